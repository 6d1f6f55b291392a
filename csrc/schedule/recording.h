// Keeps the graphs of stages from one step to the next. If a batch has only a few hundred rows, the host
// needs longer to trace a stage (in Python, with checks and derivatives) than a GPU needs to run it.
// Rebuilding the graph of the stage is faster than tracing it.
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

  /// Returns whether both recordings compute the same function: they must have the same constants and the
  /// same primitives (as far as primitives can be compared). Arrays that a function reads besides its inputs
  /// are recorded as constants, so a recording may be used only after two calls of the function have been
  /// compared.
  bool alike(const Recording& other) const;

 private:
  /// An op. Its inputs are indices into all arrays of the graph: first the graph's inputs, then the
  /// constants, then the outputs of the ops in order.
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

/// Recordings by a key that distinguishes calls. The second call with a key is recorded and compared with the
/// third; if the two are alike, the recording is used from then on. The first call is not recorded, because
/// it may evaluate arrays that are kept for later calls.
class Recordings {
 public:
  /// Returns the recording for calls with this key, or nullptr as long as none can be used.
  const Recording* find(const std::string& key) const;
  /// Must be called with the inputs and outputs of each call that was traced.
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
