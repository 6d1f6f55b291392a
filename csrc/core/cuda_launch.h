// Launches of compiled kernels on MLX's CUDA stream.
#pragma once

#include "core/gpu.h"

namespace segtrain {

/// A kernel compiled for this device.
struct CudaBinary {
  std::string name, binary;
};

/// Like mx::fast::precompiled_cuda_kernel, which copies the binary at each launch and hashes it to find the
/// loaded kernel; this function does neither. `binary` must live as long as the process.
/// With `joined` the kernel has one output, and the returned arrays are consecutive parts of it. This takes
/// one allocation, which is freed with the last of the arrays.
Arrays cuda_launch(const CudaBinary& binary, const Arrays& inputs, std::vector<mx::Shape> shapes,
                   std::vector<mx::Dtype> dtypes, const Grid& grid, mx::StreamOrDevice s,
                   bool joined = false);

}  // namespace segtrain
