// gram_update_ on CUDA: checks, conversion, torch's cuBLAS handle; the work is in kernels/gram.cu.
//
// Nothing here waits for the device, and the handle carries the current stream, so the op runs on any stream and can be
// captured in a CUDA graph. The handle also carries torch's TF32 setting, which float32 inputs follow.
#include "kernels/gram.h"

#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/Exceptions.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "checks.h"

namespace janus {
namespace {

// What the product reads: 16 bits and float32 accumulate into float32 as they are; anything else takes gram's dtype.
at::ScalarType product_type(const Tensor& x, const Tensor& gram) {
  const auto type = x.scalar_type();
  if (gram.scalar_type() == at::kDouble || type == at::kDouble) return gram.scalar_type();
  // cuBLAS has bfloat16 products from compute capability 8 on.
  if (type == at::kBFloat16 && at::cuda::getCurrentDeviceProperties()->major < 8) return at::kFloat;
  return type;
}

cudaDataType_t cuda_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return CUDA_R_64F;
    case at::kFloat:
      return CUDA_R_32F;
    case at::kHalf:
      return CUDA_R_16F;
    default:
      return CUDA_R_16BF;
  }
}

// x as rows [N, n] that cuBLAS can read: unit stride within a row, and not the memory that is being written.
Tensor rows_for(const Tensor& x, const Tensor& gram) {
  const int64_t n = gram.size(0);
  const Tensor rows = x.reshape({-1, n}).to(product_type(x, gram));
  if (rows.is_alias_of(gram)) return rows.clone(at::MemoryFormat::Contiguous);
  return rows.stride(1) == 1 && rows.stride(0) >= n ? rows : rows.contiguous();
}

void gram_update_(const Tensor& gram, const Tensor& x, double decay) {
  check_gram_update(gram, x, decay);
  const c10::cuda::CUDAGuard guard(gram.device());
  const int64_t n = gram.size(0);
  if (x.numel() == 0) {
    const Tensor upper = gram.triu();
    gram.copy_((upper + upper.triu(1).t()).mul_(decay));
    return;
  }
  const Tensor rows = rows_for(x, gram);
  const Tensor C = gram.contiguous();
  bump_version(gram);
  const kernels::GramUpdate update{
      .x = rows.const_data_ptr(),
      .type = cuda_type(rows.scalar_type()),
      .rows = rows.size(0),
      .stride = std::max(rows.stride(0), n),  // a single row may have any stride
      .gram = C.mutable_data_ptr(),
      .n = n,
      .decay = decay,
  };
  const kernels::GramCut cut = kernels::gram_cut(update.type, update.rows, n);
  const Tensor partials = at::empty({cut.chunks, n, n}, C.options());
  void* sums = partials.mutable_data_ptr();
  TORCH_CUDABLAS_CHECK(kernels::gram_partials(at::cuda::getCurrentCUDABlasHandle(), update, cut, sums));
  C10_CUDA_CHECK(kernels::gram_gather(update, cut, sums, c10::cuda::getCurrentCUDAStream()));
  if (!gram.is_same(C)) gram.copy_(C);
}

}  // namespace
}  // namespace janus

TORCH_LIBRARY_IMPL(janus_ext, CUDA, m) {
  m.impl("gram_update_", TORCH_FN(janus::gram_update_));
}
