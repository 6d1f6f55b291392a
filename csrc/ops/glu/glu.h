// Gated linear units on CUDA that read gate and up from one array, where a single matrix product has put them
// side by side.
#pragma once

#include "core/kernel.h"

namespace segtrain {

/// gate_up [rows, 2·f] → [rows, f].
mx::array glu_joint(bool gelu, const mx::array& gate_up, mx::StreamOrDevice s);

/// Returns the gradient of gate_up, [rows, 2·f], for the cotangent dh [rows, f].
mx::array glu_joint_vjp(bool gelu, const mx::array& gate_up, const mx::array& dh, mx::StreamOrDevice s);

}  // namespace segtrain
