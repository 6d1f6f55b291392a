// Calls CUDA's run-time compiler (NVRTC), which is installed together with MLX's CUDA build.
#pragma once

#include <string>

namespace segtrain {

/// Compiles CUDA C++ for devices of this compute capability (90 means 9.0) and returns the binary. Throws
/// std::runtime_error with the compiler's messages if compilation fails.
std::string compile_cuda(const std::string& name, const std::string& source, int capability);

}  // namespace segtrain
