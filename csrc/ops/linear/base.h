// Products with a frozen weight, dense or quantized, on either kind of device.
#pragma once

#include "core/gpu.h"
#include "ops/linear/cpu.h"

namespace segtrain {

/// Throws unless the base's arrays fit one another.
void check_base(const std::string& op, const Base& base);

void check_linear(const std::string& op, const Linear& linear);

/// What such an op is differentiated by: x, and a and b of the linears that have them.
Arrays primals_of(const mx::array& x, const std::vector<Linear>& linears);

/// A base as the CPU kernels take it: `arrays` are inputs of a cpu_op, from `first` on of all.
struct CpuBase {
  Arrays arrays;
  int bits, group, n, k;
  bool dense, affine;

  explicit CpuBase(const Base& base);
  cpu::Weight weight(const Inputs& in, int first) const;
};

/// Up to three weights of one kind below one another as [n, k] of `dtype` on CUDA, with `columns` [n, R]
/// beside them and `rows` [R, k] below: cuda/dequantize.cu.
mx::array unpack(const std::vector<Base>& bases, mx::Dtype dtype, const std::optional<mx::array>& columns,
                 const std::optional<mx::array>& rows, mx::StreamOrDevice s);
/// A weight as the kernels of cuda/dequantize.cu take a single one.
struct UnpackTable {
  std::map<std::string, mx::array> values;
  Template arguments;
};
UnpackTable unpack_table(const Base& base, mx::Dtype dtype);
/// Why they cannot; empty if they can.
std::string unpack_unfit(const std::vector<Base>& bases, mx::Dtype dtype);

/// x·Wᵀ, or x·W if not transposed; x [..., in] or [..., out]. MLX's own ops.
mx::array stock_product(const mx::array& x, const Base& base, bool transpose, mx::StreamOrDevice s);

}  // namespace segtrain
