"""The plan of one run: from its configuration and its longest batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ..config import TrainConfig
from ..errors import InputError
from . import Planned, choose, longest, named, ranks_of
from .budget import budget_bytes, device
from .costs import TRIM_MULTIPLE, BatchShape, Device
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
        text = self.planned.describe(len(self.shape.layers))
        peak, budget = self.planned.peak / 1e9, self.budget / 1e9
        return f"plan: {text}; {peak:.2f} GB at most of {budget:.2f} GB"

    def longest(self, budget: int | None = None) -> int:
        """The most tokens a row that fit with some plan, in steps of 128."""
        return longest(
            self.shape,
            self.ranks,
            self.device,
            self.budget if budget is None else budget,
            self.batch.rows,
            self.batch.trimmed / self.batch.length,
        )

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
        memory = mx.set_memory_limit(self.planned.limit)
        cache = mx.set_cache_limit(max(self.planned.peak // 4, self.budget - self.planned.peak))
        try:
            yield
        finally:
            mx.set_memory_limit(memory)
            mx.set_cache_limit(cache)


def full_batch(config: TrainConfig, loss: float = 1.0) -> BatchShape:
    """Rows of max_seq_length, of each of which the last part `loss` is trained."""
    length = config.max_seq_length - 1  # the last token is only predicted
    part = max(1, round(length * loss))
    trimmed = length - (length - part) // TRIM_MULTIPLE * TRIM_MULTIPLE
    accumulates = config.grad_accumulation_steps > 1
    return BatchShape(config.batch_size, length, trimmed, config.batch_size * part, accumulates)


def plan_run(config: TrainConfig, batch: BatchShape) -> RunPlan:
    """The plan for batches of up to this shape; InputError if it does not fit, before a load."""
    shape = read_shape(config.model_dir)
    ranks = ranks_of(
        shape,
        rank=config.rank,
        rank_scaling=config.rank_scaling,
        target_modules=config.target_modules,
        num_layers=config.num_layers,
    )
    given = config.memory_budget_gb
    budget = budget_bytes(None if given == "auto" else given)
    size = None if config.segment_size == "auto" else config.segment_size
    if config.grad_checkpoint:
        size = 1
    run = RunPlan(shape, batch, ranks, device(), budget, size, None)
    weights = shape.weight_bytes(run.device.size == 4)
    name = Path(config.model_dir).name
    if weights > budget:
        raise InputError(
            f"the weights of {name} alone take {weights / 1e9:.1f} GB, more than the budget of "
            f"{budget / 1e9:.1f} GB: take a smaller model, or raise memory_budget_gb."
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
            else "no length fits; take a smaller model"
        )
        if size is not None and run.within(budget).peak <= budget:
            advice = "segment_size auto fits"
        raise InputError(
            f"{name} takes {least}{planned.peak / 1e9:.2f} GB for {batch.rows} × {batch.length} "
            f"tokens, more than the budget of {budget / 1e9:.2f} GB: {advice}."
        )
    return replace(run, planned=planned)
