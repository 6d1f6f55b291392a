"""Supervised fine-tuning: cross-entropy of the next token, with a weight for each token."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from .. import ops
from ..data import Batch, Dataset
from ..models import Chain
from ..streams import SINGLE, BatchShape
from .objective import Objective, predictions, stream_values


@dataclass(frozen=True)
class Sft(Objective):
    """The loss is Σ weights·CE / total, where total is the sum of all weights in the step. Dividing
    a step into several batches therefore does not change its loss."""

    unit = "nats per token"
    reads = ("targets", "weights")

    def batch_shapes(self, data: Dataset, rows: int) -> list[BatchShape]:
        columns = data.columns
        if data.packed:
            lengths, trained = columns.length[:, 0], columns.trained[:, 0]
            length, part = data.packed - 1, float((lengths**2).sum() / lengths.sum())
            most = min(length, math.ceil(data.packed * float((trained / lengths).max())))
            return [BatchShape.packed(rows, length, part, rows * most)]
        return super().batch_shapes(data, rows)

    def total(self, batches: Sequence[Batch]) -> float:
        return float(sum(batch.weights.sum() for batch in batches))

    def values(self, chain: Chain, batch: Batch, total: float) -> dict[str, mx.array]:
        """Returns the inputs of the chain and the head, including the index, the target and the
        weight of each position in the loss."""
        tokens, b, t, places = predictions(batch)
        return {
            **stream_values(chain, SINGLE[0], tokens, b, t),
            "targets": ops.upload(batch.tokens[places]),
            "weights": ops.upload(batch.weights[places] / total),
        }

    def head(self, chain: Chain, *, needs_grad: bool = True) -> Callable[..., mx.array]:
        """Returns the function that computes the loss. The head runs only on positions in the
        loss."""

        def loss(
            params: Mapping[str, mx.array],
            h: mx.array,
            rows: mx.array,
            targets: mx.array,
            weights: mx.array,
        ) -> mx.array:
            h = ops.take_rows(h.reshape(-1, h.shape[-1]), rows)
            return chain.head.cross_entropy(params, h, targets, weights, needs_grad=needs_grad)

        return loss
