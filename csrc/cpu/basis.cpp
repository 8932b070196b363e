// extend_basis and extend_basis_factor on the CPU: the shared algebra of basis.h.
#include "../basis.h"

#include <torch/library.h>

TORCH_LIBRARY_IMPL(janus_ext, CPU, m) {
  m.impl("extend_basis", TORCH_FN(janus::extend_basis));
  m.impl("extend_basis_factor", TORCH_FN(janus::extend_basis_factor));
}
