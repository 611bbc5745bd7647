// The part of CUDA that the kernels and launchers use, for a C++ compiler: see emulator.h.
#pragma once

#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#include "emulator.h"

// These are objects and no macros, because members of launch configurations have the same names.
struct BuiltIn {
  unsigned (*value)();
  operator unsigned() const { return value(); }
};
struct BuiltIns {  // all grids are one-dimensional
  BuiltIn x;
};
inline const BuiltIns threadIdx{{[] { return hydravit::emulator::current().index.x; }}};
inline const BuiltIns blockIdx{{[] { return hydravit::emulator::current().block->index.x; }}};
inline const BuiltIns blockDim{{[] { return hydravit::emulator::current().block->threads_of.x; }}};
inline const BuiltIns gridDim{{[] { return hydravit::emulator::current().block->grid_of.x; }}};

inline void __syncthreads() { hydravit::emulator::block_barrier(); }
inline void __syncwarp() {
  hydravit::emulator::collective("__syncwarp", nullptr, [](void**) {});
}
[[noreturn]] inline void __trap() { hydravit::emulator::fail("a trap"); }
inline int min(int a, int b) { return a < b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// ---- The runtime functions that launchers use ----

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const auto& settings = hydravit::emulator::settings();
  *value = name == cudaDevAttrMultiProcessorCount            ? settings.processors
           : name == cudaDevAttrMaxSharedMemoryPerBlockOptin ? settings.shared_bytes
                                                             : settings.capability / 10;
  return cudaSuccess;
}

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*) { return cudaSuccess; }

inline cudaError_t cudaDeviceSynchronize() {
  hydravit::emulator::synchronize();
  return cudaSuccess;
}

// Events measure the time of the emulation, which says nothing about a GPU.
struct CUevent_st {
  std::chrono::steady_clock::time_point time;
};
using cudaEvent_t = CUevent_st*;
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new CUevent_st{};
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  hydravit::emulator::synchronize();
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t stop) {
  *ms = std::chrono::duration<float, std::milli>(stop->time - start->time).count();
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  hydravit::emulator::Launch launch{config->gridDim, config->blockDim, config->dynamicSmemBytes, false};
  for (unsigned i = 0; i < config->numAttrs; i++)
    launch.early |= config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization;
  hydravit::emulator::launch(launch, [=] { kernel(arguments...); });
  return cudaSuccess;
}
