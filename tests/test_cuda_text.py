"""Tests that the kernels in cuda/ compile for the devices that they support, without a GPU.

Only the host code of each call and CUDA's compiler run here, because running a kernel needs a GPU.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from importlib import import_module, metadata
from itertools import cycle
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(
        sys.platform != "linux" or os.uname().machine != "x86_64",
        reason="the compiler's package is only available for Linux on x86_64",
    ),
]

ROOT = Path(__file__).parents[1]
DEVICE = "MLX_SEGTRAIN_DRY_RUN_CUDA"
NAME = Path(__file__).stem
COMPILER = "nvidia-cuda-nvrtc"


def load_compiler():
    """Loads the compiler's libraries into the process, where _core finds them by name."""
    # Uses only the compiler package's own files, because a CUDA build of torch installs other
    # libraries in the same folder.
    files = {file.name.partition(".so.")[0]: file for file in metadata.files(COMPILER) or []}
    for name in ("libnvrtc-builtins", "libnvrtc"):
        ctypes.CDLL(str(files[name].locate()), mode=ctypes.RTLD_GLOBAL)


def differentiate(f, *args):
    """Compiles the kernels of the forward and backward passes by building their graphs."""
    y = f(*args)
    ys = list(y) if isinstance(y, list | tuple) else [y]
    mx.vjp(f, list(args), [mx.zeros_like(x) for x in ys])


def attention(impl, dtype, d, **options):
    from mlx_segtrain import ops

    q, k = mx.zeros((1, 4, 300, d), dtype), mx.zeros((1, 2, 300, d), dtype)
    differentiate(lambda q, k, v: ops.attention(q, k, v, scale=1.0, impl=impl, **options), q, k, k)


def the_plan_counts_sums():
    """Checks that the plan counts the memory of float32 dq, dk and dv for the deterministic Hopper
    kernel, and only a few additional values per query.
    """
    from mlx_segtrain import _core
    from mlx_segtrain.planning.costs import Device

    device = Device("cuda", size=2, repeatable=True)
    for head, padded in ((128, 128), (64, 64), (40, 64)):
        cost = _core.attention_cost(
            device, rows=2, heads=8, groups=2, head=head, queries=1024, keys=2048
        )
        sums = 4 * 2 * padded * (8 * 1024 + 2 * 2 * 2048)
        assert sums < cost.backward < sums + 2 * 8 * 1024 * 8, (head, cost.backward)


def layer_ops(dtype):
    from lib.linears import BASES, factors_of, linears_of, with_factors
    from mlx_segtrain import ops

    x = mx.zeros((300, 128), dtype)
    for op in (ops.swiglu, ops.geglu):
        differentiate(lambda g, u, op=op: op(g, u, impl="kernel"), x, x)
    for how in ({"base": 1e4}, {"freqs": mx.ones(24), "traditional": True}):
        y = mx.zeros((1, 4, 300, 64), dtype)
        differentiate(lambda y, how=how: ops.rope(y, 48, segments=[0, 100, 300], **how), y)
    differentiate(lambda x: ops.take_rows(x, mx.array([[3, 1], [3, 9]])), x)
    rng = np.random.default_rng(0)
    name = str(dtype).split(".")[-1]
    bases = [*BASES, ("affine", 2, 64), ("affine", 3, 128), ("affine", 5, 32), ("affine", 8, 32)]
    shapes = [([264], [16]), ([64], [6]), ([128, 32, 32], [40, 8, 3])]
    # Dequantizing kernels depend only on the base, and matrix products only on the ranks, so each
    # base and each set of ranks is tested once.
    for base, (widths, ranks) in zip(bases, cycle(shapes), strict=False):
        linears, _ = linears_of(rng, 128, widths, ranks, base, name)
        differentiate(
            lambda x, *p, w=linears: ops.lora_linears(x, with_factors(w, p), impl="kernel"),
            x,
            *factors_of(linears),
        )
    rotation = {"base": 1e4, "segments": [0, 100, 300]}
    for how in (rotation, {"freqs": mx.ones(8), "traditional": True}):
        linears, _ = linears_of(rng, 128, [128, 64, 64], [8, 8, 8], BASES[1], name)
        differentiate(
            lambda x, *p, w=linears, how=how: ops.lora_qkv(
                x[None], with_factors(w, p), 4, 2, 16, impl="kernel", **how
            ),
            x,
            *factors_of(linears),
        )
    x_rows, index = mx.zeros((3, 64), dtype), mx.arange(3)
    for base in (None, BASES[1], ("affine", 3, 128), ("mxfp4", 4, 32)):
        table = linears_of(rng, 128, [64], [0], base, name)[0][0].base
        if base is None or base[0] != "affine":
            table = table if base else ops.Base(table.weight.astype(dtype))
            ops.embedded_rows(table, index, begin=8, factor=2.0, impl="kernel")
            continue
        more = (table.scales.astype(dtype), table.biases.astype(dtype))
        table = ops.Base(table.weight, *more, **ops.packing(table))
        ops.own_input(x_rows, mx.ones(64, dtype), 1.0, table, index, 64, [1] * 3, impl="kernel")
    norms = [ops.HeadNorm(mx.ones(64, dtype), 1e-6)] * 3
    for widths in ([256, 128, 128], [256, 128], [256]):
        linears, _ = linears_of(rng, 128, widths, [8] * len(widths), BASES[1], name)
        differentiate(
            lambda x, w=linears: ops.lora_qkv(x[None], w, 4, 2, 64, base=1e4, norms=norms), x
        )
    for width in (128, 8192):
        y, w = mx.zeros((4, width), dtype), mx.ones(width, dtype)
        differentiate(lambda y, w=w: ops.add_rms_norm(*ops.rms_norm_beside(y, w, 1.0), w, 1.0), y)
        factor = mx.ones(1, dtype)
        differentiate(lambda y, w=w, f=factor: ops.add_rms_norm(y, y, w, 1.0, f), y)
        differentiate(lambda y, w=w: ops.rms_norm(y, w, 1.0, impl="kernel"), y)
    ops.join([x, x])
    for mode in (("mxfp4", 4, 32), ("nvfp4", 4, 16)):
        linears, _ = linears_of(rng, 128, [64], [0], mode, name)
        differentiate(lambda x, w=linears: ops.lora_linears(x, w, impl="kernel"), x)
    gate_up, _ = linears_of(rng, 128, [160, 160], [8, 8], BASES[1], name)
    down, _ = linears_of(rng, 160, [128], [8], BASES[1], name)
    for gelu in (False, True):
        differentiate(lambda x, g=gelu: ops.lora_glu_mlp(x, *gate_up, *down, gelu=g), x)
    for bias in (None, mx.zeros(17000)):
        head = ops.Base(mx.zeros((17000, 128), dtype), bias=bias)
        for cap in (None, 30.0):
            differentiate(
                lambda h, head=head, cap=cap: ops.linear_cross_entropy(
                    h, head, mx.zeros(300, mx.int32), softcap=cap, impl="kernel"
                ),
                x,
            )


def decoding(dtype):
    """Runs decoding steps with one and with several rows, with and without low-rank updates."""
    from lib.linears import base_of
    from mlx_segtrain import ops

    rng = np.random.default_rng(0)
    four, eight = ("affine", 4, 64), ("affine", 8, 32)
    two = ("affine", 2, 32)
    calls = [(None, (8,), 1), (four, (8, 0, 8), 1), (four, (8, 0, 8), 16), (eight, (96, 8), 7)]
    calls += [(None, (8, 0), 9), (two, (8,), 5), (four, (0,), 16)]
    for kind, ranks, rows in calls:
        out = 17000 if ranks == (0,) else 64  # output heads use different tiles
        bases = [base_of(rng, out, 128, kind)[0] for _ in ranks]
        if kind is None:
            bases = [ops.Base(bases[0].weight.astype(dtype))]
        b = [mx.zeros((2, 64, rank), dtype) if rank else None for rank in ranks]
        a = mx.zeros((2, sum(ranks), 128), dtype) if sum(ranks) else None
        op = ops.decode_linears(bases, a, b)
        mx.eval(op(mx.zeros((rows, 128), dtype), mx.zeros(rows, mx.uint32), impl="kernel"))


def compile_all():
    load_compiler()
    mx.set_default_device(mx.Device(mx.cpu))
    for d in (64, 80, 128, 256):
        attention("kernel", mx.bfloat16, d, window=70)
    for d in (64, 80, 128, 192, 256, 512):
        attention("hopper", mx.bfloat16, d)
    for impl in ("kernel", "hopper", "blocked"):
        attention(impl, mx.float16, 64, softcap=2.0)
    the_plan_counts_sums()
    layer_ops(mx.bfloat16)
    layer_ops(mx.float16)
    decoding(mx.bfloat16)
    decoding(mx.float16)
    print("compiled")


def compile_together():
    """Checks that collected kernels are compiled in one call, and that later calls do not compile
    them again."""
    from mlx_segtrain import _core, ops

    load_compiler()
    mx.set_default_device(mx.Device(mx.cpu))
    x = mx.zeros((300, 128), mx.bfloat16)
    counts = []
    for _ in range(2):
        _core.collect_kernels()
        differentiate(lambda g, u: ops.swiglu(g, u, impl="kernel"), x, x)
        counts.append(_core.compile_kernels())
    differentiate(lambda g, u: ops.swiglu(g, u, impl="kernel"), x, x)
    print(counts)


SIZES = {
    **{"hidden_size": 128, "intermediate_size": 256, "vocab_size": 64, "head_dim": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
}
LLAMA = {"rope_theta": 1e4, "max_position_embeddings": 4096, "tie_word_embeddings": True}
GEMMA = {
    **{"global_head_dim": 64, "sliding_window": 32, "use_double_wide_mlp": False},
    **{"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 64},
    "num_kv_shared_layers": 1,
}


def model_of(family, args):
    """Returns a small quantized model."""
    import mlx.nn as nn

    module = import_module(f"mlx_lm.models.{family}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": family, **SIZES, **args}))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 64, 4)
    mx.eval(model.parameters())
    return model


def launches_of_model(family, args):
    """Counts the launches of a small model's layers in the forward and backward passes. All linear
    layers are adapted."""
    from mlx_segtrain import _core
    from mlx_segtrain.models import adapting, chain_of

    chain = chain_of(model_of(family, args))
    adapter = adapting.init(chain, dict.fromkeys(chain.linears, 8), 1.0, 0)
    params = adapting.stage_params(chain, adapter)
    places = [(owner, name) for owner in params for name in sorted(params[owner])]
    factors = [params[owner][name] for owner, name in places]
    tokens = mx.zeros((1, 64), mx.int32)

    def run(h, *factors):
        own = defaultdict(dict)
        for (owner, name), x in zip(places, factors, strict=True):
            own[owner][name] = x
        values = {"h": h, "positions": mx.arange(h.shape[1]), "tokens": tokens}
        for stage in chain.stages(adapter.scales):
            made = stage.fn(own[stage.owner], *(values[name] for name in stage.reads))
            made = made if isinstance(made, tuple) else (made,)
            values |= dict(zip(stage.writes, made, strict=True))
        return values["h"]

    h = mx.zeros((1, 64, SIZES["hidden_size"]), mx.bfloat16)
    mx.eval(h, tokens, factors)
    mx.eval(run(h, *factors))  # creates the cached arrays before launches are counted
    (y,), (dh, *grads) = mx.vjp(run, [h, *factors], [h])
    return Counter(_core.launches([y, dh, *grads]))


def launches(form):
    """Returns the number of launches that one more layer of this form adds, by kernel name."""
    slides, full = "sliding_attention", "full_attention"
    alone = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "attention_k_eq_v": True}
    types = {
        "slides": [full, slides, slides],
        "full": [full, full, slides],
        "shares": [full, slides, slides],
    }
    if form in types:
        shared = 2 if form == "shares" else 1
        larger = {**GEMMA, "layer_types": [*types[form], slides], "num_kv_shared_layers": shared}
        smaller = {**GEMMA, "layer_types": [full, slides, slides]}
        family = "gemma4_text"
    elif form == "keys are values":
        larger, smaller = ({**GEMMA, **alone, "layer_types": [full] * n} for n in (3, 2))
        family = "gemma4_text"
    else:
        larger, smaller = ({**LLAMA, "num_hidden_layers": n} for n in (3, 2))
        family = form
    for args in (larger, smaller):
        args.setdefault("num_hidden_layers", len(args.get("layer_types", ())))
    counts = [launches_of_model(family, args) for args in (larger, smaller)]
    return counts[0] - counts[1]


def kept(family):
    """Returns the ratio of the bytes that each stage saves for its backward pass to the bytes that
    the plan expects."""
    from lib.chains import headers
    from mlx_segtrain import _core
    from mlx_segtrain.models import adapting, chain_of
    from mlx_segtrain.planning import shape_of
    from mlx_segtrain.planning.costs import Device, costs_of
    from mlx_segtrain.streams import BatchShape

    length, slides, full = 512, "sliding_attention", "full_attention"
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    gemma = {**GEMMA, "num_hidden_layers": 4, "layer_types": [full, slides, slides, slides]}
    own = gemma if family == "gemma4_text" else {**LLAMA, "num_hidden_layers": 2}
    args = {**own, **sizes, "head_dim": 64}
    model = model_of(family, args)
    chain = chain_of(model)
    ranks = dict.fromkeys(chain.linears, 8)
    adapter = adapting.init(chain, ranks, 1.0, 0)
    params = adapting.stage_params(chain, adapter)
    shape = shape_of({"model_type": family, **SIZES, **args}, headers(model))
    batch = BatchShape.single(1, length, length, length)
    planned, stage_cost = [], _core.StageCost

    def noted(kept, **rest):
        planned.append(kept)
        return stage_cost(kept=kept, **rest)

    _core.StageCost = noted
    costs_of(shape, batch, ranks, Device("cuda", 2, repeatable=True))
    _core.StageCost = stage_cost
    tokens = mx.zeros((1, length), mx.int32)
    values = {"h": mx.zeros((1, length, 512), mx.bfloat16), "tokens": tokens}
    values["positions"] = mx.arange(length)
    mx.eval(values, params)
    found = {}
    for stage, kept in zip(chain.stages(adapter.scales), planned, strict=True):
        names = sorted(params[stage.owner])
        _, *reads = (values[name] for name in stage.reads)

        def run(h, *factors, stage=stage, names=names, reads=reads):
            made = stage.fn(dict(zip(names, factors, strict=True)), h, *reads)
            return list(made) if isinstance(made, tuple) else [made]

        before = mx.get_active_memory()
        given = [values["h"], *(params[stage.owner][name] for name in names)]
        cotangents = [mx.zeros_like(x) for x in run(*given)]
        made, gradients = mx.vjp(run, given, cotangents)
        mx.eval(made)
        mx.synchronize()
        taken = mx.get_active_memory() - before - sum(x.nbytes for x in made)
        found[stage.name] = taken / kept
        values |= dict(zip(stage.writes, made, strict=True))
        del given, reads, run, made, gradients, cotangents  # freed before the next measurement
    return found


def recomputed():
    """Returns the launches that the backward pass of an MLP needs when the stage is run again:
    without kept products, and with them."""
    from mlx_segtrain import _core
    from mlx_segtrain.models import adapting, chain_of

    chain = chain_of(model_of("llama", {**LLAMA, "num_hidden_layers": 1}))
    adapter = adapting.init(chain, dict.fromkeys(chain.linears, 8), 1.0, 0)
    stage = chain.stages(adapter.scales)[1]
    params = adapting.stage_params(chain, adapter)[stage.owner]
    h = mx.zeros((1, 64, SIZES["hidden_size"]), mx.bfloat16)
    mx.eval(h, params)
    _, made = _core.keeping_products([], lambda: [stage.fn(params, h)])
    mx.eval(made)

    def launched(given):
        def run(h, *factors):
            own = dict(zip(params, factors, strict=True))
            return _core.keeping_products(given, lambda: [stage.fn(own, h)])[0]

        _, grads = mx.vjp(run, [h, *params.values()], [h])
        return Counter(_core.launches(grads))

    launched(made)  # creates the cached arrays before launches are counted
    return [launched([]), launched(made), len(made)]


#: The maximum number of launches for a layer of each form.
MOST_LAUNCHES = {
    **{"llama": 50, "qwen3": 50},
    **{"slides": 80, "full": 80, "shares": 80, "keys are values": 60},
}
FAMILIES = ["llama", "qwen3", "gemma4_text"]


def count_all():
    """Counts the launches for each form of layer, and the bytes saved by the stages of each model
    family, all in one process."""
    from mlx_segtrain import _core

    _core.collect_kernels()  # kernels do not run here, so they need not be compiled
    mx.set_default_device(mx.Device(mx.cpu))
    _core.set_repeatable(True)
    counts = {form: launches(form) for form in MOST_LAUNCHES}
    print(json.dumps([counts, {family: kept(family) for family in FAMILIES}, recomputed()]))


def dry_run(call, folder):
    """Runs a function of this file in a process that emulates a Hopper GPU, and returns the
    output."""
    code = (
        f"import test_cuda_text as own, mlx_segtrain.torchless as x; x.hide_torch(); own.{call}()"
    )
    for other in ("cudnn", "cusparselt"):  # a CUDA build of torch installs these libraries
        (folder / "nvidia" / other / "lib").mkdir(parents=True)
    folders = [str(ROOT / "tests"), str(folder), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, DEVICE: "90", "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_kernel_compiles(tmp_path):
    assert dry_run("compile_all", tmp_path) == "compiled\n"


def test_collected_kernels_compile_once(tmp_path):
    assert dry_run("compile_together", tmp_path) == "[2, 0]\n"


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return json.loads(dry_run("count_all", tmp_path_factory.mktemp("counted")))


@pytest.mark.parametrize("form", MOST_LAUNCHES)
def test_launches_of_a_layer(form, counted):
    """The number of launches determines the duration of a short step. A Gemma 4 layer with a
    per-layer input has two more adapted linear layers than other layers."""
    counts = counted[0][form]
    copies = [name for name in counts if name.startswith("copy for")]
    assert counts["Matmul"] >= 8
    assert sum(counts.values()) <= MOST_LAUNCHES[form] and not copies, counts


def test_a_kept_product_is_not_repeated(counted):
    """The low-rank product of `down` is a part of its product with the whole weight."""
    without, kept, made = counted[2]
    assert made == 1 and without["Matmul"] == kept["Matmul"] + 1
    assert sum(kept.values()) < sum(without.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_keeps_what_the_plan_says(family, counted):
    """The saved and the planned bytes differ by at most the size of a few values per token, which
    is negligible for real models."""
    found = counted[1][family]
    assert len(found) == (8 if family == "gemma4_text" else 4)
    assert all(0.93 < x < 1.05 for x in found.values()), found
