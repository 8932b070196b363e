// isvd_update on CUDA: the shared algebra of isvd.h, on the device of the first tensor. Its eigendecompositions wait
// for the device.
#include "isvd.h"

#include <torch/library.h>

#include "on_device.h"

namespace janus {
namespace {

// A block costs a QR and an eigendecomposition of order min(n, l + rows), of which a GPU does few large ones faster
// than many small ones: 5 ms at 512, 36 ms at 2304 on an H100. Where n bounds the
// order, a block has as many rows as make 24 Mi numbers; what is worked on is then about 0.6 GB.
int64_t block_rows(int64_t n, int64_t l) {
  return n <= 2048 ? (int64_t{24} << 20) / n : std::max<int64_t>(l, 2048);  // as reference.isvd.block_rows
}

}  // namespace
}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CUDA, m) {
  m.impl("isvd_update", TORCH_FN(janus::OnDevice<&janus::isvd_update<&janus::block_rows>>::call));
}
