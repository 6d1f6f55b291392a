"""What changes during a run, and what of it a checkpoint holds."""

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import mlx.core as mx

from .memory import Memory

#: The states of MLX's optimizers, one for each part of the factors.
Moments = list[dict[str, Any]]


@dataclass(frozen=True)
class Iterate:
    """All factors, what the optimizer remembers, and the steps that led to them: they change at
    once."""

    vector: mx.array
    moments: Moments
    step: int = 0


@dataclass(frozen=True)
class Outcome:
    """Of a step: loss, gradient norm before clipping, and what else the objective measures.

    `rate` is the learning rate, `tokens` those that are no padding, and `supervised` those of them
    that are in the loss. `bound` is the loss above which
    it was a spike, None if it was none.
    """

    loss: float
    norm: float
    metrics: dict[str, float]
    rate: float
    tokens: int
    supervised: int
    bound: float | None = None
    seconds: float = 0.0


@dataclass
class Progress:
    """How far a run has come besides its factors; numbers and lists of them, so that JSON holds it.

    `reported` and `evaluated` are the last steps of which that was done. `recent` are the outcomes
    of the last `steps_per_report` steps, whose mean is the training loss; `losses` those that tell
    what a spike is, `skipped` the steps in a row that were left out. `rewards` are the mean reward
    of each step's completions, and the variance of that mean, for collapse.py. Seconds and the
    peak, in bytes, are of all parts of a run that was resumed.
    """

    reported: int = 0
    evaluated: int = -1
    last: Outcome | None = None
    recent: list[Outcome] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    vals: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    supervised: int = 0
    train_s: float = 0.0
    wall_s: float = 0.0
    peak: int = 0
    rewards: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float | None:
        """The training loss, as it is reported everywhere: the mean of `recent`."""
        return sum(own.loss for own in self.recent) / len(self.recent) if self.recent else None

    @property
    def metrics(self) -> dict[str, float]:
        """What else the objective measures: the means over those of these steps that have it."""
        found = [own.metrics for own in self.recent]
        names = dict.fromkeys(name for own in found for name in own)
        return {name: fmean(own[name] for own in found if name in own) for name in names}

    @property
    def best(self) -> dict[str, float] | None:
        """Step and loss of the evaluation with the lowest loss, the first if several have it."""
        return min(
            self.vals,
            key=lambda v: math.inf if math.isnan(v["loss"]) else v["loss"],
            default=None,
        )

    @property
    def since_best(self) -> int:
        """Evaluations after that one."""
        best = self.best
        return 0 if best is None else len(self.vals) - 1 - self.vals.index(best)

    def per_s(self, tokens: int) -> float:
        """A count of all steps by the seconds that they took."""
        return tokens / self.train_s if self.train_s else 0.0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        last, recent = values["last"], values["recent"]
        return cls(
            **values | {"last": last and Outcome(**last), "recent": [Outcome(**x) for x in recent]}
        )


@dataclass
class State:
    """A run between two steps."""

    at: Iterate
    progress: Progress
    memory: Memory

    @property
    def step(self) -> int:
        """Steps that are finished."""
        return self.at.step
