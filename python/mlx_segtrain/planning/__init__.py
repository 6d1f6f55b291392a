"""Plans the segmented backward pass of a run from shapes alone, before any weights are loaded.

`read_shape` reads config.json and the headers of the weights, `costs_of` computes the cost of each
stage, and csrc/schedule/planner.cpp finds the plan with the least work within the memory budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _core
from ..lora.ranks import choose_ranks
from ..models.headers import ModelShape, read_shape, shape_of
from ..schedule import Cuts
from ..streams import BatchShape
from .budget import budget_bytes, device
from .costs import Device, costs_of, head_op, head_weight
from .pipeline import Part, costs_of_part

__all__ = [
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

#: Sequence lengths are planned in multiples of this number.
STEP = 128
#: On CUDA, the host launches ops ahead of the device, so a step needs more memory than its plan
#: states. As measured on an H200 (bench/LOG.md), the additional memory is AHEAD · `overshoot` if
#: MLX waits for the device at the peak of the plan, and LEAST · `overshoot` if MLX's memory limit
#: is so low that it waits before most ops.
AHEAD, LEAST = 0.8, 0.5
#: Possible limits, in bytes, on the freed buffers that MLX keeps for reuse on CUDA. Without such
#: buffers, MLX would constantly free and reallocate memory, which would take a tenth of each step's
#: time if the host is the bottleneck. The planner uses the first limit that does not require
#: additional recomputation.
BUFFERS = (256 << 20, 64 << 20)


@dataclass(frozen=True)
class Planned:
    """The cuts of a chain, with the memory (in bytes) and the work (in FLOPs) of a step with these
    cuts.

    `text` describes the plan in words. `parts` breaks the peak down by purpose. `moves` contains
    the peak total memory of each move of the plan (see schedule.py) in bytes, and `lines` describes
    the moves. When MLX's memory reaches `limit` bytes, MLX must wait for the device, so that memory
    allocated ahead of the device does not raise the total above `peak`. `host` is the size, in
    bytes, of the arrays that are offloaded to host memory. `resting` is the memory that is in use
    during the whole run. `again` is the part of `work` that is
    spent on recomputation.
    """

    cuts: Cuts
    text: str
    peak: int
    limit: int
    parts: dict[str, int]
    host: int
    resting: int
    moves: tuple[int, ...]
    lines: tuple[str, ...]
    work: float
    again: float

    @property
    def recomputed(self) -> float:
        """The ratio of recomputed work to necessary work."""
        return self.again / (self.work - self.again)


def describe(cuts: Any, first: int, layers: Sequence[int]) -> str:
    """Describes cuts in words. `layers` lists, for each layer, the number of stages up to its end.
    Stages before `first` need no backward pass."""

    def within(start: int, end: int) -> int:
        return sum(start < layer <= end for layer in layers)

    def named(n: int) -> str:
        return f"{n} layer{'s' if n > 1 else ''}"

    starts = [0, *cuts.segments[:-1]]
    begin = starts[-1]  # stages from here on are not recomputed
    if begin <= first:
        return "no recomputation"
    kept = within(begin, cuts.segments[-1])
    back = [(s, e) for s, e in zip(starts, cuts.segments, strict=True) if e > first][:-1]
    most = max(within(*segment) for segment in back)
    words = "single layers" if most == 1 else named(most)
    if max(end - start for start, end in back) == 1:
        words = "half layers"
    text = f"{words} recomputed"
    # Every group with several segments runs forward a second time, except the last group.
    groups = [
        (starts[start], cuts.segments[end - 1])
        for start, end in zip([0, *cuts.groups], cuts.groups[:-1], strict=False)
        if end - start > 1 and cuts.segments[end - 1] > first
    ]
    if whole := [n for n in (within(*group) for group in groups) if n > 1]:
        text += f", {len(whole)} group{'s' if len(whole) > 1 else ''}"
        text += f" of {max(whole)} layers a second time"
    if single := len(groups) - len(whole):
        text += f", attention of {named(single)} a second time"
    # The stages of MLPs, which are the last stages of their layers, save only a few numbers.
    if attention := sum(stage + 1 not in layers for stage in cuts.saves):
        text += f", attention output kept in {named(attention)}"
    if kept:
        text += f", no recomputation in the last {named(kept)}"
    if cuts.offloaded:
        text += f", arrays of {named(within(first, cuts.offloaded) or 1)} offloaded to host memory"
    return text


def planned(
    costs: Any, cuts: Any, above: int, ahead: int = 0, buffers: int | None = None
) -> Planned:
    """Returns the plan with these cuts. Its peak includes `ahead` bytes for allocations ahead of
    the device, and `buffers` bytes of freed buffers that MLX keeps for reuse.

    MLX may allocate up to `above` bytes more than its limit. If `buffers` is None, the limit is
    reduced by this amount; otherwise, `ahead` reserves memory for these allocations.
    """
    chain, own = (costs.stages, costs.inputs, costs.head_reads), (cuts.segments, cuts.groups)
    plan = _core.make_plan(*chain, *own, cuts.saves, costs.incoming, cuts.offloaded)
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
    parts["launched ahead"] = ahead
    parts["buffers for later"] = buffers or 0
    n = len(costs.stages)
    first = next((i for i, stage in enumerate(costs.stages) if stage.trainable), n)
    first = 0 if costs.incoming else first
    return Planned(
        text=describe(cuts, first, costs.layers),
        cuts=Cuts(tuple(own[0]), tuple(own[1]), tuple(cuts.saves), cuts.offloaded),
        peak=estimate.peak + ahead + (buffers or 0),
        limit=max(costs.fixed, estimate.peak + (-above if buffers is None else buffers)),
        parts={name: n for name, n in parts.items() if n},
        host=estimate.host,
        resting=costs.fixed,
        moves=tuple(costs.fixed + alive.total for alive in estimate.moves),
        lines=tuple(plan.describe()),
        work=estimate.work,
        again=estimate.again,
    )


def overshoot(
    model: ModelShape, batch: BatchShape, ranks: Mapping[str, int], device: Device
) -> int:
    """Returns the number of bytes that MLX may allocate above the limit at which it waits for the
    device.

    MLX waits before an op, and then allocates the op's outputs. The largest outputs are those of
    gate and up for all tokens. If the MLP is tiled, the largest outputs are those of attention's
    backward pass, which have the same total size. The dequantized weight of an adapted head may be
    even larger. On the CPU, the head allocates memory when it runs, not when its graph is built.
    """
    widest = max(2 * layer.hidden for layer in model.layers)
    longest = max(shape.length for shape in batch.streams)
    largest = batch.rows * longest * widest * device.size
    if device.gpu and model.head in ranks:
        largest = max(largest, head_weight(model, device))
    largest += device.workspace
    return largest if device.gpu else largest // 2 + head_op(model, batch, device)


def choose(
    model: ModelShape,
    batch: BatchShape,
    ranks: Mapping[str, int],
    device: Device,
    budget: int,
    part: Part | None = None,
) -> Planned:
    """Returns the plan with the least work whose peak is at most `budget` bytes; if there is none,
    returns the plan with the lowest peak. If `part` is given, the plan is for this part of a
    pipeline.

    On CUDA, the plan leaves room, if possible, for memory that the host allocates ahead of the
    device.
    """
    costs = costs_of_part(costs_of(model, batch, ranks, device), model, batch, device, part)
    above = overshoot(model, batch, ranks, device)
    if device.name == "cuda":
        ahead = int(AHEAD * above)
        found = [(_core.choose_cuts(costs, budget - ahead - n), n) for n in BUFFERS]
        least = min(choice.estimate.work for choice, _ in found)
        for choice, buffers in found:
            fits = choice.estimate.peak + ahead + buffers <= budget
            if fits and choice.estimate.work == least:
                return planned(costs, choice.cuts, above, ahead, buffers)
    least = least_ahead(device, above)
    return planned(costs, _core.choose_cuts(costs, budget - least).cuts, above, least)


def least_ahead(device: Device, above: int) -> int:
    """Returns the minimum number of bytes to reserve for allocations by the host ahead of the
    device."""
    return int(LEAST * above) if device.name == "cuda" else 0


def named(
    model: ModelShape,
    batch: BatchShape,
    ranks: Mapping[str, int],
    device: Device,
    size: int,
    part: Part | None = None,
) -> Planned:
    """Returns the plan for the configuration `segment_size: size`."""
    costs = costs_of_part(costs_of(model, batch, ranks, device), model, batch, device, part)
    cuts = Cuts.by_layer(costs.layers, size)
    above = overshoot(model, batch, ranks, device)
    if device.name == "cuda":
        return planned(costs, cuts, above, int(AHEAD * above), BUFFERS[-1])
    return planned(costs, cuts, above)


def longest(fits: Callable[[int], bool]) -> int:
    """Returns the largest number of tokens per row for which `fits` is true, or 0 if there is none.
    The result is a multiple of STEP and may be too small by up to 1/256 of its value."""
    if not fits(STEP):
        return 0
    low, high = 1, 2
    while fits(high * STEP):
        low, high = high, high * 2
    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle)
    return low * STEP


def ranks_of(model: ModelShape, *, model_dir: Path = Path(), **how: Any) -> dict[str, int]:
    """Calls ranks.choose_ranks for the layers of a model's shape."""
    return choose_ranks(model.linears, model.bits, model_dir=model_dir, outer=model.outer, **how)
