"""Computes the loss of a batch and its gradients, for any model family."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from .. import _core
from ..config import TrainConfig
from ..models import Chain
from ..models.chain import Dropout
from ..schedule import Cuts, Grads, Params, Stage, forward, segmented_value_and_grad
from ..streams import Stream, head_reads
from .grpo import Grpo
from .kto import Kto
from .objective import Objective
from .preference import Dpo, Orpo, Simpo
from .sft import Sft

__all__ = [
    "OBJECTIVES",
    "Functions",
    "Objective",
    "Value",
    "baseline_of",
    "named",
    "objective_of",
    "total_of",
    "value",
    "value_and_grad",
    "with_baseline",
    "with_head",
]


#: The objective of each `method` in the configuration.
OBJECTIVES: dict[str, type[Objective]] = {
    "sft": Sft,
    "dpo": Dpo,
    "orpo": Orpo,
    "simpo": Simpo,
    "kto": Kto,
    "grpo": Grpo,
}


def objective_of(config: TrainConfig) -> Objective:
    return OBJECTIVES[config.method].of(config)


def named(objective: Objective, outputs: Iterable[Any]) -> dict[str, float]:
    """Returns the metrics in `outputs`, keyed by name. Metrics that are NaN, because no row
    contributed to them, are omitted."""
    found = zip(objective.metrics, map(float, outputs), strict=True)
    return {name: x for name, x in found if not math.isnan(x)}


class Functions:
    """Creates the stages and the head that an objective needs for a step, and caches them together
    with their recorded graphs.

    With packed rows or dropout, stages differ from step to step and are not cached.
    """

    MOST = 8  #: the maximum number of cached combinations of streams

    def __init__(
        self,
        objective: Objective,
        chain: Chain,
        scales: Mapping[str, float],
        dropout: Dropout | None = None,
    ):
        self.objective, self.scales, self.dropout = objective, scales, dropout
        self.chain = chain.adapting(scales, dropout)
        self._kept: dict[Any, tuple[list[Stage], Callable[..., Any], Any]] = {}

    def __call__(
        self, streams: tuple[Stream, ...]
    ) -> tuple[list[Stage], Callable[..., Any], _core.Recordings | None]:
        """Returns the stages, the head and the recordings for these streams. The recordings are
        None if the stages cannot be cached."""
        if streams in self._kept:
            return self._kept[streams]
        stages = self.chain.stages(self.scales, streams, self.dropout)
        head = self.objective.head(self.chain)
        if self.dropout or any(stream.parts for stream in streams):
            return stages, head, None
        if len(self._kept) == self.MOST:
            self._kept.clear()
        self._kept[streams] = stages, head, _core.Recordings()
        return self._kept[streams]


def value_and_grad(
    functions: Functions,
    params: Params,
    batch: Any,
    total: Any,
    *,
    cuts: Callable[[Sequence[Stream]], Cuts],
    watch: Callable[[], None] | None = None,
) -> tuple[tuple[mx.array, ...], Grads]:
    """Returns the objective's outputs for a batch, and the gradients of the loss. The function
    `cuts` decides where the chain is cut into segments, given the streams of the batch."""
    objective, chain = functions.objective, functions.chain
    streams = objective.streams(chain, batch)
    values = objective.values(chain, batch, total)
    stages, head, recordings = functions(streams)
    step = segmented_value_and_grad(
        stages,
        head,
        inputs=tuple(values),
        head_reads=(*head_reads(streams), *objective.reads),
        cuts=cuts(streams),
        watch=watch,
        recordings=recordings,
    )
    outputs, grads = step({**params, "head": chain.of_head(params)}, values)
    return outputs, with_head(chain, grads)


def with_head(chain: Chain, grads: Grads) -> Grads:
    """Moves the gradients of the head's update from the key "head" to the key of the stage that
    owns the head's weight, and returns all gradients. If the head and the embedding share the
    update, the gradients of both are added."""
    for name, grad in grads.pop("head", {}).items():
        own = grads.setdefault(chain.stage_of[chain.head.path], {})
        own[name] = own[name] + grad if name in own else grad
    return grads


def value(
    objective: Objective,
    chain: Chain,
    scales: Mapping[str, float],
    params: Params,
    batch: Any,
    total: Any,
) -> list[mx.array]:
    """Returns the objective's outputs for a batch, without a backward pass."""
    chain = chain.adapting(scales)
    streams = objective.streams(chain, batch)
    reads = (*head_reads(streams), *objective.reads)
    values = objective.values(chain, batch, total)
    scope = forward(chain.stages(scales, streams), params, values, keep=reads)
    head = objective.head(chain, needs_grad=False)
    outputs = head(chain.of_head(params), *(scope[name] for name in reads))
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


#: A function with the same arguments and result as `value`. It may run on several ranks.
Value = Callable[..., list[mx.array]]


def total_of(
    objective: Objective,
    chain: Chain,
    scales: Mapping[str, float],
    params: Params,
    batches: Sequence[Any],
) -> Any:
    """Returns the total by which the losses of these batches are divided, including the baseline if
    the objective has one."""
    total = objective.total(batches)
    own = baseline_of(objective, chain, scales, params, batches, total)
    return with_baseline(objective, total, own)


def baseline_of(
    objective: Objective,
    chain: Chain,
    scales: Mapping[str, float],
    params: Params,
    batches: Sequence[Any],
    total: Any,
    value: Value = value,
) -> float:
    """Returns the contribution of these batches to the baseline of the step, or 0 if the objective
    has no baseline."""
    if objective.baseline is None:
        return 0.0
    # The batches run one at a time, so that the memory of each is freed before the next begins.
    what = (objective.baseline, chain, scales, params)
    return sum(float(value(*what, batch, total)[0]) for batch in batches)


def with_baseline(objective: Objective, total: Any, baseline: float) -> Any:
    """Returns `total` including the baseline of all batches of the step. If the objective has no
    baseline, returns `total` unchanged."""
    return total if objective.baseline is None else replace(total, baseline=baseline)
