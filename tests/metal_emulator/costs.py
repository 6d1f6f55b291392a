"""What the attention kernels ask of the hardware, counted: the tables of docs/performance.md.

cd tests && python -m metal_emulator.costs
"""

from collections import defaultdict

import mlx.core as mx

from mlx_segtrain import ops

from .kernels import emulated

#: Causal, one head: enough keys for the whole tiles inside to outweigh those at the edge.
TOKENS = 512
DTYPE = mx.bfloat16
#: (GPU cores, GHz, GB/s of memory) as Apple or those who measured it say; a core makes 128
#: multiply-adds a clock.
DEVICES = {
    "M1": (8, 1.28, 68),
    "M1 Max": (32, 1.30, 400),
    "M2 Max": (38, 1.40, 400),
    "M3 Max": (40, 1.38, 400),
    "M4 Max": (40, 1.58, 546),
}
#: What a launch of docs/performance.md is predicted for.
HEADS, LENGTH = 32, 8192


def counted(d: int, tokens: int = TOKENS) -> dict[str, dict[str, float]]:
    """Of each kernel, for a score that is seen: matrix products as multiply-adds, bytes, and so on.

    T = S = tokens, one head.
    """
    q, k, v, do = (mx.random.normal((1, 1, tokens, d)).astype(DTYPE) for _ in range(4))
    counts: list[dict[str, int]] = []
    with emulated(orders=(0,), counts=counts) as launches:
        mx.eval(
            mx.vjp(lambda *x: ops.attention(*x, scale=d**-0.5, impl="kernel"), [q, k, v], [do])[1]
        )
    pairs = tokens * (tokens + 1) / 2
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for launch, own in zip(launches, counts, strict=True):
        for name, x in own.items():
            found[launch.name][name] += x / pairs
        found[launch.name]["multiply_adds"] += own["products"] * 512 / pairs
    return {kernel: dict(own) for kernel, own in found.items()}


def floor_ms(multiply_adds: float, device: str, heads: int = HEADS, length: int = LENGTH) -> float:
    """Milliseconds of a causal launch whose products run at the rate of all multiply-add units."""
    cores, ghz, _ = DEVICES[device]
    return multiply_adds * heads * length * length / 2 / (cores * 128 * ghz * 1e9) * 1e3


def tables() -> str:
    lines = [
        "| D | kernel | multiply-adds | threadgroup bytes read | reads of a lane | device bytes "
        "read | functions | barriers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    floors = ["| D | kernel | " + " | ".join(DEVICES) + " |", "|---|---|" + "---|" * len(DEVICES)]
    for d in (64, 128, 256):
        for kernel, x in counted(d).items():
            lines.append(
                f"| {d} | `{kernel}` | {x['multiply_adds']:.0f} | {x['threadgroup_read']:.0f} | "
                f"{x['threadgroup_reads']:.0f} | {x['device_read']:.0f} | {x['functions']:.2f} | "
                f"{x['barriers']:.4f} |"
            )
            own = (f"{floor_ms(x['multiply_adds'], device):.0f}" for device in DEVICES)
            floors.append(f"| {d} | `{kernel}` | " + " | ".join(own) + " |")
    return "\n".join([*lines, "", *floors])


if __name__ == "__main__":
    print(tables())
