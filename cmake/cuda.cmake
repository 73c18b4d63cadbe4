# nybble/_cuda: machine code for sm_80 and sm_90a (wgmma exists there alone), PTX that newer GPUs' drivers compile.
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

pybind11_add_module(_cuda NO_EXTRAS
  csrc/bindings/cuda.cpp
  csrc/bindings/status.cpp
  csrc/core/check.cpp
  csrc/cuda/choose.cpp
  csrc/cuda/device.cu
  csrc/cuda/quantize_4bit.cu
  csrc/cuda/quantize_8bit.cu
  csrc/cuda/dequantize.cu
  csrc/cuda/linear_small_m.cu
  csrc/cuda/linear_mma.cu
  csrc/cuda/linear_wgmma.cu
  csrc/cuda/linear_fp32.cu
  csrc/cuda/linear_int8.cu
  csrc/cuda/optimizer.cu)
target_include_directories(_cuda PRIVATE csrc)
target_compile_definitions(_cuda PRIVATE NYBBLE_CUDA_MODULE=_cuda)
# The codec's bits are a file format: no multiply and add may be fused but where the text says so.
target_compile_options(_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU,Clang>>:-Wall -Wextra -ffp-contract=off>)
set_target_properties(_cuda PROPERTIES
  CUDA_ARCHITECTURES "80-real;90a-real;80-virtual"
  CUDA_RUNTIME_LIBRARY Static)
install(TARGETS _cuda LIBRARY DESTINATION nybble)
