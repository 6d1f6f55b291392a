"""Supervised fine-tuning: cross-entropy of the next token, weighted by token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..data import Batch
from ..models import Chain
from ..streams import SINGLE, Stream
from . import stream_values


@dataclass(frozen=True)
class Sft:
    """loss = Σ weights·CE / total, the step's sum of weights: batches add up to one large batch."""

    metrics: tuple[str, ...] = ()
    reads: tuple[str, ...] = ("targets", "weights")

    def total(self, batches: Sequence[Batch]) -> float:
        return float(sum(batch.weights.sum() for batch in batches))

    def streams(self, chain: Chain, batch: Batch) -> tuple[Stream, ...]:
        return SINGLE

    def values(self, chain: Chain, batch: Batch, total: float) -> dict[str, mx.array]:
        """Index, target and weight of the rows that count; `rows` index h [B·N, H]."""
        weights = batch.weights[:, 1:]
        b, t = np.nonzero(weights)
        first = int(t.min()) if t.size else 0
        inputs, n = stream_values(chain, SINGLE[0], batch.tokens[:, :-1], first)
        return {
            **inputs,
            "rows": mx.array((b * n + t - (weights.shape[1] - n)).astype(np.int32)),
            "targets": mx.array(batch.tokens[:, 1:][b, t]),
            "weights": mx.array((weights[b, t] / total).astype(np.float32)),
        }

    def head(self, chain: Chain, *, needs_grad: bool = True) -> Callable[..., mx.array]:
        """Only rows that count meet the head."""

        def loss(
            params: Mapping[str, mx.array],
            h: mx.array,
            rows: mx.array,
            targets: mx.array,
            weights: mx.array,
        ) -> mx.array:
            h = h.reshape(-1, h.shape[-1])[rows]
            return chain.head.cross_entropy(params, h, targets, weights, needs_grad=needs_grad)

        return loss
