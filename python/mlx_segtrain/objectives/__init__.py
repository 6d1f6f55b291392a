"""Objectives: a batch's loss as a head over boundary values. They know no model family."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx

from ..config import TrainConfig
from ..data import Dataset
from ..models import Chain
from ..models.chain import Dropout
from ..schedule import Cuts, Grads, Params, forward, segmented_value_and_grad
from ..streams import BatchShape, Stream, head_reads
from .preference import Dpo, Orpo, Simpo
from .sft import Sft

__all__ = ["OBJECTIVES", "Objective", "objective_of", "value", "value_and_grad"]


class Objective(Protocol):
    """What the head makes of a batch: the loss first, then the `metrics`, each a scalar.

    All are parts of a mean, over what `total` counts: those of several batches add up.
    """

    unit: str  #: of the loss, in words

    @classmethod
    def of(cls, config: TrainConfig) -> "Objective":
        """With the options of a configuration."""
        ...

    @property
    def reference(self) -> "Objective | None":
        """What gives the numbers of the model without its adapter with which the loss compares."""
        ...

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

    def choices(self, data: Dataset) -> Iterator[Dataset]:
        """The data for each way in which its batches can run; a run takes the first that fits."""
        ...

    def batch_shapes(self, data: Dataset, rows: int) -> list[BatchShape]:
        """As large as any batch of so many rows is in every respect, one for each number of
        streams that `streams` gives."""
        ...

    def full_shape(self, rows: int, length: int, trained: int, same: int) -> BatchShape:
        """A batch of rows that run `length` tokens, the last `trained` of which are in the loss;
        of pairs the first `same` tokens are shared."""
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
