// The graphs of stages, kept from one step to the next. For a few hundred rows, to trace a stage (Python,
// checks, derivatives) takes the host longer than a GPU needs to run it; to build its graph again does not.
#pragma once

#include <map>
#include <memory>

#include "segtrain.h"

namespace segtrain {

/// A graph without its inputs.
class Recording {
 public:
  /// That of `outputs` down to `inputs`, which are what it was made of.
  Recording(const Arrays& inputs, const Arrays& outputs);

  /// The same graph of other inputs, of the same shapes and types.
  Arrays operator()(const Arrays& inputs) const;

  /// Whether both compute the same: the same primitives, as far as these can say so, on the same constants.
  /// What a function reads besides its inputs is a constant here, so a function that is to be recorded must
  /// be seen twice.
  bool alike(const Recording& other) const;

 private:
  /// An op. Its inputs are numbers of arrays: inputs first, then constants, then outputs of ops in order.
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

/// Recordings by what tells calls apart. One is made of a key's second call (the first evaluates what is kept
/// for later calls), compared with its third, and used from then on.
class Recordings {
 public:
  /// The recording of a call with this key; nullptr as long as there is none.
  const Recording* find(const std::string& key) const;
  /// A call that was written down.
  void see(const std::string& key, const Arrays& inputs, const Arrays& outputs);

 private:
  static constexpr size_t MOST = 1024;  ///< some shapes of all stages of a model

  struct Entry {
    int calls = 0;
    std::shared_ptr<Recording> recording;
    bool ready = false;
  };
  std::map<std::string, Entry> entries_;
};

/// Adds shape and type of an array to a key.
void add_form(std::string& key, const mx::array& x);

}  // namespace segtrain
