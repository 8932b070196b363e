// extend_basis and extend_basis_factor on CUDA: the shared algebra of basis.h, on the device of the first tensor.
//
// They wait for the device: how many columns the basis grows by decides the shape of the result, and is read once a
// task.
#include "basis.h"

#include <torch/library.h>

#include "on_device.h"

TORCH_LIBRARY_IMPL(janus_ext, CUDA, m) {
  m.impl("extend_basis", TORCH_FN(janus::OnDevice<&janus::extend_basis>::call));
  m.impl("extend_basis_factor", TORCH_FN(janus::OnDevice<&janus::extend_basis_factor>::call));
}
