// Runs a plan over callables. The whole training step passes through run_plan, top to bottom.
#include <set>

#include "core/kernel.h"
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
  /// Copies for the readers to come, the last one's first.
  void define(const std::string& name, const Arrays& copies) { copies_[name] = copies; }
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
         const HeadFn& head, const std::vector<std::string>& head_reads, const std::vector<Arrays>& params,
         const std::vector<int>& owners, const Arrays& head_params, const Arrays& inputs, const Wait& wait)
      : plan_(plan),
        stages_(stages),
        fns_(fns),
        head_(head),
        head_reads_(head_reads),
        params_(params),
        owners_(owners),
        head_params_(head_params),
        wait_(wait),
        saved_(stages.size()),
        values_(plan.values.size()),
        cotangents_(plan.values.size()) {
    for (size_t i = 0; i < inputs.size(); ++i) values_[i] = inputs[i];
    result_.grads.resize(params.size());
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
      running.clear();  // or what the next one uses up would stay until it has run
      mx::async_eval(made);
      running = std::move(made);
    }
    wait_(running);
    for (size_t i = 0; i < params_.size(); ++i)
      if (result_.grads[i].empty())  // nothing that the loss depends on
        for (const auto& p : params_[i]) result_.grads[i].push_back(mx::zeros_like(p));
    return std::move(result_);
  }

 private:
  /// Under vjp as when it will go back, though nothing does: mx.compile leaves functions as they are there,
  /// and what it fuses elsewhere may round in another way; MLX's own ops choose by it, too.
  Arrays forward(const Move& move) {
    Arrays primals = params_of(move);
    size_t n_params = primals.size();
    append_differentiable(move, primals, false);
    auto fn = [&](const Arrays& in) {
      Arrays writes = writes_of(move, in, n_params);
      for (auto& x : writes) x = mx::stop_gradient(x);
      return writes;
    };
    Arrays made = mx::vjp(fn, primals, {}).first;
    for (size_t i = 0; i < made.size(); ++i) values_[move.writes[i]] = made[i];
    for (int i : move.saves) made.insert(made.end(), saved_[i].begin(), saved_[i].end());
    return made;
  }

  Arrays with_head(const Move& move) {
    size_t n_stage_params = params_of(move).size();
    Arrays primals = params_of(move);
    primals.insert(primals.end(), head_params_.begin(), head_params_.end());
    size_t n_params = primals.size();
    append_differentiable(move, primals, true);
    auto fn = [&](const Arrays& in) {
      Arrays stage_params(in.begin(), in.begin() + n_stage_params);
      Arrays head_params(in.begin() + n_stage_params, in.begin() + n_params);
      auto scope = run_stages(move, stage_params, merge_reads(move, in, n_params, true), true).scope;
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
    result_.head_grads.assign(grads.begin() + n_stage_params, grads.begin() + n_params);
    Arrays made = outputs;
    for (const auto& sum : hand_out(move, grads, n_stage_params)) made.push_back(sum);
    made.insert(made.end(), result_.head_grads.begin(), result_.head_grads.end());
    for (const auto& sum : accumulate(move, grads, n_params, true)) made.push_back(sum);
    return made;
  }

  Arrays backward(const Move& move) {
    Arrays primals = params_of(move);
    size_t n_params = primals.size();
    append_differentiable(move, primals, false);
    Arrays arriving;
    for (int value : move.writes) {
      arriving.push_back(mx::astype(*cotangents_[value], *dtypes_[value]));
      cotangents_[value].reset();
    }
    auto fn = [&](const Arrays& in) { return writes_of(move, in, n_params); };
    auto grads = mx::vjp(fn, primals, arriving).second;
    Arrays made = hand_out(move, grads, n_params);
    for (const auto& sum : accumulate(move, grads, n_params, false)) made.push_back(sum);
    for (int i = move.begin; i < move.end; ++i) saved_[i].clear();
    return made;
  }

  struct Ran {
    Arrays writes;  ///< the move's boundary writes
    Scope scope;
  };

  /// What a move without a head makes of its primals: parameters, then differentiable reads.
  Arrays writes_of(const Move& move, const Arrays& primals, size_t n_params) {
    Arrays params(primals.begin(), primals.begin() + n_params);
    return run_stages(move, params, merge_reads(move, primals, n_params, false), false).writes;
  }

  /// Runs stages [begin, end) from copies of the reads, given in the order of move.reads.
  Ran run_stages(const Move& move, const Arrays& params, const std::vector<Arrays>& reads, bool with_head) {
    Ran ran;
    for (size_t i = 0; i < reads.size(); ++i) ran.scope.define(plan_.values[move.reads[i]].name, reads[i]);
    size_t next = 0;
    for (int i = move.begin; i < move.end; ++i) {
      Arrays own(params.begin() + next, params.begin() + next + params_[owners_[i]].size());
      next += own.size();
      Arrays in;
      for (const auto& name : stages_[i].reads) in.push_back(ran.scope.read(name));
      bool save = std::find(move.saves.begin(), move.saves.end(), i) != move.saves.end();
      auto out = fns_[i](own, in, saved_[i], save);
      if (save && out.size() > stages_[i].writes.size()) {
        auto behind = out.begin() + stages_[i].writes.size();
        saved_[i].assign(behind, out.end());
        out.erase(behind, out.end());
      }
      check(out.size() == stages_[i].writes.size(), "[schedule] stage '", stages_[i].name, "' must return ",
            stages_[i].writes.size(), " arrays, one for each name it writes; got ", out.size(), ".");
      for (size_t j = 0; j < out.size(); ++j) {
        const auto& name = stages_[i].writes[j];
        ran.scope.define(name, fan_out(out[j], readers(move, name, i + 1, with_head)));
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
    for (int i = move.begin; i < move.end; ++i) {
      const auto& own = params_[owners_[i]];
      all.insert(all.end(), own.begin(), own.end());
    }
    return all;
  }

  /// How many stages of the move read a boundary value as it stands before it.
  int copies(const Move& move, int value, bool with_head) const {
    return std::max(1, readers(move, plan_.values[value].name, move.begin, with_head));
  }

  /// A primal for each reader, so that their cotangents come out one by one.
  void append_differentiable(const Move& move, Arrays& primals, bool with_head) const {
    for (int value : move.reads)
      if (plan_.values[value].differentiable)
        primals.insert(primals.end(), copies(move, value, with_head), *values_[value]);
  }

  /// The move's reads with the differentiable ones taken from the primals, from `first` on.
  std::vector<Arrays> merge_reads(const Move& move, const Arrays& primals, size_t first,
                                  bool with_head) const {
    std::vector<Arrays> reads;
    for (int value : move.reads) {
      if (!plan_.values[value].differentiable) {
        reads.push_back({*values_[value]});
        continue;
      }
      auto begin = primals.begin() + first;
      first += copies(move, value, with_head);
      reads.emplace_back(begin, primals.begin() + first);
    }
    return reads;
  }

  /// Adds the gradients of the move's parameters to those of stages behind it that share them; from the last
  /// stage to the first, whatever the cuts between them. Returns the sums.
  Arrays hand_out(const Move& move, const Arrays& grads, size_t n_stage_params) {
    std::set<int> touched;
    size_t end = n_stage_params;
    for (int i = move.end - 1; i >= move.begin; --i) {
      auto& sum = result_.grads[owners_[i]];
      const size_t n = params_[owners_[i]].size(), begin = end - n;
      if (n) touched.insert(owners_[i]);
      for (size_t j = 0; j < n; ++j)
        if (sum.size() < n)
          sum.push_back(grads[begin + j]);
        else
          sum[j] = mx::add(sum[j], grads[begin + j]);
      end = begin;
    }
    check(end == 0, "[schedule] internal: ", end, " gradients of no parameter.");
    Arrays sums;
    for (int owner : touched)
      sums.insert(sums.end(), result_.grads[owner].begin(), result_.grads[owner].end());
    return sums;
  }

  /// Adds the cotangents of the move's reads, from `first` on, to those that arrived before. All readers are
  /// added up in float32 from the last to the first, whatever the cuts between them.
  Arrays accumulate(const Move& move, const Arrays& grads, size_t first, bool with_head) {
    Arrays sums;
    for (int value : move.cotangents) {
      auto& sum = cotangents_[value];
      int n = copies(move, value, with_head);
      for (int i = 0; i < n; ++i) {
        auto grad = grads[first++];
        if (n > 1 || plan_.values[value].readers > 1) grad = mx::astype(grad, mx::float32);
        sum = sum ? mx::add(*sum, grad) : grad;
      }
      sums.push_back(*sum);
    }
    return sums;
  }

  const Plan& plan_;
  const std::vector<StageSpec>& stages_;
  const std::vector<StageFn>& fns_;
  const HeadFn& head_;
  const std::vector<std::string>& head_reads_;
  const std::vector<Arrays>& params_;  ///< by owner
  const std::vector<int>& owners_;     ///< by stage
  const Arrays& head_params_;
  const Wait& wait_;
  std::vector<Arrays> saved_;  ///< by stage, from its last run to its backward pass
  std::vector<std::optional<mx::array>> values_;
  std::vector<std::optional<mx::array>> cotangents_;
  std::map<int, std::optional<mx::Dtype>> dtypes_;
  StepResult result_;
};

}  // namespace

StepResult run_plan(const Plan& plan, const std::vector<StageSpec>& stages, const std::vector<StageFn>& fns,
                    const HeadFn& head, const std::vector<std::string>& head_reads,
                    const std::vector<Arrays>& params, const std::vector<int>& owners,
                    const Arrays& head_params, const Arrays& inputs, const Wait& wait) {
  check(fns.size() == stages.size() && owners.size() == stages.size(), "[schedule] expected ", stages.size(),
        " callables and owners of parameters, one for each stage; got ", fns.size(), " and ", owners.size(),
        ".");
  for (int owner : owners)
    check(owner >= 0 && static_cast<size_t>(owner) < params.size(), "[schedule] no parameters ", owner, ".");
  return Runner(plan, stages, fns, head, head_reads, params, owners, head_params, inputs, wait).run();
}

}  // namespace segtrain
