"""Divides the layers of a model between ranks according to the memory and the speed of their
devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from ..config import TrainConfig
from ..errors import InputError, NoRoom
from ..streams import BatchShape
from .budget import budget_bytes
from .costs import Device, costs_of
from .pipeline import Part, sent, weight_bytes
from .run import RunPlan, planned
from .speeds import SPEEDS

#: HALVINGS is the number of bisection steps for the time of the slowest rank; MOST_SECONDS is an
#: upper bound on this time.
HALVINGS, MOST_SECONDS = 24, 1e300


@dataclass(frozen=True)
class Member:
    """The memory of a rank in bytes, the type of its device, and the size of an element on this
    device in bytes."""

    budget: int
    device: str
    size: int


@dataclass(frozen=True)
class Held:
    """A rank's share of a pipeline. Sizes are in bytes.

    For each micro-batch, `sent` contains the numbers of bytes that the rank sends to the next and
    to the previous rank, and `seconds` is the rank's computing time. `busy` is the fraction of a
    step during which the rank computes. Times are predicted (speeds.py). `peak` is None if memory
    is not predicted.
    """

    rank: int
    layers: str
    weights: int
    peak: int | None
    budget: int
    sent: tuple[int, int]
    seconds: float
    busy: float


def split_run(run: RunPlan, members: Sequence[Member], batches: int) -> list[RunPlan]:
    """Returns the plan of each rank in `members` for steps of `batches` micro-batches. Raises
    InputError if there are more ranks than layers, and NoRoom if the ranks do not have enough
    memory."""
    layers = run.shape.n_layers
    if layers == 0:
        raise InputError(
            f"parallel is pipeline, but the weights of {run.shape.family} have no layers to divide "
            "between ranks: set parallel to data.",
            field="parallel",
        )

    @cache
    def bare(part: Part) -> RunPlan:
        member, device = members[part.rank], run.device
        if (device.name, device.size) != (member.device, member.size):
            device = Device(member.device, member.size)
        return replace(run, part=part, budget=member.budget, device=device, plans=())

    def quick_seconds(part: Part) -> float:
        """Returns the predicted time in seconds, without recomputation, because planning the
        recomputation would take much longer."""
        own = bare(part)
        return seconds(own.of_size(0) if own.shape.fast else own)

    parts = split(layers, len(members), batches, lambda p: has_room(bare(p)), quick_seconds)
    return [bare(part).filled() for part in parts]


def pipeline_runs(
    config: TrainConfig, batch: BatchShape, ranks: int, budgets: Sequence[float]
) -> list[RunPlan]:
    """Returns the plans of a pipeline of `ranks` devices of the same kind as this machine's device.
    `budgets` are in 10⁹ bytes; the default is the budget of this machine's device."""
    if budgets and len(budgets) != ranks:
        raise InputError(
            f"--rank-budgets has {len(budgets)} values, but --ranks is {ranks}: pass one value per "
            "rank."
        )
    run = planned(config, [batch], fills=False)
    own = [budget_bytes(gb) for gb in budgets] or [run.budget] * ranks
    members = [Member(bytes_, run.device.name, run.device.size) for bytes_ in own]
    return split_run(run, members, config.grad_accumulation_steps)


def has_room(run: RunPlan) -> bool:
    """Returns whether a plan fits into memory. If memory is not predicted, returns whether the
    weights fit."""
    assert run.part is not None
    if not run.shape.fast:
        return weight_bytes(run.shape, run.part, not run.device.gpu) <= run.budget
    return all(run.least_peak(batch) <= run.budget for batch in run.batches)


def seconds(run: RunPlan) -> float:
    """Returns the predicted time of a batch on this rank in seconds. If the work cannot be
    predicted, returns a number that is proportional to the time."""
    assert run.part is not None
    layers, speed = run.part.end - run.part.begin, SPEEDS[run.device.name]
    if run.planned is None:
        return layers / speed.work_per_s
    return run.planned.work / speed.work_per_s + speed.layer_s * layers


def held(runs: Sequence[RunPlan]) -> list[Held]:
    """Returns the share of each rank, for a report."""
    slowest, found = max(map(seconds, runs)), []
    for run in runs:
        part, own = run.part, seconds(run)
        assert part is not None
        bytes_sent = (0, 0)
        if run.planned is not None:
            what = (run.shape, run.batch, run.ranks, run.device)
            bytes_sent = sent(costs_of(*what), part)
        found.append(
            Held(
                rank=part.rank,
                layers=f"{part.begin + 1}-{part.end}",
                weights=weight_bytes(run.shape, part, not run.device.gpu),
                peak=run.planned and run.planned.peak,
                budget=run.budget,
                sent=bytes_sent,
                seconds=own,
                busy=part.batches * own / ((part.batches + part.ranks - 1) * slowest),
            )
        )
    return found


def split(
    layers: int,
    ranks: int,
    batches: int,
    fits: Callable[[Part], bool],
    seconds: Callable[[Part], float],
) -> list[Part]:
    """Returns the parts that minimize the time of the slowest part, provided that each part fits
    into the memory of its rank.

    Adding layers to a part must not reduce its time or memory. Raises InputError if there are more
    ranks than layers, and NoRoom if no division of the layers fits.
    """
    if ranks > layers:
        raise InputError(
            f"parallel is pipeline, but there are {ranks} ranks for {layers} layers: start at most "
            f"{layers} ranks.",
            field="parallel",
        )

    @cache
    def takes(part: Part) -> float:
        """Returns the time of a part in seconds, or infinity if the part does not fit."""
        return seconds(part) if fits(part) else math.inf

    def cut(limit: float) -> list[Part]:
        """Assigns to each rank as many layers as it can run within `limit` seconds. If not all
        layers can be assigned, returns fewer parts than there are ranks."""
        parts, begin = list[Part](), 0
        for rank in range(ranks):

            def part(end: int, rank: int = rank, begin: int = begin) -> Part:
                return Part(rank, ranks, begin, end, layers, batches)

            low, high = begin, layers - (ranks - 1 - rank)
            if rank == ranks - 1:
                low = high if takes(part(high)) <= limit else begin
            while low < high and rank < ranks - 1:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if takes(part(middle)) <= limit else (low, middle - 1)
            if low == begin:
                return parts
            parts.append(part(low))
            begin = low
        return parts

    found = cut(MOST_SECONDS)
    if len(found) < ranks:
        rank, first = len(found), found[-1].end + 1 if found else 1
        rest = f"layer {first} of {layers}"
        if rank == ranks - 1 and first < layers:  # the last rank needs all remaining layers
            rest = f"layers {first} to {layers}"
        raise NoRoom(
            f"the model does not fit on {ranks} ranks: rank {rank} does not have enough memory for "
            f"{rest}: lower max_seq_length or batch_size, raise memory_budget_gb, or start more "
            "ranks."
        )
    low, high = 0.0, max(map(takes, found))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        parts = cut(middle)
        if len(parts) == ranks:
            found, high = parts, max(map(takes, parts))
        else:
            low = middle
        if high - low <= 0.01 * high:
            break
    return found
