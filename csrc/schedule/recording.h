// Keeps the graphs of stages from one step to the next. If a batch has only a few hundred rows, the host
// takes longer to trace a stage (in Python, with checks and derivatives) than a GPU takes to run it.
// Rebuilding the graph is faster than tracing the stage again.
#pragma once

#include <map>
#include <memory>

#include "segtrain.h"

namespace segtrain {

/// A graph without its inputs.
class Recording {
 public:
  /// Records the graph that computes `outputs` from `inputs`.
  Recording(const Arrays& inputs, const Arrays& outputs);

  /// Builds the same graph for other inputs of the same shapes and types.
  Arrays operator()(const Arrays& inputs) const;

  /// Returns whether both recordings compute the same function: whether they have the same constants and, as
  /// far as primitives can be compared, the same primitives. Arrays that a function reads in addition to its
  /// inputs are recorded as constants, so use a recording only after comparing it with the recording of
  /// another call of the function.
  bool alike(const Recording& other) const;

 private:
  /// An op. Its inputs are indices into all arrays of the graph: the graph's inputs, then the constants, then
  /// the outputs of the ops in order.
  struct Op {
    std::shared_ptr<mx::Primitive> primitive;
    std::vector<int> inputs;
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
  };

  size_t n_inputs_;
  Arrays constants_;
  std::vector<Op> ops_;
  std::vector<int> outputs_;
};

/// Recordings, keyed by strings that identify equivalent calls. The second call with a key is recorded and
/// compared with the third; if the two recordings are alike, later calls replay one of them. The first call
/// is not recorded, because it may evaluate arrays that are kept for later calls.
class Recordings {
 public:
  /// Returns the recording for calls with this key, or nullptr if none can be used yet.
  const Recording* find(const std::string& key) const;
  /// Registers a traced call. This must be called with the inputs and outputs of each traced call.
  void see(const std::string& key, const Arrays& inputs, const Arrays& outputs);

 private:
  /// The maximum number of keys, which is enough for several batch shapes of all stages of a model.
  static constexpr size_t MOST = 1024;

  struct Entry {
    int calls = 0;
    std::shared_ptr<Recording> recording;
    bool ready = false;
  };
  std::map<std::string, Entry> entries_;
};

/// Appends the dtype and shape of an array to a key.
void add_form(std::string& key, const mx::array& x);

}  // namespace segtrain
