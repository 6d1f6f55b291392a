"""How long the rest of a run takes, by what its parts have taken so far."""

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Literal

Part = Literal["step", "evaluation", "checkpoint"]
#: The newest times of a part that are looked at.
WINDOW = 32


def due(after: int, last: int, every: int) -> int:
    """How many steps of `after` + 1 to `last` are multiples of `every` (0: none) or the last."""
    if after >= last:
        return 0
    multiples = last // every - after // every if every else 0
    return multiples + (not every or last % every != 0)


class Pace:
    """Seconds that steps, evaluations and checkpoints have taken in this process."""

    def __init__(self) -> None:
        self._seconds: defaultdict[Part, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def add(self, part: Part, seconds: float) -> None:
        self._seconds[part].append(seconds)

    @contextmanager
    def timed(self, part: Part) -> Iterator[None]:
        """Adds what happens within the context, unless it raises."""
        begin = perf_counter()
        yield
        self.add(part, perf_counter() - begin)

    def mean(self, part: Part) -> float:
        """Seconds of one; 0 as long as there was none. The first one also compiles kernels: it is
        left out as soon as there are others."""
        seen = list(self._seconds[part])
        own = seen[1:] if 1 < len(seen) < WINDOW else seen
        return sum(own) / len(own) if own else 0.0

    def left(self, steps: int, evaluations: int, checkpoints: int) -> float:
        """Seconds that so many of each will take."""
        return (
            steps * self.mean("step")
            + evaluations * self.mean("evaluation")
            + checkpoints * self.mean("checkpoint")
        )
