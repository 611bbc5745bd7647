// CUDA's execution model on one CPU thread, for tests: every thread of a block is a fiber.
//
// A warp instruction takes effect when all 32 lanes have arrived. The emulator stops with an error when the lanes of a
// warp arrive at different instructions, when some threads never reach a barrier, when nobody can go on, and at every
// access outside of shared memory or of the registered global buffers. Shared memory begins as NaN. Asynchronous copies
// and the products of warpgroups happen at the worst moment that the PTX ISA allows: see `Copies`.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace hydravit::emulator {

// The moment of an asynchronous copy. kAtOnce: a copy overwrites memory that is still in use and reads data before they
// are written. kLate: a copy happens when somebody waits for it, so a missing wait reads the old bytes. An asynchronous
// product reads shared memory at the opposite moment: late when copies are at once, which may overwrite its operands,
// and at once when copies are late and its operands may not have come. Its sums are NaN until somebody waits for it.
enum class Copies { kAtOnce, kLate };

struct Settings {
  Copies copies = Copies::kLate;
  bool early = false;            // kernels that may start early do so before the preceding kernel has begun
  bool reversed = false;         // the last blocks and warps run first
  bool warps_run_ahead = false;  // a warp runs as far as it can before the next warp runs
  int processors = 132;
  int shared_bytes = 232448;
  int capability = 90;
};
Settings& settings();

struct Launch {
  dim3 grid, threads;
  size_t shared_bytes;
  bool early;  // programmatic dependent launch
};

struct Copy {
  uint8_t* to;
  const uint8_t* from;
  size_t bytes;
};

struct Block;
struct Thread {
  dim3 index;
  Block* block;
  int number;
  uint8_t* stack;
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false;
  // The thread waits while *word == value.
  const uint32_t* word = nullptr;
  uint32_t value = 0;
  const char* waits_for = "";
  std::vector<Copy> open;  // copies that are not yet committed to a group
  std::deque<std::vector<Copy>> groups;
};

struct WarpgroupProduct {  // the part of one warp: 16 of the 64 rows
  float* sums[32];         // one pointer for each lane
  int columns;
  uint64_t a, b;  // descriptors
  float (*value)(uint16_t);
};

struct Warp {
  uint32_t arrived = 0, generation = 0;
  const char* instruction = nullptr;
  void* slots[32];
  // The warpgroup products that are under way, in groups, and those that are not yet committed to a group.
  std::deque<std::vector<WarpgroupProduct>> groups;
  std::vector<WarpgroupProduct> open;
  // The true values of a lane's sums, and the number of products under way that add to them; the lane sees NaN
  // meanwhile.
  struct Sums {
    std::vector<float> values;
    int products = 0;
  };
  std::map<float*, Sums> sums;
  bool fenced = false;  // whether a fence followed the last wait
  int products = 0;     // that the warp has begun
};

struct Barrier {  // an mbarrier
  uint32_t arrivals, pending, phase = 0;
  uint32_t changes = 0;  // counts ended phases and added copies
  int64_t bytes = 0;
  std::vector<Copy> copies;
};

struct Grid;
struct Block {
  Grid* grid;
  dim3 index, threads_of, grid_of;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<uint8_t> memory;  // the shared memory, followed by a canary
  uint8_t* shared = nullptr;
  size_t shared_bytes = 0;
  uint32_t arrived = 0, generation = 0;
  const char* barrier = nullptr;
  std::map<uint32_t, Barrier> barriers;

  ~Block();
};

Thread& current();
Warp& warp();
void launch(const Launch& launch, std::function<void()> body);
void synchronize();  // runs the kernels that launch has held back

// Suspends the running thread until *word is no longer `value`.
void wait_while(const uint32_t* word, uint32_t value, const char* what);
void block_barrier();
void wait_for_previous();
[[noreturn]] void fail(const std::string& what);

// Runs `execute` once, in the last lane that arrives; slots[lane] is the slot that the lane passed.
void collective(const char* instruction, void* slot, void (*execute)(void** slots));

// Allocates memory that kernels may access, with NaN around it. Without such memory, no access is checked.
void* allocate(size_t bytes);
void release_all();
void check_global(const void* pointer, size_t bytes, size_t alignment);
bool is_shared(const void* pointer);
uint8_t* shared_at(uint32_t address, size_t bytes, size_t alignment);

}  // namespace hydravit::emulator
