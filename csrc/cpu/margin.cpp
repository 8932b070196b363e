// margin_loss on the CPU: the shared algebra of margin.h, its rows by ATen's vectorised in-place passes.
#include "../margin.h"

#include <ATen/ops/addcmul.h>
#include <torch/library.h>

namespace janus {
namespace {

// The 1 in the denominator is the hinge's own zero, which takes part in the maximum.
std::tuple<Tensor, Tensor, Tensor> weigh_rows(const Tensor& products, const Tensor& norm, double margin,
                                              double temperature) {
  const Tensor slope = temperature / norm;
  const Tensor largest = products.amax(1, /*keepdim=*/true).mul_(slope).sub_(temperature * margin);
  const Tensor top = largest.clamp_min_(0);
  const Tensor weights = at::addcmul(-top - temperature * margin, products, slope).exp_();
  const Tensor sum = weights.sum(1, /*keepdim=*/true).add_((-top).exp_());
  const Tensor gain = sum * norm * products.size(0);
  const Tensor along = (weights * products).sum(1, /*keepdim=*/true).div_(gain).div_(norm).div_(norm);
  weights.div_(gain);
  return {weights, top + sum.log(), along};
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
