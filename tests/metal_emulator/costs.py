"""What attention on Metal asks of the hardware, ours and MLX's: the tables of docs/performance.md.

cd tests && python -m metal_emulator.costs
"""

from collections import defaultdict
from collections.abc import Mapping

import mlx.core as mx

from mlx_segtrain import ops

from . import mlx_attention
from .kernels import emulated

DTYPE = mx.bfloat16
#: (GPU cores, GHz, GB/s of memory) as Apple or those who measured it say; M5 Max's clock is an
#: estimate. A core has four parts, each of which makes 32 multiply-adds a clock.
DEVICES = {
    "M1": (8, 1.28, 68),
    "M1 Max": (32, 1.30, 400),
    "M2 Max": (38, 1.40, 400),
    "M3 Max": (40, 1.38, 400),
    "M4 Max": (40, 1.58, 546),
    "M5": (10, 1.58, 153),
    "M5 Max": (40, 1.75, 614),
}
#: Generations whose units take no bfloat: the compiler turns one operand of a product into float32,
#: since the other is kept, where the text does not.
NO_BFLOAT = ("M1", "M2")
#: Queries and keys of a block of scores in MLX's backward pass: assumed, the package does not say.
MLX_BLOCK = 1024
#: Multiply-adds of half types that a core's neural accelerators make a clock, on M5.
ACCELERATOR = 512
#: What a launch of docs/performance.md is predicted for.
HEADS, LENGTH = 32, 8192
SIZES = (64, 128, 256)
#: Head sizes and windows, as Gemma's layers have them.
WINDOWS = ((128, 512), (256, 512))
#: Clocks of a part of a core that 32 lanes' instruction takes; and how many instructions of
#: arithmetic a score takes besides its products: scale, compare, maximum, subtract, add, multiply.
FUNCTION, ARITHMETIC = 4, 8
#: Tokens at which kernels are counted: twice, which tells what grows with their square.
TOKENS = (128, 256)
#: Names of the columns, and what a launch's counts say of them.
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
    """Counts of our kernels, causal, one head, T = S = tokens."""
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
    """For each score that is seen at this length: a count is a·T² + b·T."""
    found = {}
    small, large = TOKENS
    for name in few:
        b = (few[name] / small - many[name] / large) / (small - large)
        found[name] = (b * length**2 + (few[name] / small - b * small) * length) / (
            length * (length + 1) / 2
        )
    return found


def mlx_backward(d: int, length: int) -> dict[str, dict[str, float]]:
    """MLX's backward pass, for each score that is seen: five products and what is between them.

    It makes blocks of S and dP, which are whole where the diagonal crosses them. A threadgroup of
    128 threads makes 64 × 64 numbers of a product, 16 columns of the operands at a time. Each of
    its simdgroups has 32 × 32 of them: for 16 products it reads 4 + 4 matrices from threadgroup
    memory, by two reads of a lane, and turns them into float32.
    """
    whole = (length + MLX_BLOCK) / length
    mma = d / 512 * whole  # of one of the five
    staged = mma / 128 * 2 * 64 * 16  # numbers; read from the device, written, 8 at a time
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
    # S and dP are written, P once and dS twice read, in half precision.
    products |= {"device_written": 4 * whole, "memory": (2 + 2 + 2 + 4) * whole}
    # S and dP are read, dS and P are written. For each block, dK and dV in half precision are read,
    # added to sums in float32 and written in half precision again.
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
    """Counts of each kernel for a score that is seen, plain causal attention of this length.

    `memory` are bytes that no cache can save: of numbers that are as many as scores.
    """
    few, many = (launches(d, tokens) | launches_of_mlx(d, tokens) for tokens in TOKENS)
    found = {name: per_score(few[name], many[name], length) for name in few}
    for name, x in found.items():
        x["memory"] = DTYPE.size if name.endswith("_ds") else 0
    return found | mlx_backward(d, length)


def blocked_512(length: int = LENGTH, rows: int = 512) -> dict[str, dict[str, float]]:
    """Counts of `blocked` at D = 512 for each score: MLX's products, and scores written down.

    S, and dP, are written in float32, read once (forward: twice) and give P, and dS, in half
    precision. `rows`: queries of a block, as csrc/ops/attention/blocked.cpp has them for 8 heads.
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
    """Multiply-adds of each of our kernels for a score that is seen, of a query far from the begin.

    Under a window counts grow by the same for each further query.
    """
    few, many = (launches(d, window + more, window) for more in (128, 256))
    return {
        name: 512 * (many[name]["products"] - few[name]["products"]) / (128 * window)
        for name in few
    }


def of_other_kernels() -> dict[str, dict[str, float]]:
    """Counts for each number of what a kernel gives: one of its outputs."""
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
    """Milliseconds of a causal launch whose products run at the rate of all multiply-add units."""
    cores, ghz, _ = DEVICES[device]
    return multiply_adds * scores() / (cores * 128 * ghz * 1e9) * 1e3


def predicted_ms(x: Counts, device: str) -> float:
    """Milliseconds if a part of a core begins one instruction a clock, and none waits or overlaps.

    Or as long as it takes to move `memory`.
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
    """As floor_ms, through neural accelerators."""
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
