// Decoupled Margin Loss, device-independent: mean_i (1/tau) log(1 + sum_c exp(z_ic)), z_ic = tau (f^_i . p_c - margin)
//
//   dL/df_i = (I - f^_i f^_i^T) (sum_c w_ic p_c) / (N |f_i|),   w_ic = exp(z_ic) / (1 + sum_c exp(z_ic))
//
// Two products through ATen; the rows in between are the device's own.
#pragma once

#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/promote_types.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>
#include <tuple>

#include "checks.h"

namespace janus {

// `weigh_rows(cosines [N, C], margin, tau)` overwrites the cosines with w and returns the N values log(1 + sum exp(z)).
template <typename WeighRows>
std::tuple<Tensor, Tensor> margin_loss(const Tensor& features, const Tensor& prototypes, double margin,
                                       double temperature, WeighRows weigh_rows) {
  const auto type = at::promote_types(features.scalar_type(), prototypes.scalar_type());
  const int64_t N = features.size(0), C = prototypes.size(0);
  if (N == 0 || C == 0)
    return {at::zeros({}, features.options().dtype(type)), at::zeros_like(features, at::MemoryFormat::Contiguous)};
  const Tensor f = features.to(type), p = prototypes.to(type);
  const double tiny = std::sqrt(type == at::kDouble ? std::numeric_limits<double>::min()
                                                    : static_cast<double>(std::numeric_limits<float>::min()));
  const Tensor norm = at::linalg_vector_norm(f, 2, at::IntArrayRef{1}, /*keepdim=*/true).clamp_min(tiny);
  const Tensor unit = f / norm;
  Tensor weights = at::mm(unit, p.t());
  const Tensor losses = weigh_rows(weights, margin, temperature);
  const Tensor push = at::mm(weights, p);
  const Tensor grad = (push - (push * unit).sum(1, /*keepdim=*/true) * unit) / (norm * N);
  return {losses.mean() / temperature, grad.to(features.scalar_type()).contiguous()};
}

}  // namespace janus
