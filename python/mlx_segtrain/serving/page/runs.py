"""What a job's events come to, for pages to show: curves of few points, last values, the log.

A run is read once, off the server's loop, however many pages watch it; a page that is opened later
goes on from there. So hundreds of thousands of events cost a reader no more than their reading.
"""

import asyncio
import math
import re
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from ...events import Event
from ..service import Service

#: Points of a curve, about; events of a page of the log; runs that are kept.
MOST, PAGE, KEPT = 600, 500, 100
#: What is drawn of training metrics, besides the loss.
DRAWN = ("learning_rate", "tokens_per_sec", "grad_norm", "peak_gb", "active_gb")
#: Names of metrics, and those of which no curve is drawn.
METRIC = re.compile(r"[a-z]\w{0,39}")
OTHER = ("type", "kind", "step", "loss", "step_s", "progress", "message", "ts", *DRAWN)

Point = tuple[float, float]


@dataclass(frozen=True)
class Bucket:
    """Neighbouring points: how many, their sums, the lowest and the highest."""

    n: int
    sums: Point
    low: Point
    high: Point

    def __add__(self, other: "Bucket") -> "Bucket":
        return Bucket(
            self.n + other.n,
            (self.sums[0] + other.sums[0], self.sums[1] + other.sums[1]),
            min(self.low, other.low, key=lambda point: point[1]),
            max(self.high, other.high, key=lambda point: point[1]),
        )


class Curve:
    """A curve of any length in buckets of as many points each, so that no spike is lost."""

    def __init__(self) -> None:
        self.buckets: list[Bucket] = []
        self.width = 1  #: points of a bucket

    def add(self, x: float, y: Any) -> None:
        if not isinstance(y, int | float) or not math.isfinite(y):
            return
        point = (float(x), float(y))
        own = Bucket(1, point, point, point)
        if self.buckets and self.buckets[-1].n < self.width:
            self.buckets[-1] += own
        else:
            self.buckets.append(own)
        if len(self.buckets) > MOST:
            self.width *= 2
            pairs = zip(self.buckets[::2], self.buckets[1::2], strict=False)
            rest = self.buckets[-1:] if len(self.buckets) % 2 else []
            self.buckets = [a + b for a, b in pairs] + rest

    def cut(self, x: float) -> None:
        """Forgets what lies behind: a run went on from there."""
        self.buckets = [own for own in self.buckets if max(own.low[0], own.high[0]) <= x]

    @property
    def points(self) -> list[Point]:
        """Of each bucket the mean: of short curves all points."""
        return [(own.sums[0] / own.n, own.sums[1] / own.n) for own in self.buckets]

    @property
    def extremes(self) -> list[Point]:
        """Of each bucket of a long curve the lowest and the highest point."""
        if self.width == 1:
            return []
        return [point for own in self.buckets for point in sorted({own.low, own.high})]

    @property
    def lowest(self) -> float | None:
        return min((own.low[1] for own in self.buckets), default=None)


@dataclass
class Run:
    """What the events of a job's log came to, up to a place in it."""

    service: Service
    id: str
    place: int = 0
    count: int = 0
    #: Places in the log behind which its pages begin.
    pages: list[int] = field(default_factory=lambda: [0])
    stage: str = ""
    message: str = ""
    iters: int | None = None
    step: int = 0
    planned_gb: float | None = None
    budget_gb: float | None = None
    train: dict[str, Any] = field(default_factory=dict)  #: the last training metrics
    val: dict[str, Any] = field(default_factory=dict)  #: the last evaluation
    first_val: float | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=200))
    samples: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=200))
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def catch_up(self) -> bool:
        """Reads what is new; whether there was any."""
        async with self.lock:
            behind = self.service.jobs.size(self.id) > self.place
            return behind and await asyncio.to_thread(self._read)

    def _read(self) -> bool:
        before = self.place
        while True:
            found, place = self.service.jobs.read(self.id, self.place)
            for id, event in found:
                self._take(event)
                self.count += 1
                if self.count % PAGE == 0:
                    self.pages.append(id)
            if place == self.place:
                return place != before
            self.place = place

    def page(self, number: int) -> list[Event]:
        """Events of a page of the log."""
        place = self.pages[number]
        end = self.pages[number + 1] if number + 1 < len(self.pages) else self.place
        events: list[Event] = []
        while place < end:
            before, (found, place) = place, self.service.jobs.read(self.id, place)
            events += [event for id, event in found if id <= end]
            if place == before:
                break
        return events

    def _take(self, event: Event) -> None:
        match event["type"]:
            case "stage":
                self.stage, self.message = str(event.get("stage")), str(event.get("message"))
                if event.get("stage") == "train":
                    self.iters, self.step = event.get("iters"), event.get("step") or 0
                    for curve in self.curves.values():
                        curve.cut(self.step)
                planned, budget = event.get("planned_gb"), event.get("budget_gb")
                if isinstance(planned, float) and isinstance(budget, float):
                    self.planned_gb, self.budget_gb = planned, budget
            case "warning":
                self.warnings.append(str(event.get("message")))
            case "sample":
                self.samples.append(event)
            case "metric":
                self._measure(event)

    def _measure(self, event: Event) -> None:
        step, kind = event.get("step") or 0, event.get("kind")
        self.step = max(self.step, step)
        if kind == "train":
            self.train = event
            self.curve("train").add(step, event.get("loss"))
            for name in (*DRAWN, *self.extra(event)):
                self.curve(name).add(step, event.get(name))
        elif kind == "val":
            self.val = event
            if self.first_val is None:
                self.first_val = event.get("loss")
            self.curve("val").add(step, event.get("loss"))

    @staticmethod
    def extra(event: Event) -> list[str]:
        """Metrics of preference methods."""
        return [name for name in event if name not in OTHER and METRIC.fullmatch(name)]

    def curve(self, name: str) -> Curve:
        return self.curves.setdefault(name, Curve())

    @property
    def left_s(self) -> float | None:
        """Seconds of training that are left, by the last step's."""
        if not self.iters or not isinstance(self.train.get("step_s"), int | float):
            return None
        return max(0, self.iters - self.step) * self.train["step_s"]


class Runs:
    """Of all jobs that were looked at lately."""

    def __init__(self, service: Service):
        self.service = service
        self.known: OrderedDict[str, Run] = OrderedDict()

    async def read(self, id: str) -> tuple[Run, bool]:
        """A job's run up to now, and whether there is anything new since it was last read."""
        run = self.known.setdefault(id, Run(self.service, id))
        self.known.move_to_end(id)
        if len(self.known) > KEPT:
            self.known.popitem(last=False)
        return run, await run.catch_up()
