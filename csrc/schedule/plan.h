// The order of a segmented backward pass, as data. Knows names, not arrays: only the standard library.
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
  std::string version;  ///< name@producer
  int producer;         ///< index of the stage, -1 for an input
  bool differentiable;  ///< depends on a parameter, so a cotangent must reach it
  std::vector<int>
      readers;  ///< stages in their order, once for each read; the head is the one after the last
};

/// A step of the plan over stages [begin, end). Values are indices into Plan::values.
struct Move {
  enum class Kind {
    forward,   ///< run, keep `writes`, keep nothing of the inside
    head,      ///< run the last segment and the head with everything kept, and go back through both at once
    backward,  ///< run again under vjp with the cotangents of `writes`
  };
  Kind kind;
  int begin;
  int end;
  std::vector<int> reads = {};   ///< boundary values it needs
  std::vector<int> writes = {};  ///< boundary values it makes (forward), or whose cotangents enter (backward)
  std::vector<int> cotangents = {};  ///< the differentiable ones among `reads`: their cotangents come out
  std::vector<int> drops = {};  ///< values that nobody reads after this move, or that are made again first
  std::vector<int> saves =
      {};  ///< stages that save something for their backward pass, the next time they run
};

/// The stage after the last one that runs in a move, the head among them.
int end_of(const Move& move);

/// The chain with its names resolved, and the moves over it.
struct Plan {
  std::vector<Value> values;  ///< the inputs, then what stages write, in the order of both
  std::vector<Stage> stages;
  std::vector<int> head_reads;
  std::vector<Move> moves;

  /// How often stages [begin, end) read a value; the head is the stage after the last.
  int readers(int value, int begin, int end) const;
  /// Whether several cotangents meet at a value: they are added in float32.
  bool is_summed(int value) const { return values[value].readers.size() > 1; }
};

/// Where the chain is cut. Stages between two cuts are a segment; segments may be put into groups.
struct Cuts {
  std::vector<int> segments;    ///< the stage behind each segment, rising to the number of stages
  std::vector<int> groups;      ///< the segment behind each group, rising to the number of segments
  std::vector<int> saves = {};  ///< stages that save something in the last run before their backward pass
};

/// The plan that keeps the boundary values of groups, and of a group's segments while it goes back.
///
/// The last segment is joined to the head and never recomputed; it may have no stage. A group of several
/// segments is run forward once more to rebuild the values between them (but the last group, which keeps
/// them). Segments on which no parameter depends run forward only. The last move that needs a value drops it.
/// Inputs that are `incoming` depend on parameters of stages before these, so a cotangent of each comes out.
/// Throws std::invalid_argument if cuts do not rise to the end, or a stage reads a name that is neither an
/// input nor written before it.
Plan make_plan(const std::vector<StageSpec>& stages, const std::vector<std::string>& inputs,
               const std::vector<std::string>& head_reads, const Cuts& cuts,
               const std::vector<std::string>& incoming = {});

/// One line per move, for people and tests: "backward 2:4 reads h@b; takes h@d; gives h@b; drops h@b".
std::vector<std::string> describe(const Plan& plan);

}  // namespace segtrain
