import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.core as mx

from ... import _core, ops
from .. import bench, reference, selfcheck

#: Options of attention, as functions of the number of queries. Queries after the last segment
#: attend to nothing.
CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "causal": lambda t: {},
    "window": lambda t: {"window": t // 4},
    "segments": lambda t: {"segments": [0, t // 3, t // 3 + 10, 2 * t // 3, t - t // 8]},
    "softcap": lambda t: {"softcap": 2.0},
}

#: The head sizes of a thorough check on Metal, and the head sizes that our kernel supports.
METAL_HEADS, METAL_KERNEL = (64, 128, 256, 512), (64, 128, 256)


def calls(
    op: str,
    impl: str,
    dtype: mx.Dtype,
    t: int,
    d: int = 64,
    cases: Iterable[str] = CASES,
    **more: Any,
) -> Iterator[selfcheck.Call]:
    for case in cases:
        options: dict[str, Any] = {"scale": d**-0.5, **CASES[case](t)}
        args = selfcheck.normal((1, 4, t, d), (1, 2, t, d), (1, 2, t, d), dtype=dtype)
        for_core = ops.attention_options(args[1], **options)
        kernel = functools.partial(_core.attention, options=for_core, impl=impl)
        plain = functools.partial(reference.attention, **options)
        name = f"{case}, D = {d}"
        if "thorough" in more:  # these calls differ in their dtypes
            name += f", {str(dtype).split('.')[-1]}"
        yield selfcheck.Call(op, name, kernel, plain, args, **more)


def checks(device: str, rows: int) -> Iterator[selfcheck.Call]:
    if device == "cpu":
        yield from calls("attention", "kernel", mx.float32, rows)
        return
    if device == "metal":
        yield from metal_checks(rows)
        return
    # The blocked implementation uses the kernels of attention_rows.
    yield from calls("attention_rows", "blocked", mx.bfloat16, rows)
    yield from calls("attention", "kernel", mx.bfloat16, rows)
    impls = _core.attention_impls()
    if "hopper" in impls:  # one call for each tile size
        for d in (64, 128, 256, 512):
            yield from calls("attention_hopper", "hopper", mx.bfloat16, rows, d)
    if "cudnn" in impls:
        some = ("causal", "segments")
        yield from calls("attention_cudnn", "cudnn", mx.bfloat16, rows, 256, some)


def metal_checks(rows: int) -> Iterator[selfcheck.Call]:
    """Yields checks for each dtype and head size. All checks are thorough, except those of the
    smallest head size in bfloat16."""
    nax = _core.has_neural_accelerators()
    for dtype in (mx.bfloat16, mx.float16, mx.float32):
        for d in METAL_HEADS:
            thorough = dtype != mx.bfloat16 or d != METAL_HEADS[0]
            # The neural accelerators, which MLX's matrix multiplications use, round float32 to
            # TF32.
            rough = nax and dtype == mx.float32
            how: dict[str, Any] = {"thorough": thorough}
            products: dict[str, Any] = how | ({"bound": selfcheck.HALF_BOUND} if rough else {})
            yield from calls("attention_rows", "blocked", dtype, rows, d, **products)
            if d in METAL_KERNEL:
                yield from calls("attention", "kernel", dtype, rows, d, **how)
            if dtype != mx.float32 and (d in METAL_KERNEL or nax):
                yield from calls("attention_stock", "stock", dtype, rows, d, ("causal",), **how)


def attention(
    shape: str,
    heads: int,
    groups: int,
    d: int,
    t: int,
    window: int | None = None,
    segments: list[int] | None = None,
) -> bench.Case:
    scale = d**-0.5

    def run(impl: str) -> dict[str, bench.Work]:
        q, v = (bench.normal(1, n, t, d) for n in (heads, groups))
        k = bench.normal(1, groups, t, d, seed=1)
        mask: Any = "causal"
        if impl == "mlx" and (window or segments):
            mask = reference.visible(t, t, None, window, segments)
            mx.eval(mask)

        def f(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            if impl == "mlx":
                return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
            return ops.attention(q, k, v, scale=scale, window=window, segments=segments, impl=impl)

        return bench.with_gradients(f, [q, k, v], bench.normal(1, heads, t, d, seed=2))

    one = 4.0 * bench.pairs(t, window, segments) * heads * d
    impls = ["auto", *_core.attention_impls(), "mlx"]
    # The gradients alone are not timed, because they would also need the forward pass.
    flops = {"forward": one, "both": 3.5 * one}
    return bench.Case("attention", shape, impls, run, flops)


def cases(gpu: bool) -> list[bench.Case]:
    if not gpu:
        return [
            attention("causal D64 T512", 9, 3, 64, 512),
            attention("causal D64 T8192", 9, 3, 64, 8192),
            attention("window 512 D64 T8192", 9, 3, 64, 8192, window=512),
        ]
    return [
        attention("window 512 D256", 8, 2, 256, 8192, window=512),
        attention("causal D512", 8, 2, 512, 8192),
        attention("causal D256", 8, 2, 256, 8192),
        attention("causal D128", 16, 2, 128, 8192),
        attention("causal D64", 16, 2, 64, 8192),
        attention("causal D128 T8191", 16, 2, 128, 8191),
        attention("16 segments D128", 16, 2, 128, 8192, segments=list(range(0, 8193, 512))),
    ]
