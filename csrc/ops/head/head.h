// What the ops of a head have in common: they never hold logits of all rows.
#pragma once

#include "ops/head/cpu.h"
#include "ops/linear/base.h"

namespace segtrain {

/// Checks and casts. `targets` come out as int32.
struct HeadCall {
  Base head;
  mx::array targets;
  int M;
  float cap;  ///< 0: none
  mx::StreamOrDevice s;

  HeadCall(const std::string& op, const mx::array& h, const Base& head, const mx::array& targets,
           std::optional<float> softcap, mx::StreamOrDevice s);
};

/// The inputs of a cpu_op that every kernel of a head takes, and a way to read them there.
struct HeadKernel {
  Arrays arrays;  ///< to be taken out, since an op that kept them would keep h
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

/// Calls `use` with each block of rows in turn. What it returns is made before the next block's logits are.
void for_each_block(const HeadCall& call, const mx::array& h,
                    const std::function<Arrays(const RowBlock&)>& use);

/// x [M] as a column, the part of a block.
mx::array column(const mx::array& x, const RowBlock& block, mx::StreamOrDevice s);

/// dz·W·cap'(z) in float32, for dz [rows, V] with respect to capped logits.
mx::array block_dh(const HeadCall& call, mx::array dz, const RowBlock& block, mx::Dtype dtype);

/// The loss lse(z) − z[target] of each row, [M] float32, by one pass over tiles of the vocabulary on CUDA, in
/// which dh is formed too if `needs_grad`: cuda/head.cu.
mx::array row_losses(const HeadCall& call, const mx::array& h, bool needs_grad);
/// Why it cannot; empty if it can.
std::string row_losses_unfit(const HeadCall& call, const mx::array& h);

/// The rows with a target, as indices; none if that is all of them, as where nothing is
/// `padded`, or while the targets cannot be read. The host waits for padded targets, and so for all that the
/// device was given before.
std::optional<mx::array> rows_with_target(const HeadCall& call, bool padded);
/// The call with these rows only.
HeadCall some_rows(HeadCall call, const mx::array& index);

}  // namespace segtrain
