"""Applies one of MLX's optimizers to all factors, with a learning rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..config import TrainConfig
from .layout import Layout
from .state import Iterate

#: Maps the name of an optimizer to a pair: a function that creates MLX's optimizer, and whether
#: this optimizer applies decoupled weight decay itself.
OPTIMIZERS: dict[str, tuple[Callable[[TrainConfig], optim.Optimizer], bool]] = {
    "adamw": (
        lambda c: optim.AdamW(c.learning_rate, [0.9, 0.999], 1e-8, c.weight_decay, True),
        True,
    ),
    "lion": (lambda c: optim.Lion(c.learning_rate, [0.9, 0.99], c.weight_decay), True),
    "sgd": (lambda c: optim.SGD(c.learning_rate, momentum=0.9), False),
    "adafactor": (
        lambda c: optim.Adafactor(c.learning_rate, scale_parameter=False, relative_step=False),
        False,
    ),
    "muon": (lambda c: optim.Muon(c.learning_rate, weight_decay=0.0), False),
}
#: Optimizers that need each factor as a matrix. The others update all factors as one vector.
BY_MATRIX = ("adafactor", "muon")
#: Maps the name of a schedule to its function: the learning rate, relative to its peak, after a
#: fraction p of the steps that follow the warmup.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "linear": lambda p: 1 - 0.9 * p,
    "cosine": lambda p: 0.1 + 0.45 * (1 + math.cos(math.pi * p)),
    "wsd": lambda p: 1 - 0.9 * max(0.0, p - 0.8) / 0.2,
}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Returns the learning rate of a step, where steps are counted from 0. A linear warmup is
    followed by the configured schedule."""
    peak, warmup = config.learning_rate, config.warmup_iters
    if step < warmup:
        return peak * (step + 1) / warmup
    p = (step - warmup) / max(config.iters - warmup, 1)
    return peak * SCHEDULES[config.lr_schedule](p)


class Optimizer:
    """Updates the vector of all factors. The learning rate of B is `lora_plus_ratio` times the
    learning rate of the other factors (LoRA+: Hayou et al. 2024, arXiv:2402.12354)."""

    def __init__(self, config: TrainConfig, layout: Layout):
        self.config, self.layout = config, layout
        make, self.decays = OPTIMIZERS[config.optimizer]
        ratios = [1.0] if config.lora_plus_ratio == 1 else [1.0, config.lora_plus_ratio]
        #: Pairs of an optimizer and the multiplier of its learning rate. There is one pair for all
        #: factors, or one for A and one for B.
        self.parts = [(make(config), ratio) for ratio in ratios]

    def start(self, vector: mx.array) -> Iterate:
        """Returns the iterate before the first step: the vector with the optimizer's initial
        state."""
        for (optimizer, _), own in zip(self.parts, self._split(vector), strict=True):
            optimizer.init(own)
        return Iterate(vector, [optimizer.state for optimizer, _ in self.parts])

    def __call__(self, gradient: mx.array, at: Iterate) -> Iterate:
        """Returns the iterate after one step. Its arrays have not been evaluated yet. `at` is not
        modified."""
        rate = learning_rate(self.config, at.step)
        pieces, moments = [], []
        for (optimizer, ratio), g, p, state in zip(
            self.parts, self._split(gradient), self._split(at.vector), at.moments, strict=True
        ):
            optimizer.state = tree_map(lambda x: x, state)  # a copy, because MLX modifies the dicts
            optimizer.learning_rate = rate * ratio
            if not self.decays:
                keep = 1 - rate * ratio * self.config.weight_decay
                p = {name: x * keep for name, x in p.items()}
            new: dict[str, mx.array] = optimizer.apply_gradients(g, p)
            pieces += [x.reshape(-1) for x in new.values()]
            moments.append(optimizer.state)
            optimizer.state = {}
        vector = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)
        return Iterate(vector, moments, at.step + 1)

    def _split(self, vector: mx.array) -> list[dict[str, Any]]:
        """Returns the factors of each entry of `parts`, either as one vector or as matrices in the
        order of the vector."""
        parts = self.layout.parts(len(self.parts))
        if self.config.optimizer in BY_MATRIX:
            factors = self.layout.split(vector)
            return [{name: factors[stage][name] for stage, name, _ in x.entries} for x in parts]
        if len(parts) == 1:
            return [{"factors": vector}]
        border = parts[0].size
        return [{"factors": vector[:border]}, {"factors": vector[border:]}]
