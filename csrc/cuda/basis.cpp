// extend_basis on CUDA: the shared algebra of basis.h, on the tensors' device.
//
// It waits for the device: how many columns the basis grows by decides the shape of the result, and is read once a
// task.
#include "basis.h"

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace janus {
namespace {

// A guard for any device, since the checks that refuse tensors on different devices come after it.
Tensor extend_basis_on_device(const Tensor& basis, const Tensor& gram, double energy, int64_t max_rank,
                              int64_t energy_power) {
  const c10::DeviceGuard guard(basis.device());
  return extend_basis(basis, gram, energy, max_rank, energy_power);
}

}  // namespace
}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CUDA, m) {
  m.impl("extend_basis", TORCH_FN(janus::extend_basis_on_device));
}
