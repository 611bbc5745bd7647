#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

namespace hydravit::emulator {

namespace {

constexpr size_t kStack = 64 * 1024, kCanary = 4096;
constexpr uint8_t kNan = 0xff;  // every float and half whose bytes are these is NaN

}  // namespace

struct Grid {
  Launch how;
  std::function<void()> body;
  std::vector<std::unique_ptr<Block>> blocks;
  uint32_t released = 0;  // 1 when the preceding kernel has ended
};

namespace {

Thread* running = nullptr;
jmp_buf scheduler;
std::unique_ptr<Grid> pending;
std::vector<uint8_t*> unused_stacks;  // each of kStack bytes

void enter() {
  Thread& thread = *running;
  thread.block->grid->body();
  for (const auto& group : thread.groups)
    if (!group.empty()) fail("a thread ends while its copies are under way");
  if (!thread.open.empty()) fail("a thread ends before its copies are committed");
  thread.done = true;
  _longjmp(scheduler, 1);
}

void resume(Thread& thread) {
  running = &thread;
  if (_setjmp(scheduler) == 0) {
    if (thread.started) _longjmp(thread.state, 1);
    thread.started = true;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack;
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, enter, 0);
    setcontext(&thread.start);
  }
  running = nullptr;
}

uint8_t* take_stack() {
  if (unused_stacks.empty()) {
    constexpr int kMany = 256;
    void* memory = mmap(nullptr, kMany * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    for (int i = kMany; i-- > 0;) unused_stacks.push_back(static_cast<uint8_t*>(memory) + i * kStack);
  }
  uint8_t* stack = unused_stacks.back();
  unused_stacks.pop_back();
  return stack;
}

std::unique_ptr<Block> make_block(Grid& grid, unsigned index) {
  auto block = std::make_unique<Block>();
  const unsigned count = grid.how.threads.x;
  if (count % 32) fail("blocks of whole warps only");
  block->grid = &grid;
  block->index = dim3(index, 0, 0);
  block->threads_of = grid.how.threads;
  block->grid_of = grid.how.grid;
  block->shared_bytes = grid.how.shared_bytes;
  if (block->shared_bytes > static_cast<size_t>(settings().shared_bytes)) fail("more shared memory than a block has");
  block->memory.assign(block->shared_bytes + 1024 + kCanary, kNan);
  block->shared = block->memory.data() + (1024 - reinterpret_cast<uintptr_t>(block->memory.data()) % 1024);
  block->warps.resize(count / 32);
  block->threads.resize(count);
  for (unsigned i = 0; i < count; i++) {
    block->threads[i].index = dim3(i, 0, 0);
    block->threads[i].block = block.get();
    block->threads[i].number = static_cast<int>(i);
    block->threads[i].stack = take_stack();
  }
  return block;
}

bool is_done(const Block& block) {
  return std::all_of(block.threads.begin(), block.threads.end(), [](const Thread& thread) { return thread.done; });
}

std::vector<unsigned> order_of(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (settings().reversed) std::reverse(order.begin(), order.end());
  return order;
}

// Runs the threads of a warp that can go on; returns whether one could.
bool advance(Block& block, size_t warp) {
  bool any = false;
  for (size_t i = 32 * warp; i < 32 * (warp + 1); i++) {
    Thread& thread = block.threads[i];
    if (thread.done || (thread.word != nullptr && *thread.word == thread.value)) continue;
    thread.word = nullptr;
    resume(thread);
    any = true;
  }
  return any;
}

// Runs all warps in turn, or each as far as it can before the next: a GPU may do either, and everything between.
bool advance(Block& block) {
  bool any = false;
  for (const unsigned warp : order_of(static_cast<unsigned>(block.warps.size())))
    while (advance(block, warp)) {
      any = true;
      if (!settings().warps_run_ahead) break;
    }
  return any;
}

void finish(Block& block) {
  for (const auto& [address, barrier] : block.barriers)
    if (!barrier.copies.empty()) fail("a block ends while bulk copies are under way");
  for (size_t i = 0; i < block.warps.size(); i++) {
    const Warp& warp = block.warps[i];
    if (!warp.groups.empty() || !warp.open.empty()) fail("a block ends while products of a warpgroup are under way");
    if (warp.products != block.warps[i / 4 * 4].products)
      fail("not all warps of a warpgroup took part in its products");
  }
  const uint8_t* end = block.shared + block.shared_bytes;
  for (const uint8_t* byte = end; byte < block.memory.data() + block.memory.size(); byte++)
    if (*byte != kNan) fail("shared memory was written behind its end");
}

void fail_stuck(const Block& block) {
  std::string what = "nobody can go on; waiting for";
  std::map<std::string, int> counts;
  for (const Thread& thread : block.threads) counts[thread.done ? "nothing (ended)" : thread.waits_for]++;
  for (const auto& [name, count] : counts) what += " " + name + ": " + std::to_string(count) + " threads;";
  fail(what);
}

void make_all(Grid& grid) {
  for (unsigned i : order_of(grid.how.grid.x)) grid.blocks.push_back(make_block(grid, i));
}

// Runs all blocks concurrently until all have ended. Before the grid is released, it stops when none can go on.
void run_together(Grid& grid) {
  for (bool any = true; any;) {
    any = false;
    for (auto& block : grid.blocks) {
      if (!block) continue;
      while (advance(*block)) any = true;
      if (is_done(*block)) {
        finish(*block);
        block.reset();
      }
    }
  }
  if (grid.released)
    for (const auto& block : grid.blocks)
      if (block) fail_stuck(*block);
}

void run_one_by_one(Grid& grid) {
  for (unsigned i : order_of(grid.how.grid.x)) {
    const auto block = make_block(grid, i);
    while (advance(*block)) {
    }
    if (!is_done(*block)) fail_stuck(*block);
    finish(*block);
  }
}

void flush() {
  if (!pending) return;
  pending->released = 1;
  run_together(*pending);
  pending.reset();
}

struct Buffer {
  std::vector<uint8_t> memory;
  uint8_t* begin;
  size_t bytes;
};
std::map<const uint8_t*, Buffer> buffers;

}  // namespace

Settings& settings() {
  static Settings values;
  return values;
}

Thread& current() { return *running; }
Warp& warp() { return running->block->warps[running->number / 32]; }

Block::~Block() {
  for (const Thread& thread : threads) unused_stacks.push_back(thread.stack);
}

void launch(const Launch& how, std::function<void()> body) {
  if (how.grid.x == 0 || how.threads.x == 0 || how.threads.x > 1024) fail("a launch of no or too many threads");
  auto grid = std::make_unique<Grid>();
  grid->how = how;
  grid->body = std::move(body);
  if (how.early && settings().early) {
    make_all(*grid);
    run_together(*grid);  // as far as the kernel gets before the preceding one has run
    flush();
    pending = std::move(grid);
    return;
  }
  flush();
  grid->released = 1;
  run_one_by_one(*grid);
}

void synchronize() { flush(); }

void wait_while(const uint32_t* word, uint32_t value, const char* what) {
  Thread& thread = *running;
  while (*word == value) {
    thread.word = word;
    thread.value = value;
    thread.waits_for = what;
    if (_setjmp(thread.state) == 0) _longjmp(scheduler, 1);
  }
}

void block_barrier() {
  Block& block = *running->block;
  const uint32_t generation = block.generation;
  if (++block.arrived == block.threads.size()) {
    block.arrived = 0;
    block.generation++;
  }
  wait_while(&block.generation, generation, "__syncthreads");
}

void wait_for_previous() { wait_while(&running->block->grid->released, 0, "the preceding kernel"); }

void collective(const char* instruction, void* slot, void (*execute)(void** slots)) {
  Warp& warp = emulator::warp();
  const uint32_t generation = warp.generation;
  if (warp.arrived == 0) warp.instruction = instruction;
  if (warp.instruction != instruction)
    fail(std::string("lanes of one warp at ") + warp.instruction + " and " + instruction);
  warp.slots[running->number % 32] = slot;
  if (++warp.arrived == 32) {
    execute(warp.slots);
    warp.arrived = 0;
    warp.generation++;
  }
  wait_while(&warp.generation, generation, instruction);
}

void fail(const std::string& what) {
  std::printf("FAILED in the emulator: %s", what.c_str());
  if (running != nullptr) std::printf(" (block %u, thread %d)", running->block->index.x, running->number);
  std::printf("\n");
  std::fflush(stdout);
  std::abort();
}

void* allocate(size_t bytes) {
  Buffer buffer;
  buffer.memory.assign(bytes + 2 * kCanary, kNan);
  buffer.begin = buffer.memory.data() + kCanary - reinterpret_cast<uintptr_t>(buffer.memory.data()) % 256;
  buffer.bytes = bytes;
  uint8_t* begin = buffer.begin;
  buffers.emplace(begin, std::move(buffer));
  return begin;
}

void release_all() {
  synchronize();
  for (const auto& [begin, buffer] : buffers)
    for (size_t i = 0; i < buffer.memory.size(); i++) {
      const uint8_t* byte = buffer.memory.data() + i;
      if ((byte < begin || byte >= begin + buffer.bytes) && *byte != kNan) fail("a write outside of a global buffer");
    }
  buffers.clear();
}

void check_global(const void* pointer, size_t bytes, size_t alignment) {
  const auto* p = static_cast<const uint8_t*>(pointer);
  if (reinterpret_cast<uintptr_t>(p) % alignment) fail("a misaligned access to global memory");
  if (buffers.empty()) return;
  auto after = buffers.upper_bound(p);
  if (after == buffers.begin()) fail("an access to global memory in front of every buffer");
  const auto& [begin, buffer] = *--after;
  if (p + bytes > begin + buffer.bytes) fail("an access to global memory outside of every buffer");
}

bool is_shared(const void* pointer) {
  const auto* p = static_cast<const uint8_t*>(pointer);
  const Block& block = *running->block;
  if (p < block.memory.data() || p >= block.memory.data() + block.memory.size()) return false;
  if (p < block.shared || p >= block.shared + block.shared_bytes) fail("an access outside of shared memory");
  return true;
}

uint8_t* shared_at(uint32_t address, size_t bytes, size_t alignment) {
  const Block& block = *running->block;
  if (address % alignment) fail("a misaligned access to shared memory");
  if (address + bytes > block.shared_bytes) fail("an access behind the end of shared memory");
  return block.shared + address;
}

}  // namespace hydravit::emulator
