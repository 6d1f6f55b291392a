"""Predicts the remaining time of a run from the times of its parts so far; measures a rank."""

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

Part = Literal["step", "evaluation", "checkpoint"]
#: Number of most recent times of a part from which its mean is computed.
WINDOW = 32


def due(after: int, last: int, every: int) -> int:
    """Counts the steps from `after` + 1 to `last` that are multiples of `every`, or the last one;
    if `every` is 0, only the last one."""
    if after >= last:
        return 0
    multiples = last // every - after // every if every else 0
    return multiples + (not every or last % every != 0)


class Pace:
    """The seconds that steps, evaluations and checkpoints have taken in this process."""

    def __init__(self) -> None:
        self._seconds: defaultdict[Part, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def add(self, part: Part, seconds: float) -> None:
        self._seconds[part].append(seconds)

    @contextmanager
    def timed(self, part: Part) -> Iterator[None]:
        """Adds the time spent in the context, unless it raises."""
        begin = perf_counter()
        yield
        self.add(part, perf_counter() - begin)

    def mean(self, part: Part) -> float:
        """Returns the mean seconds of a part, or 0. The first time includes the compilation of
        kernels, so it is left out once there are others."""
        seen = list(self._seconds[part])
        own = seen[1:] if 1 < len(seen) < WINDOW else seen
        return sum(own) / len(own) if own else 0.0

    def left(self, steps: int, evaluations: int, checkpoints: int) -> float:
        """Returns the predicted seconds of this many steps, evaluations and checkpoints."""
        return (
            steps * self.mean("step")
            + evaluations * self.mean("evaluation")
            + checkpoints * self.mean("checkpoint")
        )


@dataclass
class Work:
    """The work of a rank in the steps since the last report."""

    steps: int = 0
    busy_s: float = 0.0  #: spent on its own work
    waited_s: float = 0.0  #: spent waiting for other ranks, and for transfers
    tokens: int = 0

    def add(self, seconds: float, waited_s: float, tokens: int) -> None:
        """Adds a step of this many seconds, including those spent waiting."""
        self.steps += 1
        self.busy_s += seconds - waited_s
        self.waited_s += waited_s
        self.tokens += tokens

    def figures(self) -> dict[str, float]:
        """Returns the means per step, and the tokens per second of the rank's own work."""
        return {
            "busy_s": self.busy_s / self.steps,
            "waited_s": self.waited_s / self.steps,
            "tokens_per_sec": self.tokens / self.busy_s,
        }
