// Code shared by the ops of a head. They never hold the logits of all rows.
#pragma once

#include "ops/head/cpu.h"
#include "ops/linear/base.h"

namespace segtrain {

/// The checked arguments of a call; `targets` are cast to int32.
struct HeadCall {
  Base head;
  mx::array targets;
  int M;
  float cap;  ///< 0: none
  mx::StreamOrDevice s;

  HeadCall(const std::string& op, const mx::array& h, const Base& head, const mx::array& targets,
           std::optional<float> softcap, mx::StreamOrDevice s);
};

/// The inputs of a cpu_op that all kernels of a head have in common, and functions to read them in its
/// kernel.
struct HeadKernel {
  Arrays arrays;  ///< the caller moves them out, so that the op does not keep h alive
  CpuBase base;
  int m;
  float cap;
  bool bias;

  HeadKernel(const HeadCall& call, const mx::array& h);
  cpu::Weight weight(const Inputs& in) const { return base.weight(in, 2); }
  cpu::HeadInput input(const Inputs& in) const;
};

/// Rows [begin, end) of a blocked pass.
struct RowBlock {
  int begin, end;
  mx::array z;       ///< [rows, V] float32, capped
  mx::array counts;  ///< [rows, 1]: target ≥ 0
  mx::array target;  ///< [rows, 1], 0 where it does not count
  mx::array onehot;  ///< [rows, V]
};

/// Calls `use` with each block of rows in turn. What it returns is computed before the next block's logits.
void for_each_block(const HeadCall& call, const mx::array& h,
                    const std::function<Arrays(const RowBlock&)>& use);

/// The part of x [M] that belongs to a block, as a column.
mx::array column(const mx::array& x, const RowBlock& block, mx::StreamOrDevice s);

/// (dz·cap'(z))·W in float32, where dz [rows, V] is the gradient with respect to the capped logits.
mx::array block_dh(const HeadCall& call, mx::array dz, const RowBlock& block, mx::Dtype dtype);

/// The loss lse(z) − z[target] of each row, [M] float32, in one pass over tiles of the vocabulary on CUDA
/// (cuda/head.cu). If `needs_grad`, the pass also computes dh.
mx::array row_losses(const HeadCall& call, const mx::array& h, bool needs_grad);
/// Why row_losses does not support a call; empty if it does.
std::string row_losses_unfit(const HeadCall& call, const mx::array& h);

/// The indices of the rows with a target; nullopt if all rows are used: nothing is `padded`, every row has a
/// target, or MLX is tracing, so that the targets cannot be read. For padded targets the host waits until
/// they are computed, and so for all work that was launched before.
std::optional<mx::array> rows_with_target(const HeadCall& call, bool padded);
/// The call restricted to these rows.
HeadCall some_rows(HeadCall call, const mx::array& index);

}  // namespace segtrain
