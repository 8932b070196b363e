// Decoupled Margin Loss, device-independent: mean_i (1/tau) log(1 + sum_c exp(z_ic)), z_ic = tau (q_ic - margin) with
// the cosines q_ic = f_i . p_c / |f_i|. With w_ic = exp(z_ic) / (1 + sum_c exp(z_ic)),
//
//   dL/df_i = (sum_c w_ic p_c - (sum_c w_ic q_ic) f_i / |f_i|) / (N |f_i|)
//
// Two products through ATen, f P^T and w P; the rows in between are the device's own. Unit vectors are never formed.
// The gradient keeps the wider dtype: it is rounded to that of the features once it has been scaled, in the backward.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/promote_types.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <tuple>

#include "checks.h"

namespace janus {

// `weigh_rows(products [N, C], norm [N, 1], margin, tau)`, the products f_i . p_c, returns w_ic / (N |f_i|) [N, C] and,
// [N, 1] each, log(1 + sum_c exp(z_ic)) and sum_c w_ic q_ic / (N |f_i|^2). It may overwrite the products.
template <typename WeighRows>
std::tuple<Tensor, Tensor> margin_loss(const Tensor& features, const Tensor& prototypes, double margin,
                                       double temperature, WeighRows weigh_rows) {
  const auto type = at::promote_types(features.scalar_type(), prototypes.scalar_type());
  const int64_t N = features.size(0), C = prototypes.size(0);
  if (N == 0 || C == 0)
    return {at::zeros({}, features.options().dtype(type)), at::zeros(features.sizes(), features.options().dtype(type))};
  const Tensor f = features.to(type), p = prototypes.to(type);
  const double tiny = std::sqrt(type == at::kDouble ? std::numeric_limits<double>::min()
                                                    : static_cast<double>(std::numeric_limits<float>::min()));
  Tensor norm = at::linalg_vector_norm(f, 2, at::IntArrayRef{1}, /*keepdim=*/true);
  norm.masked_fill_(norm < tiny, std::numeric_limits<double>::infinity());  // no direction: cosines 0, no gradient
  const auto [weights, losses, along] = weigh_rows(at::mm(f, p.t()), norm, margin, temperature);
  const Tensor grad = (f * along).addmm_(weights, p, /*beta=*/-1);
  return {losses.mean() / temperature, grad.contiguous()};
}

}  // namespace janus
