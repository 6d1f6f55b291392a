"""The plan of one run: from its configuration and its longest batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from .. import _core
from ..config import TrainConfig
from ..errors import InputError, NoRoom
from ..lora.ranks import asked
from ..models.headers import ModelShape, read_shape
from ..schedule import Cuts
from ..streams import (
    PAIR,
    SHARED_LEAST,
    BatchShape,
    Stream,
    StreamShape,
    joined,
    padded,
    trim_start,
)
from . import Planned, choose, longest, named, ranks_of
from .budget import budget_bytes, device
from .costs import Device, costs_of

if TYPE_CHECKING:
    from ..models import Chain


@dataclass(frozen=True)
class RunPlan:
    """What a run takes of the machine: its largest batches, one for each number of streams.

    `plans` are theirs, none where memory cannot be predicted. That is so for families on the
    generic path, whose layers are mlx-lm's own: they run one layer a segment unless the
    configuration says otherwise.
    """

    shape: ModelShape
    batches: tuple[BatchShape, ...]
    ranks: dict[str, int]
    device: Device
    budget: int
    size: int | None  #: layers a segment, by the configuration; None: the planner chooses
    plans: tuple[Planned, ...]

    @property
    def planned(self) -> Planned | None:
        """The plan that takes the most memory."""
        return max(self.plans, key=lambda plan: plan.peak, default=None)

    @property
    def batch(self) -> BatchShape:
        """The batch of that plan."""
        if self.planned is None:
            return self.batches[0]
        return self.batches[self.plans.index(self.planned)]

    def cuts(self, chain: Chain, streams: Sequence[Stream]) -> Cuts:
        """How a batch of so many streams is cut."""
        for batch, plan in zip(self.batches, self.plans, strict=False):
            if len(batch.streams) == len(streams):
                return plan.cuts
        return chain.cuts(1 if self.size is None else self.size, streams)

    def __str__(self) -> str:
        if self.planned is None:
            return f"{self.shape.family} takes the generic path: memory is not predicted"
        text = self.planned.text
        peak, budget = self.planned.peak / 1e9, self.budget / 1e9
        return f"plan: {text}; {peak:.2f} GB at most of {budget:.2f} GB"

    def longest(self, budget: int | None = None) -> int:
        """The most tokens a row that fit: with the plan that was asked for, or any."""
        most, batch = self.budget if budget is None else budget, self.batch

        def fits(length: int) -> bool:
            what = (self.shape, batch.stretched(length), self.ranks, self.device)
            if self.size is not None:
                return named(*what, self.size).peak <= most
            return _core.least_peak(costs_of(*what)) <= most

        return longest(fits)

    def within(self, budget: int) -> RunPlan:
        """With the fastest plans in this budget."""
        what = [(self.shape, batch, self.ranks, self.device) for batch in self.batches]
        return replace(self, plans=tuple(choose(*args, budget) for args in what))

    def of_size(self, size: int) -> RunPlan:
        """With so many layers a segment."""
        what = [(self.shape, batch, self.ranks, self.device) for batch in self.batches]
        return replace(self, plans=tuple(named(*args, size) for args in what))

    def tightened(self, measured: int) -> RunPlan | None:
        """The next cheaper plan if `measured` bytes were over the budget, if there is one."""
        if self.planned is None or measured <= self.budget:
            return None
        return self._cheaper(int(self.budget * min(self.planned.peak / measured, 0.95)))

    def cheaper(self) -> RunPlan | None:
        """The next plan that takes less, if there is one and none was asked for."""
        return self.planned and self._cheaper(int(0.95 * self.planned.peak))

    def _cheaper(self, budget: int) -> RunPlan | None:
        if self.size is not None:
            return None
        cheaper = self.within(budget)
        same = [plan.cuts for plan in cheaper.plans] == [plan.cuts for plan in self.plans]
        return None if same else cheaper

    @contextmanager
    def limits(self) -> Iterator[None]:
        """Within it MLX waits for the device at the plan's limit, and keeps little that is free."""
        if self.planned is None:
            yield
            return
        memory, cache = self.set_limits()
        try:
            yield
        finally:
            mx.set_memory_limit(memory)
            mx.set_cache_limit(cache)

    def set_limits(self) -> tuple[int, int]:
        """Sets MLX's limits of memory and of its cache; returns those that were."""
        assert self.planned is not None
        peak = self.planned.peak
        cache = max(peak // 4, self.budget - peak)
        return mx.set_memory_limit(self.planned.limit), mx.set_cache_limit(cache)


def ways(config: TrainConfig) -> dict[str, bool]:
    """What of a BatchShape follows from the configuration, and from the adapter it goes on from."""
    from ..adapters import is_dora

    return {
        "accumulates": config.grad_accumulation_steps > 1,
        "dropout": config.lora_dropout > 0,
        "dora": config.use_dora or (config.warm_start is not None and is_dora(config.warm_start)),
    }


def full_batch(config: TrainConfig, loss: float = 1.0, shared: float = 0.0) -> BatchShape:
    """Rows of max_seq_length, of each of which the last part `loss` is trained.

    Of pairs, the first part `shared` of both is the same.
    """
    # The last token is only predicted.
    length = padded(config.max_seq_length, config.batch_size) - 1
    part = max(1, round(length * loss))
    trimmed = length - trim_start(length - part)
    how = ways(config)
    same = min(round(length * shared), length - 1)
    if config.method == "sft":
        streams = (StreamShape(Stream(), length, trimmed),)
    elif same < SHARED_LEAST:
        streams = tuple(StreamShape(stream, length, trimmed) for stream in PAIR)
    else:
        rest = length - same
        streams = (StreamShape(joined(), length + rest, trimmed + rest, same, rest),)
    loss_rows = part if config.method == "sft" else 2 * part
    return BatchShape(config.batch_size, streams, config.batch_size * loss_rows, **how)


def plan_run(config: TrainConfig, *batches: BatchShape) -> RunPlan:
    """The plan for batches of up to these shapes, each with another number of streams.

    NoRoom if one does not fit, before a load; InputError if the model cannot take them.
    """
    shape = read_shape(config.model_dir)
    name = Path(config.model_dir).name
    if shape.max_length is not None and config.max_seq_length > shape.max_length and shape.fast:
        raise InputError(
            f"max_seq_length is {config.max_seq_length}, but the model was made for at most "
            f"{shape.max_length} tokens: lower it."
        )
    ranks = _ranks(config, shape) if shape.fast else {}
    given = config.memory_budget_gb
    budget = budget_bytes(None if given == "auto" else given)
    size = None if config.segment_size == "auto" else config.segment_size
    if config.grad_checkpoint:
        size = 1
    on = device(config.deterministic)
    on = replace(on, size=max(on.size, shape.float_size))
    run = RunPlan(shape, batches, ranks, on, budget, size, ())
    weights = shape.weight_bytes(not on.gpu)
    if weights > budget:
        raise NoRoom(
            f"the weights of {name} alone take {_gb(weights)}, more than the budget of "
            f"{_gb(budget)}: take a smaller model, or raise memory_budget_gb."
        )
    if not shape.fast:
        return run
    run = run.within(budget) if size is None else run.of_size(size)
    assert run.planned is not None
    if run.planned.peak > budget:
        least = "at least " if size is None else f"with segment_size {size} "
        most = run.longest()
        advice = (
            f"the longest row that fits has {most} tokens (max_seq_length)"
            if most
            else "no length fits; lower batch_size or rank, or raise memory_budget_gb"
        )
        if size is not None and all(plan.peak <= budget for plan in run.within(budget).plans):
            advice = "segment_size auto fits"
        raise NoRoom(
            f"{name} takes {least}{_gb(run.planned.peak)} for {run.batch.rows} × "
            f"{run.batch.length} tokens, more than the budget of {_gb(budget)}: {advice}."
        )
    return run


def _ranks(config: TrainConfig, shape: ModelShape) -> dict[str, int]:
    if config.warm_start is None:
        return ranks_of(shape, **asked(config))
    from ..adapters import ranks_in

    found = ranks_in(config.warm_start, shape.tied)
    known = {path.removeprefix("language_model."): path for path in shape.widths}
    ranks = {known.get(path.removeprefix("language_model."), ""): r for path, r in found.items()}
    if "" in ranks:
        raise InputError(
            f"warm_start {config.warm_start} adapts linears that {Path(config.model_dir).name} "
            "does not have: it was trained on another model."
        )
    return ranks


def _gb(n: int) -> str:
    """Bytes in words, with digits enough to tell two of them apart."""
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.3g} MB"
