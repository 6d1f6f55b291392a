// Estimates the memory and work of a plan, and chooses the plan with the least work within a memory budget.
// This code uses sizes instead of arrays, so it needs only the standard library.
#pragma once

#include <cstdint>

#include "schedule/plan.h"

namespace segtrain {

/// The bytes and floating-point operations of a stage for one batch shape. The bytes exclude the values that
/// the stage reads and the cotangents that it receives.
struct StageCost {
  std::vector<int64_t> writes;  ///< bytes of each value that the stage writes
  int64_t forward = 0;          ///< peak during the forward pass, including the values that it writes
  int64_t backward = 0;         ///< peak while the stage is run again for its backward pass, including the
                                ///< cotangents that it computes
  int64_t kept = 0;             ///< the part of `backward` that is kept between the two passes
  int64_t saved = 0;            ///< bytes that the stage can save for its backward pass; 0 if it cannot save
  int64_t gradients = 0;        ///< bytes of the gradients of its parameters
  double forward_work = 0;
  double again_work = 0;  ///< work of recomputation, which omits the last matrix product because only later
                          ///< stages need its result
  double saved_work = 0;  ///< the part of `again_work` that saved arrays make unnecessary
  double backward_work = 0;
};

/// A chain of stages and the costs from which it is planned.
struct Costs {
  std::vector<StageSpec> stages;
  std::vector<std::string> inputs, head_reads;
  std::vector<int64_t> input_bytes;        ///< bytes of each input
  std::vector<std::string> incoming = {};  ///< inputs that depend on parameters of earlier stages
  std::vector<int> layers;                 ///< one past the last stage of each layer
  std::vector<StageCost> costs;            ///< cost of each stage
  int64_t head = 0;                        ///< peak memory while the head runs
  /// bytes allocated while the head runs, for the backward passes that follow in the same move
  int64_t ahead = 0;
  double head_work = 0;
  int64_t fixed = 0;   ///< weights, LoRA factors and optimizer state, which are always in memory
  int64_t update = 0;  ///< peak beyond `fixed` during the optimizer's update, including gradients
  /// size of a cotangent to which several segments add, relative to the size of its value
  double widened = 1;
  /// number of batches, including this one, that have run forward and wait for their cotangents
  int under_way = 1;
  int64_t host = 0;  ///< bytes of host memory that the offloaded arrays of all these batches may use
  /// bytes that are copied to host memory while one unit of work is computed
  double copied = 0;
};

/// The bytes that are in use at the peak of a move, by kind.
struct Alive {
  int64_t values = 0;      ///< boundary values
  int64_t saved = 0;       ///< arrays that stages have saved for their backward pass
  int64_t cotangents = 0;  ///< cotangents of boundary values
  int64_t gradients = 0;   ///< gradients of parameters that have been computed so far
  int64_t working = 0;     ///< arrays inside the stages of the move

  int64_t total() const { return values + saved + cotangents + gradients + working; }
};

struct Estimate {
  std::vector<Alive> moves;  ///< bytes beyond `fixed` at the peak of each move
  int64_t peak = 0;          ///< peak of the whole step, including `fixed` and the optimizer's update
  double work = 0;
  double again = 0;  ///< the part of `work` that is recomputation
  int64_t host = 0;  ///< bytes of arrays that are offloaded to host memory
};

/// Estimates the bytes and work of a plan. Throws std::invalid_argument if the costs do not match its stages.
Estimate estimate(const Plan& plan, const Costs& costs);

struct Choice {
  Cuts cuts;
  Estimate estimate;
};

/// Returns the cuts with the least work whose peak is at most `budget`. If no cuts fit, returns the cuts with
/// the lowest peak.
///
/// The search covers segments of one layer and segments of one stage. For both, it tries three options:
/// keeping all values between segments, putting all segments into groups that are run again, and putting only
/// as many segments as needed into groups. In each case, as many of the last layers as fit keep all of their
/// intermediate arrays. Then as many stages as fit save arrays, starting with the stages that avoid the most
/// work per saved byte.
Choice choose_cuts(const Costs& costs, int64_t budget);

/// Returns the lowest peak among cuts for which no stage saves arrays and at most the last two layers keep
/// their intermediate arrays. It is close to the peak that choose_cuts finds with a budget of 0, and is
/// faster to compute.
int64_t least_peak(const Costs& costs);

}  // namespace segtrain
