"""Supervised fine-tuning: cross-entropy of the next token, weighted by token."""

from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np

from .. import ops
from ..data import Batch
from ..models import Chain

#: Boundary values the head reads beside h.
HEAD_READS = ("h", "rows", "targets", "weights")


def values(chain: Chain, batch: Batch, total: float) -> dict[str, mx.array]:
    """Inputs of the chain for a batch: h, and index, target and weight of the rows that count.

    Weights are divided by `total`, the step's sum over all micro-batches, so that the losses and
    gradients of these add up to those of one large batch.
    """
    tokens, weights = batch.tokens, batch.weights
    rows = np.flatnonzero(weights[:, 1:])
    return {
        "h": chain.embed(mx.array(tokens[:, :-1])),
        "rows": mx.array(rows.astype(np.int32)),
        "targets": mx.array(tokens[:, 1:].reshape(-1)[rows]),
        "weights": mx.array((weights[:, 1:].reshape(-1)[rows] / total).astype(np.float32)),
    }


def head(chain: Chain, *, needs_grad: bool = True) -> Callable[..., mx.array]:
    """loss = Σ weights·CE(head(norm(h[rows])), targets): only rows that count meet the head."""

    def loss(
        params: Mapping[str, mx.array],
        h: mx.array,
        rows: mx.array,
        targets: mx.array,
        weights: mx.array,
    ) -> mx.array:
        h = h.reshape(-1, h.shape[-1])[rows]
        return ops.linear_cross_entropy(
            chain.norm(h),
            chain.head,
            targets,
            weights,
            softcap=chain.softcap,
            needs_grad=needs_grad,
        )

    return loss
