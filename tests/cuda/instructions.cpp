// Tests the emulator itself: 16-bit floats, the lanes of warp instructions, and the mistakes that it has to find.
#include <sys/wait.h>
#include <unistd.h>

#include <bit>
#include <cstdio>
#include <vector>

#include "check.h"
#include "ptx.cuh"

namespace hydravit::cuda::tests {

namespace {

using emulator::Copies;

template <class T>
void test_halves(const char* name, uint16_t infinity, uint16_t one) {
  begin(std::string("conversions of ") + name);
  for (int bits = 0; bits < 0x10000; bits++) {
    const T half{static_cast<uint16_t>(bits)};
    T again;
    from_float(to_float(half), again);
    if ((bits & 0x7fff) > infinity)
      expect(std::isnan(to_float(again)), "NaN stays NaN");
    else
      expect(again.bits == bits, "a value is its own nearest: " + std::to_string(bits));
    if ((bits & 0x7fff) >= infinity - 1) continue;
    // Halfway between two neighbours a value rounds to the even one, otherwise to the nearer one.
    const T next{static_cast<uint16_t>(bits + 1)};
    const float middle = to_float(half) / 2 + to_float(next) / 2;
    from_float(middle, again);
    expect(again.bits == (bits % 2 == 0 ? bits : bits + 1), "halfway goes to the even one: " + std::to_string(bits));
    from_float(std::nextafter(middle, to_float(next)), again);
    expect(again.bits == bits + 1, "beyond halfway: " + std::to_string(bits));
  }
  expect(to_float(T{one}) == 1.0f && to_float(T{infinity}) == INFINITY, "one and infinity");
  expect(pack<T>(1.0f, 0.0f) == one, "the first of two is in the low half");
}

// Runs a kernel with one block.
template <class Body>
void run(unsigned threads, size_t shared_bytes, const Body& body) {
  emulator::launch({dim3(1), dim3(threads), shared_bytes, false}, body);
  emulator::synchronize();
}

void test_matrices() {
  begin("ldmatrix and mma");
  float a[16][16], b[8][16], sums[16][8];
  uint32_t plain[32][4], transposed[32][4];
  run(32, 768, [&] {
    uint8_t* memory = shared_memory();
    const int lane = threadIdx.x;
    if (lane == 0)
      for (int i = 0; i < 24 * 16; i++) {
        const float value = static_cast<float>(i * 37 % 23 - 11);
        (i < 256 ? a[i / 16][i % 16] : b[i / 16 - 16][i % 16]) = value;
        Bf16 half;
        from_float(value, half);
        store(memory + 2 * i, half);
      }
    __syncthreads();
    load_matrices(plain[lane], shared_address(memory + lane % 16 * 32 + lane / 16 * 16));
    load_matrices_transposed(transposed[lane], shared_address(memory + lane % 16 * 32 + lane / 16 * 16));
    uint32_t of_b[4];
    load_matrices(of_b, shared_address(memory + 512 + lane % 8 * 32 + lane / 8 % 2 * 16));
    float c[4] = {1, 1, 1, 1};
    multiply_add<Bf16>(c, plain[lane], of_b[0], of_b[1]);
    for (int i = 0; i < 4; i++) sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = c[i];
  });
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) {
      float right = 1;
      for (int k = 0; k < 16; k++) right += a[i][k] * b[j][k];
      expect(sums[i][j] == right, "the product");
    }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {  // matrix i begins at row i % 2 * 8 and column i / 2 * 8
      const int row = i % 2 * 8, column = i / 2 * 8, major = lane / 4, minor = lane % 4 * 2;
      expect(plain[lane][i] == pack<Bf16>(a[row + major][column + minor], a[row + major][column + minor + 1]),
             "a matrix");
      expect(transposed[lane][i] == pack<Bf16>(a[row + minor][column + major], a[row + minor + 1][column + major]),
             "a transposed matrix");
    }
}

// A read before the wait finds old or new bytes, depending on the setting; a read after it finds the new ones.
void test_copies() {
  auto* from = static_cast<float*>(emulator::allocate(16));
  std::fill_n(from, 4, 5.0f);
  for (const Copies copies : {Copies::kAtOnce, Copies::kLate})
    for (const bool bulk : {false, true}) {
      begin("asynchronous copies");
      emulator::settings().copies = copies;
      float before = 0, after = 0;
      run(32, 64, [&] {
        uint8_t* memory = shared_memory();
        const uint32_t to = shared_address(memory), barrier = shared_address(memory + 32);
        if (threadIdx.x > 0) return;
        if (bulk) {
          barrier_init(barrier, 1);
          barrier_expect(barrier, 16);
          copy_bulk(to, from, 16, barrier);
        } else {
          copy_async(to, from);
          copy_async_commit();
        }
        before = load<float>(memory);
        if (bulk)
          barrier_wait(barrier, 0);
        else
          copy_async_wait<0>();
        after = load<float>(memory);
      });
      expect(copies == Copies::kAtOnce ? before == 5.0f : std::isnan(before), "before the wait");
      expect(after == 5.0f, "behind the wait");
    }
  emulator::settings() = {};
  emulator::release_all();
}

// A warpgroup multiplies the channels 16 to 47 of swizzled rows in two products; the sums are valid after the waits.
void test_warpgroups() {
  for (const Copies copies : {Copies::kAtOnce, Copies::kLate}) {
    begin("wgmma");
    emulator::settings().copies = copies;
    constexpr int kColumns = 128;
    const auto a = [](int row, int channel) { return static_cast<float>((row * 7 + channel * 5) % 13 - 6); };
    const auto b = [](int column, int channel) { return static_cast<float>((column * 3 + channel) % 11 - 5); };
    float first[128][kColumns / 2], second[128][kColumns / 2];
    bool hidden = true;
    run(128, 64 * 128 + kColumns * 128, [&] {
      uint8_t* memory = shared_memory();
      for (int i = threadIdx.x; i < (64 + kColumns) * 64; i += 128) {
        const int row = i / 64, channel = i % 64;
        Bf16 half;
        from_float(row < 64 ? a(row, channel) : b(row - 64, channel), half);
        store(memory + row * 128 + (channel / 8 ^ row % 8) * 16 + channel % 8 * 2, half);
      }
      __syncthreads();
      float (&sums)[kColumns / 2] = first[threadIdx.x], (&others)[kColumns / 2] = second[threadIdx.x];
      std::fill_n(sums, kColumns / 2, 1.0f);
      std::fill_n(others, kColumns / 2, 2.0f);
      const uint64_t a_matrix = matrix_descriptor(shared_address(memory)) + 2;
      const uint64_t b_matrix = matrix_descriptor(shared_address(memory + 64 * 128)) + 2;
      warpgroup_fence();
      warpgroup_multiply_add<Bf16>(sums, a_matrix, b_matrix);
      warpgroup_commit();
      warpgroup_multiply_add<Bf16>(others, a_matrix + 2, b_matrix + 2);
      warpgroup_commit();
      hidden &= std::isnan(sums[0]) && std::isnan(others[63]);
      warpgroup_wait<1>();
      hidden &= !std::isnan(sums[0]) && std::isnan(others[63]);
      warpgroup_wait<0>();
    });
    expect(hidden, "sums are there when they were waited for");
    for (int row = 0; row < 64; row++)
      for (int column = 0; column < kColumns; column++) {
        const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
        const int i = column / 8 * 4 + row / 8 % 2 * 2 + column % 2;
        float right[2] = {1, 2};
        for (int k = 0; k < 32; k++) right[k / 16] += a(row, 16 + k) * b(column, 16 + k);
        expect(first[thread][i] == right[0] && second[thread][i] == right[1], "the product");
      }
  }
  emulator::settings() = {};
}

// Expects the emulator to stop at a mistake.
template <class Body>
void expect_stop(const char* what, const Body& body) {
  begin(std::string("a mistake: ") + what);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (freopen("/dev/null", "w", stdout) == nullptr) _exit(0);
    run(128, 32768, body);
    emulator::synchronize();
    emulator::release_all();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  expect(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, "is found");
}

void test_mistakes() {
  auto* global = static_cast<uint8_t*>(emulator::allocate(64));
  expect_stop("a barrier that some threads never reach", [] {
    if (threadIdx.x < 40) __syncthreads();
  });
  expect_stop("different instructions in one warp", [] {
    uint32_t m[4];
    if (threadIdx.x % 2)
      load_matrices(m, 0);
    else
      shuffle_xor(1.0f, 1);
  });
  expect_stop("reading behind shared memory", [] { load<float>(shared_memory() + 32768); });
  expect_stop("matrices behind shared memory", [] {
    uint32_t m[4];
    load_matrices(m, 32768);
  });
  expect_stop("reading behind a global buffer", [=] { load<float>(global + 64); });
  expect_stop("misaligned reading", [=] { load<uint4>(global + 8); });
  expect_stop("writing in front of a global buffer without asking", [=] { global[-1] = 0; });
  expect_stop("copying behind a global buffer", [=] { copy_async(0, global + 64); });
  expect_stop("ending before copies have", [=] {
    copy_async(0, global);
    copy_async_commit();
  });
  expect_stop("a barrier that was not initialised", [] { barrier_wait(0, 0); });
  expect_stop("bytes that never come", [] {
    if (threadIdx.x == 0) barrier_init(0, 1), barrier_expect(0, 16);
    __syncthreads();
    barrier_wait(0, 0);
  });
  // Multiplies matrices from an address on; without the fence or the wait, or over sums that change meanwhile.
  enum class Mistake { kNone, kFence, kWait, kSums };
  const auto multiply = [](Mistake mistake, uint32_t address) {
    float sums[64] = {};
    if (mistake != Mistake::kFence) warpgroup_fence();
    warpgroup_multiply_add<Bf16>(sums, matrix_descriptor(address), matrix_descriptor(address));
    warpgroup_commit();
    if (mistake == Mistake::kSums) sums[0] = 0;
    if (mistake != Mistake::kWait) warpgroup_wait<0>();
  };
  expect_stop("wgmma without a fence", [=] { multiply(Mistake::kFence, 0); });
  expect_stop("ending before wgmma has", [=] { multiply(Mistake::kWait, 0); });
  expect_stop("writing sums that wgmma adds to", [=] { multiply(Mistake::kSums, 0); });
  expect_stop("wgmma by three warps", [=] {
    if (threadIdx.x < 96) multiply(Mistake::kNone, 0);
  });
  expect_stop("a swizzled matrix between two multiples of 1024 bytes", [=] { multiply(Mistake::kNone, 512); });
  expect_stop("a matrix behind shared memory", [=] { multiply(Mistake::kNone, 32768 - 4096); });
  emulator::release_all();
}

}  // namespace

void test_instructions() {
  test_halves<Bf16>("bf16", 0x7f80, 0x3f80);
  test_halves<Fp16>("fp16", 0x7c00, 0x3c00);
  test_matrices();
  test_copies();
  test_warpgroups();
  test_mistakes();
}

}  // namespace hydravit::cuda::tests
