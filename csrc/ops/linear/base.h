// Products with a frozen weight, dense or quantized, on CPUs and GPUs.
#pragma once

#include "core/gpu.h"
#include "ops/linear/cpu.h"

namespace segtrain {

/// Throws unless the shapes and types of the base's arrays match.
void check_base(const std::string& op, const Base& base);

void check_linear(const std::string& op, const Linear& linear);

/// The arrays with respect to which an op of linear layers is differentiated: x, and a and b of each layer
/// that has them.
Arrays primals_of(const mx::array& x, const std::vector<Linear>& linears);

/// A base in the form that CPU kernels use. `arrays` are consecutive inputs of a cpu_op; `first` is the index
/// of the first one.
struct CpuBase {
  Arrays arrays;
  int bits, group, n, k;
  bool dense, affine;

  explicit CpuBase(const Base& base);
  cpu::Weight weight(const Inputs& in, int first) const;
};

/// On CUDA, unpacks up to three weights of one kind and stacks them as [n, k] of `dtype`, with `columns` [n,
/// R] appended on the right, or `rows` [R, k] below (cuda/dequantize.cu).
mx::array unpack(const std::vector<Base>& bases, mx::Dtype dtype, const std::optional<mx::array>& columns,
                 const std::optional<mx::array>& rows, mx::StreamOrDevice s);
/// The inputs and template arguments of a kernel of cuda/dequantize.cu that reads a single weight.
struct UnpackTable {
  std::map<std::string, mx::array> values;
  Template arguments;
};
UnpackTable unpack_table(const Base& base, mx::Dtype dtype);
/// Why these kernels do not support the weights; empty if they do.
std::string unpack_unfit(const std::vector<Base>& bases, mx::Dtype dtype);

/// x·Wᵀ, or x·W if not `transpose`, by MLX's ops; x [..., in] or [..., out].
mx::array stock_product(const mx::array& x, const Base& base, bool transpose, mx::StreamOrDevice s);

}  // namespace segtrain
