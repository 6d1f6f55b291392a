"""Supervised fine-tuning: cross-entropy of the next token, weighted by token."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..data import Batch
from ..models import Chain
from ..schedule import Cuts, Stage, segmented_value_and_grad
from ..stages import HEAD_READS, trim_start


def values(chain: Chain, batch: Batch, total: float) -> dict[str, mx.array]:
    """Inputs of the chain for a batch, and index, target and weight of the rows that count.

    `positions` are those from the first row of the loss on, if the chain trims; `rows` index h as
    it then is. Weights are divided by `total`, the step's sum over all micro-batches, so that the
    losses and gradients of these add up to those of one large batch.
    """
    tokens, weights = batch.tokens, batch.weights[:, 1:]
    b, t = np.nonzero(weights)
    length = weights.shape[1]
    first = trim_start(int(t.min())) if chain.trims and t.size else 0
    return {
        **chain.start(mx.array(tokens[:, :-1])),
        "positions": mx.arange(first, length),
        "rows": mx.array((b * (length - first) + t - first).astype(np.int32)),
        "targets": mx.array(tokens[:, 1:][b, t]),
        "weights": mx.array((weights[b, t] / total).astype(np.float32)),
    }


def value_and_grad(
    chain: Chain,
    stages: Sequence[Stage],
    cuts: Cuts,
    watch: Callable[[], None] | None = None,
) -> Any:
    """step(params, values) → ((loss,), grads): segmented_value_and_grad of this objective."""
    return segmented_value_and_grad(
        stages,
        head(chain),
        inputs=(*chain.inputs, "positions", *HEAD_READS[1:]),
        head_reads=HEAD_READS,
        cuts=cuts,
        watch=watch,
    )


def head(chain: Chain, *, needs_grad: bool = True) -> Callable[..., mx.array]:
    """loss = Σ weights·CE(head(h[rows]), targets): only rows that count meet the head."""

    def loss(
        params: Mapping[str, mx.array],
        h: mx.array,
        rows: mx.array,
        targets: mx.array,
        weights: mx.array,
    ) -> mx.array:
        h = h.reshape(-1, h.shape[-1])[rows]
        return chain.head.cross_entropy(h, targets, weights, needs_grad=needs_grad)

    return loss
