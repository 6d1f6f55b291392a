// Gated linear units on CUDA, with gate and up side by side in one array, the result of one product.
#pragma once

#include "core/kernel.h"

namespace segtrain {

/// gate_up [rows, 2·f] → [rows, f].
mx::array glu_joint(bool gelu, const mx::array& gate_up, mx::StreamOrDevice s);

/// dgate_up from the cotangent dh [rows, f].
mx::array glu_joint_vjp(bool gelu, const mx::array& gate_up, const mx::array& dh, mx::StreamOrDevice s);

}  // namespace segtrain
