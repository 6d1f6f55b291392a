// Defines the Python module and its bindings for plans. The bindings of each op are in the op's source file
// (core/binding.h).
#include "core/binding.h"
#include "core/cost.h"
#include "core/gpu.h"
#include "core/kernel.h"
#include "schedule/planner.h"
#include "schedule/recording.h"
#include "segtrain.h"

using namespace segtrain;

std::vector<Binding::Add>& Binding::all() {
  static std::vector<Add> bindings;
  return bindings;
}

Gpu Device::gpu() const {
  const std::map<std::string, Gpu> kinds{{"cpu", Gpu::none}, {"metal", Gpu::metal}, {"cuda", Gpu::cuda}};
  auto found = kinds.find(name);
  check(found != kinds.end(), "[device] expected 'cpu', 'metal' or 'cuda'; got '", name, "'.");
  return found->second;
}

NB_MODULE(_core, m) {
  m.doc() = "Native core of mlx_segtrain: differentiable ops and the segmented backward pass.";
  nb::module_::import_("mlx.core");  // loads libmlx and the type mx.array
  keep_freed_memory();
  nb::class_<Device>(
      m, "Device",
      "The properties of a device that determine how much memory ops need; see csrc/core/cost.h.")
      .def(nb::init<std::string, int, int64_t, bool, bool, bool, int64_t>(), "name"_a, "size"_a,
           "workspace"_a = 0, nb::kw_only(), "cudnn"_a = false, "nax"_a = false, "repeatable"_a = false,
           "host"_a = 0)
      .def_ro("name", &Device::name)
      .def_ro("size", &Device::size)
      .def_ro("workspace", &Device::workspace)
      .def_ro("host", &Device::host)
      .def_prop_ro("gpu", [](const Device& device) { return device.gpu() != Gpu::none; });
  nb::class_<OpCost>(m, "OpCost", "The memory, in bytes, that one call of an op needs; see csrc/core/cost.h.")
      .def_ro("forward", &OpCost::forward)
      .def_ro("backward", &OpCost::backward)
      .def_ro("kept", &OpCost::kept);
  for (auto add : Binding::all()) add(m);

  m.def("switch_off", &switch_off, "kernel"_a, "reason"_a,
        "Disables a kernel that failed the self-check on this device, for the rest of this process. `reason` "
        "appears in error messages.");

  nb::class_<StageSpec>(
      m, "StageSpec", "The names of the values that a stage reads and writes, and whether it has parameters.")
      .def(nb::init<std::string, std::vector<std::string>, std::vector<std::string>, bool>(), "name"_a,
           "reads"_a, "writes"_a, "trainable"_a)
      .def_ro("name", &StageSpec::name)
      .def_ro("reads", &StageSpec::reads)
      .def_ro("writes", &StageSpec::writes)
      .def_ro("trainable", &StageSpec::trainable);
  nb::class_<Stage>(m, "Stage", "A stage of a plan: the indices of the values that it reads and writes.")
      .def_ro("reads", &Stage::reads)
      .def_ro("writes", &Stage::writes);
  nb::class_<Plan>(m, "Plan", "The order of a segmented backward pass, as data.")
      .def_ro("stages", &Plan::stages)
      .def_ro("head_reads", &Plan::head_reads)
      .def("readers", nb::overload_cast<int, int, int>(&Plan::readers, nb::const_), "value"_a, "begin"_a,
           "end"_a,
           "Returns how many times stages [begin, end) read `value`. The head's index is one past the last "
           "stage's.")
      .def("describe", &describe,
           "Returns one line per move, with its stages, the values that it reads, keeps and drops, and the "
           "cotangents that it uses and computes.");
  m.def(
      "make_plan",
      [](const std::vector<StageSpec>& stages, const std::vector<std::string>& inputs,
         const std::vector<std::string>& head_reads, const std::vector<int>& segments,
         const std::vector<int>& groups, const std::vector<int>& saves,
         const std::vector<std::string>& incoming, int offloaded) {
        return make_plan(stages, inputs, head_reads, {segments, groups, saves, offloaded}, incoming);
      },
      "stages"_a, "inputs"_a, "head_reads"_a, "segments"_a, "groups"_a, "saves"_a = std::vector<int>{},
      "incoming"_a = std::vector<std::string>{}, "offloaded"_a = 0,
      "Returns the plan for a chain. `segments` contains the index after the last stage of each segment, "
      "and `groups` the index after the last segment of each group. `saves` lists the stages that save "
      "arrays, and `incoming` the inputs that depend on parameters of stages before this chain. The arrays "
      "of the first `offloaded` stages are in host memory while they are not needed.");

  nb::class_<Cuts>(
      m, "Cuts",
      "Where a chain is cut: the ends of its segments and groups, the stages that save arrays, and the "
      "number of stages whose arrays are offloaded.")
      .def(nb::init<std::vector<int>, std::vector<int>, std::vector<int>, int>(), "segments"_a, "groups"_a,
           "saves"_a = std::vector<int>{}, "offloaded"_a = 0)
      .def_ro("segments", &Cuts::segments)
      .def_ro("groups", &Cuts::groups)
      .def_ro("saves", &Cuts::saves)
      .def_ro("offloaded", &Cuts::offloaded);
  nb::class_<StageCost>(
      m, "StageCost",
      "The memory and the amount of computation of a stage for one batch shape; see csrc/schedule/planner.h.")
      .def(nb::init<std::vector<int64_t>, int64_t, int64_t, int64_t, int64_t, int64_t, double, double, double,
                    double>(),
           nb::kw_only(), "writes"_a, "forward"_a, "backward"_a, "kept"_a, "saved"_a, "gradients"_a,
           "forward_work"_a, "again_work"_a, "saved_work"_a, "backward_work"_a)
      .def_ro("writes", &StageCost::writes)
      .def_ro("saved", &StageCost::saved)
      .def_ro("saved_work", &StageCost::saved_work)
      .def_ro("gradients", &StageCost::gradients);
  nb::class_<Costs>(m, "Costs",
                    "A chain of stages, and the costs from which its cuts are chosen; see "
                    "`struct Costs` in csrc/schedule/planner.h.")
      .def(nb::init<std::vector<StageSpec>, std::vector<std::string>, std::vector<std::string>,
                    std::vector<int64_t>, std::vector<std::string>, std::vector<int>, std::vector<StageCost>,
                    int64_t, int64_t, double, int64_t, int64_t, double, int, int64_t, double>(),
           nb::kw_only(), "stages"_a, "inputs"_a, "head_reads"_a, "input_bytes"_a,
           "incoming"_a = std::vector<std::string>{}, "layers"_a, "costs"_a, "head"_a, "ahead"_a,
           "head_work"_a, "fixed"_a, "update"_a, "widened"_a, "under_way"_a = 1, "host"_a = 0,
           "copied"_a = 0.0)
      .def_ro("stages", &Costs::stages)
      .def_ro("inputs", &Costs::inputs)
      .def_ro("head_reads", &Costs::head_reads)
      .def_ro("input_bytes", &Costs::input_bytes)
      .def_ro("incoming", &Costs::incoming)
      .def_ro("layers", &Costs::layers)
      .def_ro("costs", &Costs::costs)
      .def_ro("head", &Costs::head)
      .def_ro("ahead", &Costs::ahead)
      .def_ro("head_work", &Costs::head_work)
      .def_ro("widened", &Costs::widened)
      .def_ro("host", &Costs::host)
      .def_ro("copied", &Costs::copied)
      .def_ro("fixed", &Costs::fixed)
      .def_ro("update", &Costs::update);
  nb::class_<Alive>(
      m, "Alive",
      "The bytes in use at the peak of a move, excluding memory that is in use for the whole run.")
      .def_ro("values", &Alive::values)
      .def_ro("saved", &Alive::saved)
      .def_ro("cotangents", &Alive::cotangents)
      .def_ro("gradients", &Alive::gradients)
      .def_ro("working", &Alive::working)
      .def_prop_ro("total", &Alive::total);
  nb::class_<Estimate>(m, "Estimate", "The memory and the amount of computation of a plan.")
      .def_ro("moves", &Estimate::moves)
      .def_ro("peak", &Estimate::peak)
      .def_ro("work", &Estimate::work)
      .def_ro("again", &Estimate::again)
      .def_ro("host", &Estimate::host);
  m.def("estimate", &estimate, "plan"_a, "costs"_a,
        "Estimates the memory and the amount of computation of a plan.");
  nb::class_<Choice>(m, "Choice", "The cuts of a chain, and the estimate for the resulting plan.")
      .def_ro("cuts", &Choice::cuts)
      .def_ro("estimate", &Choice::estimate);
  m.def("choose_cuts", &choose_cuts, "costs"_a, "budget"_a,
        "Returns the cuts with the least computation whose peak is at most `budget` bytes. If no cuts fit, "
        "returns the cuts with the lowest peak.");

  m.def("least_peak", &least_peak, "costs"_a,
        "Returns the lowest peak, in bytes, among cuts for which no stage saves arrays and at most the last "
        "two layers keep their intermediate arrays.");

  m.def("collect_kernels", &collect_kernels,
        "Makes later calls on this thread record which kernels they need, instead of running them. The calls "
        "return zeros that must not be evaluated.");
  m.def("compile_kernels", &compile_kernels, nb::call_guard<nb::gil_scoped_release>(),
        "Stops recording, compiles the recorded kernels in parallel, and returns how many it compiled.");

  nb::class_<StepResult>(m, "StepResult", "The outputs of the head and the gradients of all parameters.")
      // These properties return copies of array handles. If they returned references, a caller that keeps the
      // loss would keep the whole result alive, including every gradient.
      .def_ro("outputs", &StepResult::outputs, nb::rv_policy::copy)
      .def_ro("grads", &StepResult::grads, nb::rv_policy::copy)
      .def_ro("head_grads", &StepResult::head_grads, nb::rv_policy::copy)
      .def_ro("incoming", &StepResult::incoming, nb::rv_policy::copy);
  nb::class_<Passes>(m, "Passes", "Runs a plan in two calls; see csrc/segtrain.h.")
      .def(
          "forward", [](const Passes& passes) { return passes.forward(); },
          "Runs the forward pass and returns the values that the head reads.")
      .def(
          "backward",
          [](const Passes& passes, const Arrays& cotangents) { return passes.backward(cotangents); },
          "cotangents"_a = Arrays{},
          "Runs the backward pass and returns the result. Without a head, `cotangents` must be the "
          "cotangents of the differentiable values that `forward` returned.");
  nb::class_<Recordings>(
      m, "Recordings",
      "Recorded graphs of a plan's functions. Later steps that call the same functions reuse these graphs.")
      .def(nb::init<>());
  m.def(
      "passes_of",
      [](const Plan& plan, const std::vector<StageFn>& fns, const std::optional<HeadFn>& head,
         const std::vector<Arrays>& params, const std::vector<int>& owners, const Arrays& head_params,
         const Arrays& inputs, const std::optional<Watch>& watch, Recordings* recordings) {
        // The GIL is released while MLX computes, and while MLX waits before it accepts more work, because
        // both can take a long time. It is held during the rest of the step, because MLX calls back into
        // Python while it differentiates (mx.checkpoint, mx.custom_function), and these callbacks require the
        // GIL.
        auto wait = [](const Arrays& made) {
          {
            nb::gil_scoped_release others;
            // We do not call mx::eval here, because it would also wait for work that was launched later.
            for (auto x : made) x.wait();
          }
          if (PyErr_CheckSignals()) throw nb::python_error();
        };
        auto launch = [](const Arrays& made) {
          nb::gil_scoped_release others;
          mx::async_eval(made);
        };
        return passes_of(plan, fns, head, params, owners, head_params, inputs, wait, launch,
                         watch.value_or(nullptr), recordings);
      },
      "plan"_a, "fns"_a, "head"_a.none(), "params"_a, "owners"_a, "head_params"_a, "inputs"_a,
      "watch"_a = nb::none(), "recordings"_a.none() = nb::none(), nb::keep_alive<0, 9>(),
      "Prepares a run of a plan whose stages are callables (params, reads, saved, save) → writes; see "
      "StageFn in csrc/segtrain.h. Each stage is called with the params of its owner. `watch` is called "
      "after each move.");
}
