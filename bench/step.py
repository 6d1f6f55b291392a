"""Times a step of this package and of other trainers on the same model and tokens. Each cell
runs in its own process.

    python bench/step.py [--model DIR|SHAPE] [--length 512] [--loss-rows 1] [--steps 10]
                         [--cells segtrain:1 peft …] [--shared 0.9] [--any-order]

LoRA has rank 16 on all seven projections, and a batch has one row. --loss-rows is the fraction of
the row that is in the loss, counted from its end. SHAPE is the shape of a known model (gemma4-e4b,
minicpm5-1b or qwen3-8b), with random 4-bit weights. The cells are:
    segtrain:N    this package with N layers per segment (0 turns segments off)
    segtrain:XGB  the fastest plan that fits in this much memory; segtrain:min is the plan with the
                  least memory, and segtrain:auto uses the device's free memory;
                  segtrain:auto,bf16 is for a CPU with `matmul_precision: bfloat16`, and
                  segtrain:XGB,on-device is without activation offloading
    dpo:…         the same plans for a DPO step on one pair with --length tokens in each sequence;
                  the sequences share the fraction --shared of their tokens, and the rest is the
                  response; the log-probabilities of the reference are not computed
    mlx-lm        stock LoRA layers and loss with nn.value_and_grad; mlx-lm:ckpt uses
                  grad_checkpoint
    peft          HF transformers + PEFT with torch; peft:ckpt uses gradient checkpointing. It runs
                  in float32 on the CPU (peft:bf16 in bfloat16); for a SHAPE on a GPU, in bfloat16
                  without quantization
    liger:nf4     for a SHAPE on a GPU (bench/peers.py): peft with Liger's kernels and a 4-bit
                  base; liger:bf16 has no quantization; liger:nf4-ckpt and liger:bf16-ckpt use
                  gradient checkpointing
    unsloth:keep  for a SHAPE on a GPU: Unsloth with a 4-bit base; unsloth:ckpt uses gradient
                  checkpointing, and unsloth:offload uses Unsloth's own version of it
Prints a table with the median, p20 and p80 of the steps after three warm-up steps; slow cells run
fewer steps (column `n`). `peak` is the peak of MLX's active memory; `rss` is the highest resident
memory of the process. The steps of this package are the same as those of `train`; their results are
bit-identical when repeated, unless `--any-order` is given. There are two more columns on CUDA if
torch, which traces the steps, is installed. `busy` is the fraction of a step's time during which
the device runs a kernel. `of_peak` compares a step with its matrix products: it is the time that
they would need without recomputation and at the speed of an 8192 × 8192 × 8192 product, divided by
the time of the step.
"""

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RANK, SCALE = 16, 1.0
ADAPTERS = ("lora", "dora", "dropout", "embeddings")
SHAPES: dict[str, dict[str, Any]] = {
    "gemma4-e4b": {
        "model_type": "gemma4_text",
        "hidden_size": 2560,
        "num_hidden_layers": 42,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_kv_shared_layers": 18,
        "hidden_size_per_layer_input": 256,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
        "use_double_wide_mlp": False,
    },
    "minicpm5-1b": {
        "model_type": "llama",
        "hidden_size": 1536,
        "num_hidden_layers": 24,
        "intermediate_size": 4608,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e6,
        "vocab_size": 130560,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}
SUFFIXES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEYS = [f"{'self_attn' if len(s) == 6 else 'mlp'}.{s}" for s in SUFFIXES]


def tokens(length, vocab):
    import numpy as np

    return np.random.default_rng(0).integers(0, vocab, (1, length + 1)).astype(np.int32)


def load(name):
    """Returns (model, vocabulary size) for a folder, or for a shape with random 4-bit weights in
    groups of 64."""
    import importlib

    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    from mlx_segtrain.models import load_base

    if name not in SHAPES:
        model, config, _ = load_base(name)
        return model, config["vocab_size"]
    config = SHAPES[name]
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 64, 4)
    # Weights are evaluated one at a time, so only a few float32 arrays exist at once.
    for _, weight in tree_flatten(model.parameters()):
        mx.eval(weight)
        mx.clear_cache()
    return model, config["vocab_size"]


def shape_of(name, model):
    """Returns the planner's description of the model."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_segtrain import planning

    if name not in SHAPES:
        return planning.read_shape(Path(name))
    kinds = {mx.uint32: "U32", mx.float32: "F32", mx.bfloat16: "BF16"}
    weights: Any = tree_flatten(model.parameters())
    headers = {path: (kinds[w.dtype], tuple(w.shape)) for path, w in weights}
    quantization = {"quantization": {"bits": 4, "group_size": 64}}
    return planning.shape_of({**SHAPES[name], **quantization}, headers)


def ranks_of(shape, adapter="lora"):
    from mlx_segtrain import planning

    how = {"rank": RANK, "rank_scaling": "constant", "num_layers": -1}
    outer = shape.outer if adapter == "embeddings" else ()
    return planning.ranks_of(shape, target_modules=[*SUFFIXES, *outer], **how)


def batch_of(vocabulary, length, rows, shared=None):
    """Returns (objective, batch, shape of the batch) for a row whose last `rows` tokens are in the
    loss or, if `shared` is given, for a pair whose sequences share this fraction of their
    tokens."""
    import numpy as np

    from mlx_segtrain.data import Batch, PairBatch
    from mlx_segtrain.objectives.preference import Dpo
    from mlx_segtrain.objectives.sft import Sft
    from mlx_segtrain.streams import PAIR, BatchShape, StreamShape, joined, trim_start

    def batch(ids, first):
        weights = np.ones(ids.shape, np.float32)
        weights[:, :first] = 0
        return Batch(ids, weights, np.arange(1), np.array([ids.shape[1]]))

    trimmed = length - trim_start(length - rows)
    row = tokens(length, vocabulary)
    if shared is None:
        of = BatchShape.single(1, length, trimmed, rows)
        return Sft(), batch(row, length + 1 - rows), of
    same = round(length * shared)
    other = np.concatenate([row[:, :same], tokens(length, vocabulary)[:, ::-1][:, same:]], 1)
    first = max(same, length + 1 - rows)
    pair = PairBatch(batch(row, first), batch(other, first), same, np.arange(1), None)
    rest = length - same
    streams = [StreamShape(stream, length, trimmed) for stream in PAIR]
    if same:
        trimmed = min(trimmed, rest + length - trim_start(same - 1))
        streams = [StreamShape(joined(), length + rest, trimmed + rest, same, rest)]
    return Dpo(), pair, BatchShape(1, tuple(streams), 2 * min(rows, rest + 1))


def plan_of(shape, kind, batch, adapter="lora", repeats=True, offloads=True):
    """Returns the plan for the variant in a cell's name: a number of layers per segment, `min`,
    `auto`, or a budget such as 1.8GB."""
    from mlx_segtrain import planning

    what = (shape, batch, ranks_of(shape, adapter), planning.device(repeats, offloads=offloads))
    if kind.isdecimal():
        return planning.named(*what, int(kind))
    budget = 0 if kind == "min" else None if kind == "auto" else float(kind.removesuffix("GB"))
    return planning.choose(*what, planning.budget_bytes(budget))


def prompt(args):
    """Returns the number of tokens before the first token in the loss."""
    return args.length - round(args.length * args.loss_rows)


def timed(step, steps, slow_s=15.0):
    """Times the first step and then, after three warm-up steps, `steps` single steps. If the first
    step is slow, only two more steps are timed, without further warm-up."""
    begin = time.perf_counter()
    step()
    first = time.perf_counter() - begin
    slow = first > slow_s
    for _ in range(0 if slow else 3):
        step()
    reset_peak()
    times = []
    for _ in range(2 if slow else steps):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return first, times


def reset_peak():
    if "mlx.core" in sys.modules:
        mx = sys.modules["mlx.core"]
        mx.clear_cache()
        mx.reset_peak_memory()


def run_plan(shape, batch, plan, repeats=True):
    """Wraps the plan in a RunPlan, the form that training uses."""
    from mlx_segtrain import planning
    from mlx_segtrain.planning.run import RunPlan

    how = (ranks_of(shape), planning.device(repeats), plan.peak, None)
    return RunPlan(shape, (batch,), *how, (plan,))


def stepper(model, shape, run, objective, data, watch=None, kind="lora"):
    """Returns a Stepper, which runs the steps of `train` with a plan on batches of a data set, and
    the initial training state."""
    import mlx.core as mx

    from mlx_segtrain.config import TrainConfig
    from mlx_segtrain.models import adapting, chain_of
    from mlx_segtrain.training.layout import Layout
    from mlx_segtrain.training.setup import Setup
    from mlx_segtrain.training.step import Stepper

    chain = chain_of(model)
    adapter = adapting.init(chain, ranks_of(shape, kind), SCALE, 0, dora=kind == "dora")
    params = adapting.stage_params(chain, adapter)
    layout = Layout.of(params)
    vector = layout.join(params)
    mx.eval(vector)
    dropout = 0.1 if kind == "dropout" else 0.0
    config = TrainConfig.model_construct(learning_rate=1e-4, lora_dropout=dropout)
    how = (run, model, chain, objective, adapter.scales, layout)
    made = Stepper(Setup(config, None, data, None, [], *how), watch)
    return made, made.optimizer.start(vector)


def training_step(model, shape, plan, objective, batch, watch=None, kind="lora", of=None):
    """Returns a function that runs the step of `train` on one batch with a plan."""
    import mlx.core as mx

    from mlx_segtrain.data import Dataset, PairBatch, Row
    from mlx_segtrain.data.encoding import Pair

    def row(own):
        return Row(own.tokens[0], own.weights[0], "made:1")

    rows = (
        [Pair.of(row(batch.chosen), row(batch.rejected), "made:1")]
        if isinstance(batch, PairBatch)
        else [row(batch)]
    )
    take, at = stepper(
        model, shape, run_plan(shape, of, plan), objective, Dataset.of(rows), watch, kind
    )
    mx.set_memory_limit(plan.limit)

    def step():
        nonlocal at
        at, _ = take(at, [batch])

    return step


def segtrain(args, variant, shared=None):
    import mlx.core as mx

    from mlx_segtrain import ops, planning

    model, vocabulary = load(args.model)
    shape = shape_of(args.model, model)
    objective, batch, of = batch_of(vocabulary, args.length, args.length - prompt(args), shared)
    name, _, how = (variant or "auto").partition(",")
    with ops.repeatable(not args.any_order), ops.bfloat16_products(how == "bf16"):
        plan = plan_of(shape, name, of, repeats=not args.any_order, offloads=how != "on-device")
        step = training_step(model, shape, plan, objective, batch, of=of)
        resting = mx.get_active_memory()
        first, times = timed(step, args.steps)
        result = {"first_s": first, "times": times, "resting": resting, "planned": plan.peak}
        result["peak"] = mx.get_peak_memory()
        if mx.cuda.is_available():
            least = planning.named(shape, of, ranks_of(shape), planning.device(), 0).work
            result |= traced(step, least, statistics.median(times))
    return result


def traced(step, work, seconds):
    """Returns `busy` and `of_peak` of a step, or {} if torch is not installed. `work` is the number
    of operations of a step without recomputation, and `seconds` is the time that a step takes."""
    import mlx.core as mx

    try:
        from torch._C._autograd import DeviceType  # pyright: ignore[reportMissingImports]
        from torch.profiler import ProfilerActivity, profile  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
    # Copies to and from host memory run beside the kernels.
    events = [
        e
        for e in trace.events() or []
        if e.device_type == DeviceType.CUDA and not e.name.startswith("Memcpy")
    ]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy = end = 0
    for first, last in spans:  # kernels of a CUDA graph may run at the same time
        busy += max(0, last - max(first, end))
        end = max(end, last)
    n, times = 8192, []
    x, y = (mx.random.normal((n, n)).astype(mx.bfloat16) for _ in range(2))
    mx.eval(x, y)
    for _ in range(8):
        begin = time.perf_counter()
        mx.eval(x @ y)
        times.append(time.perf_counter() - begin)
    rate = 2 * n**3 / statistics.median(times[2:])
    return {"busy": busy / 1e6 / seconds, "of_peak": work / seconds / rate}


def dpo(args, variant):
    return segtrain(args, variant, args.shared)


def mlx_lm(args, variant):
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
    from mlx_lm.tuner.utils import linear_to_lora_layers

    # On the CPU, the model runs in float32. Half precision is ten times slower there, so using it
    # would make the comparison unfair to mlx-lm.
    model, vocabulary = load(args.model)
    model.freeze()
    linear_to_lora_layers(model, 0, {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": KEYS})
    if variant == "ckpt":
        grad_checkpoint(model["model"]["layers"][0])
    batch = mx.array(tokens(args.length, vocabulary))
    lengths = mx.array([[prompt(args) + 1, args.length]])
    optimizer = optim.AdamW(1e-4, bias_correction=True)
    value_and_grad = nn.value_and_grad(model, default_loss)
    mx.eval(model.parameters())
    resting = mx.get_active_memory()

    def step():
        (loss, _), grads = value_and_grad(model, batch, lengths)
        optimizer.update(model, grads)
        mx.eval(loss, model.trainable_parameters(), optimizer.state)

    first, times = timed(step, args.steps)
    return {"first_s": first, "times": times, "resting": resting, "peak": mx.get_peak_memory()}


def peft_model(name, variant=None):
    """Returns (model with an adapter, its device, vocabulary size) for transformers and PEFT."""
    import mlx.core as mx
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model, load_model
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    from transformers import AutoConfig, AutoModelForCausalLM

    if name in SHAPES:  # random weights in bfloat16 on the GPU
        device, dtype = "cuda", torch.bfloat16
        fields = {key: value for key, value in SHAPES[name].items() if key != "model_type"}
        config: Any = AutoConfig.for_model(SHAPES[name]["model_type"], **fields)
        weights = None
    else:
        device, dtype = "cpu", torch.bfloat16 if variant == "bf16" else torch.float32
        source, _ = load_model(Path(name))
        dense: Any = dequantize_model(source).parameters()
        weights = {
            name: torch.from_numpy(np.array(w.astype(mx.float32)))
            for name, w in dict(tree_flatten(dense)).items()
        }
        del source
        config = AutoConfig.from_pretrained(name)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    torch.set_default_device(device)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if weights is not None:
        missing = model.load_state_dict(weights, strict=False).missing_keys
        assert set(missing) <= {"lm_head.weight"}, missing
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=int(RANK * SCALE), target_modules=SUFFIXES)
    )
    if variant == "ckpt":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    return model, device, config.vocab_size


def peft(args, variant):
    import torch  # pyright: ignore[reportMissingImports]

    model, device, vocabulary = peft_model(args.model, variant)
    row = torch.from_numpy(tokens(args.length, vocabulary)).long().to(device)

    def loss():
        logits = model(input_ids=row[:, :-1]).logits
        return torch.nn.functional.cross_entropy(
            logits[0, prompt(args) :], row[0, prompt(args) + 1 :]
        )

    return torch_steps(args, model, device, loss)


def peer(name, args, variant):
    """Runs the cell of a trainer in bench/peers.py, with the loss that the trainer's own forward
    pass returns."""
    import torch  # pyright: ignore[reportMissingImports]

    import peers

    shape = SHAPES[args.model]
    lora = (RANK, SCALE, SUFFIXES)
    model = peers.PEERS[name](peers.snapshot(shape, name), variant, lora, args.length)
    row = torch.from_numpy(tokens(args.length, shape["vocab_size"])[:, 1:]).long().cuda()
    labels = row.clone()
    labels[:, : prompt(args)] = -100
    return torch_steps(args, model, "cuda", lambda: model(input_ids=row, labels=labels).loss)


def torch_steps(args, model, device, loss):
    import torch  # pyright: ignore[reportMissingImports]

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    first, times = timed(step, args.steps)
    peak = {"peak": torch.cuda.max_memory_allocated()} if device == "cuda" else {}
    return {"first_s": first, "times": times, **peak}


CELLS = {
    "segtrain": segtrain,
    "dpo": dpo,
    "mlx-lm": mlx_lm,
    "peft": peft,
    "liger": functools.partial(peer, "liger"),
    "unsloth": functools.partial(peer, "unsloth"),
}


def run_cell(args):
    name, _, variant = args.cell.partition(":")
    if args.limit_gb and name == "mlx-lm":
        import mlx.core as mx

        mx.set_memory_limit(int(args.limit_gb * 1e9))
    result = CELLS[name](args, variant)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["rss"] = rss * (1 if sys.platform == "darwin" else 1024)
    print("RESULT " + json.dumps(result))


def main():
    parser = argparse.ArgumentParser(
        description="Times a training step of this package and of other trainers."
    )
    parser.add_argument("--model", help="folder of an MLX model, or a shape; default: the demo's")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument(
        "--loss-rows", type=float, default=1.0, help="fraction of a row that is in the loss"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--shared", type=float, default=0.0, help="fraction that a pair's sequences share"
    )
    parser.add_argument("--limit-gb", type=float, help="memory limit of MLX for mlx-lm")
    parser.add_argument("--any-order", action="store_true", help="the same as deterministic: false")
    parser.add_argument(
        "--cells",
        nargs="+",
        default=["segtrain:min", "segtrain:auto", "peft", "peft:ckpt", "mlx-lm"],
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 0 < args.loss_rows <= 1:
        parser.error(f"--loss-rows must be above 0 and at most 1; got {args.loss_rows}")
    if args.model is None:
        from mlx_segtrain.commands.demo.snapshot import smollm2_snapshot
        from mlx_segtrain.files import cache_dir

        args.model = str(smollm2_snapshot(cache_dir()))
    if args.cell:
        return run_cell(args)
    packages = ["mlx", "mlx-lm", "mlx-segtrain", "torch", "peft", "transformers"]
    packages += ["liger-kernel", "unsloth"]
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    print(f"{platform.platform()}, {os.cpu_count()} processors; {found}")
    rows = f"{args.length - prompt(args)} rows in the loss"
    print(f"{Path(args.model).name}, T={args.length}, rank {RANK} on all seven, {rows}")
    print(
        "cell          first_s  median_s    p20_s    p80_s  n  resting_gb  peak_gb planned_gb"
        "  rss_gb  busy of_peak"
    )
    for cell in args.cells:
        command = [sys.executable, __file__, "--cell", cell, "--model", args.model]
        command += ["--length", str(args.length), "--steps", str(args.steps)]
        command += ["--loss-rows", str(args.loss_rows), "--shared", str(args.shared)]
        command += ["--limit-gb", str(args.limit_gb)] if args.limit_gb else []
        command += ["--any-order"] if args.any_order else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
        if line is None:
            print(f"{cell:12s}  failed: {done.stderr.strip().splitlines()[-1:]}")
            continue
        r = json.loads(line.removeprefix("RESULT "))
        times = sorted(r["times"])
        q = statistics.quantiles(times, n=5, method="inclusive")
        names = ("resting", "peak", "planned", "rss")
        gb = [f"{r[k] / 1e9:.3f}" if k in r else "-" for k in names]
        parts = [f"{r[k]:.1%}" if k in r else "-" for k in ("busy", "of_peak")]
        print(
            f"{cell:12s} {r['first_s']:8.3f} {statistics.median(times):9.3f} {q[0]:8.3f} "
            f"{q[3]:8.3f} {len(times):2d} {gb[0]:>11s} {gb[1]:>8s} {gb[2]:>10s} "
            f"{gb[3]:>7s} {parts[0]:>5s} {parts[1]:>7s}",
            flush=True,
        )


if __name__ == "__main__":
    main()
