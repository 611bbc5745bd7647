// Chooses the instruction set once, at run time: the best one of the CPU, or the one that HYDRAVIT_CPU_ISA or
// set_cpu_isa names.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace hydravit {

namespace portable {
HYDRAVIT_DECLARE_KERNELS
}
#ifdef HYDRAVIT_HAVE_AVX2
namespace avx2 {
HYDRAVIT_DECLARE_KERNELS
}
#endif
#ifdef HYDRAVIT_HAVE_AVX512
namespace avx512 {
HYDRAVIT_DECLARE_KERNELS
}
#endif

namespace {

struct Kernels {
  const char* name;
  bool (*supported)();
  decltype(&portable::network) network;
  const int64_t* panel_rows;
  decltype(&portable::pack_weight) pack_weight;
  decltype(&portable::stem) stem;
  decltype(&portable::stem_backward) stem_backward;
  decltype(&portable::attention_block) attention_block;
  decltype(&portable::attention_block_backward) attention_block_backward;
  decltype(&portable::mlp_block) mlp_block;
  decltype(&portable::mlp_block_backward) mlp_block_backward;
  decltype(&portable::head) head;
  decltype(&portable::head_backward) head_backward;
  decltype(&portable::adamw) adamw;
};

#define HYDRAVIT_KERNELS(isa, supported) \
  {#isa,                                 \
   supported,                            \
   isa::network,                         \
   &isa::panel_rows,                     \
   isa::pack_weight,                     \
   isa::stem,                            \
   isa::stem_backward,                   \
   isa::attention_block,                 \
   isa::attention_block_backward,        \
   isa::mlp_block,                       \
   isa::mlp_block_backward,              \
   isa::head,                            \
   isa::head_backward,                   \
   isa::adamw}

#if defined(HYDRAVIT_HAVE_AVX2) || defined(HYDRAVIT_HAVE_AVX512)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
#ifdef HYDRAVIT_HAVE_AVX512
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best first.
const Kernels kTable[] = {
#ifdef HYDRAVIT_HAVE_AVX512
    HYDRAVIT_KERNELS(avx512, has_avx512),
#endif
#ifdef HYDRAVIT_HAVE_AVX2
    HYDRAVIT_KERNELS(avx2, has_avx2),
#endif
    HYDRAVIT_KERNELS(portable, [] { return true; }),
};

std::atomic<const Kernels*> chosen{nullptr};

int choose(const char* name, const Kernels** kernels) {
  for (const Kernels& candidate : kTable) {
    if (name != nullptr && std::strcmp(name, candidate.name) != 0) continue;
    if (candidate.supported()) {
      *kernels = &candidate;
      return kOk;
    }
    if (name != nullptr) return kUnsupportedIsa;
  }
  return kUnknownIsa;
}

int current(const Kernels** kernels) {
  *kernels = chosen.load(std::memory_order_relaxed);
  if (*kernels != nullptr) return kOk;
  const char* wanted = std::getenv("HYDRAVIT_CPU_ISA");
  if (wanted != nullptr && *wanted == '\0') wanted = nullptr;  // an empty variable counts as unset
  const int status = choose(wanted, kernels);
  if (status == kOk) chosen.store(*kernels, std::memory_order_relaxed);
  return status;
}

template <class Function, class... Arguments>
int launch(Function Kernels::* function, const Arguments&... arguments) {
  const Kernels* kernels = nullptr;
  const int status = current(&kernels);
  return status == kOk ? (kernels->*function)(arguments...) : status;
}

}  // namespace

const char* status_text(int status) {
  switch (status) {
    case kOk:
      return "ok";
    case kOutOfMemory:
      return "out of memory";
    case kUnknownIsa:
      return "unknown CPU instruction set (HYDRAVIT_CPU_ISA or set_cpu_isa): expected avx512, avx2 or portable, the "
             "first two on x86 only";
    case kUnsupportedIsa:
      return "the CPU instruction set that HYDRAVIT_CPU_ISA or set_cpu_isa names is not supported by this CPU";
    default:
      return "unknown status";
  }
}

int cpu_isa(const char** name) {
  const Kernels* kernels = nullptr;
  const int status = current(&kernels);
  if (status == kOk) *name = kernels->name;
  return status;
}

int panel_rows(int64_t* rows) {
  const Kernels* kernels = nullptr;
  const int status = current(&kernels);
  if (status == kOk) *rows = *kernels->panel_rows;
  return status;
}

int set_cpu_isa(const char* name) {
  const Kernels* kernels = nullptr;
  const int status = choose(name, &kernels);
  if (status == kOk) chosen.store(kernels, std::memory_order_relaxed);
  return status;
}

int network_cpu(const NetworkCall& call, const Threads& threads) { return launch(&Kernels::network, call, threads); }
int pack_weight_cpu(const Weight& weight, int64_t rows, int64_t columns, float* panels, const Threads& threads) {
  return launch(&Kernels::pack_weight, weight, rows, columns, panels, threads);
}
int stem_cpu(const Stem& block, const Threads& threads) { return launch(&Kernels::stem, block, threads); }
int stem_backward_cpu(const Stem& block, const StemGradients& gradients, const Threads& threads) {
  return launch(&Kernels::stem_backward, block, gradients, threads);
}
int attention_block_cpu(const AttentionBlock& block, const Threads& threads) {
  return launch(&Kernels::attention_block, block, threads);
}
int attention_block_backward_cpu(const AttentionBlock& block, const AttentionBlockGradients& gradients,
                                 const Threads& threads) {
  return launch(&Kernels::attention_block_backward, block, gradients, threads);
}
int mlp_block_cpu(const MlpBlock& block, const Threads& threads) { return launch(&Kernels::mlp_block, block, threads); }
int mlp_block_backward_cpu(const MlpBlock& block, const MlpBlockGradients& gradients, const Threads& threads) {
  return launch(&Kernels::mlp_block_backward, block, gradients, threads);
}
int head_cpu(const Head& block, const Threads& threads) { return launch(&Kernels::head, block, threads); }
int head_backward_cpu(const Head& block, const HeadGradients& gradients, const Threads& threads) {
  return launch(&Kernels::head_backward, block, gradients, threads);
}
int adamw_cpu(const Adamw& work, const Threads& threads) { return launch(&Kernels::adamw, work, threads); }

}  // namespace hydravit
