// A network as a chain of kernels, one for each phase.
//
// A kernel lets the next kernel start as soon as it runs itself. Blocks of the next kernel fetch their first weights
// and then wait for this kernel to end. This kernel waited in the same way, so all earlier phases have ended too.
#include "attention.cuh"
#include "plan.h"
#include "product.cuh"
#include "warpgroup.cuh"

namespace hydravit::cuda {

namespace {

// ---- Kernels ----

template <class W, TileShape shape, Loader loader>
__global__ void __launch_bounds__(threads_of(shape), 2) product_kernel(const Product product) {
  if constexpr (can_run(loader)) {
    uint8_t* memory = shared_memory();
    let_next_kernel_start();
    if (!is_needed(product, blockIdx.x, size_of(shape))) return;
    Pipe<loader> pipe;
    pipe.begin(shared_address(memory));
    __syncthreads();
    product_tile<W, shape>(product, blockIdx.x, memory, pipe);
  }
}

template <class T>
__global__ void __launch_bounds__(threads_of(TileShape::k128x128), 1) warpgroup_kernel(const Product product) {
  if constexpr (kHasWarpgroups) {
    let_next_kernel_start();
    warpgroup_tiles<T>(product, shared_memory());
  } else {
    __trap();  // describe_device offers wgmma only where the library has kernels for sm_90a
  }
}

template <class T>
__global__ void __launch_bounds__(kPrologueThreads, 2) prologue_kernel(const Product product) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int first_row = blockIdx.x * kPrologueRows;
  T* panels = static_cast<T*>(product.c) + static_cast<int64_t>(first_row) * kPanelChannels;
  run_prologue<T, kPrologueRows>(product, first_row, reinterpret_cast<uint8_t*>(panels),
                                 product.c_stride * static_cast<int64_t>(sizeof(T)));
}

constexpr int kMaxAttentionThreads = 256;

template <class T, Loader loader>
__global__ void __launch_bounds__(kMaxAttentionThreads, 2) attention_kernel(const Attention attention) {
  if constexpr (can_run(loader)) {
    uint8_t* memory = shared_memory();
    let_next_kernel_start();
    Pipe<loader> pipe;
    pipe.begin(shared_address(memory));
    __syncthreads();
    attention_tile<T>(attention, blockIdx.x, memory, pipe);
  }
}

// ---- Launchers ----

template <class W, Loader loader, class Visit>
int visit_kernel(const Phase& phase, const Visit& visit) {
  if (phase.kind == Kind::kAttention) return visit(attention_kernel<Activation<W>, loader>, phase.attention);
  if (phase.kind == Kind::kPrologue) return visit(prologue_kernel<Activation<W>>, phase.product);
  switch (phase.shape) {
    case TileShape::k16x32:
      return visit(product_kernel<W, TileShape::k16x32, loader>, phase.product);
    case TileShape::k32x32:
      return visit(product_kernel<W, TileShape::k32x32, loader>, phase.product);
    case TileShape::k32x64:
      return visit(product_kernel<W, TileShape::k32x64, loader>, phase.product);
    case TileShape::k32x128:
      return visit(product_kernel<W, TileShape::k32x128, loader>, phase.product);
    case TileShape::k128x64:
      return visit(product_kernel<W, TileShape::k128x64, loader>, phase.product);
    default:
      return visit(warpgroup_kernel<Activation<W>>, phase.product);
  }
}

template <class W, class Visit>
int visit_kernel(const Phase& phase, Loader loader, const Visit& visit) {
  return loader == Loader::kBulk ? visit_kernel<W, Loader::kBulk>(phase, visit)
                                 : visit_kernel<W, Loader::kAsync>(phase, visit);
}

// Calls visit(kernel, argument) with the kernel that computes the phase.
template <class Visit>
int visit_kernel(const Phase& phase, Dtype dtype, Loader loader, const Visit& visit) {
  switch (dtype) {
    case Dtype::kBf16:
      return visit_kernel<Bf16>(phase, loader, visit);
    case Dtype::kFp16:
      return visit_kernel<Fp16>(phase, loader, visit);
    default:
      return visit_kernel<E4m3>(phase, loader, visit);
  }
}

}  // namespace

int prepare(Dtype dtype, const Device& device) {
  int status = 0;
  const auto allow = [&](auto kernel, const auto&) {
    const auto set = [&](cudaFuncAttribute attribute, int value) {
      if (status == 0) status = cudaFuncSetAttribute(kernel, attribute, value);
    };
    set(cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
    // An SM changes the division of its memory only while it is idle, so kernels with different divisions would not
    // overlap: all get the largest share.
    set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    return status;
  };
  Phase phase{};
  for (const TileShape shape : kTileShapes) {
    phase.shape = shape;
    visit_kernel(phase, dtype, device.loader, allow);
  }
  for (const Kind kind : {Kind::kPrologue, Kind::kAttention}) {
    phase.kind = kind;
    visit_kernel(phase, dtype, device.loader, allow);
  }
  return status;
}

int launch(const Phase& phase, Dtype dtype, Loader loader, void* stream) {
  return visit_kernel(phase, dtype, loader, [&](auto kernel, const auto& argument) -> int {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(phase.blocks));
    config.blockDim = dim3(static_cast<unsigned>(phase.threads));
    config.dynamicSmemBytes = static_cast<size_t>(phase.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &early;
    config.numAttrs = phase.starts_early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, argument);
  });
}

const void* kernel_of(const Phase& phase, Dtype dtype, Loader loader) {
  const void* found = nullptr;
  visit_kernel(phase, dtype, loader, [&](auto kernel, const auto&) {
    found = reinterpret_cast<const void*>(kernel);
    return 0;
  });
  return found;
}

}  // namespace hydravit::cuda
