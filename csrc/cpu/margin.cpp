// margin_loss on the CPU: the shared algebra of margin.h, its rows by ATen's vectorised in-place passes.
#include "../margin.h"

#include <ATen/ops/exp.h>
#include <torch/library.h>

namespace janus {
namespace {

// The 1 in the denominator is the hinge's own zero, which takes part in the maximum.
Tensor weigh_rows(Tensor& cosines, double margin, double temperature) {
  cosines.sub_(margin).mul_(temperature);
  const Tensor top = cosines.amax(1, /*keepdim=*/true).clamp_min(0);
  cosines.sub_(top).exp_();
  const Tensor sum = cosines.sum(1, /*keepdim=*/true) + (-top).exp();
  cosines.div_(sum);
  return top + sum.log();
}

std::tuple<Tensor, Tensor> margin_loss_cpu(const Tensor& features, const Tensor& prototypes, double margin,
                                           double temperature) {
  check_margin_loss(features, prototypes, margin, temperature);
  return margin_loss(features, prototypes, margin, temperature, weigh_rows);
}

}  // namespace
}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CPU, m) {
  m.impl("margin_loss", TORCH_FN(janus::margin_loss_cpu));
}
