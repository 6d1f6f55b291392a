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
#: Clocks of a part of a core that 32 lanes' instruction takes; and how many instructions of
#: arithmetic a score takes beside its products: scale, compare, maximum, subtract, add, multiply.
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


def launches(d: int, tokens: int) -> dict[str, dict[str, int]]:
    """Counts of our kernels, and of MLX's forward pass; causal, one head, T = S = tokens."""
    q, k, v, do = (mx.random.normal((1, 1, tokens, d)).astype(DTYPE) for _ in range(4))
    counts: list[dict[str, int]] = []
    with emulated(orders=(0,), counts=counts) as launched:
        mx.eval(
            mx.vjp(lambda *x: ops.attention(*x, scale=d**-0.5, impl="kernel"), [q, k, v], [do])[1]
        )
    found = {launch.name: own for launch, own in zip(launched, counts, strict=True)}
    return found | {"MLX's forward": mlx_attention.run(q, k, v, d**-0.5)[2]}


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
    """Of each kernel, for a score that is seen, plain causal attention of this length.

    `memory` are bytes that no cache can save: of numbers that are as many as scores.
    """
    few, many = (launches(d, tokens) for tokens in TOKENS)
    found = {name: per_score(few[name], many[name], length) for name in few}
    for name, x in found.items():
        x["memory"] = DTYPE.size if name.endswith("_ds") else 0
    return found | mlx_backward(d, length)


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


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in lines)
        .replace("| --- ", "|---")
        .replace("|--- |", "|---|")
    )


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 20 else f"{x:.1f}" if x >= 0.95 else f"{x:.3f}" if x else "0"


def tables() -> str:
    all_rows = defaultdict(list)
    for d in SIZES:
        for kernel, x in counted(d).items():
            name = f"`{kernel}`" if kernel.startswith("attention") else kernel
            start = [str(d), name]
            all_rows["counts"].append([*start, *(number(f(x)) for f in COLUMNS.values())])
            all_rows["floors"].append(
                [*start, *(f"{floor_ms(512 * x['products'], device):.0f}" for device in DEVICES)]
            )
            all_rows["predicted"].append(
                [*start, *(f"{predicted_ms(x, device):.0f}" for device in DEVICES)]
            )
    heads = {"counts": list(COLUMNS), "floors": list(DEVICES), "predicted": list(DEVICES)}
    return "\n\n".join(
        table(["D", "kernel", *heads[name]], rows) for name, rows in all_rows.items()
    )


if __name__ == "__main__":
    print(tables())
