// A network as a chain of kernels, one for each phase.
//
// A kernel asks for the next one as soon as it runs: that one's blocks then fetch their first weights and wait where
// its input begins. The wait is for the whole kernel in front, which has itself waited, so all earlier phases have
// ended.
#include "attention.cuh"
#include "network.h"
#include "product.cuh"

namespace hydravit::cuda {

namespace {

// ---- Kernels ----

template <class T, Shape shape, Loader loader>
__global__ void __launch_bounds__(threads_of(shape), 2) product_kernel(const Product product) {
  uint8_t* memory = shared_memory();
  let_next_kernel_start();
  if (!is_wanted(product, blockIdx.x, size_of(shape))) return;
  Pipe<loader> pipe;
  pipe.begin(shared_address(memory));
  __syncthreads();
  product_tile<T, shape>(product, blockIdx.x, memory, pipe);
}

constexpr int kMaxAttentionThreads = 256;

template <class T, Loader loader>
__global__ void __launch_bounds__(kMaxAttentionThreads, 2) attention_kernel(const Attention attention) {
  uint8_t* memory = shared_memory();
  let_next_kernel_start();
  Pipe<loader> pipe;
  pipe.begin(shared_address(memory));
  __syncthreads();
  attention_tile<T>(attention, blockIdx.x, memory, pipe);
}

// ---- Launchers ----

template <class Argument>
int launch(void (*kernel)(Argument), const Argument& argument, const Phase& phase, Loader loader, void* stream) {
  // More than 48 KiB have to be asked for, once for each kernel and device; asking costs less than knowing.
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(phase.shared_bytes));
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(phase.blocks));
  config.blockDim = dim3(static_cast<unsigned>(phase.threads));
  config.dynamicSmemBytes = static_cast<size_t>(phase.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = loader == Loader::kBulk ? 1 : 0;
  status = cudaLaunchKernelEx(&config, kernel, argument);
  return status;
}

template <class T, Loader loader>
int launch_phase(const Phase& phase, void* stream) {
  if (phase.is_attention) return launch(attention_kernel<T, loader>, phase.attention, phase, loader, stream);
  const auto product = [&](auto kernel) { return launch(kernel, phase.product, phase, loader, stream); };
  switch (phase.shape) {
    case Shape::k16x32:
      return product(product_kernel<T, Shape::k16x32, loader>);
    case Shape::k32x32:
      return product(product_kernel<T, Shape::k32x32, loader>);
    case Shape::k64x64:
      return product(product_kernel<T, Shape::k64x64, loader>);
    default:
      return product(product_kernel<T, Shape::k128x64, loader>);
  }
}

}  // namespace

int launch(const std::vector<Phase>& phases, Dtype dtype, Loader loader, void* stream) {
  for (const Phase& phase : phases) {
    const bool bulk = loader == Loader::kBulk;
    const int status = dtype == Dtype::kBf16 ? (bulk ? launch_phase<Bf16, Loader::kBulk>(phase, stream)
                                                     : launch_phase<Bf16, Loader::kAsync>(phase, stream))
                                             : (bulk ? launch_phase<Fp16, Loader::kBulk>(phase, stream)
                                                     : launch_phase<Fp16, Loader::kAsync>(phase, stream));
    if (status != 0) return status;
  }
  return 0;
}

}  // namespace hydravit::cuda
