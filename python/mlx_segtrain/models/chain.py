"""A model as the trainer sees it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..schedule import Cuts, Stage
from ..stages import SINGLE, Stream


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

    def log_probs(self, h: mx.array, targets: mx.array, *, needs_grad: bool = True) -> mx.array:
        """Of targets [M] behind h [M, H], float32 [M]."""
        ...


@dataclass(frozen=True)
class Dropout:
    """What LoRA branches drop of their inputs; masks follow from seed, draw and a module's path."""

    rate: float
    seed: int
    draw: int  #: number of the batch since the run began

    def key(self, path: str) -> mx.array:
        return ops.dropout_key(self.seed, self.draw, path)


class Stages(Protocol):
    """The stages of one batch."""

    def __call__(
        self,
        scales: Mapping[str, float],
        streams: Sequence[Stream] = SINGLE,
        dropout: Dropout | None = None,
    ) -> list[Stage]: ...


@dataclass(frozen=True)
class Chain:
    """A model as stages over boundary values.

    `start(tokens [B, T])` gives the values of `inputs`. `stages(scales)` has one stage a layer
    (`model.layers.3`) or two (`….self_attn`, `….mlp`), one stream behind the other; parameters have
    the full path of their linear (`model.layers.3.self_attn.q_proj.lora_a`), as have the
    multipliers `scales`. The last stage of a stream writes its `h`. If the chain `trims`, a stage
    reads the input `positions` [N], the last N of T, and h has these rows from there on.
    """

    start: Callable[[mx.array], dict[str, mx.array]]
    inputs: tuple[str, ...]
    stages: Stages
    head: Head
    linears: dict[str, nn.Module]  #: what can be adapted, by full path
    stage_of: dict[str, str]  #: the owner of a path of `linears`
    layers: list[list[str]]  #: the owners of each layer
    max_length: int | None  #: positions the model was made for
    trims: bool = False
    branches: bool = False  #: streams may have a branch

    def cuts(self, size: int, streams: Sequence[Stream] = SINGLE) -> Cuts:
        """Segments of `size` layers; 0: one segment."""
        stages = accumulate(len(layer) for _ in streams for layer in self.layers)
        return Cuts.by_layer(list(stages), size)
