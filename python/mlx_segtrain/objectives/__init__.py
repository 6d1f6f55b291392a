"""Objectives: a batch's loss as a head over boundary values. They know no model family."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx

from ..models import Chain
from ..models.chain import Dropout
from ..schedule import Cuts, Grads, Params, forward, segmented_value_and_grad
from ..streams import Stream, head_reads, trim_start

__all__ = ["Objective", "stream_values", "value", "value_and_grad"]


class Objective(Protocol):
    """What the head makes of a batch: the loss first, then the `metrics`, each a scalar.

    All are parts of a mean, over what `total` counts: those of several batches add up.
    """

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the outputs behind the loss."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """What the head reads besides h and rows of each stream."""
        ...

    def total(self, batches: Sequence[Any]) -> Any:
        """What the losses of these batches are to be divided by."""
        ...

    def streams(self, chain: Chain, batch: Any) -> tuple[Stream, ...]:
        """The sequences a batch runs as."""
        ...

    def values(self, chain: Chain, batch: Any, total: Any) -> dict[str, mx.array]:
        """Inputs of the chain for a batch, and what the head reads."""
        ...

    def head(self, chain: Chain, *, needs_grad: bool = True) -> Callable[..., Any]:
        """The function of parameters and reads that gives the outputs."""
        ...


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


def stream_values(
    chain: Chain, stream: Stream, tokens: Any, first: int
) -> tuple[dict[str, mx.array], int]:
    """Inputs of a stream of tokens [B, T] whose first row that counts is `first`; rows of its h.

    `positions` are those of the rows that h has behind the layer that trims.
    """
    length = tokens.shape[1]
    start = trim_start(first) if chain.trims else 0
    inputs = {**chain.start(mx.array(tokens)), "positions": mx.arange(start, length)}
    return {stream.of(name): x for name, x in inputs.items()}, length - start
