"""The state that changes during a run. Most of it is stored in checkpoints."""

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import mlx.core as mx

from .memory import Memory

#: The states of MLX's optimizers: either one state for all factors, or one for A and one for B.
Moments = list[dict[str, Any]]


@dataclass(frozen=True)
class Iterate:
    """The factors, the optimizer state and the number of finished steps, all of which change
    together in a step."""

    vector: mx.array
    moments: Moments
    step: int = 0


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step: the loss, the gradient norm before clipping, and the objective's
    metrics.

    `rate` is the learning rate. `tokens` is the number of tokens without padding, and `supervised`
    the number of tokens in the loss. `bound` is the loss above which a step is a spike; it is None
    unless this step was a spike.
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
    """The progress of a run, apart from the factors and the optimizer state. It can be serialized
    as JSON.

    `reported` and `evaluated` are the steps of the last report and the last evaluation. `recent`
    contains the outcomes of the last `steps_per_report` steps; the mean of their losses is the
    training loss. `losses` contains the recent losses, from which spikes.py detects spikes;
    `skipped` is the number of consecutive skipped steps up to the last step. `rewards` contains the
    mean reward of each step, for collapse.py. In a resumed run, the times in seconds and the peak
    in bytes cover the whole run.
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
        """The training loss that is reported: the mean of `recent`."""
        return sum(own.loss for own in self.recent) / len(self.recent) if self.recent else None

    @property
    def metrics(self) -> dict[str, float]:
        """The objective's metrics. Each is the mean over the recent steps that have this metric."""
        found = [own.metrics for own in self.recent]
        names = dict.fromkeys(name for own in found for name in own)
        return {name: fmean(own[name] for own in found if name in own) for name in names}

    @property
    def best(self) -> dict[str, float] | None:
        """The evaluation with the lowest loss; in a tie, the first one."""
        return min(
            self.vals,
            key=lambda v: math.inf if math.isnan(v["loss"]) else v["loss"],
            default=None,
        )

    @property
    def since_best(self) -> int:
        """The number of evaluations after the best one."""
        best = self.best
        return 0 if best is None else len(self.vals) - 1 - self.vals.index(best)

    def per_s(self, tokens: int) -> float:
        """Returns the tokens per second, given the number of tokens in all steps."""
        return tokens / self.train_s if self.train_s else 0.0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        last, recent = values["last"], values["recent"]
        return cls(
            **values | {"last": last and Outcome(**last), "recent": [Outcome(**x) for x in recent]}
        )


@dataclass
class State:
    """The state of a run between two steps."""

    at: Iterate
    progress: Progress
    memory: Memory

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return self.at.step
