// Code that is common to the ops of a language-model head. These ops never keep the logits of all rows in
// memory at the same time.
#pragma once

#include "ops/head/cpu.h"
#include "ops/linear/base.h"

namespace segtrain {

/// The checked arguments of a call, with `targets` cast to int32.
struct HeadCall {
  Base head;
  mx::array targets;
  int M;
  float cap;  ///< 0 means no softcap
  mx::StreamOrDevice s;

  HeadCall(const std::string& op, const mx::array& h, const Base& head, const mx::array& targets,
           std::optional<float> softcap, mx::StreamOrDevice s);
};

/// The inputs that the CPU kernels of all head ops have in common, and functions with which a kernel reads
/// them.
struct HeadKernel {
  Arrays arrays;  ///< moved out by the caller, so that the op does not keep h alive
  CpuBase base;
  int m;
  float cap;
  bool bias;

  HeadKernel(const HeadCall& call, const mx::array& h);
  cpu::Weight weight(const Inputs& in) const { return base.weight(in, 2); }
  cpu::HeadInput input(const Inputs& in) const;
};

/// A block of rows [begin, end) in a blocked pass.
struct RowBlock {
  int begin, end;
  mx::array z;       ///< logits [rows, V] float32, after the softcap
  mx::array counts;  ///< [rows, 1]: whether target ≥ 0
  mx::array target;  ///< [rows, 1]; 0 if the row has no target
  mx::array onehot;  ///< [rows, V]
};

/// Calls `use` with each block of rows in turn. The arrays that `use` returns are computed before the next
/// block's logits.
void for_each_block(const HeadCall& call, const mx::array& h,
                    const std::function<Arrays(const RowBlock&)>& use);

/// Returns the part of x [M] that belongs to a block, as a column.
mx::array column(const mx::array& x, const RowBlock& block, mx::StreamOrDevice s);

/// Returns (dz·cap'(z))·W in float32, where dz [rows, V] is the gradient of the logits after the softcap.
mx::array block_dh(const HeadCall& call, mx::array dz, const RowBlock& block, mx::Dtype dtype);

/// Returns the loss lse(z) − z[target] of each row, [M] float32. On CUDA it is computed in one pass over
/// tiles of the vocabulary (cuda/head.cu), which also computes dh if `needs_grad` is set.
mx::array row_losses(const HeadCall& call, const mx::array& h, bool needs_grad);
/// Returns why row_losses does not support a call, or an empty string if it does.
std::string row_losses_unfit(const HeadCall& call, const mx::array& h);

/// Returns the indices of the rows with a target, or nullopt if all rows are used. All rows are used if
/// `padded` is false or if every row has a target. They are also used while MLX is tracing, because the
/// targets cannot be read during tracing. If `padded` is true, the host waits for the targets to be computed,
/// and therefore for all work that was launched earlier.
std::optional<mx::array> rows_with_target(const HeadCall& call, bool padded);
/// Returns the call restricted to these rows.
HeadCall some_rows(HeadCall call, const mx::array& index);

}  // namespace segtrain
