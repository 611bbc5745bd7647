// CUDA's execution model on one CPU thread, for tests: every thread of a block is a fiber.
//
// Warp instructions take effect when all 32 lanes have arrived; different instructions meeting in one warp, a barrier
// that some threads never reach, and waiting without end are errors, as is every access outside of shared memory or of
// the registered global buffers. Shared memory begins as NaN. Asynchronous copies are moved at the worst moment that
// the PTX ISA allows, and so are the products of warpgroups: see `Copies`.
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

// When an asynchronous copy happens: at once, so that memory still in use is overwritten and data not yet written are
// read; or not before somebody waits for it, so that a missing wait reads what was there before. An asynchronous
// product reads shared memory at the other end: late, while copies at once overwrite what is still in use; at once,
// while late copies are not there yet. Until it is waited for, its sums are NaN.
enum class Copies { kAtOnce, kLate };

struct Settings {
  Copies copies = Copies::kLate;
  bool early = false;            // kernels that may start early do so before the kernel in front of them has begun
  bool reversed = false;         // the last blocks and warps come first
  bool warps_run_ahead = false;  // each as far as it gets before the next
  int processors = 132;          // of the device
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
  // Not runnable while *word == value.
  const uint32_t* word = nullptr;
  uint32_t value = 0;
  const char* waits_for = "";
  std::vector<Copy> open;  // of the group not yet committed
  std::deque<std::vector<Copy>> groups;
};

struct WarpgroupProduct {  // of one warp: its 16 of the 64 rows
  float* sums[32];         // of each lane
  int columns;
  uint64_t a, b;  // descriptors
  float (*value)(uint16_t);
};

struct Warp {
  uint32_t arrived = 0, generation = 0;
  const char* instruction = nullptr;
  void* slots[32];
  // Warpgroup products under way, by groups, and those not yet committed.
  std::deque<std::vector<WarpgroupProduct>> groups;
  std::vector<WarpgroupProduct> open;
  // What a lane's sums have become, and by how many products under way; the lane's own are NaN meanwhile.
  struct Sums {
    std::vector<float> values;
    int products = 0;
  };
  std::map<float*, Sums> sums;
  bool fenced = false;  // since the last wait
  int products = 0;     // so far
};

struct Barrier {  // an mbarrier
  uint32_t arrivals, pending, phase = 0;
  uint32_t changes = 0;  // phases that ended and copies that were added
  int64_t bytes = 0;
  std::vector<Copy> copies;
};

struct Grid;
struct Block {
  Grid* grid;
  dim3 index, threads_of, grid_of;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<uint8_t> memory;  // the shared memory, then a canary
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
void synchronize();  // runs what is still pending; launches are otherwise free to be held back

// The running thread stops until *word is no longer `value`.
void wait_while(const uint32_t* word, uint32_t value, const char* what);
void block_barrier();
void wait_for_previous();
[[noreturn]] void fail(const std::string& what);

// `execute` runs once, in the last lane to arrive; slots[lane] is what that lane passed.
void collective(const char* instruction, void* slot, void (*execute)(void** slots));

// Memory that kernels may touch, with NaN around it; where nobody allocates here, accesses cannot be checked.
void* allocate(size_t bytes);
void release_all();
void check_global(const void* pointer, size_t bytes, size_t alignment);
bool is_shared(const void* pointer);
uint8_t* shared_at(uint32_t address, size_t bytes, size_t alignment);

}  // namespace hydravit::emulator
