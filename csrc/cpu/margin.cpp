// margin_loss on the CPU: mean_i (1/tau) log(1 + sum_c exp(z_ic)), z_ic = tau (f^_i . p_c - margin), and its gradient
//
//   dL/df_i = (I - f^_i f^_i^T) (sum_c w_ic p_c) / (N |f_i|),   w_ic = exp(z_ic) / (1 + sum_c exp(z_ic))
//
// Two products through ATen; the rows in between are one pass each.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/promote_types.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "../checks.h"

namespace janus {
namespace {

// cosines [C] -> weights w [C] in place; returns log(1 + sum_c exp(z_c)).
template <typename scalar_t>
scalar_t weigh_row(scalar_t* row, int64_t C, scalar_t margin, scalar_t temperature) {
  scalar_t top = 0;  // the hinge's own zero takes part in the maximum
  for (int64_t c = 0; c < C; ++c) {
    row[c] = temperature * (row[c] - margin);
    top = std::max(top, row[c]);
  }
  scalar_t sum = std::exp(-top);
  for (int64_t c = 0; c < C; ++c) sum += row[c] = std::exp(row[c] - top);
  for (int64_t c = 0; c < C; ++c) row[c] /= sum;
  return top + std::log(sum);
}

template <typename scalar_t>
Tensor weigh_rows(const Tensor& cosines, double margin, double temperature) {
  const int64_t N = cosines.size(0), C = cosines.size(1);
  Tensor losses = at::zeros({N}, cosines.options());
  auto* rows = cosines.mutable_data_ptr<scalar_t>();
  auto* out = losses.mutable_data_ptr<scalar_t>();
  at::parallel_for(0, N, 1 + 32768 / C, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      out[i] = weigh_row(rows + i * C, C, static_cast<scalar_t>(margin), static_cast<scalar_t>(temperature));
  });
  return losses;
}

std::tuple<Tensor, Tensor> margin_loss(const Tensor& features, const Tensor& prototypes, double margin,
                                       double temperature) {
  check_margin_loss(features, prototypes, margin, temperature);
  const auto type = at::promote_types(features.scalar_type(), prototypes.scalar_type());
  const int64_t N = features.size(0), C = prototypes.size(0);
  if (N == 0 || C == 0)
    return {at::zeros({}, features.options().dtype(type)), at::zeros_like(features, at::MemoryFormat::Contiguous)};
  const Tensor f = features.to(type), p = prototypes.to(type);
  const double tiny = std::sqrt(type == at::kDouble ? std::numeric_limits<double>::min()
                                                    : static_cast<double>(std::numeric_limits<float>::min()));
  const Tensor norm = at::linalg_vector_norm(f, 2, at::IntArrayRef{1}, /*keepdim=*/true).clamp_min(tiny);
  const Tensor unit = f / norm;
  const Tensor weights = at::mm(unit, p.t());
  Tensor losses;
  AT_DISPATCH_FLOATING_TYPES(type, "margin_loss",
                             [&] { losses = weigh_rows<scalar_t>(weights, margin, temperature); });
  const Tensor push = at::mm(weights, p);
  const Tensor grad = (push - (push * unit).sum(1, /*keepdim=*/true) * unit) / (norm * N);
  return {losses.mean() / temperature, grad.to(features.scalar_type()).contiguous()};
}

}  // namespace
}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CPU, m) { m.impl("margin_loss", TORCH_FN(janus::margin_loss)); }
