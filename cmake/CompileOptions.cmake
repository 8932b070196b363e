# Warnings and sanitizers of every target, as janus::options; with the link rules of the op libraries, janus::ops_options.

add_library(janus_options INTERFACE)
add_library(janus::options ALIAS janus_options)

target_compile_options(janus_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra;--expt-relaxed-constexpr>)
if(JANUS_WERROR)
  target_compile_options(janus_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Werror>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Werror;--Werror=all-warnings>)
endif()

# A missing symbol is an error of the link, not of the first import; what torch's own libraries need is their business.
# Not so for _C, whose Python symbols come from the interpreter, and under a sanitizer, whose runtime is put in front of
# Python with LD_PRELOAD.
add_library(janus_ops_options INTERFACE)
add_library(janus::ops_options ALIAS janus_ops_options)
target_link_libraries(janus_ops_options INTERFACE janus_options)
if(NOT JANUS_SANITIZE)
  target_link_options(janus_ops_options INTERFACE LINKER:-z,defs LINKER:--allow-shlib-undefined)
endif()

if(JANUS_SANITIZE)
  target_compile_options(janus_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=address,undefined;-fno-omit-frame-pointer;-g>)
  target_link_options(janus_options INTERFACE -fsanitize=address,undefined)
endif()

find_program(JANUS_CCACHE ccache)
if(JANUS_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER "${JANUS_CCACHE}")
endif()
