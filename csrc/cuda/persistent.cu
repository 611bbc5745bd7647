// A network as one kernel: see schedule.h. The tiles are those of the chain of kernels; between them are counters in
// global memory instead of kernels' ends.
//
// Memory of other blocks is read by bulk copies and by ordinary loads. Hence, before a tile is counted, all its threads
// make their stores visible to bulk copies and meet; and after a count was seen, all threads meet and the copies begin.
#include "attention.cuh"
#include "product.cuh"
#include "schedule.h"

namespace hydravit::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kStepAt = 64;  // in shared memory: behind the barriers, in front of the tiles
static_assert(8 * kMostStages <= kStepAt && kStepAt + sizeof(Step) <= kBarrierBytes);

struct Counters {
  uint32_t* memory;
  uint32_t calls;  // before this one: counters go on counting

  __device__ uint32_t* group(const Step& step, int group) const { return memory + step.counter + group; }
  __device__ uint32_t target(const Step& step) const { return (calls + 1) * static_cast<uint32_t>(step.expected); }
};

// ---- The kernel ----

template <class W, Loader loader, class Wait>
__device__ void step_tile(const Step& step, int tile, uint8_t* memory, Pipe<loader>& pipe, const Wait& wait) {
  if (step.is_attention)
    attention_tile<Activation<W>>(step.attention, tile, memory, pipe, wait);
  else if (!is_wanted(step.product, tile, size_of(step.shape)))
    return;
  else if (step.shape == Shape::k32x32)
    product_tile<W, Shape::k32x32>(step.product, tile, memory, pipe, wait);
  else if (step.shape == Shape::k32x64)
    product_tile<W, Shape::k32x64>(step.product, tile, memory, pipe, wait);
  else if (step.shape == Shape::k32x128)
    product_tile<W, Shape::k32x128>(step.product, tile, memory, pipe, wait);
  else
    product_tile<W, Shape::k128x64>(step.product, tile, memory, pipe, wait);
}

template <class W, Loader loader>
__global__ void __launch_bounds__(kThreads, 1)
    network_kernel(const Step* steps, int step_count, uint32_t* counter_memory, const Ends ends) {
  if constexpr (can_run(loader)) {
    uint8_t* memory = shared_memory();
    Step& step = *reinterpret_cast<Step*>(memory + kStepAt);
    Pipe<loader> pipe;
    pipe.begin(shared_address(memory));
    const Counters counters{counter_memory, load<uint32_t>(counter_memory)};
    const int blocks = gridDim.x;
    for (int i = 0; i < step_count; i++) {
      __syncthreads();
      for (int word = threadIdx.x; word < static_cast<int>(sizeof(Step) / 4); word += kThreads)
        store<uint32_t>(memory + kStepAt + 4 * word,
                        load<uint32_t>(reinterpret_cast<const uint8_t*>(steps + i) + 4 * word));
      __syncthreads();
      if (threadIdx.x == 0) {
        if (i == 0) step.product.a = ends.pixels, step.product.image_dtype = ends.pixel_dtype;
        if (i == step_count - 1) step.product.c = ends.logits;
      }
      __syncthreads();
      const Step* input = step.input < 0 ? nullptr : steps + step.input;
      for (int tile = (static_cast<int>(blockIdx.x) - step.first_block + blocks) % blocks; tile < step.tiles;
           tile += blocks) {
        step_tile<W>(step, tile, memory, pipe, [&] {
          if (input == nullptr) return;
          const Range groups = groups_read(step, *input, tile);
          for (int group = groups.begin + threadIdx.x; group < groups.end; group += kThreads)
            wait_for_count(counters.group(*input, group), counters.target(*input));
          __syncthreads();
          // By the thread that copies: nobody else reads through the asynchronous proxy.
          if constexpr (loader == Loader::kBulk)
            if (threadIdx.x == 0) copy_bulk_fence();
        });
        if constexpr (loader == Loader::kBulk) copy_bulk_fence();
        __syncthreads();
        if (threadIdx.x == 0) count(counters.group(step, group_of_tile(step, tile)));
      }
    }
    if (threadIdx.x == 0 && count_round(counter_memory + 1, blocks))
      store<uint32_t>(counter_memory, counters.calls + 1);
  }
}

}  // namespace

// ---- Launcher ----

namespace {

template <class W>
auto network_kernel_for(Loader loader) {
  return loader == Loader::kBulk ? network_kernel<W, Loader::kBulk> : network_kernel<W, Loader::kAsync>;
}
auto network_kernel_for(Dtype dtype, Loader loader) {
  return dtype == Dtype::kBf16   ? network_kernel_for<Bf16>(loader)
         : dtype == Dtype::kFp16 ? network_kernel_for<Fp16>(loader)
                                 : network_kernel_for<E4m3>(loader);
}

}  // namespace

int prepare_schedules(Dtype dtype, const Device& device) {
  return cudaFuncSetAttribute(network_kernel_for(dtype, device.loader), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              device.shared_bytes);
}

int launch(const Schedule& schedule, const Step* steps, uint32_t* counters, const Ends& ends, Dtype dtype,
           Loader loader, void* stream) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(schedule.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(schedule.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, network_kernel_for(dtype, loader), steps, static_cast<int>(schedule.steps.size()),
                            counters, ends);
}

}  // namespace hydravit::cuda
