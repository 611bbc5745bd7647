// Packs parameters of any floating dtype into the one copy that serves every width: matrices into panels of T or E4m3,
// everything else into float. Matrices are padded with zeros to whole panels and to a multiple of 64 rows.
//
// The scale of an E4m3 row maps the largest weight of the whole row to the largest E4m3 number, so all widths have the
// same quantised weights. NaN and infinite weights become NaN and do not count for the scale: only the widths that read
// them are affected.
#include <bit>
#include <cfloat>
#include <stdexcept>
#include <string>

#include "plan.h"
#include "tile.cuh"

namespace hydravit::cuda {

namespace {

constexpr int kThreads = 256;

__device__ float load_as_float(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::kBf16) return to_float(load<Bf16>(static_cast<const Bf16*>(data) + index));
  if (dtype == Dtype::kFp16) return to_float(load<Fp16>(static_cast<const Fp16*>(data) + index));
  return load<float>(static_cast<const float*>(data) + index);
}

// ---- Kernels: unless a comment says otherwise, a thread packs one chunk or one float ----

__device__ int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

struct MatrixJob {
  Parameter from;
  int64_t rows, columns;        // of the parameter
  int64_t padded_rows, chunks;  // of the panels; `chunks` is the number in a row
  void* to;
  float* scales;  // E4m3 only
};

__device__ float weight_at(const MatrixJob& job, int64_t row, int64_t column) {
  if (row >= job.rows || column >= job.columns) return 0.0f;
  return load_as_float(job.from.data, job.from.dtype, row * job.from.row_stride + column);
}

template <class T>
__global__ void pack_matrix_kernel(const MatrixJob job) {
  const int64_t i = thread_index();
  if (i >= job.padded_rows * job.chunks) return;
  const int64_t row = i / job.chunks, column = i % job.chunks * kChunk;
  float v[kChunk];
  for (int j = 0; j < kChunk; j++) v[j] = weight_at(job, row, column + j);
  store<uint4>(static_cast<T*>(job.to) + panel_index(job.padded_rows, row, column), pack_chunk<T>(v));
}

constexpr float kLargestE4m3 = 448.0f, kSmallestNormalE4m3 = 0x1p-6f;

// Rounds to the nearest number, ties to even, as PyTorch does. Values that would round beyond the largest become NaN.
__device__ uint32_t round_to_e4m3(float value) {
  const float magnitude = fabsf(value);
  if (!(magnitude < 480.0f)) return 0x7f;
  const uint32_t sign = std::bit_cast<uint32_t>(value) >> 31 << 7;
  if (magnitude >= kSmallestNormalE4m3) {  // drops 20 bits of the fraction and turns the exponent's bias of 127 into 7
    const auto bits = std::bit_cast<uint32_t>(magnitude), odd = bits >> 20 & 1;
    return sign | (((bits + 0x7ffff + odd) >> 20) - (120 << 3));
  }
  constexpr float kSameUnit = 0x1p14f;  // its last place is the unit of the subnormals, so the addition rounds to it
  return sign | (std::bit_cast<uint32_t>(magnitude + kSameUnit) - std::bit_cast<uint32_t>(kSameUnit));
}

// One warp for each row. A scale is never subnormal, because a finite weight could then leave the range of E4m3.
__global__ void scale_rows_kernel(const MatrixJob job) {
  const int64_t row = thread_index() / 32, lane = threadIdx.x % 32;
  if (row >= job.padded_rows) return;
  float largest = 0;
  for (int64_t column = lane; column < job.columns; column += 32) {
    const float magnitude = fabsf(weight_at(job, row, column));
    if (magnitude <= FLT_MAX) largest = fmaxf(largest, magnitude);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, shuffle_xor(largest, lanes));
  if (lane == 0) store<float>(job.scales + row, fmaxf(largest / kLargestE4m3, FLT_MIN));
}

// One thread for two chunks, whose 16 bytes lie together.
__global__ void quantise_matrix_kernel(const MatrixJob job) {
  const int64_t pair = thread_index(), pairs = job.chunks / 2;
  if (pair >= job.padded_rows * pairs) return;
  const int64_t row = pair / pairs, column = pair % pairs * 2 * kChunk;
  const float scale = load<float>(job.scales + row);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const int64_t channel = column + i / 4 * 2 + i % 4 / 2 * 8 + i % 2;  // the channel of byte i: see e4m3_index
    words[i / 4] |= round_to_e4m3(weight_at(job, row, channel) / scale) << 8 * (i % 4);
  }
  const int64_t to = e4m3_index(job.padded_rows, row, column);
  store<uint4>(static_cast<uint8_t*>(job.to) + to, {words[0], words[1], words[2], words[3]});
}

struct VectorJob {
  Parameter from;
  int64_t size, padded_size;
  float absent;  // the value if the model lacks the parameter
  float* to;
};

__global__ void pack_vector_kernel(const VectorJob job) {
  const int64_t i = thread_index();
  if (i >= job.padded_size) return;
  float value = i < job.size ? job.absent : 0.0f;
  if (i < job.size && job.from.data != nullptr) value = load_as_float(job.from.data, job.from.dtype, i);
  store<float>(job.to + i, value);
}

// Packs the sum that the stem adds to every token: the class token, the register token or the bias of the patches, plus
// the position.
struct PositionsJob {
  Parameter bias, cls_token, reg_token, pos_embed;
  int64_t tokens, embed, cls_tokens, prefix_tokens, unplaced;  // the first `unplaced` tokens have no position
  float* to;
};

__global__ void pack_positions_kernel(const PositionsJob job) {
  const int64_t i = thread_index();
  if (i >= job.tokens * job.embed) return;
  const int64_t token = i / job.embed, channel = i % job.embed;
  const auto value = [&](const Parameter& from, int64_t row) {
    return from.data == nullptr ? 0.0f : load_as_float(from.data, from.dtype, row * from.row_stride + channel);
  };
  float sum = token < job.cls_tokens      ? value(job.cls_token, token)
              : token < job.prefix_tokens ? value(job.reg_token, token - job.cls_tokens)
                                          : value(job.bias, 0);
  if (token >= job.unplaced) sum += value(job.pos_embed, token - job.unplaced);
  store<float>(job.to + i, sum);
}

// ---- Launchers ----

template <class Job>
int launch(void (*kernel)(Job), const Job& job, int64_t count, void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, job);
}

}  // namespace

int pack(const Layout& layout, const std::vector<Parameter>& parameters, uint8_t* packed, void* stream) {
  const NetworkSizes& sizes = layout.sizes;
  int status = 0;
  const auto run = [&](auto kernel, const auto& job, int64_t count) {
    if (status == 0) status = launch(kernel, job, count, stream);
  };
  const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(packed + offset); };
  size_t next = 0;
  const auto pack_one = [&](const ParameterSpec& spec) -> Parameter {
    const Parameter& from = parameters.at(next);
    const Packed& to = layout.in_order[next++];
    if (from.data == nullptr && (spec.weight || !spec.optional))
      throw std::invalid_argument(spec.name.full() + ": a tensor expected, None given");
    if (!spec.weight) {
      if (to.rows > 0)
        run(pack_vector_kernel, VectorJob{from, spec.shape[0], to.columns, spec.absent, floats(to.offset)}, to.columns);
      return from;
    }
    const MatrixJob job{
        from, spec.shape[0], spec.columns(), to.rows, to.columns / kChunk, packed + to.offset, floats(to.scales)};
    const int64_t chunks = job.padded_rows * job.chunks;
    if (layout.dtype == Dtype::kBf16) run(pack_matrix_kernel<Bf16>, job, chunks);
    if (layout.dtype == Dtype::kFp16) run(pack_matrix_kernel<Fp16>, job, chunks);
    if (layout.dtype == Dtype::kE4m3) {
      run(scale_rows_kernel, job, job.padded_rows * 32);
      run(quantise_matrix_kernel, job, chunks / 2);
    }
    return from;
  };
  const auto [stem, attention, mlp, head] = read_parameters(sizes, pack_one);
  if (head.norm_weight.data == nullptr) throw std::invalid_argument("norm.weight: a tensor expected, None given");
  const PositionsJob positions{stem.bias,
                               stem.cls_token,
                               stem.reg_token,
                               stem.pos_embed,
                               sizes.tokens(),
                               sizes.embed,
                               sizes.cls_tokens,
                               sizes.prefix_tokens(),
                               sizes.pos_on_prefix() ? 0 : sizes.prefix_tokens(),
                               floats(layout.positions.offset)};
  run(pack_positions_kernel, positions, sizes.tokens() * sizes.embed);
  return status;
}

}  // namespace hydravit::cuda
