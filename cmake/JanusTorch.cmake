# The torch to build against, as imported target janus::torch (and, for a CUDA torch, janus::torch_cuda).
#
# find_package(Torch) is not used: with a CUDA torch it is fatal when nvcc or the full toolkit is missing, it overrides
# CMAKE_CUDA_ARCHITECTURES and it writes global flags. Here Python is asked instead, see janus_build.py.
# Sets JANUS_TORCH_VERSION, JANUS_TORCH_CUDA (empty for a CPU torch), JANUS_TORCH_ABI, JANUS_TORCH_ROOT.

set(facts "${CMAKE_CURRENT_BINARY_DIR}/janus_torch_facts.cmake")
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/janus_build.py" "${facts}"
  RESULT_VARIABLE status ERROR_VARIABLE output)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "Asking ${Python_EXECUTABLE} for its torch failed: ${output}")
endif()
include("${facts}")
if(JANUS_TORCH_ERROR)
  message(FATAL_ERROR "${JANUS_TORCH_ERROR}")
endif()

function(janus_import_torch_library name)
  set(file "${JANUS_TORCH_ROOT}/lib/lib${name}.so")
  if(NOT EXISTS "${file}")
    message(FATAL_ERROR "torch ${JANUS_TORCH_VERSION} lacks ${file}: reinstall it with "
                        "`pip install --force-reinstall --no-deps torch==${JANUS_TORCH_VERSION}`.")
  endif()
  add_library(janus::lib_${name} SHARED IMPORTED)
  set_target_properties(janus::lib_${name} PROPERTIES IMPORTED_LOCATION "${file}")
endfunction()

# at::parallel_for is an OpenMP region inside a header, so -fopenmp is needed to compile. Linked is the very libgomp
# that torch brings (its file name has a hash in some wheels): a second OpenMP runtime in the process would have its own
# thread pool and would not know at::set_num_threads. Only a torch without a libgomp of its own takes the compiler's.
string(REGEX REPLACE "([[*?])" "[\\1]" root "${JANUS_TORCH_ROOT}")    # a folder's own brackets are no pattern
file(GLOB JANUS_TORCH_GOMP LIST_DIRECTORIES false
     "${root}/lib/libgomp*.so*" "${root}/../torch.libs/libgomp*.so*")
list(LENGTH JANUS_TORCH_GOMP gomp_count)
if(gomp_count EQUAL 0)
  set(JANUS_TORCH_GOMP -fopenmp)
elseif(gomp_count GREATER 1)
  list(GET JANUS_TORCH_GOMP 0 JANUS_TORCH_GOMP)
endif()

# The C++ library, too, has to be the one that torch has in the process: a compiler that comes without the shared one (or
# is told -static-libstdc++) puts a second into ours, whose streams write numbers with the other's locale: the first error
# message ends the process. Named before the compiler's own, the shared one is what all symbols are taken from.
execute_process(COMMAND "${CMAKE_CXX_COMPILER}" -print-file-name=libstdc++.so.6
  OUTPUT_VARIABLE JANUS_LIBSTDCXX OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT IS_ABSOLUTE "${JANUS_LIBSTDCXX}")
  set(JANUS_LIBSTDCXX "")
  if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_SYSTEM_NAME STREQUAL Linux)
    message(WARNING "${CMAKE_CXX_COMPILER} finds no libstdc++.so.6: if it links its C++ library statically, error messages will end the process.")
  endif()
endif()

janus_import_torch_library(c10)
janus_import_torch_library(torch_cpu)
add_library(janus::torch INTERFACE IMPORTED)
target_include_directories(janus::torch SYSTEM INTERFACE
  "${JANUS_TORCH_ROOT}/include" "${JANUS_TORCH_ROOT}/include/torch/csrc/api/include")
target_compile_definitions(janus::torch INTERFACE _GLIBCXX_USE_CXX11_ABI=${JANUS_TORCH_ABI})
target_compile_options(janus::torch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
target_link_libraries(janus::torch INTERFACE janus::lib_c10 janus::lib_torch_cpu "${JANUS_TORCH_GOMP}" ${JANUS_LIBSTDCXX})

if(JANUS_TORCH_CUDA)
  janus_import_torch_library(c10_cuda)
  janus_import_torch_library(torch_cuda)
  add_library(janus::torch_cuda INTERFACE IMPORTED)
  target_link_libraries(janus::torch_cuda INTERFACE janus::torch janus::lib_c10_cuda janus::lib_torch_cuda)
endif()
message(STATUS "janus-ext: torch ${JANUS_TORCH_VERSION} in ${JANUS_TORCH_ROOT}")
