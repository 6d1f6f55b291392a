"""A model as the trainer sees it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ..schedule import Cuts, Stage


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

    `start(tokens [B, T])` gives the values of `inputs`. `stages(scales)` has one stage a layer
    (`model.layers.3`) or two (`….self_attn`, `….mlp`); parameters have the full path of their
    linear (`model.layers.3.self_attn.q_proj.lora_a`), as have the multipliers `scales`. The last
    stage writes `h`. If the chain `trims`, a
    stage reads the input `positions` [N], the last N of T, and h has these rows from there on.
    """

    start: Callable[[mx.array], dict[str, mx.array]]
    inputs: tuple[str, ...]
    stages: Callable[[Mapping[str, float]], list[Stage]]
    head: Head
    linears: dict[str, nn.Module]  #: what can be adapted, by full path
    stage_of: dict[str, str]  #: the stage that a path of `linears` belongs to
    layers: list[list[str]]  #: the stages of each layer
    max_length: int | None  #: positions the model was made for
    trims: bool = False

    def cuts(self, size: int) -> Cuts:
        """Segments of `size` layers; 0: one segment."""
        ends = [sum(map(len, self.layers[: i + 1])) for i in range(len(self.layers))]
        return Cuts.by_layer(ends, size)
