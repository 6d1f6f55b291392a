"""Counts the work of our Metal kernels and of MLX's Metal kernels for attention, for the tables in
docs/performance.md.

cd tests && python -m metal_emulator.costs
"""

from collections import defaultdict
from collections.abc import Mapping

import mlx.core as mx

from mlx_segtrain import ops

from . import mlx_attention
from .kernels import emulated

DTYPE = mx.bfloat16
#: The number of GPU cores, the clock in GHz, and the memory bandwidth in GB/s of each device, as
#: published or measured; the clock of the M5 Max is an estimate. A core has four parts, each of
#: which executes 32 multiply-adds per clock cycle.
DEVICES = {
    "M1": (8, 1.28, 68),
    "M1 Max": (32, 1.30, 400),
    "M2 Max": (38, 1.40, 400),
    "M3 Max": (40, 1.38, 400),
    "M4 Max": (40, 1.58, 546),
    "M5": (10, 1.58, 153),
    "M5 Max": (40, 1.75, 614),
}
#: Generations without bfloat units. On these, the operands of a matrix product are converted to
#: float32. If the kernel's text does not convert them, the compiler converts one operand for each
#: product and keeps the converted form of the other operand.
NO_BFLOAT = ("M1", "M2")
#: The number of queries and of keys in a block of scores in MLX's backward pass. This number is an
#: assumption, because it cannot be found in the MLX package.
MLX_BLOCK = 1024
#: Half-precision multiply-adds per clock cycle of the neural accelerators in one core of an M5.
ACCELERATOR = 512
#: The number of heads and tokens for which docs/performance.md predicts times.
HEADS, LENGTH = 32, 8192
SIZES = (64, 128, 256)
#: Head sizes and windows of Gemma's layers.
WINDOWS = ((128, 512), (256, 512))
#: FUNCTION is the number of clock cycles that a part of a core needs to compute a function such as
#: exp for 32 lanes. ARITHMETIC is the number of arithmetic instructions per score, apart from
#: matrix products: scale, compare, maximum, subtract, add, multiply.
FUNCTION, ARITHMETIC = 4, 8
#: The two lengths for which the work of kernels is counted, to separate terms that are quadratic in
#: the length from linear terms.
TOKENS = (128, 256)
#: The columns of the tables, and the function that computes each one from the counts of a launch.
COLUMNS = {
    "multiply-adds": lambda x: 512 * x["products"],
    "threadgroup bytes": lambda x: x["threadgroup_read"] + x["threadgroup_written"],
    "accesses": lambda x: x["threadgroup_reads"] + x["threadgroup_writes"] + x["device_accesses"],
    "device bytes": lambda x: x["device_read"] + x["device_written"],
    "conversions": lambda x: x["conversions"],
    "functions": lambda x: x["functions"],
    "barriers": lambda x: x["barriers"],
}

Counts = Mapping[str, float]


def launches(d: int, tokens: int, window: int | None = None) -> dict[str, dict[str, int]]:
    """Returns the counts of our kernels for causal attention with one head and T = S = `tokens`."""
    q, k, v, do = (mx.random.normal((1, 1, tokens, d)).astype(DTYPE) for _ in range(4))
    counts: list[dict[str, int]] = []

    def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return ops.attention(q, k, v, scale=d**-0.5, window=window, impl="kernel")

    with emulated(orders=(0,), counts=counts) as launched:
        mx.eval(mx.vjp(attention, [q, k, v], [do])[1])
    return {launch.name: own for launch, own in zip(launched, counts, strict=True)}


def launches_of_mlx(d: int, tokens: int) -> dict[str, dict[str, int]]:
    q, k, v = (mx.random.normal((1, 1, tokens, d)).astype(DTYPE) for _ in range(3))
    return {"MLX's forward": mlx_attention.run(q, k, v, d**-0.5)[2]}


def per_score(few: Mapping[str, int], many: Mapping[str, int], length: int) -> dict[str, float]:
    """Returns the counts per visible score at this length, assuming that each count is a·T² + b·T
    for T tokens."""
    found = {}
    small, large = TOKENS
    for name in few:
        b = (few[name] / small - many[name] / large) / (small - large)
        found[name] = (b * length**2 + (few[name] / small - b * small) * length) / (
            length * (length + 1) / 2
        )
    return found


def mlx_backward(d: int, length: int) -> dict[str, dict[str, float]]:
    """Returns the counts of MLX's backward pass per visible score, for its five matrix products and
    the passes between them.

    MLX computes whole blocks of S and dP, even on the diagonal. A threadgroup of 128 threads
    computes 64 × 64 elements of a product, 16 columns of the operands at a time. Each of its
    simdgroups computes 32 × 32 of these elements: for every 16 products of 8 × 8 matrices, it reads
    4 + 4 matrices from threadgroup memory, with two reads per lane, and converts them to float32.
    """
    whole = (length + MLX_BLOCK) / length
    mma = d / 512 * whole  # one of the five matrix products
    # Elements that are read from device memory and written to threadgroup memory, 8 at a time.
    staged = mma / 128 * 2 * 64 * 16
    one = {
        "products": mma,
        "threadgroup_read": mma * 0.5 * 64 * 2,
        "threadgroup_reads": mma * 0.5 * 64,
        "threadgroup_written": staged * 2,
        "threadgroup_writes": staged / 8,
        "device_read": staged * 2,
        "device_accesses": staged / 8,
        "device_written": 0,
        "conversions": mma * 0.5 * 64,
        "functions": 0,
        "barriers": mma / 128 * 2,
    }
    products = {name: 5 * x for name, x in one.items()}
    # In half precision: S and dP are written, P is read once, and dS is read twice.
    products |= {"device_written": 4 * whole, "memory": (2 + 2 + 2 + 4) * whole}
    # S and dP are read, and dS and P are written. For each block, dK and dV are read in half
    # precision, added to float32 sums, and written in half precision again.
    sums = 2 * d / MLX_BLOCK * whole
    between = dict.fromkeys(one, 0.0) | {
        "device_read": 4 * whole + (2 + 4) * sums,
        "device_written": 4 * whole + (4 + 2) * sums,
        "device_accesses": 4 * whole + 4 * sums,
        "conversions": 4 * whole + 2 * sums,
        "functions": whole,
    }
    between["memory"] = between["device_read"] + between["device_written"]
    return {"MLX's backward: products": products, "MLX's backward: the rest": between}


def counted(d: int, length: int = LENGTH) -> dict[str, dict[str, float]]:
    """Returns the counts of each kernel per visible score, for plain causal attention at this
    length.

    `memory` is the number of bytes that must be transferred to or from device memory, because
    arrays with one element per score do not fit into the caches.
    """
    few, many = (launches(d, tokens) | launches_of_mlx(d, tokens) for tokens in TOKENS)
    found = {name: per_score(few[name], many[name], length) for name in few}
    for name, x in found.items():
        x["memory"] = DTYPE.size if name.endswith("_ds") else 0
    return found | mlx_backward(d, length)


def blocked_512(length: int = LENGTH, rows: int = 512) -> dict[str, dict[str, float]]:
    """Returns the counts per score of MLX's matrix products and of the passes over the scores, for
    the implementation `blocked` and D = 512.

    S and dP are written in float32 and read once (twice in the forward pass) to compute P and dS in
    half precision. `rows` is the number of queries in a block, as in csrc/ops/attention/blocked.cpp
    for 8 heads.
    """
    whole = (length + rows) / length
    five = mlx_backward(512, length)["MLX's backward: products"]
    scale = whole * length / (length + MLX_BLOCK) / 5
    made = {}
    for name, products, memory, functions in (
        ("forward", 2, 4 + 8 + 2 + 2, 2),
        ("backward", 5, 8 + 8 + 4 + 6, 1),
    ):
        made[name] = {key: x * products * scale for key, x in five.items()} | {"memory": 0.0}
        rest = dict.fromkeys(five, 0.0) | {
            "device_accesses": 4 * whole,
            "functions": functions * whole,
            "memory": memory * whole,
        }
        made[name + ", the rest"] = rest
    return made


def in_window(d: int, window: int) -> dict[str, float]:
    """Returns the number of multiply-adds per visible score for each of our kernels, for a query
    far from the start.

    With a window, each such query adds the same number of multiply-adds.
    """
    few, many = (launches(d, window + more, window) for more in (128, 256))
    return {
        name: 512 * (many[name]["products"] - few[name]["products"]) / (128 * window)
        for name in few
    }


def of_other_kernels() -> dict[str, dict[str, float]]:
    """Returns the counts per output element of our kernels that do not compute attention."""
    n = 4096
    counts: list[dict[str, int]] = []
    x, y, z = (mx.random.normal((n,)).astype(DTYPE) for _ in range(3))
    rows = mx.random.normal((1, 2, n // 256, 128)).astype(DTYPE)
    with emulated(orders=(0,), counts=counts) as launched:
        mx.eval(mx.vjp(lambda *x: ops.geglu(*x, impl="kernel"), [x, y], [z]))
        mx.eval(ops.rope(rows, 128, freqs=mx.ones((64,)), segments=[0, 3, 16], impl="kernel"))
    return {
        launch.name: {name: value / n for name, value in own.items()}
        for launch, own in zip(launched, counts, strict=True)
    }


def scores(heads: int = HEADS, length: int = LENGTH) -> float:
    return heads * length * length / 2


def floor_ms(multiply_adds: float, device: str) -> float:
    """Returns the milliseconds that a causal launch would take if its matrix products ran at peak
    speed."""
    cores, ghz, _ = DEVICES[device]
    return multiply_adds * scores() / (cores * 128 * ghz * 1e9) * 1e3


def predicted_ms(x: Counts, device: str) -> float:
    """Returns the milliseconds that a launch would take if each part of a core issued one
    instruction per clock cycle without waiting or overlap.

    If the transfer of `memory` bytes takes longer, returns the time of the transfer instead.
    """
    cores, ghz, bandwidth = DEVICES[device]
    lanes = x["threadgroup_reads"] + x["threadgroup_writes"] + x["device_accesses"]
    lanes += x["conversions"] + FUNCTION * x["functions"] + ARITHMETIC * min(1, x["functions"])
    if device.startswith(NO_BFLOAT) and x["conversions"] < 64 * x["products"] / 2:
        lanes += 64 * x["products"]
    clocks = 16 * x["products"] + lanes / 32
    computes = clocks / (cores * 4 * ghz * 1e9)
    return scores() * max(computes, x["memory"] / bandwidth / 1e9) * 1e3


def accelerated_ms(multiply_adds: float, device: str) -> float:
    """Returns the same as floor_ms, but for matrix products on neural accelerators."""
    cores, ghz, _ = DEVICES[device]
    return multiply_adds * scores() / (cores * ACCELERATOR * ghz * 1e9) * 1e3


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(head), "|".join(["---"] * len(head)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"|{line}|" if line.startswith("---") else f"| {line} |" for line in lines)


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 20 else f"{x:.1f}" if x >= 0.95 else f"{x:.2g}" if x else "0"


def tables_of(sizes: tuple[int, ...]) -> dict[str, str]:
    rows: dict[str, list[list[str]]] = defaultdict(list)
    for d in sizes:
        kernels = counted(d)
        for kernel, x in kernels.items():
            start = [str(d), f"`{kernel}`" if kernel.startswith("attention") else kernel]
            rows["counts"].append([*start, *(number(f(x)) for f in COLUMNS.values())])
            rows["floors"].append(
                [*start, *(f"{floor_ms(512 * x['products'], device):.0f}" for device in DEVICES)]
            )
        parts = {
            "forward": [["attention"], ["MLX's forward"]],
            "backward": [
                [x for x in kernels if x.endswith("_ds")],
                [x for x in kernels if x.startswith("MLX's backward")],
            ],
        }
        for name, both in parts.items():
            ours, theirs = (
                [sum(predicted_ms(kernels[x], device) for x in own) for device in DEVICES]
                for own in both
            )
            for whose, times in (("ours", ours), ("MLX's", theirs)):
                rows["predicted"].append([str(d), name, whose, *(f"{x:.0f}" for x in times)])
            ratios = [f"{x / y:.2f}" for x, y in zip(ours, theirs, strict=True)]
            rows["predicted"].append([str(d), name, "ratio", *ratios])
    kernel_heads = {"counts": list(COLUMNS), "floors": list(DEVICES)}
    found = {name: table(["D", "kernel", *kernel_heads[name]], rows[name]) for name in kernel_heads}
    head = ["D", "pass", "whose", *DEVICES]
    return found | {"predicted": table(head, rows["predicted"])}


def table_of_others() -> str:
    columns = ["accesses", "device bytes", "conversions", "functions"]
    rows = [
        [f"`{kernel}`", *(number(COLUMNS[name](x)) for name in columns)]
        for kernel, x in of_other_kernels().items()
    ]
    return table(["kernel", *columns], rows)


def tables() -> str:
    windows = [
        [
            str(d),
            str(window),
            *(f"{x:.0f} ({x / (n * d):.2f})" for n, x in zip((2, 4, 1), own, strict=True)),
        ]
        for d, window in WINDOWS
        for own in [in_window(d, window).values()]
    ]
    accelerators = [
        [str(d), name, *(f"{accelerated_ms(n * d, device):.1f}" for device in ("M5", "M5 Max"))]
        for d in (*SIZES, 512)
        for name, n in (("forward", 2), ("backward", 5))
    ]
    wide = blocked_512()
    blocked = [
        [
            name,
            *(
                f"{sum(predicted_ms(wide[x], device) for x in (name, f'{name}, the rest')):.0f}"
                f" ({floor_ms(512 * n, device):.0f})"
                for device in DEVICES
            ),
        ]
        for name, n in (("forward", 2), ("backward", 5))
    ]
    own = ["attention", "attention_vjp_kv_ds", "attention_vjp_q_ds"]
    return "\n\n".join(
        [
            *tables_of(SIZES).values(),
            table(["D", "window", *(f"`{x}`" for x in own)], windows),
            table(["pass", *DEVICES], blocked),
            table(["D", "pass", "M5", "M5 Max"], accelerators),
            table_of_others(),
        ]
    )


if __name__ == "__main__":
    mx.set_default_device(mx.Device(mx.cpu))
    print(tables())
