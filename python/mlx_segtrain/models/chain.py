"""A model as the trainer sees it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ..schedule import Stage


class Head(Protocol):
    """What turns rows of the last h into logits, and these into losses."""

    def logits(self, h: mx.array) -> mx.array:
        """h [..., H] → logits [..., V]"""
        ...

    def cross_entropy(
        self, h: mx.array, targets: mx.array, weights: mx.array, *, needs_grad: bool = True
    ) -> mx.array:
        """Σ weights·CE of h [M, H] against targets [M], a scalar in float32."""
        ...


@dataclass(frozen=True)
class Chain:
    """A model as stages over boundary values.

    `start(tokens [B, T])` gives the values of `inputs`. `stages(scales)` has one stage a layer,
    named by its path (`model.layers.3`); its parameters are `self_attn.q_proj.lora_a` and the like,
    and `scales` the multipliers by full path. The last stage writes `h`. If the chain `trims`, a
    stage reads the input `positions` [N], the last N of T, and h has these rows from there on.
    """

    start: Callable[[mx.array], dict[str, mx.array]]
    inputs: tuple[str, ...]
    stages: Callable[[Mapping[str, float]], list[Stage]]
    head: Head
    linears: dict[str, nn.Module]  #: what can be adapted, by full path
    layer_of: dict[str, int]  #: index of the layer that a path belongs to
    n_layers: int
    max_length: int | None  #: positions the model was made for
    trims: bool = False
