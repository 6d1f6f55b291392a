"""Objectives: a batch's loss as a head over boundary values. They know no model family."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from ..config import TrainConfig
from ..models import Chain
from ..models.chain import Dropout
from ..schedule import Cuts, Grads, Params, forward, segmented_value_and_grad
from ..streams import Stream, head_reads
from .objective import Objective
from .preference import Dpo, Orpo, Simpo
from .sft import Sft

__all__ = ["OBJECTIVES", "Objective", "objective_of", "value", "value_and_grad"]


#: By the name that a configuration has for it (config.ROWS).
OBJECTIVES: dict[str, type[Objective]] = {"sft": Sft, "dpo": Dpo, "orpo": Orpo, "simpo": Simpo}


def objective_of(config: TrainConfig) -> Objective:
    return OBJECTIVES[config.method].of(config)


def value_and_grad(
    objective: Objective,
    chain: Chain,
    scales: Mapping[str, float],
    params: Params,
    batch: Any,
    total: Any,
    *,
    cuts: Callable[[Sequence[Stream]], Cuts],
    dropout: Dropout | None = None,
    watch: Callable[[], None] | None = None,
) -> tuple[tuple[mx.array, ...], Grads]:
    """Outputs of the objective for a batch, and gradients; `cuts` of the chain of its streams."""
    chain = chain.adapting(scales, dropout)
    streams = objective.streams(chain, batch)
    values = objective.values(chain, batch, total)
    step = segmented_value_and_grad(
        chain.stages(scales, streams, dropout),
        objective.head(chain),
        inputs=tuple(values),
        head_reads=(*head_reads(streams), *objective.reads),
        cuts=cuts(streams),
        watch=watch,
    )
    outputs, grads = step({**params, "head": chain.of_head(params)}, values)
    for name, grad in grads.pop("head", {}).items():
        own = grads.setdefault(chain.stage_of[chain.head.path], {})
        own[name] = own[name] + grad if name in own else grad
    return outputs, grads


def value(
    objective: Objective,
    chain: Chain,
    scales: Mapping[str, float],
    params: Params,
    batch: Any,
    total: Any,
) -> list[mx.array]:
    """Outputs of the objective for a batch, forward only."""
    chain = chain.adapting(scales)
    streams = objective.streams(chain, batch)
    reads = (*head_reads(streams), *objective.reads)
    values = objective.values(chain, batch, total)
    scope = forward(chain.stages(scales, streams), params, values, keep=reads)
    head = objective.head(chain, needs_grad=False)
    outputs = head(chain.of_head(params), *(scope[name] for name in reads))
    return list(outputs) if isinstance(outputs, tuple) else [outputs]
