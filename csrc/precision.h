// Products with V and all r x r work are IEEE float32, whatever TF32 or float32-matmul-precision settings say.
#pragma once

#include <ATen/Context.h>

#include <utility>
#include <vector>

namespace janus {

class FullFloat32 {
 public:
  FullFloat32() {
    auto& context = at::globalContext();
    for (auto backend : {at::Float32Backend::CUDA, at::Float32Backend::MKLDNN}) {
      const auto precision = context.float32Precision(backend, at::Float32Op::MATMUL);
      if (precision != at::Float32Precision::TF32 && precision != at::Float32Precision::BF16) continue;
      reduced_.emplace_back(backend, precision);
      context.setFloat32Precision(backend, at::Float32Op::MATMUL, at::Float32Precision::IEEE);
    }
  }
  ~FullFloat32() {
    for (const auto& [backend, precision] : reduced_)
      at::globalContext().setFloat32Precision(backend, at::Float32Op::MATMUL, precision);
  }
  FullFloat32(const FullFloat32&) = delete;
  FullFloat32& operator=(const FullFloat32&) = delete;

 private:
  std::vector<std::pair<at::Float32Backend, at::Float32Precision>> reduced_;
  at::NoTF32Guard no_tf32_;  // of this thread, should another thread restore the process-wide setting meanwhile
};

}  // namespace janus
