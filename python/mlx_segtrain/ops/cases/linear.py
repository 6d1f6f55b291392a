"""Ops on a frozen weight: a linear layer with its low-rank update, and dequantization alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from ... import _core, ops
from .. import bench, reference, selfcheck


def checks(device: str, rows: int) -> Iterator[selfcheck.Call]:
    """Yields checks with a wide and a narrow weight."""
    if device == "metal":
        return
    dtype = mx.float32 if device == "cpu" else mx.bfloat16
    for case, (k, n) in {"wide": (512, 704), "narrow": (704, 512)}.items():
        x, w = selfcheck.normal((rows, k), (n, k), dtype=dtype)
        a, b = selfcheck.normal((k, 8), (8, n), seed=1)
        base = _core.Base(*mx.quantize(w / 16, bits=4), group_size=64, bits=4)
        linear = _core.Linear(base, a / 16, b, 0.5)

        def lora(x: mx.array, a: mx.array, b: mx.array, linear: _core.Linear = linear) -> mx.array:
            return _core.lora_linears(x, [linear.with_factors(a, b)], impl="kernel")[0]

        def plain(x: mx.array, a: mx.array, b: mx.array, base: _core.Base = base) -> mx.array:
            return reference.lora_linear(x, base, a, b, 0.5)

        yield selfcheck.Call("lora_linear", case, lora, plain, [x, a / 16, b])


def frozen(out: int, width: int, bits: int, group: int, seed: int = 0) -> ops.Base:
    """Returns a quantized weight with normally distributed values."""
    w = bench.normal(out, width, seed=seed) / width**0.5
    packed = mx.quantize(w, group_size=group, bits=bits)
    mx.eval(packed)  # otherwise a compiled call would do the quantization
    return ops.Base(*packed, group_size=group, bits=bits)


def linear(out: int, width: int, bits: int, group: int, rank: int, seed: int = 0) -> ops.Linear:
    a = bench.normal(width, rank, seed=seed, of=mx.float32) / width**0.5
    b = bench.normal(rank, out, seed=seed + 1, of=mx.float32)
    return ops.Linear(frozen(out, width, bits, group, seed), a, b, 2.0)


def with_factors(linears: list[ops.Linear], ab: Sequence[mx.array]) -> list[ops.Linear]:
    return [w.with_factors(ab[2 * i], ab[2 * i + 1]) for i, w in enumerate(linears)]


def factors_of(linears: list[ops.Linear]) -> list[mx.array]:
    return [x for w in linears for x in (w.a, w.b) if x is not None]


def mlx_product(x: mx.array, base: ops.Base) -> mx.array:
    scales: Any = base.scales
    return mx.quantized_matmul(x, base.weight, scales, base.biases, **ops.packing(base))


def mlx_linear(x: mx.array, w: ops.Linear) -> mx.array:
    """Returns the output of a LoRA layer as mlx-lm computes it, with float32 factors."""
    low = (x @ w.a) @ w.b  # pyright: ignore[reportOperatorIssue]
    return mlx_product(x, w.base) + (w.scale * low).astype(x.dtype)


def dequantize(out: int, width: int, bits: int, group: int) -> bench.Case:
    def run(impl: str) -> dict[str, bench.Work]:
        base = frozen(out, width, bits, group)
        quant = ops.packing(base)
        arrays = [base.weight, base.scales, base.biases]
        mx.eval(arrays)
        if impl == "mlx":
            return {"forward": bench.Work(lambda *x: mx.dequantize(*x, **quant), arrays)}
        return {"forward": bench.Work(ops.dequantize, (base, bench.dtype()))}

    size = out * width
    moved = size * bench.dtype().size + size * bits / 8 + 2 * size / group * bench.dtype().size
    shape = f"{out}×{width} {bits}-bit"
    return bench.Case("dequantize", shape, ["kernel", "mlx"], run, moved={"forward": moved})


def lora(rows: int, width: int, outs: list[int], bits: int, group: int, rank: int) -> bench.Case:
    def run(impl: str) -> dict[str, bench.Work]:
        linears = [linear(out, width, bits, group, rank, seed=i) for i, out in enumerate(outs)]

        def f(x: mx.array, *ab: mx.array) -> mx.array:
            of = with_factors(linears, ab)
            if impl == "mlx":
                ys = [mlx_linear(x, w) for w in of]
            else:
                ys = ops.lora_linears(x, of, impl=impl)
            return ys[0] if len(ys) == 1 else mx.concatenate(ys, axis=-1)

        args = [bench.normal(rows, width), *factors_of(linears)]
        return bench.with_gradients(f, args, bench.normal(rows, sum(outs), seed=1))

    one = 2.0 * rows * width * sum(outs)
    flops = {"forward": one, "grads": one, "both": 2 * one}
    shape = f"{rows}×{width}→{'+'.join(map(str, outs))} r{rank}"
    return bench.Case("lora_linears", shape, ["kernel", "stock", "mlx"], run, flops)


def cases(gpu: bool) -> list[bench.Case]:
    if not gpu:
        return [
            dequantize(1536, 576, 4, 32),
            lora(512, 576, [1536], 4, 32, 16),
            lora(512, 576, [576, 192, 192], 4, 32, 16),
        ]
    return [
        dequantize(10240, 2560, 4, 64),
        lora(8192, 2560, [10240], 4, 64, 16),
        lora(8192, 10240, [2560], 4, 64, 16),
        lora(8192, 1536, [2048, 256, 256], 4, 64, 16),
    ]
