// Products with V and all r x r work are IEEE float32, whatever TF32 or float32-matmul-precision settings say.
#pragma once

#include <ATen/Context.h>

#include <mutex>
#include <utility>
#include <vector>

namespace janus {

// The setting is process-wide: the first one in changes it, the last one out restores it.
class FullFloat32 {
 public:
  FullFloat32() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (inside_++ > 0) return;
    auto& context = at::globalContext();
    for (auto backend : {at::Float32Backend::CUDA, at::Float32Backend::MKLDNN}) {
      const auto precision = context.float32Precision(backend, at::Float32Op::MATMUL);
      if (precision != at::Float32Precision::TF32 && precision != at::Float32Precision::BF16) continue;
      // What its parent has, it has from there, and goes on having: it is restored as not set.
      const bool inherited = precision == context.float32Precision(backend, at::Float32Op::ALL);
      reduced_.emplace_back(backend, inherited ? at::Float32Precision::NONE : precision);
      context.setFloat32Precision(backend, at::Float32Op::MATMUL, at::Float32Precision::IEEE);
    }
  }
  ~FullFloat32() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--inside_ > 0) return;
    for (const auto& [backend, precision] : reduced_)
      at::globalContext().setFloat32Precision(backend, at::Float32Op::MATMUL, precision);
    reduced_.clear();
  }
  FullFloat32(const FullFloat32&) = delete;
  FullFloat32& operator=(const FullFloat32&) = delete;

 private:
  inline static std::mutex mutex_;
  inline static int inside_ = 0;
  inline static std::vector<std::pair<at::Float32Backend, at::Float32Precision>> reduced_;
  at::NoTF32Guard no_tf32_;  // of this thread: legacy settings reach cuBLAS through it
};

}  // namespace janus
