"""The text of cuda/ compiles for the devices it names, on a machine without one.

What runs here are the host's part of each call and CUDA's own compiler; only a GPU runs the rest.
"""

import ctypes
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

pytestmark = pytest.mark.acceptance

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


@pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="the compiler is for Linux"
)
def test_every_kernel_compiles(tmp_path):
    command = [sys.executable, "-c", "import test_cuda_text; test_cuda_text.compile_all()"]
    for other in ("cudnn", "cusparselt"):  # which come with a torch for CUDA
        (tmp_path / "nvidia" / other / "lib").mkdir(parents=True)
    folders = [str(ROOT / "tests"), str(tmp_path), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(folders)
    env = {**os.environ, DEVICE: "90", "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "compiled\n"
