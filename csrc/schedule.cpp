// Runs a plan over callables. The whole training step passes through run_plan, top to bottom.
#include "kernel.h"
#include "segtrain.h"

namespace segtrain {

namespace {

/// x, n times; the n cotangents are added in float32 and rounded once.
Arrays fan_out(const mx::array& x, int n) {
  if (n <= 1) return {x};
  auto op = mx::custom_vjp([n](const Arrays& in) { return Arrays(n, in[0]); },
                           [](const Arrays& in, const Arrays& dy, const Arrays&) {
                             auto sum = mx::astype(dy[0], mx::float32);
                             for (size_t i = 1; i < dy.size(); ++i)
                               sum = mx::add(sum, mx::astype(dy[i], mx::float32));
                             return Arrays{mx::astype(sum, in[0].dtype())};
                           });
  return op({x});
}

/// The values a segment sees while its stages run one after another, each under its name.
class Scope {
 public:
  /// Gives `value` to `readers` readers to come.
  void define(const std::string& name, const mx::array& value, int readers) {
    copies_[name] = fan_out(value, readers);
  }
  mx::array read(const std::string& name) {
    auto& copies = copies_.at(name);
    auto value = copies.back();
    if (copies.size() > 1) copies.pop_back();
    return value;
  }

 private:
  std::map<std::string, Arrays> copies_;
};

class Runner {
 public:
  Runner(const Plan& plan, const std::vector<StageSpec>& stages, const std::vector<StageFn>& fns,
         const StageFn& head, const std::vector<std::string>& head_reads, const std::vector<Arrays>& params,
         const Arrays& head_params, const Arrays& inputs, const Wait& wait)
      : plan_(plan),
        stages_(stages),
        fns_(fns),
        head_(head),
        head_reads_(head_reads),
        params_(params),
        head_params_(head_params),
        wait_(wait),
        values_(plan.values.size()),
        cotangents_(plan.values.size()) {
    for (size_t i = 0; i < inputs.size(); ++i) values_[i] = inputs[i];
    result_.grads.resize(stages.size());
    for (size_t i = 0; i < stages.size(); ++i)
      for (const auto& p : params[i]) result_.grads[i].push_back(mx::zeros_like(p));
  }

  StepResult run() {
    Arrays running;
    for (const auto& move : plan_.moves) {
      Arrays made;
      switch (move.kind) {
        case Move::Kind::forward:
          made = forward(move);
          break;
        case Move::Kind::head:
          made = with_head(move);
          break;
        case Move::Kind::backward:
          made = backward(move);
          break;
      }
      for (int value : move.drops) values_[value].reset();
      // The move was written down while the one before ran, whose inner arrays die here: that no two run
      // at a time is what bounds memory.
      wait_(running);
      mx::async_eval(made);
      running = std::move(made);
    }
    wait_(running);
    return std::move(result_);
  }

 private:
  Arrays forward(const Move& move) {
    Arrays writes = run_stages(move, params_of(move), reads_of(move), false).writes;
    for (size_t i = 0; i < writes.size(); ++i) values_[move.writes[i]] = writes[i];
    return writes;
  }

  Arrays with_head(const Move& move) {
    size_t n_stage_params = params_of(move).size();
    Arrays primals = params_of(move);
    primals.insert(primals.end(), head_params_.begin(), head_params_.end());
    size_t n_params = primals.size();
    append_differentiable(move, primals);
    auto fn = [&](const Arrays& in) {
      Arrays stage_params(in.begin(), in.begin() + n_stage_params);
      Arrays head_params(in.begin() + n_stage_params, in.begin() + n_params);
      auto scope = run_stages(move, stage_params, merge_reads(move, in, n_params), true).scope;
      Arrays reads;
      for (const auto& name : head_reads_) reads.push_back(scope.read(name));
      return head_(head_params, reads);
    };
    Arrays outputs, grads;
    if (primals.empty()) {
      outputs = fn(primals);
    } else {
      std::vector<int> all(primals.size());
      for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int>(i);
      std::tie(outputs, grads) = mx::value_and_grad(fn, all)(primals);
    }
    result_.outputs = outputs;
    hand_out(move, grads, n_stage_params);
    result_.head_grads.assign(grads.begin() + n_stage_params, grads.begin() + n_params);
    accumulate(move, grads, n_params);
    Arrays made = outputs;
    made.insert(made.end(), grads.begin(), grads.end());
    return made;
  }

  Arrays backward(const Move& move) {
    Arrays primals = params_of(move);
    size_t n_params = primals.size();
    append_differentiable(move, primals);
    Arrays arriving;
    for (int value : move.writes) {
      arriving.push_back(mx::astype(*cotangents_[value], *dtypes_[value]));
      cotangents_[value].reset();
    }
    auto fn = [&](const Arrays& in) {
      Arrays stage_params(in.begin(), in.begin() + n_params);
      return run_stages(move, stage_params, merge_reads(move, in, n_params), false).writes;
    };
    auto grads = mx::vjp(fn, primals, arriving).second;
    hand_out(move, grads, n_params);
    accumulate(move, grads, n_params);
    return grads;
  }

  struct Ran {
    Arrays writes;  ///< the move's boundary writes
    Scope scope;
  };

  /// Runs stages [begin, end) from `reads`, given in the order of move.reads.
  Ran run_stages(const Move& move, const Arrays& params, const Arrays& reads, bool with_head) {
    Ran ran;
    for (size_t i = 0; i < reads.size(); ++i) {
      const auto& name = plan_.values[move.reads[i]].name;
      ran.scope.define(name, reads[i], readers(move, name, move.begin, with_head));
    }
    size_t next = 0;
    for (int i = move.begin; i < move.end; ++i) {
      Arrays own(params.begin() + next, params.begin() + next + params_[i].size());
      next += own.size();
      Arrays in;
      for (const auto& name : stages_[i].reads) in.push_back(ran.scope.read(name));
      auto out = fns_[i](own, in);
      check(out.size() == stages_[i].writes.size(), "[schedule] stage '", stages_[i].name, "' must return ",
            stages_[i].writes.size(), " arrays, one for each name it writes; got ", out.size(), ".");
      for (size_t j = 0; j < out.size(); ++j) {
        const auto& name = stages_[i].writes[j];
        ran.scope.define(name, out[j], readers(move, name, i + 1, with_head));
      }
    }
    for (int value : move.writes) {
      ran.writes.push_back(ran.scope.read(plan_.values[value].name));
      dtypes_[value] = ran.writes.back().dtype();
    }
    return ran;
  }

  /// How often the version of `name` that stands before stage `from` is read in the move, its export
  /// included.
  int readers(const Move& move, const std::string& name, int from, bool with_head) const {
    auto has = [&](const std::vector<std::string>& names) {
      return static_cast<int>(std::count(names.begin(), names.end(), name));
    };
    int count = 0;
    for (int i = from; i < move.end; ++i) {
      count += has(stages_[i].reads);
      if (has(stages_[i].writes)) return count;
    }
    if (with_head) count += has(head_reads_);
    for (int value : move.writes) count += plan_.values[value].name == name;
    return count;
  }

  Arrays params_of(const Move& move) const {
    Arrays all;
    for (int i = move.begin; i < move.end; ++i) all.insert(all.end(), params_[i].begin(), params_[i].end());
    return all;
  }

  Arrays reads_of(const Move& move) const {
    Arrays reads;
    for (int value : move.reads) reads.push_back(*values_[value]);
    return reads;
  }

  void append_differentiable(const Move& move, Arrays& primals) const {
    for (int value : move.cotangents) primals.push_back(*values_[value]);
  }

  /// The move's reads with the differentiable ones taken from the primals, from `first` on.
  Arrays merge_reads(const Move& move, const Arrays& primals, size_t first) const {
    Arrays reads;
    for (int value : move.reads)
      reads.push_back(plan_.values[value].differentiable ? primals[first++] : *values_[value]);
    return reads;
  }

  void hand_out(const Move& move, const Arrays& grads, size_t n_stage_params) {
    size_t next = 0;
    for (int i = move.begin; i < move.end; ++i)
      for (auto& grad : result_.grads[i]) grad = grads[next++];
    check(next == n_stage_params, "[schedule] internal: ", next, " gradients for ", n_stage_params,
          " parameters.");
  }

  void accumulate(const Move& move, Arrays& grads, size_t first) {
    for (int value : move.cotangents) {
      auto& grad = grads[first++];
      if (plan_.values[value].readers > 1) grad = mx::astype(grad, mx::float32);
      auto& sum = cotangents_[value];
      if (sum) grad = mx::add(*sum, grad);
      sum = grad;
    }
  }

  const Plan& plan_;
  const std::vector<StageSpec>& stages_;
  const std::vector<StageFn>& fns_;
  const StageFn& head_;
  const std::vector<std::string>& head_reads_;
  const std::vector<Arrays>& params_;
  const Arrays& head_params_;
  const Wait& wait_;
  std::vector<std::optional<mx::array>> values_;
  std::vector<std::optional<mx::array>> cotangents_;
  std::map<int, std::optional<mx::Dtype>> dtypes_;
  StepResult result_;
};

}  // namespace

StepResult run_plan(const Plan& plan, const std::vector<StageSpec>& stages, const std::vector<StageFn>& fns,
                    const StageFn& head, const std::vector<std::string>& head_reads,
                    const std::vector<Arrays>& params, const Arrays& head_params, const Arrays& inputs,
                    const Wait& wait) {
  check(fns.size() == stages.size() && params.size() == stages.size(), "[schedule] expected ", stages.size(),
        " callables and parameter lists, one for each stage; got ", fns.size(), " and ", params.size(), ".");
  return Runner(plan, stages, fns, head, head_reads, params, head_params, inputs, wait).run();
}

}  // namespace segtrain
