#include <cstdlib>

#include "parallel.h"

namespace hydravit::HYDRAVIT_ISA {

namespace {
struct Block {
  float* data = nullptr;
  int64_t size = 0;
  ~Block() { std::free(data); }
};
thread_local Block block;
}  // namespace

bool Workspace::allocate() {
  if (block.size < total_) {
    std::free(block.data);
    constexpr size_t kAlignment = 64;
    block.data = static_cast<float*>(std::aligned_alloc(kAlignment, static_cast<size_t>(total_) * sizeof(float)));
    block.size = block.data == nullptr ? 0 : total_;
    if (block.data == nullptr) return false;
  }
  for (int i = 0; i < size_; i++) *buffers_[i].pointer = buffers_[i].used ? block.data + buffers_[i].offset : nullptr;
  return true;
}

}  // namespace hydravit::HYDRAVIT_ISA
