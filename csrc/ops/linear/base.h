// Matrix products with a frozen weight, dense or quantized, on CPUs and GPUs.
#pragma once

#include "core/gpu.h"
#include "ops/linear/cpu.h"

namespace segtrain {

/// Throws an exception if the shapes or dtypes of the base's arrays do not match.
void check_base(const std::string& op, const Base& base);

void check_linear(const std::string& op, const Linear& linear);

/// Returns the arrays for which an op of linear layers computes gradients: x, and a and b of each layer that
/// has these factors.
Arrays primals_of(const mx::array& x, const std::vector<Linear>& linears);

/// A base in the form that CPU kernels use. `arrays` are consecutive inputs of a cpu_op, the first of which
/// has the index `first`.
struct CpuBase {
  Arrays arrays;
  int bits, group, n, k;
  bool dense, affine, rounded;

  explicit CpuBase(const Base& base);
  cpu::Weight weight(const Inputs& in, int first) const;
};

/// On CUDA, dequantizes up to three weights with the same format and stacks them as [n, k] of `dtype`.
/// `columns` [n, R] are appended at the right, or `rows` [R, k] at the bottom (cuda/dequantize.cu).
mx::array unpack(const std::vector<Base>& bases, mx::Dtype dtype, const std::optional<mx::array>& columns,
                 const std::optional<mx::array>& rows, mx::StreamOrDevice s);
/// The inputs and template arguments of a kernel in cuda/dequantize.cu that reads a single weight.
struct UnpackTable {
  std::map<std::string, mx::array> values;
  Template arguments;
};
UnpackTable unpack_table(const Base& base, mx::Dtype dtype);
/// Returns why the kernels in cuda/dequantize.cu do not support the weights, or an empty string if they do.
std::string unpack_unfit(const std::vector<Base>& bases, mx::Dtype dtype);

/// Returns x·Wᵀ for x [..., in] or, if `transpose` is false, x·W for x [..., out], computed with MLX's ops.
mx::array stock_product(const mx::array& x, const Base& base, bool transpose, mx::StreamOrDevice s);

}  // namespace segtrain
