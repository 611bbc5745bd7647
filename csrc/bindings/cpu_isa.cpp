// Tells and sets the instruction set of the CPU kernels.
#include "checks.h"

namespace hydravit {
namespace {

std::string cpu_isa_name() {
  const char* name = "";
  check_status(cpu_isa(&name));
  return name;
}

void set_cpu_isa_name(std::string isa) {
  const int status = set_cpu_isa(isa.c_str());
  HYDRAVIT_CHECK(status == kOk, "isa: ", status_text(status), "; '", isa, "' given");
}

}  // namespace
}  // namespace hydravit

STABLE_TORCH_LIBRARY_IMPL(hydravit, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&hydravit::cpu_isa_name));
  m.impl("set_cpu_isa", TORCH_BOX(&hydravit::set_cpu_isa_name));
}
