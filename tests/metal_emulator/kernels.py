"""The kernels of metal/ and how they are launched: what csrc/ has to do, as data."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from . import ORDERS, emulate

METAL = Path(__file__).parents[2] / "metal"


@dataclass(frozen=True)
class Kernel:
    name: str
    inputs: list[str]
    outputs: list[str]
    header: str
    source: str


def load(file: str) -> dict[str, Kernel]:
    """A file is one header and, each behind `//: name: inputs -> outputs`, the bodies."""
    header, *bodies = re.split(r"^//: ", (METAL / file).read_text(), flags=re.M)
    kernels = {}
    for body in bodies:
        line, source = body.split("\n", 1)
        name, inputs, outputs = re.split(": | -> ", line)
        kernels[name] = Kernel(name, inputs.split(), outputs.split(), header, source)
    return kernels


KERNELS = load("attention.metal") | load("attention_rows.metal") | load("glu.metal")
KERNELS |= load("rope.metal")
#: Threads of a group; rows that a group owns.
THREADS = {
    "attention": 128,
    "attention_vjp_q": 128,
    "attention_vjp_kv": 256,
    "softmax_rows": 256,
    "softmax_vjp_rows": 256,
    "glu": 256,
    "glu_vjp": 256,
    "rope": 256,
}
OWN = 32
GLU_OWN = 1024  # elements


def run(kernel: Kernel, values, outputs, template, grid, orders=ORDERS) -> list[mx.array]:
    threads = THREADS[kernel.name]
    return emulate(
        kernel.name,
        kernel.source,
        kernel.header,
        {name: values[name] for name in kernel.inputs},
        dict(zip(kernel.outputs, outputs, strict=True)),
        template,
        (threads * grid[0], *grid[1:]),
        (threads, 1, 1),
        orders,
    )


def call(q, k, first, q_start, scale, softcap) -> tuple[dict, dict]:
    """Inputs that all three kernels share, and the template."""
    values = {
        "q": q,
        "k": k,
        "first": mx.array(first, mx.int32),
        "q_start": mx.array(q_start, mx.int32),
        "scale": mx.array(scale, mx.float32),
        "cap": mx.array(softcap or 0.0, mx.float32),
    }
    return values, {"T": q.dtype, "D": q.shape[-1], "CAP": softcap is not None}


def attention(q, k, v, first, q_start, scale, softcap=None, kernels=KERNELS, orders=ORDERS):
    """o [B,H,T,D], lse [B,H,T]"""
    values, template = call(q, k, first, q_start, scale, softcap)
    b, h, t, _ = q.shape
    outputs = [(q.shape, q.dtype), ((b, h, t), mx.float32)]
    grid = math.ceil(t / OWN), h, b
    return run(kernels["attention"], values | {"v": v}, outputs, template, grid, orders)


def attention_vjp(
    q, k, v, o, lse, d_o, first, q_start, scale, softcap=None, kernels=KERNELS, orders=ORDERS
):
    """dq [B,H,T,D], dk, dv [B,G,S,D]"""
    values, template = call(q, k, first, q_start, scale, softcap)
    delta = (o.astype(mx.float32) * d_o.astype(mx.float32)).sum(axis=-1)
    values |= {"v": v, "lse": lse, "delta": delta, "d_o": d_o}
    b, h, t, _ = q.shape
    grid = math.ceil(t / OWN), h, b
    of_q, of_kv = kernels["attention_vjp_q"], kernels["attention_vjp_kv"]
    dq = run(of_q, values, [(q.shape, q.dtype)], template, grid, orders)
    grid = math.ceil(k.shape[2] / OWN), k.shape[1], b
    dkv = run(of_kv, values, [(k.shape, k.dtype), (v.shape, v.dtype)], template, grid, orders)
    return dq + dkv


def rows(first, q_start, q0, k0, nq, period, scale, softcap) -> dict:
    ints = {"q_start": q_start, "q0": q0, "k0": k0, "nq": nq, "period": period}
    return {
        "first": mx.array(first, mx.int32),
        "scale": mx.array(scale, mx.float32),
        "cap": mx.array(softcap or 0.0, mx.float32),
        **{name: mx.array(x, mx.int32) for name, x in ints.items()},
    }


def softmax_rows(s, first, q_start, q0, k0, nq, period, dtype, softcap=None):
    """p [R, nk], lse [R]"""
    values = rows(first, q_start, q0, k0, nq, period, 1.0, softcap) | {"s": s}
    outputs = [(s.shape, dtype), (s.shape[:1], mx.float32)]
    template = {"T": dtype, "CAP": softcap is not None}
    return run(KERNELS["softmax_rows"], values, outputs, template, (1, s.shape[0], 1))


def softmax_vjp_rows(
    s, dp, lse, delta, first, q_start, q0, k0, nq, period, scale, dtype, softcap=None
):
    """p, ds [R, nk]"""
    values = rows(first, q_start, q0, k0, nq, period, scale, softcap)
    values |= {"s": s, "dp": dp, "lse": lse, "delta": delta}
    template = {"T": dtype, "CAP": softcap is not None}
    outputs = [(s.shape, dtype), (s.shape, dtype)]
    return run(KERNELS["softmax_vjp_rows"], values, outputs, template, (1, s.shape[0], 1))


def glu(gelu, gate, up, dy=None, kernels=KERNELS, orders=ORDERS):
    """y, or with dy: dgate, dup; all [n]"""
    kernel = kernels["glu" if dy is None else "glu_vjp"]
    values = {"gate": gate, "up": up, "dy": dy}
    outputs = [(gate.shape, gate.dtype)] * len(kernel.outputs)
    grid = math.ceil(gate.size / GLU_OWN), 1, 1
    return run(kernel, values, outputs, {"T": gate.dtype, "GELU": gelu}, grid, orders)


def rope(x, dims, freqs, positions, scale, traditional, back=False, kernels=KERNELS, orders=ORDERS):
    """x [B,H,T,D] rotated, or rotated back."""
    b, h, t, d = x.shape
    by_token = x.transpose(0, 2, 1, 3)
    values = {
        "x": x if back else by_token,
        "freqs": freqs,
        "positions": mx.array([*positions, *[0] * max(0, 8 - t)], mx.int32),
        "at": mx.array([b, h, t, d, dims], mx.int32),
        "args": mx.array([scale], mx.float32),
    }
    outputs = [(by_token.shape if back else x.shape, x.dtype)]
    template = {"T": x.dtype, "TRADITIONAL": traditional, "BACK": back}
    grid = math.ceil(b * h * t * (d - dims // 2) / THREADS["rope"]), 1, 1
    (y,) = run(kernels["rope"], values, outputs, template, grid, orders)
    return y.transpose(0, 2, 1, 3) if back else y
