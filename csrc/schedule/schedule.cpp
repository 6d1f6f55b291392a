// Runs a plan whose stages are callables. A Runner executes one whole training step.
#include <deque>
#include <set>

#include "core/gpu.h"
#include "core/offload.h"
#include "mlx/primitives.h"
#include "schedule/recording.h"
#include "segtrain.h"

namespace segtrain {

namespace {

/// The primitive of a placeholder array. Its input is set later and becomes the value of the array.
class Later : public mx::Primitive {
 public:
  using Primitive::Primitive;
  static mx::array like(const mx::array& x) {
    return mx::array(x.shape(), x.dtype(), std::make_shared<Later>(mx::to_stream({})), {});
  }
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override { outputs[0].copy_shared_buffer(inputs[0]); }
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override { outputs[0].copy_shared_buffer(inputs[0]); }
  const char* name() const override { return "Later"; }
};

/// The number of stages per launch if nothing is recomputed; in most models, two stages are one layer. The
/// device works on these stages while the host traces the next ones. With fewer stages per launch there would
/// be more launches; with more, the device would start later.
constexpr int AT_A_TIME = 2;

/// The maximum number of launches of AT_A_TIME stages that may be pending on a CPU. Launched work cannot be
/// cancelled, so after an interrupt, saving a checkpoint has to wait for this work.
constexpr size_t UNDER_WAY = 2;

/// The number of moves that may be pending at a time on CUDA, so that the next move is ready when the current
/// one ends. Memory use stays within the plan, because MLX's memory limit is set to the planned memory: above
/// the limit, MLX waits for each op.
constexpr size_t CUDA_MOVES = 2;

class Runner {
 public:
  Runner(const Plan& plan, const std::vector<StageFn>& fns, const std::optional<HeadFn>& head,
         const std::vector<Arrays>& params, const std::vector<int>& owners, const Arrays& head_params,
         const Arrays& inputs, const Wait& wait, const Launch& launch, const Watch& watch,
         Recordings* recordings)
      : plan_(plan),
        fns_(fns),
        head_(head),
        params_(params),
        owners_(owners),
        head_params_(head_params),
        wait_(wait),
        launch_(launch),
        watch_(watch),
        recordings_(collects_kernels() ? nullptr : recordings),
        at_a_time_(on_cuda({}) && !watch ? CUDA_MOVES : 1),
        saved_(plan.stages.size()),
        values_(plan.values.size()),
        offloaded_values_(plan.values.size()),
        offloaded_saves_(plan.stages.size()),
        cotangents_(plan.values.size()) {
    for (size_t i = 0; i < inputs.size(); ++i) values_[i] = inputs[i];
    result_.grads.resize(params.size());
  }

  /// Runs the moves before the head's move, and the stages that run together with the head.
  Arrays forward() {
    for (; plan_.moves[at_].kind == Move::Kind::forward; ++at_) {
      fetch_ahead();
      finish(forward(plan_.moves[at_]));
    }
    const auto& move = plan_.moves[at_];
    fetch_ahead();
    for (int i = move.begin; i < move.end; ++i) {
      kept_.push_back(run_stage(move, i));
      if ((move.end - 1 - i) % AT_A_TIME == 0) start({}, plan_.stages[i].writes, values_);
    }
    const Arrays made = found(plan_.head_reads, values_);
    // From here on, the caller keeps these values alive, and the graphs in `kept_` keep the arrays that they
    // need.
    if (!head_)
      for (int value : move.drops) values_[value].reset();
    return made;
  }

  StepResult backward(const Arrays& cotangents) {
    const auto& move = plan_.moves[at_];
    finish(head_ ? with_head(move) : with_cotangents(move, cotangents));
    for (++at_; at_ < plan_.moves.size(); ++at_) {
      const auto& next = plan_.moves[at_];
      fetch_ahead();
      finish(next.kind == Move::Kind::forward ? forward(next) : backward(next));
    }
    settle(at_a_time_ == 1 ? 0 : at_a_time_);
    for (size_t i = 0; i < params_.size(); ++i)
      if (result_.grads[i].empty())  // the loss does not depend on these parameters
        for (const auto& p : params_[i]) result_.grads[i].push_back(mx::zeros_like(p));
    for (size_t i = 0; i < plan_.values.size() && plan_.values[i].producer < 0; ++i)
      if (plan_.values[i].differentiable && cotangents_[i]) result_.incoming.push_back(*cotangents_[i]);
    return std::move(result_);
  }

 private:
  /// A stage that has run, and the graph of its backward pass, whose cotangents are not known yet.
  struct Kept {
    int stage;
    std::vector<int> writes = {};  ///< the values it writes that will have a cotangent
    Arrays cotangents = {};        ///< placeholders for these cotangents
    Arrays grads = {};  ///< gradients of its parameters, then of the differentiable values that it reads
  };

  /// Launches the computation of the current move's results.
  void finish(const Arrays& made) {
    const auto& move = plan_.moves[at_];
    for (int value : move.drops) values_[value].reset(), offloaded_values_[value].reset();
    settle(at_a_time_ - 1);
    begin(made);
    offload_after(move);
    // Cotangents are not kept in `running_`, so that the next move can free the ones that it consumes.
    const bool has_grads =
        at_a_time_ > 1 && move.kind != Move::Kind::forward && made.size() > move.cotangents.size();
    running_.push_back(Arrays(made.begin(), made.end() - (has_grads ? move.cotangents.size() : 0)));
  }

  /// Starts to copy the arrays that leave the device after a move to host memory.
  void offload_after(const Move& move) {
    if (collects_kernels()) return;  // there is no data to copy
    Arrays leaving;
    auto copy = [&](const mx::array& x) {
      auto made = offload(x);
      leaving.push_back(made.copied);
      return made;
    };
    for (int value : move.offloads) offloaded_values_[value] = copy(*values_[value]);
    for (int stage : move.saves_leave)
      for (const auto& x : saved_[stage]) offloaded_saves_[stage].push_back(copy(x));
    if (!leaving.empty()) launch_(leaving);
    for (int value : move.leaves) values_[value].reset();
    for (int stage : move.saves_leave) saved_[stage].clear();
  }

  /// Starts to copy the arrays that the next move needs back to the device. This must happen before the
  /// current move is launched, because MLX makes the host wait during the launch, so that at most ten graphs
  /// are queued.
  void fetch_ahead() {
    if (collects_kernels() || at_ + 1 == plan_.moves.size()) return;
    const auto& move = plan_.moves[at_ + 1];
    Arrays arriving;
    for (int value : move.returns) arriving.push_back(*(values_[value] = fetch(*offloaded_values_[value])));
    for (int stage : move.saves_return) {
      for (const auto& copy : offloaded_saves_[stage]) saved_[stage].push_back(fetch(copy));
      arriving.insert(arriving.end(), saved_[stage].begin(), saved_[stage].end());
      offloaded_saves_[stage].clear();
    }
    if (!arriving.empty()) launch_(arriving);
  }

  /// Waits until at most `left` earlier moves are still running. By then, the intermediate arrays of the
  /// finished moves are freed.
  void settle(size_t left) {
    if (running_.size() <= left) wait_({});
    while (running_.size() > left) {
      if (!collects_kernels()) wait_(running_.front());
      running_.pop_front();
      if (watch_) watch_();
    }
  }

  /// Launches a move stage by stage, so that the device can run the first stages while the host launches the
  /// others. While kernels are being collected, nothing is launched.
  void begin(const Arrays& made) {
    for (auto& part : parts_) {
      if (!collects_kernels() && !part.empty()) launch_(part);
      part.clear();  // otherwise its arrays would stay alive until the whole move is launched
    }
    parts_.clear();
    if (!collects_kernels()) launch_(made);
  }

  /// Returns the arrays in `of` at the indices `values`. Skips indices without an array.
  static Arrays found(const std::vector<int>& values, const std::vector<std::optional<mx::array>>& of) {
    Arrays all;
    for (int value : values)
      if (of[value]) all.push_back(*of[value]);
    return all;
  }

  Arrays forward(const Move& move) {
    for (int i = move.begin; i < move.end; ++i) {
      run_stage(move, i);
      parts_.push_back(found(plan_.stages[i].writes, values_));
    }
    Arrays made;
    for (int value : move.writes) made.push_back(*values_[value]);
    for (int i : move.saves) made.insert(made.end(), saved_[i].begin(), saved_[i].end());
    return made;
  }

  Arrays with_head(const Move& move) {
    const size_t n_params = head_params_.size();
    Arrays primals = head_params_;
    append_differentiable(plan_.head_reads, primals);
    Arrays made_by_head = recorded("head", head_params_, plan_.head_reads, {}, [&] {
      auto fn = [&](const Arrays& in) {
        return (*head_)(Arrays(in.begin(), in.begin() + n_params),
                        merge_reads(plan_.head_reads, in, n_params));
      };
      if (primals.empty()) return fn(primals);
      std::vector<int> every(primals.size());
      for (size_t i = 0; i < every.size(); ++i) every[i] = static_cast<int>(i);
      auto [outputs, grads] = mx::value_and_grad(fn, every)(primals);
      outputs.insert(outputs.end(), grads.begin(), grads.end());
      return outputs;
    });
    const auto first_grad = made_by_head.end() - primals.size();
    const Arrays grads(first_grad, made_by_head.end());
    result_.outputs.assign(made_by_head.begin(), first_grad);
    result_.head_grads.assign(grads.begin(), grads.begin() + n_params);
    accumulate(plan_.head_reads, grads);
    Arrays made = result_.outputs;
    made.insert(made.end(), result_.head_grads.begin(), result_.head_grads.end());
    start(made, plan_.head_reads, cotangents_);
    Arrays more = go_back(move, kept_);
    made.insert(made.end(), more.begin(), more.end());
    return made;
  }

  /// Used instead of with_head if the caller provides the cotangents of the values that a head would read.
  Arrays with_cotangents(const Move& move, const Arrays& cotangents) {
    auto given = cotangents.begin();
    for (int value : plan_.head_reads) {
      if (!plan_.values[value].differentiable) continue;
      check(given != cotangents.end(),
            "[schedule] expected a cotangent for each differentiable value that the head reads.");
      cotangents_[value] = *given++;
    }
    check(given == cotangents.end(),
          "[schedule] expected a cotangent for each differentiable value that the head reads.");
    return go_back(move, kept_);
  }

  /// Launches the computation of `made` and of the arrays in `of` at the indices `values`, before the rest of
  /// the move is traced.
  void start(Arrays made, const std::vector<int>& values, const std::vector<std::optional<mx::array>>& of) {
    auto more = found(values, of);
    made.insert(made.end(), more.begin(), more.end());
    settle(at_a_time_ - 1);
    if (on_cpu({})) {
      if (under_way_.size() == UNDER_WAY) {
        wait_(under_way_.front());
        under_way_.pop_front();
      }
      under_way_.push_back(made);
    }
    begin(made);
  }

  Arrays backward(const Move& move) {
    std::vector<Kept> kept;
    for (int i = move.begin; i < move.end; ++i) {
      kept.push_back(run_stage(move, i));
      parts_.push_back(found(plan_.stages[i].writes, values_));
    }
    return go_back(move, kept);
  }

  /// Runs a stage of a move on the values that the stage reads.
  Kept run_stage(const Move& move, int i) {
    const auto& stage = plan_.stages[i];
    const bool goes_back = move.kind != Move::Kind::forward, save = contains(move.saves, i);
    Kept kept{i};
    if (goes_back)
      for (int value : stage.writes)
        if (plan_.values[value].differentiable && !plan_.values[value].readers.empty())
          kept.writes.push_back(value);
    const auto& params = params_[owners_[i]];
    size_t n_grads = params.size();
    for (int value : stage.reads) n_grads += plan_.values[value].differentiable;
    const auto key = std::to_string(i) + (save ? " save" : "") + (goes_back ? " back" : "");
    const Arrays all =
        recorded(key, params, stage.reads, saved_[i], [&] { return write_down(i, save, kept.writes); });

    // `all` contains the values that the stage writes, the saved arrays, the placeholders for cotangents, and
    // the gradients, in this order.
    auto at = all.begin();
    for (int value : stage.writes) values_[value] = *at++;
    const auto late = all.end() - n_grads - kept.writes.size();
    if (save) saved_[i].assign(at, late);
    kept.cotangents.assign(late, late + kept.writes.size());
    kept.grads.assign(all.end() - n_grads, all.end());
    for (const auto* values : {&stage.reads, &stage.writes})
      for (int value : *values) {
        const bool kept_here = move.kind == Move::Kind::forward && contains(move.writes, value);
        if (plan_.values[value].producer >= move.begin && !kept_here &&
            !plan_.readers(value, i + 1, end_of(move)))
          values_[value].reset();
      }
    return kept;
  }

  /// Traces the function of a stage. Returns the values that it writes, the arrays that it saves,
  /// placeholders for the cotangents of the values `cotangents`, and the gradients of its parameters and of
  /// the differentiable values that it reads. The function is traced under vjp even if no backward pass
  /// follows, because results could differ otherwise: without vjp, mx.compile fuses ops, which may change
  /// rounding, and MLX's ops may choose other implementations.
  Arrays write_down(int i, bool save, const std::vector<int>& cotangents) {
    const auto& stage = plan_.stages[i];
    Arrays primals = params_[owners_[i]];
    const size_t n_params = primals.size();
    append_differentiable(stage.reads, primals);
    Arrays saved, late;
    auto fn = [&](const Arrays& in) {
      Arrays own(in.begin(), in.begin() + n_params);
      auto out = fns_[i](own, merge_reads(stage.reads, in, n_params), saved_[i], save);
      if (save && out.size() > stage.writes.size()) {
        saved.assign(out.begin() + stage.writes.size(), out.end());
        out.erase(out.begin() + stage.writes.size(), out.end());
      }
      check(out.size() == stage.writes.size(), "[schedule] stage '", stage.name, "' must return ",
            stage.writes.size(), " arrays, one for each name it writes; got ", out.size(), ".");
      for (size_t j = 0; j < out.size(); ++j) {
        if (contains(cotangents, stage.writes[j]))
          late.push_back(Later::like(out[j]));
        else
          out[j] = mx::stop_gradient(out[j]);
      }
      return out;
    };
    // mx::vjp reads `late` only after it has called fn, which fills `late`.
    auto [all, grads] = mx::vjp(fn, primals, late);
    for (const auto* more : {&saved, &late, &grads}) all.insert(all.end(), more->begin(), more->end());
    return all;
  }

  /// Returns the arrays that `run` computes from the parameters, the values `reads` and the saved arrays. If
  /// such a call has been recorded, the recording is replayed instead of calling `run`.
  Arrays recorded(std::string key, const Arrays& params, const std::vector<int>& reads, const Arrays& saved,
                  const std::function<Arrays()>& run) {
    if (!recordings_) return run();
    Arrays inputs = params;
    for (int value : reads) inputs.push_back(*values_[value]);
    inputs.insert(inputs.end(), saved.begin(), saved.end());
    for (const auto& x : inputs) add_form(key, x);
    if (auto* known = recordings_->find(key)) return (*known)(inputs);
    auto outputs = run();
    recordings_->see(key, inputs, outputs);
    return outputs;
  }

  /// Runs the backward passes of a move's stages with the available cotangents. Returns the gradients
  /// of the stages' parameters and the cotangents of the values that the move reads, including the parts from
  /// earlier moves.
  Arrays go_back(const Move& move, std::vector<Kept>& kept) {
    std::set<int> owners;
    for (auto stage = kept.rbegin(); stage != kept.rend(); ++stage) {
      for (size_t j = 0; j < stage->writes.size(); ++j) {
        auto& sum = cotangents_[stage->writes[j]];
        auto& arriving = stage->cotangents[j];
        // There is no cotangent if all outputs of the stages that read this value are unused.
        arriving.inputs() = {sum ? mx::astype(*sum, arriving.dtype())
                                 : mx::zeros(arriving.shape(), arriving.dtype())};
        sum.reset();
      }
      // The gradients of shared parameters are always added from the last stage to the first, so the cuts do
      // not change the rounding.
      const int owner = owners_[stage->stage];
      auto& sums = result_.grads[owner];
      const size_t n = params_[owner].size();
      for (size_t j = 0; j < n; ++j) {
        if (sums.size() < n)
          sums.push_back(stage->grads[j]);
        else
          sums[j] = mx::add(sums[j], stage->grads[j]);
      }
      if (n) owners.insert(owner);
      const auto& reads = plan_.stages[stage->stage].reads;
      accumulate(reads, stage->grads);
      saved_[stage->stage].clear();
      stage->grads.clear();  // otherwise they would keep intermediate arrays alive until the move ends
      if (move.kind != Move::Kind::head) {
        parts_.push_back(found(reads, cotangents_));
        parts_.back().insert(parts_.back().end(), sums.begin(), sums.end());
      } else if ((stage->stage - move.begin) % AT_A_TIME == 0) {
        start(sums, reads, cotangents_);
      }
    }
    kept.clear();
    Arrays made;
    for (int owner : owners)
      made.insert(made.end(), result_.grads[owner].begin(), result_.grads[owner].end());
    for (int value : move.cotangents) made.push_back(*cotangents_[value]);
    return made;
  }

  void append_differentiable(const std::vector<int>& reads, Arrays& primals) const {
    for (int value : reads)
      if (plan_.values[value].differentiable) primals.push_back(*values_[value]);
  }

  /// Returns the arrays of `reads`. Differentiable arrays are taken from `primals`, starting at index `next`.
  Arrays merge_reads(const std::vector<int>& reads, const Arrays& primals, size_t next) const {
    Arrays all;
    for (int value : reads)
      all.push_back(plan_.values[value].differentiable ? primals[next++] : *values_[value]);
    return all;
  }

  /// Adds the gradients of the differentiable `reads`, which are at the end of `grads`, to the cotangents
  /// accumulated so far. If a value has several readers, their gradients are added in float32 from the last
  /// reader to the first, so the cuts do not change the rounding.
  void accumulate(const std::vector<int>& reads, const Arrays& grads) {
    auto grad = grads.rbegin();
    for (auto read = reads.rbegin(); read != reads.rend(); ++read) {
      if (!plan_.values[*read].differentiable) continue;
      auto& sum = cotangents_[*read];
      auto own = plan_.is_summed(*read) ? mx::astype(*grad, mx::float32) : *grad;
      sum = sum ? mx::add(*sum, own) : own;
      ++grad;
    }
  }

  const Plan plan_;
  const std::vector<StageFn> fns_;
  const std::optional<HeadFn> head_;
  const std::vector<Arrays> params_;  ///< parameters by owner
  const std::vector<int> owners_;     ///< the owner of each stage
  const Arrays head_params_;
  const Wait wait_;
  const Launch launch_;
  const Watch watch_;
  Recordings* recordings_;
  size_t at_ = 0;           ///< index of the next move
  std::vector<Kept> kept_;  ///< stages of the head's move that have run forward but not backward
  size_t at_a_time_;        ///< maximum number of moves that may be pending at a time
  std::vector<Arrays>
      saved_;  ///< arrays that each stage saved, from its last forward run to its backward pass
  std::vector<std::optional<mx::array>> values_;
  std::vector<std::optional<Offloaded>> offloaded_values_;
  std::vector<std::vector<Offloaded>> offloaded_saves_;  ///< saved arrays by stage
  std::vector<std::optional<mx::array>> cotangents_;
  std::vector<Arrays> parts_;     ///< results of the move that is being traced, by stage
  std::deque<Arrays> running_;    ///< results of the moves that have been launched
  std::deque<Arrays> under_way_;  ///< launches that are pending on a CPU
  StepResult result_;
};

}  // namespace

Passes passes_of(const Plan& plan, const std::vector<StageFn>& fns, const std::optional<HeadFn>& head,
                 const std::vector<Arrays>& params, const std::vector<int>& owners, const Arrays& head_params,
                 const Arrays& inputs, const Wait& wait, const Launch& launch, const Watch& watch,
                 Recordings* recordings) {
  const size_t n = plan.stages.size();
  check(fns.size() == n && owners.size() == n, "[schedule] expected ", n,
        " callables and owners of parameters, one for each stage; got ", fns.size(), " and ", owners.size(),
        ".");
  for (int owner : owners)
    check(owner >= 0 && static_cast<size_t>(owner) < params.size(),
          "[schedule] there are no parameters for owner ", owner, ".");
  auto runner = std::make_shared<Runner>(plan, fns, head, params, owners, head_params, inputs, wait, launch,
                                         watch, recordings);
  return {[runner] { return runner->forward(); },
          [runner](const Arrays& cotangents) { return runner->backward(cotangents); }};
}

}  // namespace segtrain
