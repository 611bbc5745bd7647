#include <algorithm>

#include "ptx.cuh"

namespace hydravit::cuda {

using namespace emulator;

namespace {

uint16_t half_at(const uint8_t* bytes, int index) {
  uint16_t value;
  std::memcpy(&value, bytes + 2 * index, sizeof value);
  return value;
}

struct Matrices {
  uint32_t row;
  uint32_t* result;
};

template <bool transposed>
void execute_load_matrices(void** slots) {
  const auto slot = [&](int lane) { return static_cast<Matrices*>(slots[lane]); };
  for (int i = 0; i < 4; i++) {
    const uint8_t* rows[8];
    for (int row = 0; row < 8; row++) rows[row] = shared_at(slot(8 * i + row)->row, 16, 16);
    for (int lane = 0; lane < 32; lane++) {
      const int major = lane / 4, minor = lane % 4 * 2;
      const uint32_t low = transposed ? half_at(rows[minor], major) : half_at(rows[major], minor);
      const uint32_t high = transposed ? half_at(rows[minor + 1], major) : half_at(rows[major], minor + 1);
      slot(lane)->result[i] = high << 16 | low;
    }
  }
}

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
float half_of(uint32_t pair, int index) {
  return to_float(T{static_cast<uint16_t>(pair >> 16 * index)});
}

template <class T>
void execute_multiply_add(void** slots) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto* slot = static_cast<Product*>(slots[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 2; j++) a[group + i % 2 * 8][pair + i / 2 * 8 + j] = half_of<T>(slot->a[i], j);
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++) b[pair + i * 8 + j][group] = half_of<T>(slot->b[i], j);
  }
  for (int lane = 0; lane < 32; lane++) {
    float* c = static_cast<Product*>(slots[lane])->c;
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
      c[i] += sum;
    }
  }
}

// Reads 16 channels of row `row` of the matrix in shared memory that a descriptor without offset describes: its
// 128-byte rows form groups of 8, and bits 4 to 6 of an address are XORed with bits 7 to 9.
void read_row(uint64_t descriptor, int row, float (*value)(uint16_t), float (&result)[16]) {
  const auto field = [&](int from, int bits) {
    return static_cast<uint32_t>(descriptor >> from & ((uint64_t{1} << bits) - 1));
  };
  if (field(62, 2) != 1 || field(49, 3) != 0) fail("a matrix that is not swizzled by 128 bytes, or with an offset");
  const uint32_t start = field(0, 14) << 4, stride = field(32, 14) << 4;
  if (start % 1024 >= 128 || stride % 1024) fail("a swizzled matrix that does not begin at a multiple of 1024 bytes");
  for (uint32_t byte = 0; byte < 32; byte += 16) {
    const uint32_t address = start + row / 8 * stride + row % 8 * 128 + byte;
    const uint8_t* chunk = shared_at(address ^ (address >> 7 & 7) << 4, 16, 16);
    for (int i = 0; i < 8; i++) result[byte / 2 + i] = value(half_at(chunk, i));
  }
}

void compute(Warp& warp, const WarpgroupProduct& product) {
  const int first_row = current().number / 32 % 4 * 16;
  float a[16][16];
  for (int row = 0; row < 16; row++) read_row(product.a, first_row + row, product.value, a[row]);
  for (int column = 0; column < product.columns; column++) {
    float b[16];
    read_row(product.b, column, product.value, b);
    for (int row = 0; row < 16; row++) {
      float sum = 0;
      for (int k = 0; k < 16; k++) sum += a[row][k] * b[k];
      const int lane = row % 8 * 4 + column % 8 / 2;
      warp.sums[product.sums[lane]].values[column / 8 * 4 + row / 8 * 2 + column % 2] += sum;
    }
  }
}

void execute_warpgroup_product(void** slots) {
  Warp& warp = emulator::warp();
  WarpgroupProduct product = *static_cast<WarpgroupProduct*>(slots[0]);
  if ((current().number / 128 + 1) * 128u > current().block->threads.size()) fail("wgmma in no whole warpgroup");
  if (!warp.fenced) fail("wgmma without a wgmma.fence since the last wait");
  for (int lane = 0; lane < 32; lane++) {
    const auto& slot = *static_cast<WarpgroupProduct*>(slots[lane]);
    if (slot.a != product.a || slot.b != product.b) fail("lanes with different matrix descriptors");
    float* lane_sums = product.sums[lane] = slot.sums[0];
    Warp::Sums& sums = warp.sums[lane_sums];
    if (sums.products++ > 0) continue;
    sums.values.assign(lane_sums, lane_sums + product.columns / 2);
    std::fill_n(lane_sums, product.columns / 2, NAN);
  }
  if (settings().copies == Copies::kLate) compute(warp, product);
  warp.open.push_back(product);
  warp.products++;
}

void execute_warpgroup_fence(void**) { emulator::warp().fenced = true; }
void execute_warpgroup_commit(void**) {
  Warp& warp = emulator::warp();
  warp.groups.push_back(std::move(warp.open));
  warp.open.clear();
}
void execute_warpgroup_wait(void** slots) {
  Warp& warp = emulator::warp();
  warp.fenced = false;
  for (; warp.groups.size() > *static_cast<size_t*>(slots[0]); warp.groups.pop_front())
    for (const WarpgroupProduct& product : warp.groups.front()) {
      if (settings().copies == Copies::kAtOnce) compute(warp, product);
      for (float* lane_sums : product.sums) {
        const auto sums = warp.sums.find(lane_sums);
        if (--sums->second.products > 0) continue;
        const auto& values = sums->second.values;
        if (!std::all_of(lane_sums, lane_sums + values.size(), [](float v) { return std::isnan(v); }))
          fail("sums that were written while wgmma was under way");
        std::copy(values.begin(), values.end(), lane_sums);
        warp.sums.erase(sums);
      }
    }
}

struct Shuffle {
  float value, result;
  int lanes;
};

void execute_shuffle(void** slots) {
  for (int lane = 0; lane < 32; lane++) {
    auto* slot = static_cast<Shuffle*>(slots[lane]);
    slot->result = static_cast<Shuffle*>(slots[lane ^ slot->lanes])->value;
  }
}

void move(const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }

Barrier& barrier_at(uint32_t address) {
  shared_at(address, 8, 8);
  auto& barriers = current().block->barriers;
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("an mbarrier that was never initialised");
  return found->second;
}

void end_phase(Barrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  barrier.phase++;
  barrier.changes++;
}

void finish_copies(Barrier& barrier) {
  for (const Copy& copy : barrier.copies) {
    move(copy);
    barrier.bytes -= static_cast<int64_t>(copy.bytes);
  }
  barrier.copies.clear();
  end_phase(barrier);
}

}  // namespace

uint8_t* shared_memory() { return current().block->shared; }
uint32_t shared_address(const void* pointer) {
  if (!is_shared(pointer)) fail("a shared address of memory that is not");
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - current().block->shared);
}

uint32_t load_shared(uint32_t address) { return load<uint32_t>(shared_at(address, 4, 4)); }

float to_float(Bf16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
float to_float(Fp16 value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return value.bits & 0x8000 ? -magnitude : magnitude;
}
float to_float(E4m3 value) {
  const int exponent = value.bits >> 3 & 15, fraction = value.bits & 7;
  const float magnitude = exponent == 15 && fraction == 7 ? NAN
                          : exponent == 0                 ? std::ldexp(static_cast<float>(fraction), -9)
                                                          : std::ldexp(static_cast<float>(fraction + 8), exponent - 10);
  return value.bits & 0x80 ? -magnitude : magnitude;
}
void from_float(float value, Bf16& result) {
  const auto bits = std::bit_cast<uint32_t>(value);
  result.bits = std::isnan(value) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
void from_float(float value, Fp16& result) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) {
    result.bits = 0x7fff;
  } else if (magnitude == 0.0f) {
    result.bits = sign;
  } else if (magnitude >= 65520.0f) {
    result.bits = sign | 0x7c00;
  } else {
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    const int unit = std::max(exponent - 11, -24);  // the last place is worth 2^unit
    const auto places = static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
    // A carry out of the fraction correctly moves into the exponent.
    result.bits = static_cast<uint16_t>(sign | (unit == -24 ? places : ((unit + 24) << 10) + places));
  }
}

uint32_t multiply_fp16(uint32_t a, uint32_t b) {
  return pack<Fp16>(half_of<Fp16>(a, 0) * half_of<Fp16>(b, 0), half_of<Fp16>(a, 1) * half_of<Fp16>(b, 1));
}
uint32_t convert_e4m3(uint16_t pair) {
  return pack<Fp16>(to_float(E4m3{static_cast<uint8_t>(pair)}), to_float(E4m3{static_cast<uint8_t>(pair >> 8)}));
}

void load_matrices(uint32_t (&matrices)[4], uint32_t row) {
  Matrices slot{row, matrices};
  collective("ldmatrix", &slot, execute_load_matrices<false>);
}
void load_matrices_transposed(uint32_t (&matrices)[4], uint32_t row) {
  Matrices slot{row, matrices};
  collective("ldmatrix.trans", &slot, execute_load_matrices<true>);
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product slot{c, a, {b0, b1}};
  collective("mma", &slot, execute_multiply_add<T>);
}
template void multiply_add<Bf16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void multiply_add<Fp16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);

float shuffle_xor(float value, int lanes) {
  Shuffle slot{value, 0, lanes};
  collective("shfl", &slot, execute_shuffle);
  return slot.result;
}

void copy_async(uint32_t to, const void* from) {
  check_global(from, 16, 16);
  const Copy copy{shared_at(to, 16, 16), static_cast<const uint8_t*>(from), 16};
  if (settings().copies == Copies::kAtOnce) move(copy);
  current().open.push_back(copy);
}
void copy_async_commit() {
  current().groups.push_back(std::move(current().open));
  current().open.clear();
}
void copy_async_wait_for(size_t pending) {
  auto& groups = current().groups;
  for (; groups.size() > pending; groups.pop_front())
    if (settings().copies == Copies::kLate)
      for (const Copy& copy : groups.front()) move(copy);
}

void barrier_init(uint32_t barrier, uint32_t arrivals) {
  shared_at(barrier, 8, 8);
  current().block->barriers[barrier] = {arrivals, arrivals, 0, 0, 0, {}};
}
void barrier_expect(uint32_t address, uint32_t bytes) {
  Barrier& barrier = barrier_at(address);
  if (barrier.pending == 0) fail("too many arrivals at an mbarrier");
  barrier.pending--;
  barrier.bytes += bytes;
  end_phase(barrier);
}
void barrier_arrive(uint32_t address) { barrier_expect(address, 0); }
void barrier_wait(uint32_t address, uint32_t parity) {
  Barrier& barrier = barrier_at(address);
  if (barrier.phase % 2 == parity) finish_copies(barrier);
  while (barrier.phase % 2 == parity) {
    wait_while(&barrier.changes, barrier.changes, "mbarrier");
    finish_copies(barrier);
  }
}
void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t address) {
  if (bytes == 0 || bytes % 16) fail("a bulk copy of no multiple of 16 bytes");
  check_global(from, bytes, 16);
  Barrier& barrier = barrier_at(address);
  barrier.copies.push_back({shared_at(to, bytes, 16), static_cast<const uint8_t*>(from), bytes});
  barrier.changes++;
  if (settings().copies == Copies::kAtOnce) finish_copies(barrier);
}

void warpgroup_fence() { collective("wgmma.fence", nullptr, execute_warpgroup_fence); }
void warpgroup_commit() { collective("wgmma.commit_group", nullptr, execute_warpgroup_commit); }
void warpgroup_wait_for(size_t pending) { collective("wgmma.wait_group", &pending, execute_warpgroup_wait); }
void begin_warpgroup_product(float* sums, int columns, uint64_t a, uint64_t b, float (*value)(uint16_t)) {
  WarpgroupProduct slot{{sums}, columns, a, b, value};
  collective("wgmma", &slot, execute_warpgroup_product);
}

}  // namespace hydravit::cuda
