// The only nanobind file: names, defaults and docstrings, no logic.
#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "core/gpu.h"
#include "core/kernel.h"
#include "schedule/planner.h"
#include "segtrain.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace segtrain;

NB_MODULE(_core, m) {
  m.doc() = "Native core of mlx_segtrain: differentiable ops and the segmented backward pass.";
  nb::module_::import_("mlx.core");  // brings mx.array's type, and libmlx
  keep_freed_memory();

  nb::class_<Base>(m, "Base", "A frozen weight [out, in]: dense, or quantized as `mx.quantize` writes it.")
      .def(nb::init<mx::array, std::optional<mx::array>, std::optional<mx::array>, std::optional<mx::array>,
                    int, int, std::string>(),
           "weight"_a, "scales"_a = nb::none(), "biases"_a = nb::none(), "bias"_a = nb::none(), nb::kw_only(),
           "group_size"_a = 0, "bits"_a = 0, "mode"_a = "affine")
      .def_ro("weight", &Base::weight)
      .def_ro("scales", &Base::scales)
      .def_ro("biases", &Base::biases)
      .def_ro("bias", &Base::bias)
      .def_ro("group_size", &Base::group_size)
      .def_ro("bits", &Base::bits)
      .def_ro("mode", &Base::mode)
      .def_prop_ro("out_dims", &Base::out)
      .def_prop_ro("in_dims", &Base::in);

  nb::class_<AttentionOptions>(m, "AttentionOptions", "Which keys a query sees, and what scores become.")
      .def(nb::init<float, std::optional<int>, std::optional<Ranges>, std::optional<float>,
                    std::optional<int>>(),
           nb::kw_only(), "scale"_a, "window"_a = nb::none(), "segments"_a = nb::none(),
           "softcap"_a = nb::none(), "q_start"_a = nb::none())
      .def_ro("segments", &AttentionOptions::segments);
  m.def("attention", &attention, "q"_a, "k"_a, "v"_a, "options"_a, nb::kw_only(), "saved"_a = nb::none(),
        "impl"_a = "auto", "stream"_a = nb::none(),
        "softmax(scale·q·kᵀ)·v, causal. q [B,H,T,D], k [B,G,S,D], v [B,G,S,Dv] → [B,H,T,Dv].");
  m.def("attention_forward", &attention_forward, "q"_a, "k"_a, "v"_a, "options"_a, nb::kw_only(),
        "impl"_a = "auto", "stream"_a = nb::none(), "{o, statistics}, as attention takes them as saved.");
  m.def("attention_impls", &attention_impls, "Implementations of attention that the default device has.");
  m.def("swiglu", &swiglu, "gate"_a, "up"_a, nb::kw_only(), "impl"_a = "auto", "stream"_a = nb::none(),
        "silu(gate)·up. [..., F] → [..., F].");
  m.def("geglu", &geglu, "gate"_a, "up"_a, nb::kw_only(), "impl"_a = "auto", "stream"_a = nb::none(),
        "gelu(gate)·up, tanh form. [..., F] → [..., F].");
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, nb::kw_only(), "impl"_a = "auto",
        "stream"_a = nb::none(), "x / sqrt(mean(x²) + eps)·weight. x [..., H], weight [H] → [..., H].");
  m.def("add_rms_norm", &add_rms_norm, "x"_a, "r"_a, "weight"_a, "eps"_a, nb::kw_only(), "impl"_a = "auto",
        "stream"_a = nb::none(), "h = x + r and rms_norm(h). x, r [..., H], weight [H] → [..., H] twice.");
  m.def("rope", &rope, "x"_a, "dims"_a, nb::kw_only(), "traditional"_a = false, "base"_a = nb::none(),
        "scale"_a = 1.0f, "offset"_a = 0, "freqs"_a = nb::none(), "impl"_a = "auto", "stream"_a = nb::none(),
        "Rotary embedding. x [B,H,T,D] → [B,H,T,D].");
  nb::class_<Linear>(m, "Linear", "A frozen weight and its low-rank update: x·Wᵀ + bias + scale·(x·a)·b.")
      .def(nb::init<Base, std::optional<mx::array>, std::optional<mx::array>, float>(), "base"_a,
           "a"_a = nb::none(), "b"_a = nb::none(), "scale"_a = 1.0f)
      .def_ro("base", &Linear::base)
      .def("with_factors", &Linear::with_factors, "a"_a, "b"_a, "The same with other factors.")
      .def_ro("a", &Linear::a)
      .def_ro("b", &Linear::b)
      .def_ro("scale", &Linear::scale);
  m.def("lora_linears", &lora_linears, "x"_a, "linears"_a, nb::kw_only(), "dropout"_a = 0.0f,
        "keys"_a = Arrays{}, "impl"_a = "auto", "stream"_a = nb::none(),
        "x·Wᵀ + bias + scale·(x·a)·b of each linear. x [..., in] → [..., out] each.");
  m.def("lora_glu_mlp", &lora_glu_mlp, "x"_a, "gate"_a, "up"_a, "down"_a, nb::kw_only(), "gelu"_a = false,
        "tile_rows"_a = nb::none(), "impl"_a = "auto", "stream"_a = nb::none(),
        "down(act(gate(x))·up(x)). x [..., H] → [..., H].");
  m.def("linear_cross_entropy", &linear_cross_entropy, "h"_a, "head"_a, "targets"_a, "weights"_a = nb::none(),
        nb::kw_only(), "softcap"_a = nb::none(), "label_smoothing"_a = 0.0f, "needs_grad"_a = true,
        "impl"_a = "auto", "stream"_a = nb::none(),
        "Σ weights·cross_entropy(h·Wᵀ, targets). h [M, H], targets [M], weights [M] → [] float32.");
  m.def("linear_log_probs", &linear_log_probs, "h"_a, "head"_a, "targets"_a, nb::kw_only(),
        "softcap"_a = nb::none(), "needs_grad"_a = true, "impl"_a = "auto", "stream"_a = nb::none(),
        "log softmax(h·Wᵀ)[targets]. h [M, H], targets [M] → [M] float32.");
  m.def("dequantize", &dequantize, "base"_a, "dtype"_a = mx::float32, nb::kw_only(), "stream"_a = nb::none(),
        "A quantized weight as an array [out, in].");

  m.def("set_repeatable", &set_repeatable, "on"_a,
        "Whether 'auto' takes only implementations that give the same bits again; what was set before.");
  m.def("is_repeatable", &is_repeatable, "What set_repeatable set last.");
  m.def("attention_way", &attention_way, "device"_a, "head"_a, "dtype"_a = mx::bfloat16, nb::kw_only(),
        "cudnn"_a = false, "nax"_a = false, "repeatable"_a = false,
        "The implementation that 'auto' takes for plain causal attention of many tokens on a device, 'cpu', "
        "'metal' or 'cuda', which need not be here.");
  m.def("has_neural_accelerators", &has_neural_accelerators,
        "Whether MLX has attention kernels for neural accelerators on this machine's GPU.");
  m.def("switch_off", &switch_off, "kernel"_a, "reason"_a,
        "Never choose a kernel again in this process: it failed the self-check on this device.");

  nb::class_<StageSpec>(m, "StageSpec", "A stage as the plan sees it.")
      .def(nb::init<std::string, std::vector<std::string>, std::vector<std::string>, bool>(), "name"_a,
           "reads"_a, "writes"_a, "trainable"_a)
      .def_ro("name", &StageSpec::name)
      .def_ro("reads", &StageSpec::reads)
      .def_ro("writes", &StageSpec::writes)
      .def_ro("trainable", &StageSpec::trainable);
  nb::class_<Stage>(m, "Stage", "A stage of a plan: the values it reads and writes, as numbers.")
      .def_ro("reads", &Stage::reads)
      .def_ro("writes", &Stage::writes);
  nb::class_<Plan>(m, "Plan", "The order of a segmented backward pass, as data.")
      .def_ro("stages", &Plan::stages)
      .def_ro("head_reads", &Plan::head_reads)
      .def("readers", nb::overload_cast<int, int, int>(&Plan::readers, nb::const_), "value"_a, "begin"_a,
           "end"_a, "How often stages [begin, end) read a value; the head is the stage after the last.")
      .def("describe", &describe, "One line per move: what it runs, reads, keeps, takes, gives and drops.");
  m.def(
      "make_plan",
      [](const std::vector<StageSpec>& stages, const std::vector<std::string>& inputs,
         const std::vector<std::string>& head_reads, const std::vector<int>& segments,
         const std::vector<int>& groups, const std::vector<int>& saves) {
        return make_plan(stages, inputs, head_reads, {segments, groups, saves});
      },
      "stages"_a, "inputs"_a, "head_reads"_a, "segments"_a, "groups"_a, "saves"_a = std::vector<int>{},
      "The plan for cuts behind these stages, groups that end behind these segments, and saving stages.");

  nb::class_<Cuts>(m, "Cuts", "Where a chain is cut: ends of segments and groups, stages that save.")
      .def(nb::init<std::vector<int>, std::vector<int>, std::vector<int>>(), "segments"_a, "groups"_a,
           "saves"_a = std::vector<int>{})
      .def_ro("segments", &Cuts::segments)
      .def_ro("groups", &Cuts::groups)
      .def_ro("saves", &Cuts::saves);
  nb::class_<StageCost>(m, "StageCost",
                        "Bytes and work of a stage at one batch shape; csrc/schedule/planner.h.")
      .def(nb::init<std::vector<int64_t>, int64_t, int64_t, int64_t, int64_t, int64_t, double, double, double,
                    double>(),
           nb::kw_only(), "writes"_a, "forward"_a, "backward"_a, "kept"_a, "saved"_a, "gradients"_a,
           "forward_work"_a, "again_work"_a, "saved_work"_a, "backward_work"_a)
      .def_ro("writes", &StageCost::writes)
      .def_ro("saved", &StageCost::saved)
      .def_ro("saved_work", &StageCost::saved_work)
      .def_ro("gradients", &StageCost::gradients);
  nb::class_<Costs>(m, "Costs",
                    "A chain of stages with all that a plan for it depends on; csrc/schedule/planner.h.")
      .def(nb::init<std::vector<StageSpec>, std::vector<std::string>, std::vector<std::string>,
                    std::vector<int64_t>, std::vector<int>, std::vector<StageCost>, int64_t, int64_t, double,
                    int64_t, int64_t, double>(),
           nb::kw_only(), "stages"_a, "inputs"_a, "head_reads"_a, "input_bytes"_a, "layers"_a, "costs"_a,
           "head"_a, "ahead"_a, "head_work"_a, "fixed"_a, "update"_a, "widened"_a)
      .def_ro("stages", &Costs::stages)
      .def_ro("inputs", &Costs::inputs)
      .def_ro("head_reads", &Costs::head_reads)
      .def_ro("layers", &Costs::layers)
      .def_ro("costs", &Costs::costs)
      .def_ro("fixed", &Costs::fixed)
      .def_ro("update", &Costs::update);
  nb::class_<Alive>(m, "Alive", "Bytes alive at the peak of a move, beyond what is there all the time.")
      .def_ro("values", &Alive::values)
      .def_ro("saved", &Alive::saved)
      .def_ro("cotangents", &Alive::cotangents)
      .def_ro("gradients", &Alive::gradients)
      .def_ro("working", &Alive::working)
      .def_prop_ro("total", &Alive::total);
  nb::class_<Estimate>(m, "Estimate", "What a plan takes.")
      .def_ro("moves", &Estimate::moves)
      .def_ro("peak", &Estimate::peak)
      .def_ro("work", &Estimate::work)
      .def_ro("again", &Estimate::again);
  m.def("estimate", &estimate, "plan"_a, "costs"_a, "Bytes and work of a plan.");
  nb::class_<Choice>(m, "Choice", "Cuts, and what a plan with them takes.")
      .def_ro("cuts", &Choice::cuts)
      .def_ro("estimate", &Choice::estimate);
  m.def("choose_cuts", &choose_cuts, "costs"_a, "budget"_a,
        "The cuts of least work whose peak is at most `budget` bytes; those of the least peak if none has.");

  m.def("least_peak", &least_peak, "costs"_a, "The least peak of cuts that keep little, in bytes.");

  nb::class_<StepResult>(m, "StepResult", "Outputs of the head and gradients of every parameter.")
      // Copies of handles: a reference into the result would keep all of it, so that whoever holds the loss
      // would hold every gradient.
      .def_ro("outputs", &StepResult::outputs, nb::rv_policy::copy)
      .def_ro("grads", &StepResult::grads, nb::rv_policy::copy)
      .def_ro("head_grads", &StepResult::head_grads, nb::rv_policy::copy);
  m.def(
      "run_plan",
      [](const Plan& plan, const std::vector<StageFn>& fns, const HeadFn& head,
         const std::vector<Arrays>& params, const std::vector<int>& owners, const Arrays& head_params,
         const Arrays& inputs, const std::optional<std::function<void()>>& watch) {
        // Not around all of it: what MLX calls back while it differentiates (mx.checkpoint,
        // mx.custom_function) takes it for granted.
        auto wait = [&watch](const Arrays& made) {
          {
            nb::gil_scoped_release others;
            mx::eval(made);
          }
          if (watch && !made.empty()) (*watch)();
        };
        return run_plan(plan, fns, head, params, owners, head_params, inputs, wait);
      },
      "plan"_a, "fns"_a, "head"_a, "params"_a, "owners"_a, "head_params"_a, "inputs"_a,
      "watch"_a = nb::none(),
      "Runs a plan over callables (params, reads) → writes; a stage has the params of its owner. `watch` is "
      "called when a move is through.");
}
