// The Python module janus_ext._C: the record of how the compiled ops beside it were built, and nothing else.
//
// It links no torch library on purpose. janus_ext/_native.py imports it first, compares the record with the torch that
// is running, and only then loads libjanus_ops.so, whose symbols would not resolve in another torch. The values are
// compile definitions from CMakeLists.txt.

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = JANUS_VERSION;
  info["torch"] = JANUS_TORCH_VERSION;
  info["torch_cuda"] = JANUS_TORCH_CUDA;
  info["cxx11_abi"] = static_cast<bool>(JANUS_TORCH_ABI);
  info["python"] = PY_VERSION;
  info["compiler"] = JANUS_COMPILER;
  info["cplusplus"] = __cplusplus;
  info["nvcc"] = JANUS_NVCC;
  info["cuda_architectures"] = JANUS_CUDA_ARCHITECTURES;
  info["cuda_ops"] = sizeof(JANUS_CUDA_REASON) == 1;
  info["cuda_reason"] = JANUS_CUDA_REASON;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the compiled ops of janus_ext were built.";
  m.def(
      "build_info", &build_info,
      "Dictionary of strings and booleans: versions of janus_ext, torch, CUDA and Python built against, the compilers, "
      "the CUDA architectures, whether the CUDA ops were built, and if not, why.");
}
