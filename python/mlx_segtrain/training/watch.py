"""Who of a group of processes is lost, and that all of them name the same one.

A state machine without clock and sockets: what arrives and what time it is are its inputs, and what
it wants sent stands in `out`. Every rank has one. Each sends all others a beat every BEAT seconds.
Whoever finds that another one has ended or is silent says so to the judges, which are the JUDGES
lowest ranks that are not lost; a rank that fails says so to all. The first judge decides `settle`
seconds later, and each of the others as much later again, if it has heard of no decision by then. A
decision goes to all; who hears of it tells the judges, and a judge tells all: one that reaches
anybody reaches everybody, though the rank that took it is lost while it tells, as long as a judge
is left.
"""

from dataclasses import dataclass
from typing import Any, Literal

#: Seconds between two beats, without one until a rank is lost, and from the first loss to the
#: decision: several times what a message takes.
BEAT, PATIENCE, SETTLE = 1.0, 30.0, 2.0
#: Ranks that decide, one after the other.
JUDGES = 3

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
        #: How many times each rank has begun or ceased to wait for others; whether this one waits.
        self.at = dict.fromkeys(range(size), 0)
        self.waits = False
        #: Who has left at the end of the run, and when that was heard of.
        self.left: dict[int, float] = {}
        #: Who is lost, as far as this rank knows.
        self.lost: dict[int, Lost] = {}
        self.judges = list(range(size))[:JUDGES]
        self.decided: Lost | None = None
        #: Messages to send: to whom, what.
        self.out: list[tuple[list[int], dict[str, Any]]] = []
        self._since = now  # when a loss was heard of that a decision is to wait for
        self._ticked, self._due = now, now + beat

    def receive(self, source: int, message: dict[str, Any], now: float) -> None:
        """A message of another rank."""
        self.heard[source] = now
        if "at" in message:  # a beat
            self.at[source] = message["at"]
        elif "lost" in message:
            self._note(Lost(*message["lost"]), now)
        elif "decided" in message and self.decided is None:
            lost = Lost(*message["decided"])
            tell = self.others if self.rank in self.judges else self.judges
            # Who was given up may have slept for long: the others have come further.
            self._decide(lost, tell if lost.rank != self.rank else [])
        elif "left" in message:
            self.left.setdefault(source, now)

    def closed(self, source: int, now: float) -> None:
        """The connection to another rank is closed."""
        if source not in self.left:
            self._note(Lost(source, "ended", "has ended"), now)

    def fail(self, why: str, now: float) -> None:
        """This rank cannot go on."""
        self._note(Lost(self.rank, "failed", why), now)

    def leave(self) -> None:
        """This rank has come to the end of its run, or has named the one that is lost."""
        self.out.append((self.others, {"left": True}))

    def tick(self, now: float) -> None:
        """Time has passed. To be called several times in a beat, after all that has arrived."""
        slept, self._ticked = now - self._ticked, now
        if slept > 2 * self.beat:  # others may have spoken meanwhile: give them time again
            self.heard = {r: at + slept for r, at in self.heard.items()}
        if self.decided is not None:
            return
        if now >= self._due:
            self._due = now + self.beat
            self.out.append((self.others, {"at": self.at[self.rank]}))
            self._listen(now)
        if self.lost:
            turn = min([*self.judges, self.rank].index(self.rank), JUDGES)
            if now - self._since > self.settle * (1 + turn):
                # Of several the surest one: others are lost by that, or by a cable.
                surest = min(self.lost.values(), key=lambda x: (SUREST.index(x.how), x.rank))
                self._decide(surest, self.others)

    def _listen(self, now: float) -> None:
        for r, heard in self.heard.items():
            if r in self.left:
                if self.waits and now - self.left[r] > self.settle:
                    self._note(Lost(r, "ended", "has left the run"), now)
            elif now - heard > self.patience:
                self._note(Lost(r, "silent", f"has not answered for {self.patience:g} s"), now)

    def _note(self, lost: Lost, now: float) -> None:
        """Keeps what is the surest of each rank, and passes it on."""
        known = self.lost.get(lost.rank)
        if self.decided is not None:
            return
        if known is not None and SUREST.index(known.how) <= SUREST.index(lost.how):
            return
        before, first = self.judges, not self.lost
        self.lost[lost.rank] = lost
        self.judges = [r for r in range(len(self.at)) if r not in self.lost][:JUDGES]
        if first or self.judges != before:  # what a judge has decided before it was lost may come
            self._since = now
        told = self.others if lost.rank == self.rank else self.judges
        self._send(lost, told)
        for other in self.lost.values():  # the judges who are new know nothing
            self._send(other, [r for r in self.judges if r not in before])

    def _decide(self, lost: Lost, tell: list[int]) -> None:
        self.decided = lost
        self.out.append((tell, {"decided": [lost.rank, lost.how, lost.why]}))

    def _send(self, lost: Lost, to: list[int]) -> None:
        """Tells of a loss."""
        if to := [r for r in to if r != self.rank]:
            self.out.append((to, {"lost": [lost.rank, lost.how, lost.why]}))
