# Whether the CUDA ops are built, and if not, why: janus_find_cuda(), which knows four wishes (JANUS_CUDA):
#   AUTO     built when torch has CUDA and a fitting nvcc and cuBLAS are found; otherwise left out, with the reason kept
#   ON       built, or a fatal error with the same reason
#   OFF      not built
#   COMPILE  compiled to object files only, against the headers of any torch, a CPU one too: what a machine without a
#            GPU (CI) can check. Nothing of it is linked or installed.
# Decided by torch.version.cuda and nvcc, never by torch.cuda.is_available(): that is false while an image is built.
#
# Sets in the caller: JANUS_BUILD_CUDA, JANUS_CUDA_REASON (a sentence if not built), and for the compiler
# CMAKE_CUDA_COMPILER, CMAKE_CUDA_ARCHITECTURES, JANUS_CUDA_INCLUDES, JANUS_CUBLAS_LIBRARY.

set(JANUS_NATIVE_ARCHITECTURES 75 80 86 89 90 100 120)
cmake_path(GET JANUS_TORCH_ROOT PARENT_PATH JANUS_SITE_PACKAGES)

# Absolute path of an nvcc: the user's choice, PATH, the usual toolkit folder, NVIDIA's Python packages.
function(janus_find_nvcc result)
  unset(nvcc)
  find_program(nvcc NAMES "${CMAKE_CUDA_COMPILER}" "$ENV{CUDACXX}" nvcc NO_CACHE
    HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin"
    PATHS /usr/local/cuda/bin "${JANUS_SITE_PACKAGES}/nvidia/cu13/bin")
  set(${result} "${nvcc}" PARENT_SCOPE)
endfunction()

# "13.0" of "Cuda compilation tools, release 13.0, V13.0.88"
function(janus_nvcc_version nvcc result)
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" unused "${text}")
  set(${result} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

# Those of our architectures that this nvcc knows, the last one with PTX for the cards to come.
function(janus_native_architectures nvcc result)
  execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE text ERROR_QUIET)
  string(REGEX MATCHALL "[0-9]+" known "${text}")
  set(architectures ${JANUS_NATIVE_ARCHITECTURES})
  foreach(architecture IN LISTS JANUS_NATIVE_ARCHITECTURES)
    if(NOT architecture IN_LIST known)
      list(REMOVE_ITEM architectures ${architecture})
    endif()
  endforeach()
  list(POP_BACK architectures newest)
  list(TRANSFORM architectures APPEND "-real")
  set(${result} ${architectures} ${newest} PARENT_SCOPE)
endfunction()

# Why the CUDA ops cannot be built here, or an empty string. The cheap questions come first.
function(janus_cuda_obstacle result nvcc nvcc_version)
  string(REGEX MATCH "^[0-9]+" torch_major "${JANUS_TORCH_CUDA}")
  string(REGEX MATCH "^[0-9]+" nvcc_major "${nvcc_version}")
  set(reason "")
  if(JANUS_CUDA STREQUAL "OFF")
    set(reason "the CUDA ops were switched off when this library was built (JANUS_CUDA=OFF)")
  elseif(NOT JANUS_TORCH_CUDA AND NOT JANUS_CUDA STREQUAL "COMPILE")
    set(reason "torch ${JANUS_TORCH_VERSION} was built without CUDA: install a CUDA build of torch, then janus-ext again")
  elseif(NOT nvcc)
    set(reason "no nvcc was found: install the CUDA toolkit ${JANUS_TORCH_CUDA}, or point CUDACXX at its nvcc")
  elseif(NOT nvcc_version)
    set(reason "${nvcc} --version prints no release: point CUDACXX at the nvcc of a CUDA toolkit")
  elseif(JANUS_TORCH_CUDA AND NOT torch_major EQUAL nvcc_major)
    set(reason "${nvcc} is of CUDA ${nvcc_version}, but torch ${JANUS_TORCH_VERSION} was built with CUDA ${JANUS_TORCH_CUDA}: point CUDACXX at an nvcc ${torch_major}.x")
  endif()
  set(${result} "${reason}" PARENT_SCOPE)
endfunction()

# cuBLAS (and what ATen/cuda/CUDAContext.h includes besides): from the toolkit, else from NVIDIA's Python packages.
function(janus_find_cublas nvcc_version)
  string(REGEX MATCH "^[0-9]+" major "${nvcc_version}")
  set(toolkit ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  set(wheels "${JANUS_SITE_PACKAGES}/nvidia/cu${major}")
  set(old_wheels "${JANUS_SITE_PACKAGES}/nvidia")    # one folder a library, before CUDA 13
  set(includes ${toolkit})
  set(packages cublas cusolver cusparse)
  set(headers cublas_v2.h cusolverDn.h cusparse.h)
  foreach(package header IN ZIP_LISTS packages headers)
    unset(folder)
    find_path(folder ${header} NO_CACHE NO_DEFAULT_PATH PATHS
      ${JANUS_CUBLAS_INCLUDE} ${toolkit} "${wheels}/include" "${old_wheels}/${package}/include")
    if(NOT folder)
      set(JANUS_CUDA_REASON "${header} was not found: install the whole CUDA toolkit, or `pip install nvidia-${package}`, or give its folder as JANUS_CUBLAS_INCLUDE" PARENT_SCOPE)
      return()
    endif()
    list(APPEND includes "${folder}")
  endforeach()
  list(REMOVE_DUPLICATES includes)
  unset(cublas)
  find_library(cublas NAMES "libcublas.so.${major}" cublas NO_CACHE
    PATHS "${wheels}/lib" "${old_wheels}/cublas/lib" ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
  if(NOT cublas AND NOT JANUS_CUDA STREQUAL "COMPILE")
    set(JANUS_CUDA_REASON "libcublas.so.${major} was not found: install the whole CUDA toolkit, or `pip install nvidia-cublas`" PARENT_SCOPE)
  endif()
  set(JANUS_CUDA_INCLUDES "${includes}" PARENT_SCOPE)
  set(JANUS_CUBLAS_LIBRARY "${cublas}" PARENT_SCOPE)
endfunction()

macro(janus_find_cuda)
  if(NOT JANUS_CUDA MATCHES "^(AUTO|ON|OFF|COMPILE)$")
    message(FATAL_ERROR "JANUS_CUDA is AUTO, ON, OFF or COMPILE, not '${JANUS_CUDA}'.")
  endif()
  janus_find_nvcc(janus_nvcc)
  if(janus_nvcc)
    janus_nvcc_version("${janus_nvcc}" janus_nvcc_version)
  endif()
  janus_cuda_obstacle(JANUS_CUDA_REASON "${janus_nvcc}" "${janus_nvcc_version}")
  if(NOT JANUS_CUDA_REASON)
    set(ENV{CUDACXX} "${janus_nvcc}")
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      janus_native_architectures("${janus_nvcc}" CMAKE_CUDA_ARCHITECTURES)
    endif()
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      enable_language(CUDA)
      set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
      janus_find_cublas("${janus_nvcc_version}")
    else()
      set(JANUS_CUDA_REASON "${janus_nvcc} does not build a test program with ${CMAKE_CXX_COMPILER} ${CMAKE_CXX_COMPILER_VERSION}: name another host compiler in CUDAHOSTCXX, or install a whole CUDA toolkit")
    endif()
  endif()
  set(JANUS_BUILD_CUDA ON)
  if(JANUS_CUDA_REASON)
    set(JANUS_BUILD_CUDA OFF)
    if(JANUS_CUDA MATCHES "^(ON|COMPILE)$")
      message(FATAL_ERROR "JANUS_CUDA=${JANUS_CUDA}: ${JANUS_CUDA_REASON}.")
    endif()
    message(STATUS "janus-ext: CPU ops only; ${JANUS_CUDA_REASON}")
  elseif(JANUS_CUDA STREQUAL "COMPILE")
    set(JANUS_BUILD_CUDA OFF)
    set(JANUS_CUDA_REASON "the CUDA sources were only compiled, not linked (JANUS_CUDA=COMPILE)")
  endif()
endmacro()

# The one generated header that a CPU torch leaves out of its CUDA headers.
function(janus_write_cuda_stub folder)
  file(WRITE "${folder}/c10/cuda/impl/cuda_cmake_macros.h" "#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
endfunction()
