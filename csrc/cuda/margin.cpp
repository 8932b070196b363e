// margin_loss on CUDA: the shared algebra of margin.h, its rows by one kernel. Nothing waits for the device.
#include "margin.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "kernels/margin.h"

namespace janus {
namespace {

std::tuple<Tensor, Tensor, Tensor> weigh_rows(const Tensor& products, const Tensor& norm, double margin,
                                              double temperature) {
  const Tensor losses = at::empty_like(norm), along = at::empty_like(norm);
  AT_DISPATCH_FLOATING_TYPES(products.scalar_type(), "margin_loss", [&] {
    const kernels::MarginRows<scalar_t> rows{
        .products = products.mutable_data_ptr<scalar_t>(),
        .norm = norm.const_data_ptr<scalar_t>(),
        .losses = losses.mutable_data_ptr<scalar_t>(),
        .along = along.mutable_data_ptr<scalar_t>(),
        .count = products.size(0),
        .columns = products.size(1),
    };
    C10_CUDA_CHECK(kernels::margin_weigh_rows(rows, margin, temperature, c10::cuda::getCurrentCUDAStream()));
  });
  return {products, losses, along};
}

std::tuple<Tensor, Tensor> margin_loss_cuda(const Tensor& features, const Tensor& prototypes, double margin,
                                            double temperature) {
  check_margin_loss(features, prototypes, margin, temperature);
  const c10::cuda::CUDAGuard guard(features.device());
  return margin_loss(features, prototypes, margin, temperature, weigh_rows);
}

}  // namespace
}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CUDA, m) {
  m.impl("margin_loss", TORCH_FN(janus::margin_loss_cuda));
}
