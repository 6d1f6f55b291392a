// Launches of compiled kernels on MLX's CUDA stream.
#pragma once

#include "core/gpu.h"

namespace segtrain {

/// A kernel compiled for this device.
struct CudaBinary {
  std::string name, binary;
};

/// Inputs of a kernel that all its launches share. They are evaluated and contiguous, so a launch has no
/// other inputs than its own and `keeper`, which keeps them alive for as long as MLX keeps a launch's inputs.
/// MLX visits each input several times, for its order, its lifetime and the edges of the CUDA graph.
struct FixedInputs {
  FixedInputs(Arrays all, std::vector<size_t> open);
  Arrays inputs;             ///< all of the kernel; those in the places `open` are replaced by a launch's own
  std::vector<size_t> open;  ///< in the order in which a launch has them
  mx::array keeper;
};

/// Like mx::fast::precompiled_cuda_kernel, which copies the binary at each launch and hashes it to find the
/// loaded kernel; this function does neither. `binary` must live as long as the process.
/// With `fixed`, `inputs` are those of its open places, the kernel has one output, and the returned arrays
/// are consecutive parts of it. This takes one allocation, which is freed with the last of the arrays.
Arrays cuda_launch(const CudaBinary& binary, Arrays inputs, std::vector<mx::Shape> shapes,
                   std::vector<mx::Dtype> dtypes, const Grid& grid, mx::StreamOrDevice s,
                   std::shared_ptr<const FixedInputs> fixed = nullptr);

}  // namespace segtrain
