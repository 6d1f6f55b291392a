"""Who of a group of processes is lost, and that all of them name the same one.

A state machine without clock and sockets: what arrives and what time it is are its inputs, and what
it wants sent stands in `out`. Every rank has one. Each sends all others a beat every BEAT seconds.
Whoever finds that another one has ended, is silent, or has failed itself, reports that to all, and
every rank passes on what is new to it. Some seconds (`settle`) later all have the same reports,
and decide by them. A decision is passed on too: a rank that slept takes that of the others.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

#: Seconds between two beats, without one until a rank is lost, and from the first report to the
#: decision: several times what a message takes.
BEAT, PATIENCE, SETTLE = 1.0, 30.0, 2.0

#: How a rank is lost, the surest first: it says so, its connections are closed, it says nothing.
How = Literal["failed", "ended", "silent"]
SUREST: tuple[How, ...] = ("failed", "ended", "silent")


@dataclass(frozen=True)
class Lost:
    """A rank without which the run cannot go on; `why` is a sentence's predicate."""

    rank: int
    how: How
    why: str


class Watch:
    """What one rank knows of the others. Messages are JSON objects."""

    def __init__(
        self,
        rank: int,
        size: int,
        now: float,
        *,
        patience: float = PATIENCE,
        settle: float = SETTLE,
        beat: float = BEAT,
    ):
        self.rank, self.patience, self.settle, self.beat = rank, patience, settle, beat
        self.others = [r for r in range(size) if r != rank]
        self.heard = dict.fromkeys(self.others, now)
        #: How many times each rank has begun to wait for all others; and whether this one does.
        self.at = dict.fromkeys(range(size), 0)
        self.waits = False
        #: Who has left at the end of the run, and when that was heard of.
        self.left: dict[int, float] = {}
        #: What each rank found first.
        self.reports: dict[int, Lost] = {}
        self.decided: Lost | None = None
        #: Messages to send: to whom, what.
        self.out: list[tuple[int, dict[str, Any]]] = []
        self._first = now  # when the first report came
        self._ticked = self._due = now

    def receive(self, source: int, message: dict[str, Any], now: float) -> None:
        """A message of another rank; one of an unknown kind is a beat."""
        self.heard[source] = now
        self.at[source] = max(self.at[source], message.get("at", 0))
        for reporter, *lost in message.get("reports", ()):
            self._report(reporter, Lost(*lost), now)
        if self.decided is None and "decided" in message:
            self._decide(Lost(*message["decided"]))
        if message.get("left"):
            self.left.setdefault(source, now)

    def closed(self, source: int, now: float) -> None:
        """The connection to another rank is closed."""
        if source not in self.left:
            self._report(self.rank, Lost(source, "ended", "has ended"), now)

    def fail(self, why: str, now: float) -> None:
        """This rank cannot go on."""
        self._report(self.rank, Lost(self.rank, "failed", why), now)

    def leave(self) -> None:
        """This rank has come to the end of its run, or has named the one that is lost."""
        self._send({"left": True})

    def tick(self, now: float) -> None:
        """Time has passed. To be called several times in a beat, after all that has arrived."""
        slept, self._ticked = now - self._ticked, now
        if slept > 2 * self.beat:  # others may have spoken meanwhile: give them time again
            self.heard = {r: at + slept for r, at in self.heard.items()}
        if now >= self._due:
            self._due = now + self.beat
            self._send({"at": self.at[self.rank]})
        if self.decided is not None:
            return
        for r in self.others:
            if r in self.left:
                if self.waits and now - self.left[r] > self.settle:
                    self._report(self.rank, Lost(r, "ended", "has left the run"), now)
            elif now - self.heard[r] > self.patience:
                why = f"has not answered for {self.patience:.0f} s"
                self._report(self.rank, Lost(r, "silent", why), now)
        if self.reports and now - self._first > self.settle:
            votes = Counter(lost.rank for lost in self.reports.values())
            named = min(
                self.reports.values(),
                key=lambda x: (SUREST.index(x.how), -votes[x.rank], x.rank, x.why),
            )
            self._decide(named)

    def _report(self, reporter: int, lost: Lost, now: float) -> None:
        """Keeps the first report of each rank; one of itself counts more than what others say."""
        known = self.reports.get(reporter)
        if self.decided is not None or (known and (known.how == "failed" or lost.how != "failed")):
            return
        if not self.reports:
            self._first = now
        self.reports[reporter] = lost
        self._send({"reports": [[reporter, lost.rank, lost.how, lost.why]]})

    def _decide(self, lost: Lost) -> None:
        self.decided = lost
        self._send({"decided": [lost.rank, lost.how, lost.why]})

    def _send(self, message: dict[str, Any]) -> None:
        self.out += [(r, message) for r in self.others if r not in self.left]
