"""The plan of one run: from its configuration and its longest batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from .. import _core
from ..config import TrainConfig
from ..errors import InputError
from ..ranks import asked
from ..stages import padded, trim_start
from . import Planned, choose, longest, named, ranks_of
from .budget import budget_bytes, device
from .costs import BatchShape, Device, costs_of
from .shapes import ModelShape, read_shape


@dataclass(frozen=True)
class RunPlan:
    """What a run takes of the machine. `planned` is None where memory cannot be predicted.

    That is so for families on the generic path, whose layers are mlx-lm's own: they run one layer
    a segment unless the configuration says otherwise.
    """

    shape: ModelShape
    batch: BatchShape
    ranks: dict[str, int]
    device: Device
    budget: int
    size: int | None  #: layers a segment, by the configuration; None: the planner chooses
    planned: Planned | None

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
            part = -(-length * batch.trimmed // batch.length)
            loss = -(-length * batch.loss // batch.length)
            longer = replace(batch, length=length, trimmed=part, loss=loss)
            what = (self.shape, longer, self.ranks, self.device)
            if self.size is not None:
                return named(*what, self.size).peak <= most
            return _core.least_peak(costs_of(*what)) <= most

        return longest(fits)

    def within(self, budget: int) -> Planned:
        """The fastest plan in another budget."""
        return choose(self.shape, self.batch, self.ranks, self.device, budget)

    def tightened(self, measured: int) -> RunPlan | None:
        """The next cheaper plan if `measured` bytes were over the budget, if there is one."""
        if self.planned is None or self.size is not None or measured <= self.budget:
            return None
        cheaper = self.within(int(self.budget * min(self.planned.peak / measured, 0.95)))
        if cheaper.cuts == self.planned.cuts:
            return None
        return replace(self, planned=cheaper)

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


def full_batch(config: TrainConfig, loss: float = 1.0) -> BatchShape:
    """Rows of max_seq_length, of each of which the last part `loss` is trained."""
    # The last token is only predicted.
    length = padded(config.max_seq_length, config.batch_size) - 1
    part = max(1, round(length * loss))
    trimmed = length - trim_start(length - part)
    accumulates = config.grad_accumulation_steps > 1
    return BatchShape(config.batch_size, length, trimmed, config.batch_size * part, accumulates)


def plan_run(config: TrainConfig, batch: BatchShape) -> RunPlan:
    """The plan for batches of up to this shape; InputError if it does not fit, before a load."""
    shape = read_shape(config.model_dir)
    name = Path(config.model_dir).name
    if shape.max_length is not None and config.max_seq_length > shape.max_length and shape.fast:
        raise InputError(
            f"max_seq_length is {config.max_seq_length}, but the model was made for at most "
            f"{shape.max_length} tokens: lower it."
        )
    ranks = ranks_of(shape, **asked(config)) if shape.fast else {}
    given = config.memory_budget_gb
    budget = budget_bytes(None if given == "auto" else given)
    size = None if config.segment_size == "auto" else config.segment_size
    if config.grad_checkpoint:
        size = 1
    on = device()
    on = replace(on, size=max(on.size, shape.float_size))
    run = RunPlan(shape, batch, ranks, on, budget, size, None)
    weights = shape.weight_bytes(not on.gpu)
    if weights > budget:
        raise InputError(
            f"the weights of {name} alone take {_gb(weights)}, more than the budget of "
            f"{_gb(budget)}: take a smaller model, or raise memory_budget_gb."
        )
    if not shape.fast:
        return run
    what = (shape, batch, ranks, run.device)
    planned = run.within(budget) if size is None else named(*what, size)
    if planned.peak > budget:
        least = "at least " if size is None else f"with segment_size {size} "
        most = run.longest()
        advice = (
            f"the longest row that fits has {most} tokens (max_seq_length)"
            if most
            else "no length fits; lower batch_size or rank, or raise memory_budget_gb"
        )
        if size is not None and run.within(budget).peak <= budget:
            advice = "segment_size auto fits"
        raise InputError(
            f"{name} takes {least}{_gb(planned.peak)} for {batch.rows} × {batch.length} tokens, "
            f"more than the budget of {_gb(budget)}: {advice}."
        )
    return replace(run, planned=planned)


def _gb(n: int) -> str:
    """Bytes in words, with digits enough to tell two of them apart."""
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.3g} MB"
