#include "schedule/plan.h"

#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>
#include <utility>

namespace segtrain {

namespace {

struct Segment {
  int begin, end;
};

/// Returns the ranges that end at the ascending `ends`, the last of which must be n. The last range may be
/// empty.
std::vector<Segment> cut(const char* what, const std::vector<int>& ends, int n) {
  std::vector<Segment> ranges;
  for (int begin = 0; int end : ends) {
    if (end < begin || (end == begin && (ranges.empty() || ranges.size() + 1 != ends.size()))) break;
    ranges.push_back({begin, end});
    begin = end;
  }
  if (ranges.size() != ends.size() || ranges.empty() || ranges.back().end != n)
    throw std::invalid_argument(std::string("[plan] the ends of ") + what +
                                " must be ascending and end with " + std::to_string(n) + ".");
  return ranges;
}

void add_unique(std::vector<int>& list, int value) {
  if (!contains(list, value)) list.push_back(value);
}

/// Returns a plan that contains the chain but no moves yet.
Plan resolve(const std::vector<StageSpec>& stages, const std::vector<std::string>& inputs,
             const std::vector<std::string>& head_reads, const std::vector<std::string>& incoming) {
  Plan plan;
  std::map<std::string, int> version;
  auto define = [&](const std::string& name, const std::string& producer, int stage, bool differentiable) {
    plan.values.push_back({name + "@" + producer, stage, differentiable, {}});
    return version[name] = static_cast<int>(plan.values.size()) - 1;
  };
  auto read = [&](const std::string& name, const std::string& reader, int stage) {
    auto found = version.find(name);
    if (found == version.end())
      throw std::invalid_argument("[plan] " + reader + " reads '" + name +
                                  "', which is neither an input nor written by an earlier stage.");
    plan.values[found->second].readers.push_back(stage);
    return found->second;
  };
  for (const auto& name : inputs)
    define(name, "input", -1, std::find(incoming.begin(), incoming.end(), name) != incoming.end());
  for (int i = 0; const auto& spec : stages) {
    Stage stage{spec.name, {}, {}};
    bool differentiable = spec.trainable;
    for (const auto& name : spec.reads) {
      stage.reads.push_back(read(name, spec.name, i));
      differentiable |= plan.values[stage.reads.back()].differentiable;
    }
    for (const auto& name : spec.writes) stage.writes.push_back(define(name, spec.name, i, differentiable));
    plan.stages.push_back(std::move(stage));
    ++i;
  }
  for (const auto& name : head_reads)
    plan.head_reads.push_back(read(name, "the head", static_cast<int>(stages.size())));
  return plan;
}

/// Returns the values that stages [begin, end) read and that stages [from, to) write, in the order in which
/// they are read.
std::vector<int> read_of(const Plan& plan, int begin, int end, int from, int to) {
  std::vector<int> found;
  for (int i = begin; i < end; ++i)
    for (int value : i < static_cast<int>(plan.stages.size()) ? plan.stages[i].reads : plan.head_reads)
      if (plan.values[value].producer >= from && plan.values[value].producer < to) add_unique(found, value);
  return found;
}

/// Returns a move that runs these stages together.
Move move_over(const Plan& plan, Move::Kind kind, Segment s) {
  Move move{kind, s.begin, s.end};
  move.reads = read_of(plan, s.begin, end_of(move), -1, s.begin);
  move.writes = read_of(plan, s.end, static_cast<int>(plan.stages.size()) + 1, s.begin, s.end);
  if (kind == Move::Kind::head) move.writes.clear();
  if (kind == Move::Kind::forward) return move;
  auto fixed = [&](int v) { return !plan.values[v].differentiable; };
  std::erase_if(move.writes, fixed);
  move.cotangents = move.reads;
  std::erase_if(move.cotangents, fixed);
  return move;
}

/// For each move, finds the values that can be dropped after it: values that are never needed again, or that
/// are recomputed before they are needed.
void assign_drops(Plan& plan) {
  std::set<int> needed;
  for (auto move = plan.moves.rbegin(); move != plan.moves.rend(); ++move) {
    if (move->kind == Move::Kind::forward)
      for (int value : move->writes) needed.erase(value);
    for (int value : move->reads)
      if (needed.insert(value).second) move->drops.push_back(value);
  }
}

/// Makes each stage in `saves` save its arrays in the last forward move before the backward pass of the
/// stage. A stage without a backward pass saves nothing.
void assign_saves(Plan& plan, const std::vector<int>& saves) {
  std::set<int> wanted;
  for (auto move = plan.moves.rbegin(); move != plan.moves.rend(); ++move)
    for (int stage : saves) {
      if (stage < move->begin || stage >= move->end) continue;
      if (move->kind == Move::Kind::backward) wanted.insert(stage);
      if (move->kind == Move::Kind::forward && wanted.erase(stage)) move->saves.push_back(stage);
    }
}

/// Moves what the first `offloaded` stages write and save to host memory while no move needs it.
void assign_offloads(Plan& plan, int offloaded) {
  // A copy takes about as long as a move, and the next move is prepared while one runs. So an array is copied
  // back one move early, and its memory is freed one move late; with fewer moves in between, nothing is
  // gained.
  constexpr size_t APART = 4;
  struct Use {
    size_t move;
    bool made;
  };
  auto& moves = plan.moves;
  for (int v = 0; v < static_cast<int>(plan.values.size()); ++v) {
    const int producer = plan.values[v].producer;
    if (producer < 0 || producer >= offloaded) continue;
    std::vector<Use> uses;
    for (size_t m = 0; m < moves.size(); ++m) {
      const bool made = moves[m].kind == Move::Kind::forward && contains(moves[m].writes, v);
      if (made || contains(moves[m].reads, v)) uses.push_back({m, made});
    }
    bool copied = false;
    size_t maker = 0;
    for (size_t i = 0; i + 1 < uses.size(); ++i) {
      if (uses[i].made) maker = uses[i].move, copied = false;
      if (uses[i + 1].made || uses[i + 1].move - uses[i].move < APART) continue;
      if (!copied) moves[maker].offloads.push_back(v);
      copied = true;
      moves[uses[i].move].leaves.push_back(v);
      moves[uses[i + 1].move].returns.push_back(v);
    }
  }
  for (size_t m = 0; m < moves.size(); ++m)
    for (int stage : moves[m].saves) {
      if (stage >= offloaded) continue;
      size_t back = m + 1;
      while (moves[back].kind == Move::Kind::forward || stage < moves[back].begin || stage >= moves[back].end)
        ++back;
      if (back - m < APART) continue;
      moves[m].saves_leave.push_back(stage);
      moves[back].saves_return.push_back(stage);
    }
}

}  // namespace

bool contains(const std::vector<int>& list, int value) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

int Plan::readers(int value, int begin, int end) const {
  const auto& all = values[value].readers;
  return static_cast<int>(std::lower_bound(all.begin(), all.end(), end) -
                          std::lower_bound(all.begin(), all.end(), begin));
}

int end_of(const Move& move) {
  return move.end + (move.kind == Move::Kind::head);
}

Plan make_plan(const std::vector<StageSpec>& stages, const std::vector<std::string>& inputs,
               const std::vector<std::string>& head_reads, const Cuts& cuts,
               const std::vector<std::string>& incoming) {
  if (stages.empty()) throw std::invalid_argument("[plan] expected at least one stage; got none.");
  Plan plan = resolve(stages, inputs, head_reads, incoming);
  const auto segments = cut("segments", cuts.segments, static_cast<int>(stages.size()));
  const auto groups = cut("groups", cuts.groups, static_cast<int>(segments.size()));
  const auto head = move_over(plan, Move::Kind::head, segments.back());

  auto stages_of = [&](Segment group) {
    return Segment{segments[group.begin].begin, segments[group.end - 1].end};
  };
  auto forward = [&](Segment s) { plan.moves.push_back(move_over(plan, Move::Kind::forward, s)); };
  auto backward = [&](int i) {
    auto move = move_over(plan, Move::Kind::backward, segments[i]);
    // Stages before the first stage with a parameter have no backward pass.
    if (!move.writes.empty()) plan.moves.push_back(move);
  };
  const auto last = groups.back();
  for (auto group : groups)
    if (group.end != last.end) forward(stages_of(group));
  for (int i = last.begin; i + 1 < last.end; ++i) forward(segments[i]);
  plan.moves.push_back(head);
  for (int i = last.end - 2; i >= last.begin; --i) backward(i);
  for (auto group = groups.rbegin() + 1; group != groups.rend(); ++group) {
    const auto whole = stages_of(*group);
    if (move_over(plan, Move::Kind::backward, whole).writes.empty()) continue;
    for (int i = group->begin; i + 1 < group->end; ++i) {
      auto move = move_over(plan, Move::Kind::forward, segments[i]);
      // Keep only the values that later segments of this group read.
      std::erase_if(move.writes, [&](int v) { return plan.readers(v, move.end, whole.end) == 0; });
      // If there are no such values, the segment need not run, unless one of its stages saves arrays.
      const bool saves = std::any_of(cuts.saves.begin(), cuts.saves.end(),
                                     [&](int stage) { return stage >= move.begin && stage < move.end; });
      if (!move.writes.empty() || saves) plan.moves.push_back(move);
    }
    for (int i = group->end - 1; i >= group->begin; --i) backward(i);
  }
  assign_drops(plan);
  assign_saves(plan, cuts.saves);
  assign_offloads(plan, cuts.offloaded);
  return plan;
}

std::vector<std::string> describe(const Plan& plan) {
  std::vector<std::string> lines;
  for (const auto& move : plan.moves) {
    static const char* kinds[] = {"forward", "head", "backward"};
    std::string line = kinds[static_cast<int>(move.kind)];
    line += " " + std::to_string(move.begin) + ":" + std::to_string(move.end);
    auto list = [&](const char* verb, const std::vector<int>& values, const char* before) {
      if (values.empty()) return;
      line += std::string(before) + verb;
      for (size_t i = 0; i < values.size(); ++i) line += (i ? ", " : " ") + plan.values[values[i]].version;
    };
    list("reads", move.reads, " ");
    list(move.kind == Move::Kind::backward ? "takes" : "keeps", move.writes, "; ");
    list("gives", move.cotangents, "; ");
    list("drops", move.drops, "; ");
    auto numbers = [&](const char* verb, const std::vector<int>& stages) {
      for (size_t i = 0; i < stages.size(); ++i)
        line += (i ? ", " : std::string("; ") + verb + " ") + std::to_string(stages[i]);
    };
    numbers("saves in", move.saves);
    list("offloads", move.offloads, "; ");
    list("frees", move.leaves, "; ");
    list("fetches", move.returns, "; ");
    numbers("offloads the saves of", move.saves_leave);
    numbers("fetches the saves of", move.saves_return);
    lines.push_back(line);
  }
  return lines;
}

}  // namespace segtrain
