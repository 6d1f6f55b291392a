// cuDNN's attention lives in a shared library of its own, mlx_segtrain/_cudnn.so: only where MLX drives CUDA
// are the symbols there that it needs, and the rest of the package must load everywhere.
#pragma once

#include "ops/attention/attention.h"

namespace segtrain {

struct CudnnAttention {
  std::string (*unfit)(const Call&);  ///< why it cannot serve a call; empty if it can
  AttentionWay way;
};

/// That of gpu.h: the library cannot link the core.
using DeviceInts = mx::array(const std::vector<int32_t>&);

/// Does the package have the library, and does it load?
bool has_cudnn();

/// "cudnn": serves if the package has the library, cuDNN takes the call, and the self-check did not fail.
/// Asking takes a second for a new shape: both directions are planned.
Way cudnn_way(const Call& c);

/// Why cuDNN takes no such call on any device; empty if it may.
inline std::string cudnn_call_unfit(const Call& c) {
  if (c.dtype != mx::float16 && c.dtype != mx::bfloat16) return "cuDNN takes half precision only";
  if (c.window || c.cap || c.T != c.S) return "it is for causal calls without window or cap, with T = S";
  if (c.T < 128) return "it takes 128 queries or more: to plan for fewer costs more than it gains";
  bool fits = c.D % 8 == 0 && c.Dv % 8 == 0 && c.D <= 256 && c.Dv <= 256;
  return fits ? "" : "its head sizes are multiples of 8 up to 256";
}

/// The implementation, where cudnn_way is ok.
const AttentionWay& cudnn_attention();

}  // namespace segtrain

/// What the library defines; found by name.
extern "C" const segtrain::CudnnAttention* segtrain_cudnn_attention(segtrain::DeviceInts* device_ints);
