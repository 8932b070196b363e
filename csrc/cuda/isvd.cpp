// isvd_update on CUDA: the shared algebra of isvd.h, on the device of the first tensor. Its eigendecompositions wait
// for the device.
#include "isvd.h"

#include <torch/library.h>

#include "on_device.h"

TORCH_LIBRARY_IMPL(janus_ext, CUDA, m) {
  m.impl("isvd_update", TORCH_FN(janus::OnDevice<&janus::isvd_update>::call));
}
