// cuDNN's attention is in a separate shared library, mlx_segtrain/_cudnn.so, because it needs symbols that
// only MLX's CUDA build exports, whereas the main library, _core, must load with every build of MLX.
#pragma once

#include "ops/attention/attention.h"

namespace segtrain {

struct CudnnAttention {
  std::string (*unfit)(const Call&);  ///< returns why cuDNN does not support a call, or ""
  AttentionWay way;
};

/// The type of device_ints in gpu.h. _cudnn.so receives a pointer to device_ints from _core, because it
/// cannot link to _core.
using DeviceInts = mx::array(const std::vector<int32_t>&);

/// Returns whether the package includes the library and the library can be loaded.
bool has_cudnn();

/// Returns the implementation "cudnn". It is ok if the package includes the library, cuDNN supports the call,
/// and the self-check has not failed. The first call for a new shape takes about one second, because it
/// builds the plans for the forward and the backward pass.
Way cudnn_way(const Call& c);

/// Returns why the call cannot run with cuDNN on any device, or an empty string if it may run on some device.
inline std::string cudnn_call_unfit(const Call& c) {
  if (c.dtype != mx::float16 && c.dtype != mx::bfloat16) return "cuDNN supports half precision only";
  if (c.window || c.cap || c.T != c.S)
    return "it supports only causal calls without window or cap, with T = S";
  if (c.T < 128)
    return "it needs at least 128 queries, because for fewer, building a plan takes more time than cuDNN "
           "saves";
  bool fits = c.D % 8 == 0 && c.Dv % 8 == 0 && c.D <= 256 && c.Dv <= 256;
  return fits ? "" : "it supports head sizes in multiples of 8 up to 256";
}

/// Returns the functions of the implementation. Call this only if the result of cudnn_way is ok.
const AttentionWay& cudnn_attention();

}  // namespace segtrain

/// The library's entry point, which is looked up by name.
extern "C" const segtrain::CudnnAttention* segtrain_cudnn_attention(segtrain::DeviceInts* device_ints);
