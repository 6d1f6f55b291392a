#include "schedule/planner.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <set>
#include <stdexcept>
#include <tuple>

namespace segtrain {

namespace {

/// Marks the stages that have a backward pass, that is, whose outputs depend on a parameter. The other stages
/// only run forward and keep nothing.
std::vector<bool> stages_that_go_back(const Plan& plan) {
  std::vector<bool> back(plan.stages.size());
  for (const auto& value : plan.values)
    if (value.producer >= 0 && value.differentiable) back[value.producer] = true;
  return back;
}

/// Simulates the moves of a plan and counts the bytes in use.
class Walk {
 public:
  Walk(const Plan& plan, const Costs& costs)
      : plan_(plan),
        costs_(costs),
        bytes_(costs.input_bytes),
        saved_(plan.stages.size()),
        made_(plan.values.size()),
        cotangents_(plan.values.size()),
        goes_back_(stages_that_go_back(plan)) {
    for (const auto& cost : costs.costs) bytes_.insert(bytes_.end(), cost.writes.begin(), cost.writes.end());
    if (costs.costs.size() != plan.stages.size() || bytes_.size() != plan.values.size())
      throw std::invalid_argument("[planner] expected the costs of each stage and the bytes of each input.");
    for (size_t i = 0; i < plan.values.size(); ++i) made_[i] = plan.values[i].producer < 0;
  }

  Estimate run() {
    Estimate result;
    for (size_t i = 0; i < plan_.moves.size(); ++i) {
      const auto& move = plan_.moves[i];
      // What the next move needs is copied back while this move runs.
      if (i + 1 < plan_.moves.size()) fetch(plan_.moves[i + 1]);
      Alive alive = now();
      alive.working = move.kind == Move::Kind::forward ? forward(move) : backward(move);
      if (move.kind == Move::Kind::head) waiting_ = alive.values + alive.saved + kept_by_head_;
      result.moves.push_back(alive);
      result.peak = std::max(result.peak, alive.total());
      finish(move);
    }
    result.peak = costs_.fixed + std::max(result.peak + (costs_.under_way - 1) * waiting_, costs_.update);
    result.work = work_ + again_;
    result.again = again_;
    result.host = host_;
    return result;
  }

 private:
  Alive now() const {
    Alive alive;
    for (size_t i = 0; i < made_.size(); ++i) {
      if (made_[i]) alive.values += bytes_[i];
      alive.cotangents += cotangents_[i];
    }
    alive.saved = std::accumulate(saved_.begin(), saved_.end(), int64_t{0});
    alive.gradients = gradients_;
    return alive;
  }

  int64_t written(int stage) const {
    const auto& writes = costs_.costs[stage].writes;
    return std::accumulate(writes.begin(), writes.end(), int64_t{0});
  }

  bool saves(const Move& move, int stage) const {
    return std::find(move.saves.begin(), move.saves.end(), stage) != move.saves.end();
  }

  /// Returns the bytes of the values that earlier stages of the move have computed and that `stage` or a
  /// later stage of the move reads. Values that the move keeps are counted elsewhere.
  int64_t passing(const Move& move, int stage) const {
    int64_t bytes = 0;
    for (size_t v = 0; v < bytes_.size(); ++v) {
      const int producer = plan_.values[v].producer;
      if (producer < move.begin || producer >= stage) continue;
      if (std::find(move.writes.begin(), move.writes.end(), static_cast<int>(v)) != move.writes.end())
        continue;
      if (plan_.readers(static_cast<int>(v), stage, move.end)) bytes += bytes_[v];
    }
    return bytes;
  }

  /// Returns the peak memory of a forward move. It consists of the values that the move keeps, the values
  /// that its later stages read, and the memory of the running stage.
  int64_t forward(const Move& move) {
    int64_t most = 0, kept = 0;
    for (int i = move.begin; i < move.end; ++i) {
      const auto& cost = costs_.costs[i];
      most = std::max(most, kept + passing(move, i) + cost.forward);
      for (int value : move.writes)
        if (plan_.values[value].producer == i) kept += bytes_[value];
      if (saves(move, i)) kept += cost.saved;
      (ran_.insert(i).second ? work_ : again_) += cost.forward_work;
    }
    return most;
  }

  /// Returns the peak memory of a move whose stages first run and keep everything, and then run their
  /// backward passes from the last stage to the first.
  int64_t backward(const Move& move) {
    const bool head = move.kind == Move::Kind::head;
    int64_t most = 0, kept = 0;
    for (int i = move.begin; i < move.end; ++i) {
      const auto& cost = costs_.costs[i];
      if (!goes_back_[i]) {
        most = std::max(most, passing(move, i) + cost.forward);
        (ran_.insert(i).second ? work_ : again_) += cost.forward_work;
        continue;
      }
      if (i > move.begin && !goes_back_[i - 1]) kept += passing(move, i);
      const bool last = i + 1 == move.end && !head;
      // The arrays that the stage saved are already counted. The cotangents that arrive at an inner stage
      // have the same size as the values that it writes.
      most = std::max(most, kept + cost.backward - saved_[i] + (last ? 0 : written(i)));
      kept += cost.kept - saved_[i] + (last ? 0 : written(i));
      double again = (last ? cost.again_work : cost.forward_work) - (saved_[i] ? cost.saved_work : 0);
      (ran_.insert(i).second ? work_ : again_) += again;
      work_ += cost.backward_work;
    }
    if (head) {
      most = std::max(most, kept + costs_.head + (move.begin < move.end ? costs_.ahead : 0));
      work_ += costs_.head_work;
      kept_by_head_ = kept;
    }
    return most;
  }

  void fetch(const Move& move) {
    for (int value : move.returns) made_[value] = true;
    for (int stage : move.saves_return) saved_[stage] = costs_.costs[stage].saved;
  }

  void finish(const Move& move) {
    // The memory of an array that leaves is counted until the end of the next move, because the copy runs
    // beside that move.
    for (int value : leaving_) made_[value] = false;
    for (int stage : saves_leaving_) saved_[stage] = 0;
    leaving_ = move.leaves;
    saves_leaving_ = move.saves_leave;
    for (int value : move.offloads) host_ += bytes_[value];
    for (int stage : move.saves_leave) host_ += costs_.costs[stage].saved;
    for (int value : move.writes)
      if (move.kind == Move::Kind::forward)
        made_[value] = true;
      else
        cotangents_[value] = 0;
    for (int value : move.cotangents) {
      const double widened = plan_.is_summed(value) ? costs_.widened : 1;
      cotangents_[value] = static_cast<int64_t>(static_cast<double>(bytes_[value]) * widened);
    }
    for (int stage : move.saves) saved_[stage] = costs_.costs[stage].saved;
    if (move.kind != Move::Kind::forward)
      for (int i = move.begin; i < move.end; ++i) {
        saved_[i] = 0;
        gradients_ += costs_.costs[i].gradients;
      }
    for (int value : move.drops)
      if (plan_.values[value].producer >= 0) made_[value] = false;  // the caller keeps a step's inputs alive
  }

  const Plan& plan_;
  const Costs& costs_;
  std::vector<int64_t> bytes_;       ///< bytes of each value
  std::vector<int64_t> saved_;       ///< bytes that each stage has saved
  std::vector<bool> made_;           ///< values that are in memory
  std::vector<int64_t> cotangents_;  ///< bytes of each value's cotangent
  std::vector<bool> goes_back_;      ///< whether each stage has a backward pass
  std::set<int> ran_;
  std::vector<int> leaving_, saves_leaving_;  ///< values and stages whose arrays are being copied to the host
  int64_t gradients_ = 0, kept_by_head_ = 0, host_ = 0;
  int64_t waiting_ = 0;  ///< bytes of a batch between its forward and backward pass
  double work_ = 0, again_ = 0;
};

/// Returns the largest n in [0, most] for which fits(n) is true. This assumes that fits(0) is true and that
/// `fits` is monotonic.
int largest(int most, const std::function<bool(int)>& fits) {
  int low = 0, high = most;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (fits(middle))
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

class Search {
 public:
  Search(const Costs& costs, int64_t budget) : costs_(costs), budget_(budget) {
    const int n = static_cast<int>(costs.stages.size());
    const auto whole = make_plan(costs.stages, costs.inputs, costs.head_reads, {{n}, {1}}, costs.incoming);
    const auto back = stages_that_go_back(whole);
    for (int i = 0; i < n; ++i)
      if (back[i] && costs.costs[i].saved > 0) savers_.push_back(i);
    const auto first = std::find(back.begin(), back.end(), true) - back.begin();
    for (int end : costs.layers) adapted_ += end > first;
    auto gain = [&](int i) { return costs.costs[i].saved_work / static_cast<double>(costs.costs[i].saved); };
    std::stable_sort(savers_.begin(), savers_.end(), [&](int a, int b) { return gain(a) > gain(b); });
  }

  Choice run() {
    const int layers = static_cast<int>(costs_.layers.size()), all = static_cast<int>(savers_.size());
    try_least();
    for (bool halves : {false, true})
      for (int group : groups(halves))
        for (int saves : {0, all}) {
          try_tails({halves, group, layers, 0, saves});
          if (group < 2) continue;
          // Only as many layers as needed are put into groups.
          auto free = largest(layers, [&](int n) { return fits({halves, group, layers - n, 0, saves}); });
          try_tails({halves, group, layers - free, 0, saves});
        }
    if (costs_.host > 0)
      for (bool halves : {false, true})
        for (int saves : {0, all}) try_tails({halves, 0, layers, 0, saves, true});
    return found_ ? best_ : least_;
  }

  /// Returns the lowest peak of the cuts that try_least tries.
  int64_t least() {
    try_least();
    return least_.estimate.peak;
  }

 private:
  void try_least() {
    const int layers = static_cast<int>(costs_.layers.size());
    for (bool halves : {false, true})
      for (int group : groups(halves))
        for (int tail : {0, 1, 2})
          for (bool offload : {false, true})
            if (!offload || (costs_.host > 0 && !group))
              fits({halves, group, layers, std::min(tail, adapted_), 0, offload});
  }

  /// The kind of cuts to try. Segments are layers or, with `halves`, single stages. If `group` is 0, the
  /// values between segments are kept. Otherwise the first `grouped` layers are in groups of `group` layers,
  /// and each of the other layers is a group. The last `tail` layers run together with the head, and all of
  /// their intermediate arrays are kept. The first `saves` stages of savers_ save arrays. With `offload`,
  /// values between segments and saved arrays are offloaded.
  struct Form {
    bool halves;
    int group, grouped, tail, saves;
    bool offload = false;
  };

  std::vector<int> groups(bool halves) const {
    std::vector<int> sizes;
    for (int size : {0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24})
      if (size < static_cast<int>(costs_.layers.size()) && (size != 1 || halves)) sizes.push_back(size);
    return sizes;
  }

  /// Tries the largest tail that fits, and a tail half as long. In both cases, as many stages as fit in
  /// memory save arrays.
  void try_tails(Form form) {
    auto most = [&](int Form::* what, int limit) {
      return largest(limit, [this, form, what](int n) mutable {
        form.*what = n;
        return fits(form);
      });
    };
    const int tail = most(&Form::tail, adapted_);
    for (int some : {tail, tail / 2}) {
      form.tail = some;
      fits(form);
      form.saves = most(&Form::saves, static_cast<int>(savers_.size()));
      fits(form);
    }
  }

  Cuts cuts(const Form& form) const {
    const auto& ends = costs_.layers;
    const int n = static_cast<int>(costs_.stages.size()), layers = static_cast<int>(ends.size());
    // The first stage of the last segment, which may consist of the head alone.
    const int at = form.tail >= layers ? 0 : ends[layers - form.tail - 1];
    Cuts cuts;
    if (form.halves)
      for (int i = 1; i <= at; ++i) cuts.segments.push_back(i);
    else
      for (int end : ends)
        if (end <= at) cuts.segments.push_back(end);
    const int segments = static_cast<int>(cuts.segments.size());
    cuts.segments.push_back(n);
    auto segments_of = [&](int layer) {  // the number of segments up to the end of a layer
      auto end = std::upper_bound(cuts.segments.begin(), cuts.segments.end() - 1, ends[layer]);
      return static_cast<int>(end - cuts.segments.begin());
    };
    for (int layer = 0; form.group && layer < layers && segments_of(layer) < segments;) {
      layer += layer < form.grouped ? form.group : 1;
      int end = layer <= layers ? segments_of(layer - 1) : segments;
      if (cuts.groups.empty() || end > cuts.groups.back()) cuts.groups.push_back(end);
    }
    if (!form.group)
      for (int i = 1; i <= segments; ++i) cuts.groups.push_back(i);
    // The last group contains the head and keeps the values between its segments.
    cuts.groups.push_back(segments + 1);
    for (int i = 0; i < form.saves; ++i)
      if (savers_[i] < at) cuts.saves.push_back(savers_[i]);
    std::sort(cuts.saves.begin(), cuts.saves.end());
    if (form.offload) cuts.offloaded = offloaded(cuts, at);
    return cuts;
  }

  /// Returns how many of the first stages, up to `at`, can offload their arrays. The arrays must fit in host
  /// memory, and must be copied during the forward pass.
  int offloaded(const Cuts& cuts, int at) const {
    double work = costs_.head_work / 2, bytes = 0;
    for (const auto& cost : costs_.costs) work += cost.forward_work;
    const double most = std::min(static_cast<double>(costs_.host) / costs_.under_way, work * costs_.copied);
    for (int i = 0; i < at; ++i) {
      if (contains(cuts.segments, i + 1))
        for (int64_t written : costs_.costs[i].writes) bytes += static_cast<double>(written);
      if (contains(cuts.saves, i)) bytes += static_cast<double>(costs_.costs[i].saved);
      if (bytes > most) return i;
    }
    return at;
  }

  bool fits(const Form& form) {
    Choice choice{cuts(form), {}};
    const auto plan =
        make_plan(costs_.stages, costs_.inputs, costs_.head_reads, choice.cuts, costs_.incoming);
    choice.estimate = estimate(plan, costs_);
    const auto& now = choice.estimate;
    auto by_peak = [](const Estimate& x) { return std::tuple(x.peak, x.work); };
    // Between plans with the same work, the one that copies less is chosen.
    auto by_work = [](const Estimate& x) { return std::tuple(x.work, x.host, x.peak); };
    if (least_.estimate.moves.empty() || by_peak(now) < by_peak(least_.estimate)) least_ = choice;
    if (now.peak > budget_) return false;
    if (!found_ || by_work(now) < by_work(best_.estimate)) best_ = choice;
    found_ = true;
    return true;
  }

  const Costs& costs_;
  int64_t budget_;
  std::vector<int> savers_;  ///< stages that can save arrays, in descending order of avoided work per byte
  int adapted_ = 0;          ///< number of layers with a backward pass
  bool found_ = false;
  Choice best_, least_;
};

}  // namespace

Estimate estimate(const Plan& plan, const Costs& costs) {
  return Walk(plan, costs).run();
}

int64_t least_peak(const Costs& costs) {
  return Search(costs, 0).least();
}

Choice choose_cuts(const Costs& costs, int64_t budget) {
  return Search(costs, budget).run();
}

}  // namespace segtrain
