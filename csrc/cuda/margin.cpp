// margin_loss on CUDA: the shared algebra of margin.h, its rows by one kernel. Nothing waits for the device.
#include "margin.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "kernels/margin.h"

namespace janus {
namespace {

Tensor weigh_rows(const Tensor& cosines, double margin, double temperature) {
  const int64_t N = cosines.size(0), C = cosines.size(1);
  const Tensor losses = at::empty({N}, cosines.options());
  AT_DISPATCH_FLOATING_TYPES(cosines.scalar_type(), "margin_loss", [&] {
    C10_CUDA_CHECK(kernels::margin_weigh_rows(cosines.mutable_data_ptr<scalar_t>(), losses.mutable_data_ptr<scalar_t>(),
                                              N, C, margin, temperature, c10::cuda::getCurrentCUDAStream()));
  });
  return losses;
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
