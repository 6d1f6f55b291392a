"""Predicts the remaining time of a run, and measures how long a rank computes and waits."""

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

Part = Literal["step", "evaluation", "checkpoint"]
#: The number of recent measurements from which the mean time of a part is computed.
WINDOW = 32


def due(after: int, last: int, every: int) -> int:
    """Returns how many of the steps from `after` + 1 to `last` are multiples of `every` or equal to
    `last`. If `every` is 0, only the step `last` counts."""
    if after >= last:
        return 0
    multiples = last // every - after // every if every else 0
    return multiples + (not every or last % every != 0)


class Pace:
    """The durations of steps, evaluations and checkpoints in this process, in seconds."""

    def __init__(self) -> None:
        self._seconds: defaultdict[Part, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def add(self, part: Part, seconds: float) -> None:
        self._seconds[part].append(seconds)

    @contextmanager
    def timed(self, part: Part) -> Iterator[None]:
        """Measures the time of the `with` block for `part`, unless the block raises an
        exception."""
        begin = perf_counter()
        yield
        self.add(part, perf_counter() - begin)

    def mean(self, part: Part) -> float:
        """Returns the mean time of a part in seconds, or 0 if it has not been measured yet. The
        first measurement includes the compilation of kernels, so it is excluded once there are more
        measurements."""
        seen = list(self._seconds[part])
        own = seen[1:] if 1 < len(seen) < WINDOW else seen
        return sum(own) / len(own) if own else 0.0

    def left(self, steps: int, evaluations: int, checkpoints: int) -> float:
        """Returns the predicted time for these numbers of steps, evaluations and checkpoints, in
        seconds."""
        return (
            steps * self.mean("step")
            + evaluations * self.mean("evaluation")
            + checkpoints * self.mean("checkpoint")
        )


@dataclass
class Work:
    """The work of one rank in the steps since the last report."""

    steps: int = 0
    busy_s: float = 0.0  #: seconds that this rank spent computing
    waited_s: float = 0.0  #: seconds that this rank spent waiting for other ranks or transfers
    tokens: int = 0

    def add(self, seconds: float, waited_s: float, tokens: int) -> None:
        """Adds a step that took `seconds`, including `waited_s` seconds of waiting."""
        self.steps += 1
        self.busy_s += seconds - waited_s
        self.waited_s += waited_s
        self.tokens += tokens

    def figures(self) -> dict[str, float]:
        """Returns the mean computing and waiting times per step, and the tokens per second while
        this rank was computing."""
        return {
            "busy_s": self.busy_s / self.steps,
            "waited_s": self.waited_s / self.steps,
            "tokens_per_sec": self.tokens / self.busy_s,
        }
