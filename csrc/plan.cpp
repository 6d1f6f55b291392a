#include "plan.h"

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

std::vector<Segment> cut(int n, int size) {
  if (size == 0) return {{0, n}};
  std::vector<Segment> segments;
  for (int begin = 0; begin < n; begin += size) segments.push_back({begin, std::min(begin + size, n)});
  return segments;
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
    Move move{Move::Kind::forward, s.begin, s.end, {}, {}, {}, {}};
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

}  // namespace

Plan make_plan(const std::vector<StageSpec>& stages, const std::vector<std::string>& inputs,
               const std::vector<std::string>& head_reads, int segment_size) {
  if (stages.empty()) throw std::invalid_argument("[plan] expected at least one stage; got none.");
  if (segment_size < 0)
    throw std::invalid_argument("[plan] segment_size must be 0 (off) or more; got " +
                                std::to_string(segment_size) + ".");
  Plan plan;
  Resolver names(plan, inputs);
  std::vector<Move> forward;
  for (auto segment : cut(static_cast<int>(stages.size()), segment_size))
    forward.push_back(names.segment(stages, segment));
  Move head = forward.back();
  forward.pop_back();
  head.kind = Move::Kind::head;
  for (const auto& name : head_reads) {
    int value = names.current(name, "the head");
    if (plan.values[value].producer < head.begin) add_unique(head.reads, value);
  }

  // A segment writes what a later segment, or the head, reads of it.
  auto producer_of = [&](int value) -> Move* {
    for (auto& move : forward)
      if (plan.values[value].producer >= move.begin && plan.values[value].producer < move.end) return &move;
    return nullptr;  // an input
  };
  auto count_reads = [&](Move& move) {
    for (int value : move.reads) {
      plan.values[value].readers += 1;
      if (plan.values[value].differentiable) move.cotangents.push_back(value);
      if (Move* producer = producer_of(value)) add_unique(producer->writes, value);
    }
  };
  for (auto& move : forward) count_reads(move);
  count_reads(head);

  for (Move move : forward) {
    move.cotangents.clear();
    plan.moves.push_back(move);
  }
  plan.moves.push_back(head);
  for (auto move = forward.rbegin(); move != forward.rend(); ++move) {
    Move backward = *move;
    backward.kind = Move::Kind::backward;
    std::erase_if(backward.writes, [&](int v) { return !plan.values[v].differentiable; });
    // Below the first parameter nothing has a cotangent to pass on.
    if (!backward.writes.empty()) plan.moves.push_back(backward);
  }

  // The last move that reads a value drops it; a cotangent is gone once its producer's backward took it.
  std::set<int> seen;
  for (auto move = plan.moves.rbegin(); move != plan.moves.rend(); ++move)
    for (int value : move->reads)
      if (seen.insert(value).second) move->drops.push_back(value);
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
    lines.push_back(line);
  }
  return lines;
}

}  // namespace segtrain
