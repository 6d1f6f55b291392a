// The graphs of stages, kept from one step to the next. For a few hundred rows, the host needs longer to
// trace a stage (Python, checks, derivatives) than a GPU needs to run it. Rebuilding its graph is faster.
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

  /// Whether both recordings compute the same: the same primitives (as far as primitives can be compared) on
  /// the same constants. Arrays that a function reads besides its inputs are recorded as constants, so a
  /// recording may be used only after two calls of the function have been compared.
  bool alike(const Recording& other) const;

 private:
  /// An op. Its inputs are indices of arrays: the graph's inputs, then constants, then outputs of ops in
  /// order.
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

/// Recordings by a key that tells calls apart. The second call with a key is recorded (the first may evaluate
/// arrays that are kept for later calls) and compared with the third; if they are alike, the recording is
/// used from then on.
class Recordings {
 public:
  /// The recording of calls with this key; nullptr as long as there is none to use.
  const Recording* find(const std::string& key) const;
  /// Reports the inputs and outputs of a call that was traced.
  void see(const std::string& key, const Arrays& inputs, const Arrays& outputs);

 private:
  static constexpr size_t MOST = 1024;  ///< enough for several shapes of all stages of a model

  struct Entry {
    int calls = 0;
    std::shared_ptr<Recording> recording;
    bool ready = false;
  };
  std::map<std::string, Entry> entries_;
};

/// Appends the type and shape of an array to a key.
void add_form(std::string& key, const mx::array& x);

}  // namespace segtrain
