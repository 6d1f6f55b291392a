// Estimates the memory and work of a plan, and chooses the plan with the least work within a memory budget.
// It handles sizes instead of arrays, and so needs only the standard library.
#pragma once

#include <cstdint>

#include "schedule/plan.h"

namespace segtrain {

/// Bytes and floating-point operations of a stage at one batch shape. The bytes do not include the stage's
/// reads and the cotangents that arrive.
struct StageCost {
  std::vector<int64_t> writes;  ///< bytes of each value that it writes
  int64_t forward = 0;          ///< peak during its forward pass, including its writes
  int64_t backward = 0;   ///< peak while it is run again for its backward pass, including its cotangents
  int64_t kept = 0;       ///< the part of `backward` that is held between the two passes
  int64_t saved = 0;      ///< bytes that it can save for its backward pass; 0: it cannot save
  int64_t gradients = 0;  ///< bytes of its parameters' gradients
  double forward_work = 0;
  double again_work = 0;  ///< work of recomputation; it omits the last product, which only later stages need
  double saved_work = 0;  ///< the part of `again_work` that saved arrays make unnecessary
  double backward_work = 0;
};

/// A chain of stages with everything that a plan for it depends on.
struct Costs {
  std::vector<StageSpec> stages;
  std::vector<std::string> inputs, head_reads;
  std::vector<int64_t> input_bytes;        ///< bytes of each input
  std::vector<std::string> incoming = {};  ///< inputs that depend on parameters of other stages
  std::vector<int> layers;                 ///< one past the last stage of each layer
  std::vector<StageCost> costs;            ///< cost of each stage
  int64_t head = 0;                        ///< peak while the head runs
  int64_t ahead = 0;  ///< allocated meanwhile for the backward passes that follow in the same move
  double head_work = 0;
  int64_t fixed = 0;   ///< weights, factors, optimizer state: always in memory
  int64_t update = 0;  ///< peak beyond `fixed` during the optimizer's update, including gradients
  double widened = 1;  ///< bytes of a cotangent to which several segments add, relative to those of its value
  int under_way = 1;   ///< batches that have run forward and wait for their cotangents, including this one
};

/// Bytes that are alive at the peak of a move, by kind.
struct Alive {
  int64_t values = 0;      ///< boundary values
  int64_t saved = 0;       ///< arrays that stages have saved for their backward pass
  int64_t cotangents = 0;  ///< cotangents of boundary values
  int64_t gradients = 0;   ///< gradients of parameters, so far
  int64_t working = 0;     ///< arrays inside the stages of the move

  int64_t total() const { return values + saved + cotangents + gradients + working; }
};

struct Estimate {
  std::vector<Alive> moves;  ///< bytes beyond `fixed` at the peak of each move
  int64_t peak = 0;          ///< peak of the whole step, including `fixed` and the optimizer's update
  double work = 0;
  double again = 0;  ///< the part of `work` that is recomputation
};

/// Estimates the bytes and work of a plan. Throws std::invalid_argument if the costs do not match its stages.
Estimate estimate(const Plan& plan, const Costs& costs);

struct Choice {
  Cuts cuts;
  Estimate estimate;
};

/// Returns the cuts with the least work whose peak is at most `budget`, or else those with the least peak.
///
/// It tries segments of one layer or of one stage. The values between them are kept, or the segments are put
/// into groups that are run again: either all of them, or only as many as necessary. In each case, as
/// many of the last layers as fit are kept whole, and as many stages as fit save, first those that avoid the
/// most work per byte.
Choice choose_cuts(const Costs& costs, int64_t budget);

/// Returns the least peak of cuts that keep little. It is close to that of choose_cuts with a budget of 0,
/// and faster to compute.
int64_t least_peak(const Costs& costs);

}  // namespace segtrain
