"""The text of cuda/ compiles for the devices it names, on a machine without one.

What runs here are the host's part of each call and CUDA's own compiler; only a GPU runs the rest.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from importlib import import_module, metadata
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(
        sys.platform != "linux" or os.uname().machine != "x86_64",
        reason="the compiler is for Linux",
    ),
]

ROOT = Path(__file__).parents[1]
DEVICE = "MLX_SEGTRAIN_DRY_RUN_CUDA"
COMPILER = "nvidia-cuda-nvrtc"


def load_compiler():
    """Brings the package's libraries into the process, where the core finds them by name."""
    # The package's own files: a torch for CUDA brings more libraries into folders beside them.
    files = {file.name.partition(".so.")[0]: file for file in metadata.files(COMPILER) or []}
    for name in ("libnvrtc-builtins", "libnvrtc"):
        ctypes.CDLL(str(files[name].locate()), mode=ctypes.RTLD_GLOBAL)


def differentiate(f, *args):
    """Writes forward and backward pass down, which compiles their kernels."""
    y = f(*args)
    ys = list(y) if isinstance(y, list | tuple) else [y]
    mx.vjp(f, list(args), [mx.zeros_like(x) for x in ys])


def attention(impl, dtype, d, **options):
    from mlx_segtrain import ops

    q, k = mx.zeros((1, 4, 300, d), dtype), mx.zeros((1, 2, 300, d), dtype)
    differentiate(lambda q, k, v: ops.attention(q, k, v, scale=1.0, impl=impl, **options), q, k, k)


def the_plan_counts_sums():
    """Of dq, dk and dv in float32, by the kernel that a repeatable run takes on Hopper.

    Besides them it takes no more than a few numbers a query.
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
    for base in [
        *BASES,
        ("affine", 2, 64),
        ("affine", 3, 128),
        ("affine", 5, 32),
        ("affine", 8, 32),
    ]:
        for widths, ranks in (([264], [16]), ([64], [6]), ([128, 32, 32], [40, 8, 3])):
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
    print("compiled")


def compile_together():
    """What is collected is compiled once, and found when it is called."""
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


def launches_of_layers(n):
    """Of n layers of a Llama with seven adapted linears each, forward and back."""
    import mlx.nn as nn

    from mlx_segtrain import _core
    from mlx_segtrain.models import adapting, chain_of

    module = import_module("mlx_lm.models.llama")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 64, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": n}
    args = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 1e4} | sizes | heads
    model = module.Model(module.ModelArgs.from_dict(args))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 64, 4)
    chain = chain_of(model)
    adapter = adapting.init(chain, dict.fromkeys(chain.linears, 8), 1.0, 0)
    params = adapting.stage_params(chain, adapter)
    places = [(owner, name) for owner in params for name in sorted(params[owner])]
    factors = [params[owner][name] for owner, name in places]

    def run(h, *factors):
        own = defaultdict(dict)
        for (owner, name), x in zip(places, factors, strict=True):
            own[owner][name] = x
        values = {"h": h, "positions": mx.arange(h.shape[1])}
        for stage in chain.stages(adapter.scales):
            made = stage.fn(own[stage.owner], *(values[name] for name in stage.reads))
            values["h"] = made[0] if isinstance(made, tuple) else made
        return values["h"]

    h = mx.zeros((1, 64, sizes["hidden_size"]), mx.bfloat16)
    mx.eval(h, factors, model.parameters())
    (y,), (dh, *grads) = mx.vjp(run, [h, *factors], [h])
    return Counter(_core.launches([y, dh, _core.join(grads)]))


def launches():
    """Of one layer by name, without its norms, which are several ops of a CPU here."""
    from mlx_segtrain import _core, ops

    load_compiler()
    mx.set_default_device(mx.Device(mx.cpu))
    _core.set_repeatable(True)
    x = mx.zeros((1, 64, 128), mx.bfloat16)
    weight = mx.ones(128, mx.bfloat16)
    mx.eval(x, weight)
    (y,), (dx,) = mx.vjp(lambda x: ops.rms_norm(x, weight, 1e-5), [x], [x])
    norm = Counter(_core.launches([y, dx]))
    print(json.dumps(launches_of_layers(3) - launches_of_layers(2) - norm - norm))


def dry_run(call, tmp_path):
    """What a function of this file prints in a process where calls take the ways of a Hopper."""
    command = [sys.executable, "-c", f"import test_cuda_text; test_cuda_text.{call}()"]
    for other in ("cudnn", "cusparselt"):  # which come with a torch for CUDA
        (tmp_path / "nvidia" / other / "lib").mkdir(parents=True)
    folders = [str(ROOT / "tests"), str(tmp_path), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(folders)
    env = {**os.environ, DEVICE: "90", "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_kernel_compiles(tmp_path):
    assert dry_run("compile_all", tmp_path) == "compiled\n"


def test_collected_kernels_compile_once(tmp_path):
    assert dry_run("compile_together", tmp_path) == "[2, 0]\n"


def test_launches_of_a_layer(tmp_path):
    """What a short step takes is their number."""
    counts = json.loads(dry_run("launches", tmp_path))
    copies = [name for name in counts if name.startswith("copy for")]
    assert sum(counts.values()) <= 50 and not copies, counts
