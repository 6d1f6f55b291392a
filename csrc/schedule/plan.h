// Describes the order of a segmented backward pass as data. This code uses names instead of arrays, so it
// needs only the standard library.
#pragma once

#include <string>
#include <vector>

namespace segtrain {

/// Describes a stage for the plan: the boundary values that it reads and writes (it may write a new version
/// of a value), and whether it has parameters.
struct StageSpec {
  std::string name;
  std::vector<std::string> reads;
  std::vector<std::string> writes;
  bool trainable;
};

/// A stage whose names are resolved to indices into Plan::values, in the order of its spec.
struct Stage {
  std::string name;
  std::vector<int> reads, writes;
};

/// One version of a boundary value. For example, `h@layers.3` is the `h` that stage `layers.3` writes, and
/// `h@input` is the input `h`.
struct Value {
  std::string version;  ///< name@producer
  int producer;         ///< index of the stage that writes it; -1 for an input
  bool differentiable;  ///< depends on a parameter, so a cotangent must reach it
  std::vector<int>
      readers;  ///< stages that read it, in order, once per read; the head counts as the last stage
};

/// A step of the plan over stages [begin, end). Values are indices into Plan::values.
struct Move {
  enum class Kind {
    forward,  ///< run the stages; keep `writes`, but no intermediate arrays
    /// run the last segment and the head, keep all intermediate arrays, and run the backward pass of both
    head,
    backward,  ///< run the stages again, then their backward passes with the cotangents of `writes`
  };
  Kind kind;
  int begin;
  int end;
  std::vector<int> reads = {};  ///< boundary values that the move needs
  /// values that the move computes; in a backward move, the values whose cotangents it needs
  std::vector<int> writes = {};
  std::vector<int> cotangents = {};  ///< the differentiable `reads`, whose cotangents the move computes
  /// values that are not needed after the move, or that are recomputed before they are needed again
  std::vector<int> drops = {};
  /// stages that save arrays in this move; the next time such a stage runs, it uses them in its backward pass
  std::vector<int> saves = {};

  // Offloading to host memory. It never changes what a move computes.
  std::vector<int> offloads = {};      ///< `writes` of which a copy goes to host memory after the move
  std::vector<int> leaves = {};        ///< values whose device memory is freed after the move
  std::vector<int> returns = {};       ///< values that are copied back before the move
  std::vector<int> saves_leave = {};   ///< the `saves` whose arrays go to host memory after the move
  std::vector<int> saves_return = {};  ///< stages whose saved arrays are copied back before the move
};

bool contains(const std::vector<int>& list, int value);

/// Returns one past the index of the last stage of a move; the head counts as a stage.
int end_of(const Move& move);

/// The chain with its names resolved, and the moves over it.
struct Plan {
  std::vector<Value> values;  ///< the inputs, then the values that stages write, both in order
  std::vector<Stage> stages;
  std::vector<int> head_reads;
  std::vector<Move> moves;

  /// Returns how many times stages [begin, end) read a value. The index of the head is one greater than the
  /// index of the last stage.
  int readers(int value, int begin, int end) const;
  /// Returns whether a value has several cotangents, which are then added in float32.
  bool is_summed(int value) const { return values[value].readers.size() > 1; }
};

/// Where the chain is cut. The stages between two cuts are a segment; consecutive segments form groups.
struct Cuts {
  /// one past the last stage of each segment, in ascending order up to the number of stages
  std::vector<int> segments;
  /// one past the last segment of each group, in ascending order up to the number of segments
  std::vector<int> groups;
  std::vector<int> saves = {};  ///< stages that save arrays in the last run before their backward pass
  /// The values and arrays that the first `offloaded` stages write and save are in host memory while no move
  /// needs them, unless a move needs them again soon.
  int offloaded = 0;
};

/// Returns the plan for these cuts. It keeps the boundary values between groups. During a group's backward
/// pass, it also keeps the boundary values between the segments of this group.
///
/// The last segment runs together with the head and is never recomputed; it may have no stage. A group of
/// several segments is run forward once more to recompute the values between its segments, except for the
/// last group, which keeps these values. Segments that do not depend on any parameter have no backward pass.
/// A value is dropped after the last move that needs it. The `incoming` inputs depend on parameters of stages
/// before this chain, so the plan computes the cotangents of these inputs. Throws std::invalid_argument if
/// the cuts are not ascending or do not end at the end of the chain, or if a stage reads a name that is
/// neither an input nor written by an earlier stage.
Plan make_plan(const std::vector<StageSpec>& stages, const std::vector<std::string>& inputs,
               const std::vector<std::string>& head_reads, const Cuts& cuts,
               const std::vector<std::string>& incoming = {});

/// Returns one line per move, for messages and tests, such as "backward 2:4 reads h@b; takes h@d; gives h@b;
/// drops h@b".
std::vector<std::string> describe(const Plan& plan);

}  // namespace segtrain
