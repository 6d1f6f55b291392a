"""Kernels that run on a GPU for the first time are compared with the plain code, once a device.

What fails to compile or to agree is switched off with a warning, and the next implementation
serves. The result is kept in the cache folder, by device and by the core that was checked.
"""

import functools
import hashlib
import json
import warnings
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from . import MLX_VERSION, _core, reference
from .files import cache_dir, write_json

#: How far half-precision kernels may be from the plain code in float32, relative L2.
BOUND = 0.02
CASES = {
    "window": {"window": 40},
    "segments": {"segments": [0, 50, 60, 150]},
    "softcap": {"softcap": 2.0},
    "causal": {},
}


def attention_error(impl: str, dtype: mx.Dtype, options: dict) -> float:
    """Largest relative L2 error of o, dq, dk, dv of an implementation on a small call."""
    keys = mx.random.split(mx.random.key(0), 4)
    heads = (4, 2, 2, 4)
    q, k, v, do = (
        mx.random.normal((1, h, 150, 64), key=key).astype(dtype)
        for h, key in zip(heads, keys, strict=True)
    )

    def run(f, args, cotangent):
        out, grads = mx.vjp(lambda *x: f(*x, scale=0.125, **options), args, [cotangent])
        return [x.astype(mx.float32) for x in (*out, *grads)]

    got = run(functools.partial(_core.attention, impl=impl), [q, k, v], do)
    exact = [x.astype(mx.float32) for x in (q, k, v)]
    truth = run(reference.attention, exact, do.astype(mx.float32))
    errors = [mx.linalg.norm(x - y) / mx.linalg.norm(y) for x, y in zip(got, truth, strict=True)]
    worst = mx.stack(errors).max()
    return float(worst) if mx.isfinite(worst) else float("inf")


def check() -> dict[str, str]:
    """Runs every check; returns the ops whose kernel failed, with the reason."""
    failed = {}
    # The row passes are what the blocked form runs on.
    for op, impl in (("attention_rows", "blocked"), ("attention", "kernel")):
        for name, options in CASES.items():
            try:
                error = attention_error(impl, mx.bfloat16, options)
            except (RuntimeError, ValueError) as failure:
                failed[op] = f"{name}: {' '.join(str(failure).split())[:300]}"
                break
            if error > BOUND:
                failed[op] = f"{name}: {error:.1e} away from the plain code"
                break
    return failed


@functools.cache
def self_check() -> dict[str, str]:
    """Switches off what `check` found, now or earlier on this device; returns it."""
    core = hashlib.sha256(Path(_core.__file__).read_bytes()).hexdigest()[:16]
    device = mx.device_info().get("device_name", "unknown")
    key = f"{device}, mlx {MLX_VERSION}, core {core}"
    file = cache_dir() / "self-check.json"
    known: dict[str, dict[str, str]] = {}
    with suppress(OSError, ValueError):
        known = json.loads(file.read_text(encoding="utf-8"))
    if key not in known:
        known[key] = check()
        with suppress(OSError):  # a cache that cannot be written costs the next process a check
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, known)
    for op, reason in known[key].items():
        _core.switch_off(op, "kernel", reason)
        text = f"mlx_segtrain: the {op} kernel is off on this device ({reason})"
        warnings.warn(text, stacklevel=2)
    return known[key]
