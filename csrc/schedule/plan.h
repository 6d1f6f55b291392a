// The order of a segmented backward pass, as data. It handles names instead of arrays, and so needs only the
// standard library.
#pragma once

#include <string>
#include <vector>

namespace segtrain {

/// A stage as the plan sees it: which boundary values it reads and (re)writes, and whether it has parameters.
struct StageSpec {
  std::string name;
  std::vector<std::string> reads;
  std::vector<std::string> writes;
  bool trainable;
};

/// A stage with its names resolved: indices into Plan::values, in the order of its spec.
struct Stage {
  std::string name;
  std::vector<int> reads, writes;
};

/// One version of a boundary value: `h` written by stage `layers.3` is `h@layers.3`, an input `h@input`.
struct Value {
  std::string version;       ///< name@producer
  int producer;              ///< index of the stage, -1 for an input
  bool differentiable;       ///< depends on a parameter, so a cotangent must reach it
  std::vector<int> readers;  ///< stages in order, once for each read; the head is the stage after the last
};

/// A step of the plan over stages [begin, end). Values are indices into Plan::values.
struct Move {
  enum class Kind {
    forward,   ///< run the stages; keep `writes`, but no intermediate values
    head,      ///< run the last segment and the head with everything kept, then the backward pass of both
    backward,  ///< run the stages again under vjp, with the cotangents of `writes`
  };
  Kind kind;
  int begin;
  int end;
  std::vector<int> reads = {};       ///< boundary values that it needs
  std::vector<int> writes = {};      ///< values that it computes, or (backward) whose cotangents it needs
  std::vector<int> cotangents = {};  ///< differentiable `reads`, whose cotangents it computes
  std::vector<int> drops = {};       ///< values not needed after the move, or not until they are recomputed
  std::vector<int> saves = {};  ///< stages that save arrays for their backward pass, which is their next run
};

/// One past the last stage that runs in a move; the head counts as a stage.
int end_of(const Move& move);

/// The chain with its names resolved, and the moves over it.
struct Plan {
  std::vector<Value> values;  ///< the inputs, then the values that stages write, both in order
  std::vector<Stage> stages;
  std::vector<int> head_reads;
  std::vector<Move> moves;

  /// How often stages [begin, end) read a value; the head is the stage after the last.
  int readers(int value, int begin, int end) const;
  /// Whether several cotangents arrive at a value; if so, they are added in float32.
  bool is_summed(int value) const { return values[value].readers.size() > 1; }
};

/// Where the chain is cut. The stages between two cuts are a segment; segments may be put into groups.
struct Cuts {
  std::vector<int> segments;  ///< one past the last stage of each segment, ascending to the number of stages
  std::vector<int> groups;  ///< one past the last segment of each group, ascending to the number of segments
  std::vector<int> saves = {};  ///< stages that save arrays in the last run before their backward pass
};

/// Returns the plan that keeps the boundary values of groups, and those of a group's segments during the
/// group's backward pass.
///
/// The last segment runs together with the head and is never recomputed; it may have no stage. A group of
/// several segments is run forward once more to rebuild the values between them, except the last group, which
/// keeps them. Segments that depend on no parameter run forward only. The last move that needs a value drops
/// it. The `incoming` inputs depend on parameters of stages before this chain, so the plan computes their
/// cotangents. Throws std::invalid_argument if the cuts do not ascend to the end of the chain, or a stage
/// reads a name that is neither an input nor written by an earlier stage.
Plan make_plan(const std::vector<StageSpec>& stages, const std::vector<std::string>& inputs,
               const std::vector<std::string>& head_reads, const Cuts& cuts,
               const std::vector<std::string>& incoming = {});

/// One line per move, for people and tests: "backward 2:4 reads h@b; takes h@d; gives h@b; drops h@b".
std::vector<std::string> describe(const Plan& plan);

}  // namespace segtrain
