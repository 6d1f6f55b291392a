"""Computes the memory plan of a run from its configuration and its largest batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import mlx.core as mx

from .. import _core
from ..config import ROWS, TrainConfig
from ..errors import InputError, NoRoom
from ..hub import title
from ..lora.paths import bare
from ..lora.ranks import asked
from ..models.headers import ModelShape, read_shape
from ..objectives import objective_of
from ..ops.choice import Heads, settle
from ..schedule import Cuts
from ..streams import BatchShape, Stream, padded
from . import Planned, choose, least_ahead, longest, named, overshoot, ranks_of
from .budget import budget_bytes, device
from .costs import Device, costs_of
from .pipeline import Part, costs_of_part

if TYPE_CHECKING:
    from ..models import Chain

T = TypeVar("T")


@dataclass(frozen=True)
class RunPlan:
    """The memory plan of a run. The plan is based on the largest batch for each number of streams.

    `plans` contains the plan of each of the `batches`. `plans` is empty for model families on the
    generic path, because the memory of mlx-lm's layers cannot be predicted. Such models use one
    layer per segment, unless the configuration sets a segment size.
    """

    shape: ModelShape
    batches: tuple[BatchShape, ...]
    ranks: dict[str, int]
    device: Device
    budget: int
    size: int | None  #: configured layers per segment; if None, the planner chooses
    plans: tuple[Planned, ...]
    part: Part | None = None  #: the layers of this rank, in a pipeline

    @property
    def planned(self) -> Planned | None:
        """The plan with the highest peak, or None if there are no plans."""
        return max(self.plans, key=lambda plan: plan.peak, default=None)

    @property
    def batch(self) -> BatchShape:
        """The batch whose plan has the highest peak."""
        if self.planned is None:
            return self.batches[0]
        return self.batches[self.plans.index(self.planned)]

    def cuts(self, chain: Chain, streams: Sequence[Stream]) -> Cuts:
        """Returns the cuts of the chain for a batch with these streams."""
        for batch, plan in zip(self.batches, self.plans, strict=False):
            if len(batch.streams) == len(streams):
                return plan.cuts
        own = slice(self.part.begin, self.part.end) if self.part else slice(None)
        return chain.cuts(1 if self.size is None else self.size, streams, own)

    def __str__(self) -> str:
        if self.planned is None:
            return f"memory is not predicted for {self.shape.family}, which runs on mlx-lm's layers"
        text = self.planned.text
        peak, budget = self.planned.peak / 1e9, self.budget / 1e9
        own = f"{self.part}; " if self.part else ""
        return f"memory plan: {own}{text}; peak {peak:.2f} GB, budget {budget:.2f} GB"

    @property
    def fits(self) -> bool:
        """Whether the plan is within the budget. True if memory is not predicted."""
        return self.planned is None or self.planned.peak <= self.budget

    def no_room(self, name: str) -> NoRoom:
        """Returns the error for a plan that does not fit. `name` is the name of the model."""
        assert self.planned is not None
        least = "at least " if self.size is None else f"with segment_size {self.size} "
        most = self.longest()
        advice = (
            f"the longest row that fits has {most} tokens (max_seq_length)"
            if most
            else "no length fits, so lower batch_size or rank, or raise memory_budget_gb"
        )
        if self.size is not None and self.within(self.budget).fits:
            advice = "set segment_size to auto, which would fit"
        needed, budget = _gb(self.planned.peak, self.budget)
        return NoRoom(
            f"{name} needs {least}{needed} for {self.batch.rows} × {self.batch.length} tokens, "
            f"more than the budget of {budget}: {advice}."
        )

    def longest(self, budget: int | None = None) -> int:
        """Returns the largest number of tokens per row that fits into memory, up to the context
        length of the model. If no segment size is configured, considers all plans."""
        most, batch = self.budget if budget is None else budget, self.batch

        def fits(length: int) -> bool:
            return self.least_peak(batch.stretched(length)) <= most

        most_known = self.shape.max_length
        return min(longest(fits), most_known) if most_known else longest(fits)

    def least_peak(self, batch: BatchShape) -> int:
        """Returns the peak memory of a batch, in bytes. If no segment size is configured, this is
        the lowest peak of all plans."""
        what = self._of(batch)
        if self.size is not None:
            return named(*what, self.size, self.part).peak
        model, _, _, device = what
        costs = costs_of_part(costs_of(*what), model, batch, device, self.part)
        return _core.least_peak(costs) + least_ahead(device, overshoot(*what))

    def filled(self) -> RunPlan:
        """Returns this run with plans for its budget and its configured segment size."""
        if not self.shape.fast:
            return self
        return self.within(self.budget) if self.size is None else self.of_size(self.size)

    def within(self, budget: int) -> RunPlan:
        """Returns this run with the fastest plans that need at most `budget` bytes."""
        plans = tuple(choose(*self._of(batch), budget, self.part) for batch in self.batches)
        return replace(self, plans=plans)

    def of_size(self, size: int) -> RunPlan:
        """Returns this run with plans that have `size` layers per segment."""
        plans = tuple(named(*self._of(batch), size, self.part) for batch in self.batches)
        return replace(self, plans=plans)

    def of_part(self, part: Part, budget: int, device: Device) -> RunPlan:
        """Returns the plan of a rank that runs the layers of this part."""
        return replace(self, part=part, budget=budget, device=device, plans=()).filled()

    def _of(self, batch: BatchShape) -> tuple[ModelShape, BatchShape, dict[str, int], Device]:
        """Returns everything on which the plan of a batch depends."""
        return self.shape, batch, self.ranks, self.device

    def tightened(self, measured: int) -> RunPlan | None:
        """If the `measured` peak, in bytes, exceeds the budget, returns a plan with a lower peak;
        otherwise returns None."""
        if self.planned is None or measured <= self.budget:
            return None
        return self._cheaper(int(self.budget * min(self.planned.peak / measured, 0.95)))

    def cheaper(self) -> RunPlan | None:
        """Returns a plan with a lower peak, or None if there is none or if the configuration sets
        the segment size."""
        return self.planned and self._cheaper(int(0.95 * self.planned.peak))

    def _cheaper(self, budget: int) -> RunPlan | None:
        if self.size is not None:
            return None
        cheaper = self.within(budget)
        same = [plan.cuts for plan in cheaper.plans] == [plan.cuts for plan in self.plans]
        return None if same else cheaper

    @contextmanager
    def limits(self) -> Iterator[None]:
        """Inside this context, MLX waits for the device when its memory reaches the plan's limit,
        and keeps freed buffers only up to the size that the plan allows. At its end, frees the host
        memory of offloaded arrays."""
        if self.planned is None:
            yield
            return
        memory, cache = self.set_limits()
        try:
            yield
        finally:
            mx.set_memory_limit(memory)
            mx.set_cache_limit(cache)
            _core.release_host_memory()

    def set_limits(self) -> tuple[int, int]:
        """Sets the memory and cache limits of MLX, and returns the previous limits.

        The plan does not contain the arrays that the rest of this process keeps, such as another
        model in a notebook. Without room for them, MLX would wait for each op."""
        assert self.planned is not None
        peak = self.planned.peak
        cache = max(peak // 4, self.budget - peak)
        others = max(0, mx.get_active_memory() - self.planned.resting)
        return mx.set_memory_limit(self.planned.limit + others), mx.set_cache_limit(cache)


def _ways(config: TrainConfig) -> dict[str, bool]:
    """Returns the fields of a BatchShape that the configuration and its `warm_start` adapter
    determine."""
    from ..adapters import is_dora

    return {
        "accumulates": config.grad_accumulation_steps > 1,
        "dropout": config.lora_dropout > 0,
        "dora": config.use_dora or (config.warm_start is not None and is_dora(config.warm_start)),
    }


def full_batch(config: TrainConfig, loss: float = 1.0, shared: float = 0.0) -> BatchShape:
    """Returns the shape of a batch whose rows have max_seq_length tokens. `loss` is the fraction of
    each row, at its end, that is in the loss. `shared` is the fraction of each sequence, at its
    beginning, that the two sequences of a pair share."""
    # The last token of a row is a target, but not an input. Packed rows are neither padded nor
    # trimmed.
    packs, rows = config.packing is True, config.batch_size
    if ROWS[config.method] == "prompt":  # batch_size counts prompts, not rows
        packs, rows = False, 1
    length = (config.max_seq_length if packs else padded(config.max_seq_length, rows)) - 1
    trained, same = max(1, round(length * loss)), min(round(length * shared), length - 1)
    if packs:
        return BatchShape.packed(rows, length, length, rows * trained)
    return objective_of(config).full_shape(config.batch_size, length, trained, same)


def plan_run(config: TrainConfig, *batches: BatchShape) -> RunPlan:
    """Returns the plan of a run whose batches have at most these shapes, one for each number of
    streams.

    No weights are loaded. Raises NoRoom if one of the batches does not fit into memory, and
    InputError if the model does not support such batches.
    """
    return first_that_fits(config, [batches], tuple)[1]


def first_that_fits(
    config: TrainConfig,
    choices: Iterable[T],
    shapes: Callable[[T], Sequence[BatchShape]],
    *,
    measures: bool = False,
) -> tuple[T, RunPlan]:
    """Returns the first choice whose shapes fit into memory, with its plan. If none fits, raises
    the error that plan_run raises for the first choice. If `measures` is true, the attention
    kernels may be timed before planning (on a Mac only)."""
    plans = []
    for own in choices:
        plans.append(planned(config, shapes(own), measures=measures))
        if plans[-1].fits:
            return own, plans[-1]
    raise plans[0].no_room(title(config.model_dir))


def resting_shape(config: TrainConfig) -> ModelShape:
    """Returns the shape of the model. If there is a reward model, the shape includes its
    weights."""
    shape = read_shape(config.model_dir)
    if config.reward_model is None:
        return shape
    more = {f"reward_model/{k}": x for k, x in read_shape(config.reward_model).tensors.items()}
    return replace(shape, tensors={**shape.tensors, **more})


def planned(
    config: TrainConfig,
    batches: Sequence[BatchShape],
    *,
    measures: bool = False,
    fills: bool = True,
) -> RunPlan:
    """Returns the plan of a run, even if it does not fit into memory. If `fills` is False, the
    result does not contain the plans of the batches. Raises InputError if the model does not
    support such batches, and NoRoom if the weights alone do not fit."""
    shape = resting_shape(config)
    if shape.max_length is not None and config.max_seq_length > shape.max_length and shape.fast:
        raise InputError(
            f"max_seq_length = {config.max_seq_length} exceeds the model's context length of "
            f"{shape.max_length} tokens: lower max_seq_length.",
            field="max_seq_length",
        )
    if not shape.fast and any(stream.part for batch in batches for stream in batch.streams):
        raise InputError(
            f"packing is not supported for {shape.family}, because this model runs on mlx-lm's "
            "layers, which do not support packed rows: leave packing out and set batch_size "
            "instead; rows of similar length are then batched together.",
            field="packing",
        )
    ranks = adapter_ranks(config, shape) if shape.fast else {}
    given = config.memory_budget_gb
    budget = budget_bytes(None if given == "auto" else given)
    size = None if config.segment_size == "auto" else config.segment_size
    if config.grad_checkpoint:
        size = 1
    on = device(config.deterministic, shape.float_size, config.activation_offloading)
    if shape.fast and on.name == "metal":
        packed = any(stream.part for batch in batches for stream in batch.streams)
        settle(heads_of(shape, packed), measures=measures)
    how = _ways(config)
    own = tuple(replace(batch, **how) for batch in batches)
    run = RunPlan(shape, own, ranks, on, budget, size, ())
    weights = shape.weight_bytes(not on.gpu)
    if fills and weights > budget:
        needed, given = _gb(weights, budget)
        raise NoRoom(
            f"the weights of {title(config.model_dir)} alone need {needed}, more than the budget "
            f"of {given}: use a smaller model, or raise memory_budget_gb."
        )
    return run.filled() if fills else run


#: With at least this many tokens in a row, a kernel may run for a large fraction of a second on a
#: small GPU.
LONG = 16384
#: The maximum number of kernels per command buffer for such rows. It is low because macOS aborts
#: work that blocks the display for too long.
LAUNCHES = "4"


def short_buffers(tokens: int) -> None:
    """Limits the number of kernels per command buffer if rows have LONG tokens or more. Must be
    called before MLX first uses the GPU of a Mac."""
    if tokens >= LONG:
        os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", LAUNCHES)


def heads_of(shape: ModelShape, packed: bool) -> list[Heads]:
    """Returns the distinct kinds of attention calls in a model's layers."""
    dtype = mx.float32 if shape.float_size == 4 else mx.bfloat16
    by_name = {form.name: form for form in shape.layers}
    kinds = []
    for form in shape.layers:
        giver = form if form.donor is None else by_name.get(form.donor, form)
        groups = max(1, giver.key_value // form.head)
        causal = not packed and form.window is None and not form.softcap
        kinds.append(Heads(form.query // form.head, groups, form.head, dtype, causal))
    return list(dict.fromkeys(kinds))


def adapter_ranks(config: TrainConfig, shape: ModelShape) -> dict[str, int]:
    """Returns the LoRA rank of each linear layer that the run adapts, keyed by path. Raises
    InputError if the configured target modules or layers do not exist."""
    if config.warm_start is None:
        return ranks_of(shape, **asked(config))
    from ..adapters import ranks_in

    found = ranks_in(config.warm_start, shape.tied)
    known = {bare(path): path for path in shape.widths}
    ranks = {known.get(bare(path), ""): r for path, r in found.items()}
    if "" in ranks:
        raise InputError(
            f"warm_start {config.warm_start} adapts linear layers that {title(config.model_dir)} "
            "does not have: the adapter was trained on another model.",
            field="warm_start",
        )
    return ranks


def _gb(*sizes: int) -> list[str]:
    """Formats different numbers of bytes with enough digits to distinguish them."""
    digits, texts = 2, list[str]()
    while len(set(texts)) < len(sizes) and digits < 10:
        texts = [
            f"{n / 1e9:.{digits}f} GB" if n >= 1e8 else f"{n / 1e6:.{digits + 1}g} MB"
            for n in sizes
        ]
        digits += 1
    return texts
