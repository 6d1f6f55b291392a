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

/// Ranges between rising ends, the last of which must be n. The last range may be empty.
std::vector<Segment> cut(const char* what, const std::vector<int>& ends, int n) {
  std::vector<Segment> ranges;
  for (int begin = 0; int end : ends) {
    if (end < begin || (end == begin && (ranges.empty() || ranges.size() + 1 != ends.size()))) break;
    ranges.push_back({begin, end});
    begin = end;
  }
  if (ranges.size() != ends.size() || ranges.empty() || ranges.back().end != n)
    throw std::invalid_argument(std::string("[plan] the ends of ") + what + " must rise to " +
                                std::to_string(n) + ".");
  return ranges;
}

void add_unique(std::vector<int>& list, int value) {
  if (std::find(list.begin(), list.end(), value) == list.end()) list.push_back(value);
}

/// The values that moves use, resolved from names to versions by walking forward once.
class Resolver {
 public:
  Resolver(Plan& plan, const std::vector<std::string>& inputs) : plan_(plan) {
    for (const auto& name : inputs) define(name, name + "@input", -1, false);
  }

  /// Reads and writes of one segment; `reads` are versions that stood before it.
  Move segment(const std::vector<StageSpec>& stages, Segment s) {
    Move move{Move::Kind::forward, s.begin, s.end, {}, {}, {}, {}, {}};
    for (int i = s.begin; i < s.end; ++i) {
      bool differentiable = stages[i].trainable;
      for (const auto& name : stages[i].reads) {
        int value = current(name, stages[i].name);
        differentiable |= plan_.values[value].differentiable;
        if (plan_.values[value].producer < s.begin) add_unique(move.reads, value);
      }
      for (const auto& name : stages[i].writes) define(name, name + "@" + stages[i].name, i, differentiable);
    }
    return move;
  }

  int current(const std::string& name, const std::string& reader) const {
    auto found = version_.find(name);
    if (found == version_.end())
      throw std::invalid_argument("[plan] " + reader + " reads '" + name +
                                  "', which is neither an input nor written by an earlier stage.");
    return found->second;
  }

 private:
  void define(const std::string& name, std::string version, int producer, bool differentiable) {
    version_[name] = static_cast<int>(plan_.values.size());
    plan_.values.push_back({name, std::move(version), producer, differentiable, 0});
  }

  Plan& plan_;
  std::map<std::string, int> version_;
};

/// Segments before the last one run together: what they read from before, and what is read of them behind.
Move together(const Plan& plan, const std::vector<Move>& segments, Segment group) {
  Move move{
      Move::Kind::forward, segments[group.begin].begin, segments[group.end - 1].end, {}, {}, {}, {}, {}};
  for (int i = 0; i < static_cast<int>(segments.size()); ++i)
    for (int value : segments[i].reads) {
      int producer = plan.values[value].producer;
      bool inside = i >= group.begin && i < group.end;
      if (inside && producer < move.begin) add_unique(move.reads, value);
      if (i >= group.end && producer >= move.begin && producer < move.end) add_unique(move.writes, value);
    }
  return move;
}

/// What nobody needs after a move, or not before it is made again.
void assign_drops(Plan& plan) {
  std::set<int> needed;
  for (auto move = plan.moves.rbegin(); move != plan.moves.rend(); ++move) {
    if (move->kind == Move::Kind::forward)
      for (int value : move->writes) needed.erase(value);
    for (int value : move->reads)
      if (needed.insert(value).second) move->drops.push_back(value);
  }
}

/// A stage saves in the last forward move before it goes back; one that never goes back saves nothing.
void assign_saves(Plan& plan, const std::vector<int>& saves) {
  std::set<int> wanted;
  for (auto move = plan.moves.rbegin(); move != plan.moves.rend(); ++move)
    for (int stage : saves) {
      if (stage < move->begin || stage >= move->end) continue;
      if (move->kind == Move::Kind::backward) wanted.insert(stage);
      if (move->kind == Move::Kind::forward && wanted.erase(stage)) move->saves.push_back(stage);
    }
}

}  // namespace

Plan make_plan(const std::vector<StageSpec>& stages, const std::vector<std::string>& inputs,
               const std::vector<std::string>& head_reads, const Cuts& cuts) {
  if (stages.empty()) throw std::invalid_argument("[plan] expected at least one stage; got none.");
  Plan plan;
  Resolver names(plan, inputs);
  std::vector<Move> segments;
  for (auto segment : cut("segments", cuts.segments, static_cast<int>(stages.size())))
    segments.push_back(names.segment(stages, segment));
  const auto groups = cut("groups", cuts.groups, static_cast<int>(segments.size()));
  Move& head = segments.back();
  head.kind = Move::Kind::head;
  for (const auto& name : head_reads) {
    int value = names.current(name, "the head");
    if (plan.values[value].producer < head.begin) add_unique(head.reads, value);
  }
  for (auto& move : segments)
    for (int value : move.reads) {
      plan.values[value].readers += 1;
      if (plan.values[value].differentiable) move.cotangents.push_back(value);
    }

  auto forward = [&](Segment range) { plan.moves.push_back(together(plan, segments, range)); };
  auto backward = [&](int i) {
    Move move = together(plan, segments, {i, i + 1});
    move.kind = Move::Kind::backward;
    move.cotangents = segments[i].cotangents;
    std::erase_if(move.writes, [&](int v) { return !plan.values[v].differentiable; });
    // Below the first parameter nothing has a cotangent to pass on.
    if (!move.writes.empty()) plan.moves.push_back(move);
  };
  const auto last = groups.back();
  for (auto group : groups)
    if (group.end != last.end) forward(group);
  for (int i = last.begin; i + 1 < last.end; ++i) forward({i, i + 1});
  plan.moves.push_back(head);
  for (int i = last.end - 2; i >= last.begin; --i) backward(i);
  for (auto group = groups.rbegin() + 1; group != groups.rend(); ++group) {
    auto whole = together(plan, segments, *group);
    if (std::none_of(whole.writes.begin(), whole.writes.end(),
                     [&](int v) { return plan.values[v].differentiable; }))
      continue;
    for (int i = group->begin; i + 1 < group->end; ++i) {
      Move move = together(plan, segments, {i, i + 1});
      // Of what it makes only the group's own segments read again.
      std::erase_if(move.writes, [&](int v) {
        return std::none_of(segments.begin() + i + 1, segments.begin() + group->end, [&](const Move& reader) {
          return std::find(reader.reads.begin(), reader.reads.end(), v) != reader.reads.end();
        });
      });
      // What no segment of the group reads again need not run, unless something is saved in it.
      const bool saves = std::any_of(cuts.saves.begin(), cuts.saves.end(),
                                     [&](int stage) { return stage >= move.begin && stage < move.end; });
      if (!move.writes.empty() || saves) plan.moves.push_back(move);
    }
    for (int i = group->end - 1; i >= group->begin; --i) backward(i);
  }
  assign_drops(plan);
  assign_saves(plan, cuts.saves);
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
    for (size_t i = 0; i < move.saves.size(); ++i)
      line += (i ? ", " : "; saves in ") + std::to_string(move.saves[i]);
    lines.push_back(line);
  }
  return lines;
}

}  // namespace segtrain
