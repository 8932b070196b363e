// isvd_update on the CPU: the shared algebra of isvd.h.
#include "../isvd.h"

#include <torch/library.h>

TORCH_LIBRARY_IMPL(janus_ext, CPU, m) {
  m.impl("isvd_update", TORCH_FN(janus::isvd_update));
}
