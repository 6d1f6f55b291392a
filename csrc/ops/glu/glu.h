// Gated linear units on CUDA whose input is one array, the result of a single matrix product, with gate and
// up side by side.
#pragma once

#include "core/kernel.h"

namespace segtrain {

/// gate_up [rows, 2·f] → [rows, f].
mx::array glu_joint(bool gelu, const mx::array& gate_up, mx::StreamOrDevice s);

/// Returns the gradient of gate_up, [rows, 2·f], for the cotangent dh [rows, f].
mx::array glu_joint_vjp(bool gelu, const mx::array& gate_up, const mx::array& dh, mx::StreamOrDevice s);

}  // namespace segtrain
