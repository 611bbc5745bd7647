#include <cstdlib>

#include "parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace hydravit::HYDRAVIT_ISA {

namespace {
constexpr size_t kHugePage = size_t{1} << 21;
}

void prefer_huge_pages(float* data, int64_t size) {
#ifdef MADV_HUGEPAGE
  const size_t bytes = static_cast<size_t>(size) * sizeof(float), end = reinterpret_cast<size_t>(data) + bytes;
  if (bytes < kHugePage) return;
  const size_t begin = reinterpret_cast<size_t>(data) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), (end - begin + kHugePage - 1) / kHugePage * kHugePage, MADV_HUGEPAGE);
#else
  (void)data, (void)size;
#endif
}

namespace {
struct Memory {
  float* data = nullptr;
  int64_t size = 0;
  ~Memory() { std::free(data); }
};
thread_local Memory memory;
}  // namespace

bool Workspace::allocate() {
  if (memory.size < total_) {
    std::free(memory.data);
    const size_t bytes = static_cast<size_t>(total_) * sizeof(float);
    const size_t alignment = bytes < kHugePage ? 64 : kHugePage;
    memory.data = static_cast<float*>(std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment));
    if (memory.data != nullptr) prefer_huge_pages(memory.data, total_);
    memory.size = memory.data == nullptr ? 0 : total_;
    if (memory.data == nullptr) return false;
  }
  for (int i = 0; i < size_; i++) *buffers_[i].pointer = buffers_[i].used ? memory.data + buffers_[i].offset : nullptr;
  return true;
}

}  // namespace hydravit::HYDRAVIT_ISA
