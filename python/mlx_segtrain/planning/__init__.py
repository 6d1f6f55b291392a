"""Which plan of the segmented backward pass a run takes, from shapes alone, before anything loads.

`read_shape` reads config.json and the headers of the weights; `costs_of` says what each stage
takes; csrc/planner.cpp finds the plan of least work within the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import _core
from ..schedule import Cuts
from .budget import budget_bytes, device
from .costs import BatchShape, Device, costs_of, cpu_logits
from .shapes import ModelShape, read_shape, shape_of

__all__ = [
    "BatchShape",
    "Device",
    "ModelShape",
    "Planned",
    "budget_bytes",
    "choose",
    "device",
    "longest",
    "named",
    "ranks_of",
    "read_shape",
    "shape_of",
]

#: Lengths are planned in steps of it.
STEP = 128


@dataclass(frozen=True)
class Planned:
    """Cuts of a chain and what a step with them takes: bytes, floating-point operations.

    `parts` are the bytes of the peak by what they are; `moves` the bytes alive at the peak of each
    move of the plan, everything included. `limit` is where MLX should wait for the device: what it
    allocates ahead of it stays below `peak`.
    """

    cuts: Cuts
    peak: int
    limit: int
    parts: dict[str, int]
    moves: tuple[int, ...]
    lines: tuple[str, ...]
    work: float
    again: float

    @property
    def recomputed(self) -> float:
        """What runs again over what must run."""
        return self.again / (self.work - self.again)

    def describe(self, layers: int) -> str:
        """The plan in words."""
        return describe(self.cuts, layers)


def describe(cuts: Cuts, layers: int) -> str:
    """Cuts of a chain of two stages a layer, in words."""
    n = cuts.segments[-1]
    begin = cuts.segments[-2] if len(cuts.segments) > 1 else 0
    kept = (n - begin) // 2
    if kept >= layers:
        return "everything kept, nothing recomputed"
    sizes = {
        end - start for start, end in zip([0, *cuts.segments[:-2]], cuts.segments[:-1], strict=True)
    }
    words = {1: "half layers", 2: "single layers"}.get(max(sizes), f"{max(sizes) // 2} layers")
    text = f"{words} run again"
    # Layers of each group that is run once more; the last one is not.
    groups = [
        (end - start) * max(sizes) / 2
        for start, end in zip([0, *cuts.groups], cuts.groups[:-1], strict=False)
        if end - start > 1
    ]
    if whole := [size for size in groups if size > 1]:
        text += f", {len(whole)} groups of {max(whole):g} layers once more"
    if single := len(groups) - len(whole):
        text += f", attention of {single} layers once more"
    if cuts.saves:
        text += f", attention's output kept in {len(cuts.saves)}"
    if kept:
        text += f", everything kept in the last {kept} layer{'s' if kept > 1 else ''}"
    return text


def planned(costs: Any, cuts: Any, above: int) -> Planned:
    """What these cuts take, if MLX comes to have up to `above` bytes more than the limit."""
    plan = _core.make_plan(
        costs.stages, costs.inputs, costs.head_reads, cuts.segments, cuts.groups, cuts.saves
    )
    estimate = _core.estimate(plan, costs)
    at = max(range(len(estimate.moves)), key=lambda i: estimate.moves[i].total)
    alive = estimate.moves[at]
    parts = {
        "weights, adapter, optimizer": costs.fixed,
        "boundary values": alive.values + alive.cotangents,
        "kept for the backward pass": alive.saved,
        "gradients": alive.gradients,
        "inside a segment": alive.working,
    }
    if costs.fixed + alive.total < estimate.peak:
        parts = {"weights, adapter, optimizer": costs.fixed, "optimizer's step": costs.update}
    return Planned(
        cuts=Cuts(tuple(cuts.segments), tuple(cuts.groups), tuple(cuts.saves)),
        peak=estimate.peak,
        limit=max(costs.fixed, estimate.peak - above),
        parts={name: n for name, n in parts.items() if n},
        moves=tuple(costs.fixed + alive.total for alive in estimate.moves),
        lines=tuple(plan.describe()),
        work=estimate.work,
        again=estimate.again,
    )


def overshoot(model: ModelShape, batch: BatchShape, device: Device) -> int:
    """Bytes that MLX may come to have above the limit at which it waits.

    It waits before an op, for what it allocated ahead of the device. The largest array there is are
    gate and up of all tokens; where the MLP is tiled, attention's backward pass makes several that
    come to as much. On the CPU the head allocates when it runs, and not when it is written down.
    """
    widest = max(2 * layer.hidden for layer in model.layers)
    largest = batch.rows * batch.length * widest * device.size
    return largest if device.gpu else largest // 2 + cpu_logits(model, batch)


def choose(
    model: ModelShape,
    batch: BatchShape,
    ranks: Mapping[str, int],
    device: Device,
    budget: int,
) -> Planned:
    """The plan of least work whose peak is within `budget` bytes; that of least peak if none is."""
    costs = costs_of(model, batch, ranks, device)
    cuts = _core.choose_cuts(costs, budget).cuts
    return planned(costs, cuts, overshoot(model, batch, device))


def named(
    model: ModelShape,
    batch: BatchShape,
    ranks: Mapping[str, int],
    device: Device,
    size: int,
) -> Planned:
    """The plan of `segment_size: size`."""
    costs = costs_of(model, batch, ranks, device)
    n = len(model.layers)
    ends = [2 * min(end, n) for end in range(size, n + size, size)] if size else [2 * n]
    cuts = _core.Cuts(ends, list(range(1, len(ends) + 1)))
    return planned(costs, cuts, overshoot(model, batch, device))


def longest(
    model: ModelShape,
    ranks: Mapping[str, int],
    device: Device,
    budget: int,
    rows: int = 1,
    loss: float = 1.0,
) -> int:
    """The most tokens a row, in steps of 128, of which a plan fits; 0 if none does."""

    def fits(steps: int) -> bool:
        length = steps * STEP
        part = max(1, round(length * loss))
        batch = BatchShape(rows, length, part, rows * part)
        return _core.least_peak(costs_of(model, batch, ranks, device)) <= budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, high * 2
    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * STEP


def ranks_of(
    model: ModelShape,
    *,
    rank: int,
    rank_scaling: str,
    target_modules: Sequence[str],
    num_layers: int,
) -> dict[str, int]:
    """As lora.choose_ranks has them, from the headers; `by_kl` counts as `by_bits`."""
    adapted = model.layers if num_layers < 0 else model.layers[-num_layers:]
    found = {}
    for layer in adapted:
        for path in model.widths:
            if not path.startswith(f"{layer.path}."):
                continue
            if layer.donor is not None and path.endswith(("k_proj", "v_proj")):
                continue
            if any(path.endswith(f".{target}") for target in target_modules):
                bits = model.bits.get(path, 4) if rank_scaling != "constant" else 4
                found[path] = max(2, math.ceil(rank * bits / 4))
    return found
