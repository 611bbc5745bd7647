// A sample of the contents of tensors, which shows whether something has written to them that torch did not see.
#include <cstring>

#include "checks.h"

namespace hydravit {
namespace {

using Tensors = std::vector<Tensor>;
using Fraction = uint64_t;  // of 2^64

// A rotation samples a tensor at equal distances of less than a quarter of its elements, and so any contiguous quarter.
// Distances of a quarter would put all samples of a matrix into one column.
constexpr Fraction kDistance = 0x3f4857c000000000;  // 0.2472
constexpr Fraction kGolden = 0x9e3779b97f4a7c15;    // 0.618: its multiples spread evenly over [0, 1)
constexpr int64_t kFew = 16;                        // a rotation samples every element of so small a tensor
constexpr int64_t kMostRotations = 1024;

// A sample is a tensor of 64-bit words: Header | runs of elements of one size | rotations x elements.
constexpr int64_t kMagic = 0x687964726176736d;  // no tensor of other words passes for a sample

struct Header {
  int64_t magic, words, runs, rotations, elements;
};
struct Run {
  int64_t count, bytes;  // elements, and the bytes of one
};
struct Element {
  const char* address;
  uint64_t bits;
};
constexpr int64_t kWord = sizeof(int64_t);
static_assert(sizeof(Header) % kWord == 0 && sizeof(Run) % kWord == 0 && sizeof(Element) % kWord == 0);

int64_t part_of(Fraction fraction, int64_t size) {
  return static_cast<int64_t>(static_cast<unsigned __int128>(fraction) * static_cast<uint64_t>(size) >> 64);
}

int64_t distance_of(int64_t numel) { return numel <= kFew ? 1 : part_of(kDistance, numel); }
int64_t elements_of(int64_t numel) { return (numel + distance_of(numel) - 1) / distance_of(numel); }

uint64_t bits_at(const char* address, int64_t bytes) {
  const auto read = [&](auto bits) -> uint64_t {
    std::memcpy(&bits, address, sizeof(bits));
    return bits;
  };
  if (bytes == 4) return read(uint32_t{});
  if (bytes == 2) return read(uint16_t{});
  return bytes == 1 ? read(uint8_t{}) : read(uint64_t{});
}

// Where element `index` of a tensor lies, in the order of its shape.
int64_t offset_of(const Tensor& tensor, int64_t index) {
  int64_t offset = 0;
  for (int64_t axis = tensor.dim() - 1; axis >= 0; index /= tensor.size(axis--))
    offset += index % tensor.size(axis) * tensor.stride(axis);
  return offset;
}

void check_memory(const Tensor& tensor) {
  HYDRAVIT_CHECK(tensor.is_cpu(), "tensors: CPU tensors expected, a tensor of another device given");
  int64_t given = 0, last = tensor.storage_offset();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &given));
  for (int64_t axis = 0; axis < tensor.dim(); axis++) last += (tensor.size(axis) - 1) * tensor.stride(axis);
  const int64_t needed = tensor.numel() == 0 ? 0 : (last + 1) * static_cast<int64_t>(tensor.element_size());
  HYDRAVIT_CHECK(needed <= given, "tensors: a storage of ", needed, " bytes expected for a tensor of shape ",
                 text(shape_of(tensor)), ", ", given, " bytes given");
}

// CPU tensors -> their sample.
Tensor sample(const Tensors& tensors, int64_t rotations) {
  HYDRAVIT_CHECK(rotations > 0 && rotations <= kMostRotations, "rotations: 1 to ", kMostRotations, " expected, ",
                 rotations, " given");
  std::vector<Run> runs;
  Header header{kMagic, 0, 0, rotations, 0};
  for (const Tensor& tensor : tensors) {
    check_memory(tensor);
    const auto bytes = static_cast<int64_t>(tensor.element_size());
    if (runs.empty() || runs.back().bytes != bytes) runs.push_back({0, bytes});
    runs.back().count += elements_of(tensor.numel());
    header.elements += elements_of(tensor.numel());
  }
  header.runs = static_cast<int64_t>(runs.size());
  const size_t size =
      sizeof(Header) + runs.size() * sizeof(Run) + static_cast<size_t>(rotations * header.elements) * sizeof(Element);
  header.words = static_cast<int64_t>(size) / kWord;

  const Tensor result = torch::stable::empty(Integers{header.words}, ScalarType::Long);
  auto* place = static_cast<char*>(result.mutable_data_ptr());
  const auto write = [&](const auto& value) {
    std::memcpy(place, &value, sizeof(value));
    place += sizeof(value);
  };
  write(header);
  for (const Run& run : runs) write(run);
  for (int64_t rotation = 0; rotation < rotations; rotation++)
    for (size_t i = 0; i < tensors.size(); i++) {
      const Tensor& tensor = tensors[i];
      const auto* data = static_cast<const char*>(tensor.const_data_ptr());
      const auto bytes = static_cast<int64_t>(tensor.element_size());
      const int64_t numel = tensor.numel(), distance = distance_of(numel);
      const bool contiguous = tensor.is_contiguous();
      // Tensors begin in different places: a write to a few columns of all of them is then in some sample.
      const uint64_t turn = static_cast<uint64_t>(rotation) + i * static_cast<uint64_t>(rotations);
      const int64_t first = part_of(turn * kGolden, distance);
      for (int64_t j = 0; j < elements_of(numel); j++) {
        const int64_t index = (first + j * distance) % numel;
        const char* address = data + (contiguous ? index : offset_of(tensor, index)) * bytes;
        write(Element{address, bits_at(address, bytes)});
      }
    }
  return result;
}

// Whether the elements of one rotation still have their bits. The caller has made sure that they are still there: that
// the tensors live and that none has another address.
bool sample_holds(const Tensor& sample, int64_t rotation) {
  check_kind(sample, "sample", ScalarType::Long);
  Header header{};
  const auto* place = static_cast<const char*>(sample.const_data_ptr());
  const int64_t words = sample.dim() == 1 && sample.is_contiguous() ? sample.size(0) : 0;
  if (words * kWord >= static_cast<int64_t>(sizeof(header))) std::memcpy(&header, place, sizeof(header));
  HYDRAVIT_CHECK(header.magic == kMagic && header.words == words,
                 "sample: a tensor of sample_native expected, other words given");
  HYDRAVIT_CHECK(rotation >= 0 && rotation < header.rotations, "rotation: one of [0, ", header.rotations,
                 ") expected, ", rotation, " given");
  const auto* run = reinterpret_cast<const Run*>(place + sizeof(Header));
  const auto* element = reinterpret_cast<const Element*>(run + header.runs) + rotation * header.elements;
  for (int64_t i = 0; i < header.elements; i++) __builtin_prefetch(element[i].address);  // most are in no cache
  bool same = true;
  for (int64_t i = 0; i < header.runs; i++, run++)
    for (int64_t j = 0; j < run->count; j++, element++) same &= bits_at(element->address, run->bytes) == element->bits;
  return same;
}

}  // namespace
}  // namespace hydravit

STABLE_TORCH_LIBRARY_IMPL(hydravit, CPU, m) { m.impl("sample_holds_native", TORCH_BOX(&hydravit::sample_holds)); }
// Tensors may lie on other devices, and there may be none: the op itself says what it expects.
STABLE_TORCH_LIBRARY_IMPL(hydravit, CompositeExplicitAutograd, m) {
  m.impl("sample_native", TORCH_BOX(&hydravit::sample));
}
