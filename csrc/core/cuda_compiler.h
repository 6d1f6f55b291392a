// CUDA's run-time compiler, which MLX's CUDA build brings along.
#pragma once

#include <string>

namespace segtrain {

/// Compiles CUDA C++ for a device of this compute capability (90: 9.0): the binary of its kernels.
/// Throws std::runtime_error with the compiler's words.
std::string compile_cuda(const std::string& name, const std::string& source, int capability);

}  // namespace segtrain
