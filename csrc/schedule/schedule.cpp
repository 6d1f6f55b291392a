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

/// The values that the stages of a move see.
class Scope {
 public:
  /// Copies for the readers to come, the last one's first.
  void define(int value, const Arrays& copies) { copies_[value] = copies; }
  mx::array read(int value) {
    auto& copies = copies_.at(value);
    auto x = copies.back();
    if (copies.size() > 1) copies.pop_back();
    return x;
  }
  Arrays read(const std::vector<int>& values) {
    Arrays all;
    for (int value : values) all.push_back(read(value));
    return all;
  }

 private:
  std::map<int, Arrays> copies_;
};

bool contains(const std::vector<int>& values, int value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

class Runner {
 public:
  Runner(const Plan& plan, const std::vector<StageFn>& fns, const HeadFn& head,
         const std::vector<Arrays>& params, const std::vector<int>& owners, const Arrays& head_params,
         const Arrays& inputs, const Wait& wait)
      : plan_(plan),
        fns_(fns),
        head_(head),
        params_(params),
        owners_(owners),
        head_params_(head_params),
        wait_(wait),
        saved_(plan.stages.size()),
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
    append_differentiable(move, primals);
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
    append_differentiable(move, primals);
    auto fn = [&](const Arrays& in) {
      Arrays stage_params(in.begin(), in.begin() + n_stage_params);
      Arrays head_params(in.begin() + n_stage_params, in.begin() + n_params);
      auto scope = run_stages(move, stage_params, merge_reads(move, in, n_params));
      return head_(head_params, scope.read(plan_.head_reads));
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
    for (const auto& sum : accumulate(move, grads, n_params)) made.push_back(sum);
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
    auto fn = [&](const Arrays& in) { return writes_of(move, in, n_params); };
    auto grads = mx::vjp(fn, primals, arriving).second;
    Arrays made = hand_out(move, grads, n_params);
    for (const auto& sum : accumulate(move, grads, n_params)) made.push_back(sum);
    for (int i = move.begin; i < move.end; ++i) saved_[i].clear();
    return made;
  }

  /// What a move without a head makes of its primals: parameters, then differentiable reads.
  Arrays writes_of(const Move& move, const Arrays& primals, size_t n_params) {
    Arrays params(primals.begin(), primals.begin() + n_params);
    auto writes = run_stages(move, params, merge_reads(move, primals, n_params)).read(move.writes);
    for (size_t i = 0; i < writes.size(); ++i) dtypes_[move.writes[i]] = writes[i].dtype();
    return writes;
  }

  /// Runs stages [begin, end) from copies of the reads, given in the order of move.reads.
  Scope run_stages(const Move& move, const Arrays& params, const std::vector<Arrays>& reads) {
    Scope scope;
    for (size_t i = 0; i < reads.size(); ++i) scope.define(move.reads[i], reads[i]);
    size_t next = 0;
    for (int i = move.begin; i < move.end; ++i) {
      const auto& stage = plan_.stages[i];
      Arrays own(params.begin() + next, params.begin() + next + params_[owners_[i]].size());
      next += own.size();
      bool save = contains(move.saves, i);
      auto out = fns_[i](own, scope.read(stage.reads), saved_[i], save);
      if (save && out.size() > stage.writes.size()) {
        auto behind = out.begin() + stage.writes.size();
        saved_[i].assign(behind, out.end());
        out.erase(behind, out.end());
      }
      check(out.size() == stage.writes.size(), "[schedule] stage '", stage.name, "' must return ",
            stage.writes.size(), " arrays, one for each name it writes; got ", out.size(), ".");
      for (size_t j = 0; j < out.size(); ++j) {
        int value = stage.writes[j];
        scope.define(value, fan_out(out[j], plan_.readers(value, move) + contains(move.writes, value)));
      }
    }
    return scope;
  }

  Arrays params_of(const Move& move) const {
    Arrays all;
    for (int i = move.begin; i < move.end; ++i) {
      const auto& own = params_[owners_[i]];
      all.insert(all.end(), own.begin(), own.end());
    }
    return all;
  }

  /// A primal for each reader, so that their cotangents come out one by one.
  void append_differentiable(const Move& move, Arrays& primals) const {
    for (int value : move.reads)
      if (plan_.values[value].differentiable)
        primals.insert(primals.end(), plan_.readers(value, move), *values_[value]);
  }

  /// The move's reads with the differentiable ones taken from the primals, from `first` on.
  std::vector<Arrays> merge_reads(const Move& move, const Arrays& primals, size_t first) const {
    std::vector<Arrays> reads;
    for (int value : move.reads) {
      if (!plan_.values[value].differentiable) {
        reads.push_back({*values_[value]});
        continue;
      }
      auto begin = primals.begin() + first;
      first += plan_.readers(value, move);
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
  Arrays accumulate(const Move& move, const Arrays& grads, size_t first) {
    Arrays sums;
    for (int value : move.cotangents) {
      auto& sum = cotangents_[value];
      for (int i = plan_.readers(value, move); i > 0; --i) {
        auto grad = grads[first++];
        if (plan_.is_summed(value, move)) grad = mx::astype(grad, mx::float32);
        sum = sum ? mx::add(*sum, grad) : grad;
      }
      sums.push_back(*sum);
    }
    return sums;
  }

  const Plan& plan_;
  const std::vector<StageFn>& fns_;
  const HeadFn& head_;
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

StepResult run_plan(const Plan& plan, const std::vector<StageFn>& fns, const HeadFn& head,
                    const std::vector<Arrays>& params, const std::vector<int>& owners,
                    const Arrays& head_params, const Arrays& inputs, const Wait& wait) {
  const size_t n = plan.stages.size();
  check(fns.size() == n && owners.size() == n, "[schedule] expected ", n,
        " callables and owners of parameters, one for each stage; got ", fns.size(), " and ", owners.size(),
        ".");
  for (int owner : owners)
    check(owner >= 0 && static_cast<size_t>(owner) < params.size(), "[schedule] no parameters ", owner, ".");
  return Runner(plan, fns, head, params, owners, head_params, inputs, wait).run();
}

}  // namespace segtrain
