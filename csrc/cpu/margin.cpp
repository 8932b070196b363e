// margin_loss on the CPU: the shared algebra of margin.h. What has a value for every feature and prototype goes through
// ATen's vectorised passes, what has one for every feature through a loop: a dozen tiny tensors would cost more.
#include "../margin.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>

namespace janus {
namespace {

// With the largest exponent taken out of all, no tau is too large. The 1 in the denominator is the hinge's own zero: it
// takes part, as exp(tau margin). A NaN loses every comparison, but reaches the sum.
template <typename scalar_t>
std::tuple<Tensor, Tensor, Tensor> weigh_rows_typed(const Tensor& products, const Tensor& norm, scalar_t margin,
                                                    scalar_t temperature) {
  const int64_t N = products.size(0);
  const scalar_t hinge = temperature * margin;
  const auto* length = norm.const_data_ptr<scalar_t>();
  const Tensor weights = products * (temperature / norm), top = weights.amax(1, /*keepdim=*/true);
  auto* top_data = top.mutable_data_ptr<scalar_t>();
  for (int64_t i = 0; i < N; ++i) top_data[i] = top_data[i] > hinge ? top_data[i] : hinge;
  weights.sub_(top).exp_();
  const Tensor losses = weights.sum(1, /*keepdim=*/true), along = (weights * products).sum(1, /*keepdim=*/true);
  const Tensor gain = at::empty_like(norm);
  auto *loss_data = losses.mutable_data_ptr<scalar_t>(), *along_data = along.mutable_data_ptr<scalar_t>(),
       *gain_data = gain.mutable_data_ptr<scalar_t>();
  for (int64_t i = 0; i < N; ++i) {
    const scalar_t sum = loss_data[i] + std::exp(hinge - top_data[i]);
    gain_data[i] = sum * length[i] * static_cast<scalar_t>(N);
    loss_data[i] = top_data[i] - hinge + std::log(sum);
    along_data[i] = along_data[i] / gain_data[i] / length[i] / length[i];
  }
  return {weights.div_(gain), losses, along};
}

std::tuple<Tensor, Tensor, Tensor> weigh_rows(const Tensor& products, const Tensor& norm, double margin,
                                              double temperature) {
  return AT_DISPATCH_FLOATING_TYPES(products.scalar_type(), "margin_loss", [&] {
    return weigh_rows_typed(products, norm, static_cast<scalar_t>(margin), static_cast<scalar_t>(temperature));
  });
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
