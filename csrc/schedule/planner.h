// What a plan takes in bytes and work, and the one that takes the least work within a budget. Knows numbers,
// not arrays: only the standard library.
#pragma once

#include <cstdint>

#include "schedule/plan.h"

namespace segtrain {

/// Bytes and floating-point operations of a stage at one batch shape. All bytes but those of values count
/// what is alive beyond the stage's reads and the cotangents that arrive.
struct StageCost {
  std::vector<int64_t> writes;  ///< bytes of each value it writes
  int64_t forward = 0;          ///< most while it runs forward, its writes included
  int64_t backward = 0;         ///< most while it is run again and goes back, its cotangents included
  int64_t kept = 0;             ///< of `backward`, what is between its two passes: everything kept
  int64_t saved = 0;            ///< what it can save for its backward pass; 0: nothing
  int64_t gradients = 0;        ///< of its parameters
  double forward_work = 0;
  double again_work = 0;  ///< forward without the last product, which only what comes next needs
  double saved_work = 0;  ///< of `again_work`, what having saved spares
  double backward_work = 0;
};

/// A chain of stages with all that a plan for it depends on.
struct Costs {
  std::vector<StageSpec> stages;
  std::vector<std::string> inputs, head_reads;
  std::vector<int64_t> input_bytes;        ///< of each input
  std::vector<std::string> incoming = {};  ///< inputs that depend on parameters of other stages
  std::vector<int> layers;                 ///< the stage behind each layer
  std::vector<StageCost> costs;            ///< of each stage
  int64_t head = 0;                        ///< most while the head runs
  int64_t ahead = 0;  ///< allocated meanwhile for what goes back behind it in the same move
  double head_work = 0;
  int64_t fixed = 0;   ///< weights, factors, optimizer: there all the time
  int64_t update = 0;  ///< most beyond `fixed` while the optimizer works, gradients included
  double widened = 1;  ///< a cotangent that several segments add to, over the value's own bytes
  int under_way = 1;   ///< batches that have run forward and wait for their cotangents, the present one too
};

/// What is alive at the peak of a move, by part.
struct Alive {
  int64_t values = 0;      ///< boundary values
  int64_t saved = 0;       ///< by stages for their backward pass
  int64_t cotangents = 0;  ///< of boundary values
  int64_t gradients = 0;   ///< of parameters, so far
  int64_t working = 0;     ///< inside the stages of the move

  int64_t total() const { return values + saved + cotangents + gradients + working; }
};

struct Estimate {
  std::vector<Alive> moves;  ///< beyond `fixed`
  int64_t peak = 0;          ///< of the step, with `fixed` and the optimizer's update
  double work = 0;
  double again = 0;  ///< of `work`, what runs once more
};

/// Bytes and work of a plan. Sizes must fit the plan's stages; std::invalid_argument if they do not.
Estimate estimate(const Plan& plan, const Costs& costs);

struct Choice {
  Cuts cuts;
  Estimate estimate;
};

/// The cuts of least work whose peak is at most `budget`; those of the least peak if none has.
///
/// Tried are segments of a layer, or of a stage, whose values between are kept or in groups that are run
/// again, all layers or only as many as must be; in each, as many of the last layers with everything kept as
/// fit, and as many stages that save, those first where a byte spares most work.
Choice choose_cuts(const Costs& costs, int64_t budget);

/// The least peak of the cuts that keep little: nearly that of choose_cuts at a budget of 0, and quicker.
int64_t least_peak(const Costs& costs);

}  // namespace segtrain
