// Packs parameters of any floating dtype into the one copy that serves every width: matrices into panels of T or E4m3,
// everything else into float. Matrices are padded with zeros to whole panels and to a multiple of 64 rows.
//
// The scale of an E4m3 row maps the largest weight of the whole row to the largest E4m3 number, so all widths have the
// same quantised weights. NaN and infinite weights become NaN and do not count for the scale: only the widths that read
// them are affected.
#include <bit>
#include <cfloat>

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

struct MatrixJob {
  Parameter from;
  int rows, columns;        // of the parameter
  int padded_rows, chunks;  // of the panels; `chunks` is the number in a row
  void* to;
  float* scales;  // E4m3 only
};

__device__ float weight_at(const MatrixJob& job, int row, int column) {
  if (row >= job.rows || column >= job.columns) return 0.0f;
  return load_as_float(job.from.data, job.from.dtype, row * job.from.row_stride + column);
}

template <class T>
__global__ void pack_matrix_kernel(const MatrixJob job) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= static_cast<int64_t>(job.padded_rows) * job.chunks) return;
  const int row = static_cast<int>(i / job.chunks), column = static_cast<int>(i % job.chunks) * kChunk;
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
  const int row = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / 32), lane = threadIdx.x % 32;
  if (row >= job.padded_rows) return;
  float largest = 0;
  for (int column = lane; column < job.columns; column += 32) {
    const float magnitude = fabsf(weight_at(job, row, column));
    if (magnitude <= FLT_MAX) largest = fmaxf(largest, magnitude);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, shuffle_xor(largest, lanes));
  if (lane == 0) store<float>(job.scales + row, fmaxf(largest / kLargestE4m3, FLT_MIN));
}

// One thread for two chunks, whose 16 bytes lie together.
__global__ void quantise_matrix_kernel(const MatrixJob job) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int pairs = job.chunks / 2;
  if (pair >= static_cast<int64_t>(job.padded_rows) * pairs) return;
  const int row = static_cast<int>(pair / pairs), column = static_cast<int>(pair % pairs) * 2 * kChunk;
  const float scale = load<float>(job.scales + row);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const int channel = column + i / 4 * 2 + i % 4 / 2 * 8 + i % 2;  // the channel of byte i: see e4m3_index
    words[i / 4] |= round_to_e4m3(weight_at(job, row, channel) / scale) << 8 * (i % 4);
  }
  const int64_t to = e4m3_index(job.padded_rows, row, column);
  store<uint4>(static_cast<uint8_t*>(job.to) + to, {words[0], words[1], words[2], words[3]});
}

struct VectorJob {
  Parameter from;
  int size, padded_size;
  float absent;  // the value if the model lacks the parameter
  float* to;
};

__global__ void pack_vector_kernel(const VectorJob job) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= job.padded_size) return;
  float value = i < job.size ? job.absent : 0.0f;
  if (i < job.size && job.from.data != nullptr) value = load_as_float(job.from.data, job.from.dtype, i);
  store<float>(job.to + i, value);
}

// Packs the sum that the stem adds to every token: the class token, the register token or the bias of the patches, plus
// the position.
struct PositionsJob {
  Parameter bias, cls_token, reg_token, pos_embed;
  int tokens, embed, cls_tokens, prefix_tokens, unplaced;  // the first `unplaced` tokens have no position
  float* to;
};

__global__ void pack_positions_kernel(const PositionsJob job) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= job.tokens * job.embed) return;
  const int token = i / job.embed, channel = i % job.embed;
  const auto value = [&](const Parameter& from, int row) {
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

int pack(const Model& model, const Layout& layout, const std::vector<Parameter>& parameters, uint8_t* packed,
         void* stream) {
  int status = 0;
  const auto matrix = [&](const Parameter& from, int rows, int columns, const Packed& to) {
    if (status != 0) return;
    auto* scales = reinterpret_cast<float*>(packed + to.scales);
    const MatrixJob job{from, rows, columns, to.rows, to.columns / kChunk, packed + to.offset, scales};
    const int64_t chunks = int64_t{job.padded_rows} * job.chunks;
    if (layout.dtype != Dtype::kE4m3) {
      const auto kernel = layout.dtype == Dtype::kBf16 ? pack_matrix_kernel<Bf16> : pack_matrix_kernel<Fp16>;
      status = launch(kernel, job, chunks, stream);
      return;
    }
    status = launch(scale_rows_kernel, job, int64_t{job.padded_rows} * 32, stream);
    if (status == 0) status = launch(quantise_matrix_kernel, job, chunks / 2, stream);
  };
  const auto vector = [&](const Parameter& from, int size, float absent, const Packed& to) {
    if (status != 0) return;
    const VectorJob job{from, size, to.columns, absent, reinterpret_cast<float*>(packed + to.offset)};
    status = launch(pack_vector_kernel, job, job.padded_size, stream);
  };
  const int embed = model.embed, hidden = model.hidden;
  const Parameter* p = parameters.data();
  matrix(p[0], embed, model.patch_size(), layout.stem);
  const PositionsJob positions{p[1],
                               p[2],
                               p[3],
                               p[4],
                               model.tokens(),
                               embed,
                               model.cls_tokens,
                               model.prefix_tokens(),
                               model.pos_on_prefix ? 0 : model.prefix_tokens(),
                               reinterpret_cast<float*>(packed + layout.positions.offset)};
  if (status == 0) status = launch(pack_positions_kernel, positions, int64_t{model.tokens()} * embed, stream);
  p += 5;
  for (const Layout::Block& block : layout.blocks) {
    vector(p[0], embed, 1.0f, block.norm1_weight);
    vector(p[1], embed, 0.0f, block.norm1_bias);
    matrix(p[2], 3 * embed, embed, block.qkv);
    vector(p[3], 3 * embed, 0.0f, block.qkv_bias);
    matrix(p[4], embed, embed, block.proj);
    vector(p[5], embed, 0.0f, block.proj_bias);
    vector(p[6], embed, 1.0f, block.scale1);
    vector(p[7], embed, 1.0f, block.norm2_weight);
    vector(p[8], embed, 0.0f, block.norm2_bias);
    matrix(p[9], hidden, embed, block.fc1);
    vector(p[10], hidden, 0.0f, block.fc1_bias);
    matrix(p[11], embed, hidden, block.fc2);
    vector(p[12], embed, 0.0f, block.fc2_bias);
    vector(p[13], embed, 1.0f, block.scale2);
    p += 14;
  }
  vector(p[0], embed, 1.0f, layout.norm_weight);
  vector(p[1], embed, 0.0f, layout.norm_bias);
  matrix(p[2], model.classes, embed, layout.head);
  vector(p[3], model.classes, 0.0f, layout.head_bias);
  return status;
}

}  // namespace hydravit::cuda
