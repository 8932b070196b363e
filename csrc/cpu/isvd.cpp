// isvd_update on the CPU: the shared algebra of isvd.h.
#include "../isvd.h"

#include <torch/library.h>

namespace janus {
namespace {

// As many as the sketch has directions: more, and the eigendecomposition, cubic in their number, costs too much.
int64_t block_rows(int64_t /*n*/, int64_t l) {
  return l;
}

}  // namespace
}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CPU, m) {
  m.impl("isvd_update", TORCH_FN(janus::isvd_update<&janus::block_rows>));
}
