// margin_loss on the CPU: the shared algebra of margin.h. What has a value for every feature and prototype goes through
// ATen's vectorised passes, what has one for every feature through a loop: a dozen tiny tensors would cost more.
#include "../margin.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>

namespace janus {
namespace {

// The 1 in the denominator is the hinge's own zero, which takes part in the maximum; a NaN does not, but reaches the
// sum.
template <typename scalar_t>
std::tuple<Tensor, Tensor, Tensor> weigh_rows_typed(const Tensor& products, const Tensor& norm, scalar_t margin,
                                                    scalar_t temperature) {
  const int64_t N = products.size(0);
  const auto* length = norm.const_data_ptr<scalar_t>();
  const Tensor top = products.amax(1, /*keepdim=*/true), slope = at::empty_like(norm), shift = at::empty_like(norm);
  auto *top_data = top.mutable_data_ptr<scalar_t>(), *slope_data = slope.mutable_data_ptr<scalar_t>(),
       *shift_data = shift.mutable_data_ptr<scalar_t>();
  for (int64_t i = 0; i < N; ++i) {
    slope_data[i] = temperature / length[i];
    const scalar_t z = slope_data[i] * top_data[i] - temperature * margin;
    top_data[i] = z > 0 ? z : 0;
    shift_data[i] = -top_data[i] - temperature * margin;
  }
  const Tensor weights = at::addcmul(shift, products, slope).exp_();  // exp(z - top)
  const Tensor losses = weights.sum(1, /*keepdim=*/true), along = (weights * products).sum(1, /*keepdim=*/true);
  auto *loss_data = losses.mutable_data_ptr<scalar_t>(), *along_data = along.mutable_data_ptr<scalar_t>();
  auto* gain_data = shift_data;  // the shifts are used up
  for (int64_t i = 0; i < N; ++i) {
    const scalar_t sum = loss_data[i] + std::exp(-top_data[i]);
    gain_data[i] = sum * length[i] * static_cast<scalar_t>(N);
    loss_data[i] = top_data[i] + std::log(sum);
    along_data[i] = along_data[i] / gain_data[i] / length[i] / length[i];
  }
  return {weights.div_(shift), losses, along};
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
