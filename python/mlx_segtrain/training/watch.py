"""Detects that a rank of a group is lost, and makes all ranks agree on which rank it is.

A `Watch` is a state machine that uses neither a clock nor sockets: its inputs are messages and the
time, and `out` contains the messages to send. Every rank has a Watch, and sends a beat to all other
ranks every BEAT seconds. When a rank finds that another one has ended or is silent, it reports this
to the judges, which are the JUDGES lowest ranks that are not lost. When a rank fails, it reports
this to all ranks. `settle` seconds later, the first judge decides which rank is lost. Each further
judge waits another `settle` seconds, and decides if it has received no decision by then. A decision
is sent to all ranks. A rank that receives the decision passes it on to the judges, and a judge
passes it on to all ranks. Therefore, as long as a judge is left, a decision that reaches one rank
reaches all of them, even if the judge that made it is lost while sending it.
"""

from dataclasses import dataclass
from typing import Any, Literal

#: Times in seconds. BEAT is the interval between beats. PATIENCE is the time without messages after
#: which a rank is considered lost. SETTLE is the time from the first lost rank to the decision,
#: which is several times the latency of a message.
BEAT, PATIENCE, SETTLE = 1.0, 30.0, 2.0
#: The number of judges, which are the ranks that may decide which rank is lost.
JUDGES = 3

#: How a rank was lost, from the most to the least certain case: it has reported its failure, its
#: connections are closed, or it sends nothing.
How = Literal["failed", "ended", "silent"]
SUREST: tuple[How, ...] = ("failed", "ended", "silent")


@dataclass(frozen=True)
class Lost:
    """A lost rank, without which the run cannot continue. `why` completes a sentence that begins
    with the rank."""

    rank: int
    how: How
    why: str


class Watch:
    """This rank's knowledge of the state of the other ranks. Messages are JSON objects."""

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
        #: `at` counts how often each rank has started or stopped waiting; `waits` is whether this
        #: rank is waiting now.
        self.at = dict.fromkeys(range(size), 0)
        self.waits = False
        #: Ranks that have left at the end of the run, with the time at which this rank received
        #: their message.
        self.left: dict[int, float] = {}
        #: Ranks that this rank knows to be lost.
        self.lost: dict[int, Lost] = {}
        self.judges = list(range(size))[:JUDGES]
        self.decided: Lost | None = None
        #: Messages to send: recipients and content.
        self.out: list[tuple[list[int], dict[str, Any]]] = []
        self._since = now  # the time from which the judges' turns are counted
        self._ticked, self._due = now, now + beat

    def receive(self, source: int, message: dict[str, Any], now: float) -> None:
        """Handles a message from another rank."""
        self.heard[source] = now
        if "at" in message:  # a beat
            self.at[source] = message["at"]
        elif "lost" in message:
            self._note(Lost(*message["lost"]), now)
        elif "decided" in message and self.decided is None:
            lost = Lost(*message["decided"])
            tell = self.others if self.rank in self.judges else self.judges
            # If this rank itself was declared lost, perhaps because its machine slept, the other
            # ranks already know the decision.
            self._decide(lost, tell if lost.rank != self.rank else [])
        elif "left" in message:
            self.left.setdefault(source, now)

    def closed(self, source: int, now: float) -> None:
        """Handles the end of the connection to another rank."""
        if source not in self.left:
            self._note(Lost(source, "ended", "has ended"), now)

    def fail(self, why: str, now: float) -> None:
        """Reports that this rank cannot continue."""
        self._note(Lost(self.rank, "failed", why), now)

    def leave(self) -> None:
        """Tells the other ranks that this rank is leaving, because it has finished its run or has
        reported the lost rank."""
        self.out.append((self.others, {"left": True}))

    def tick(self, now: float) -> None:
        """Handles the passage of time. Must be called several times per beat, always after handling
        all messages that have arrived."""
        slept, self._ticked = now - self._ticked, now
        if slept > 2 * self.beat:  # messages may have arrived while this process slept
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
                # The most certain loss is assumed to be the cause: the other losses result from it
                # or from a broken connection.
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
        """Records that a rank is lost, and reports this, unless it is already known with at least
        the same certainty."""
        known = self.lost.get(lost.rank)
        if self.decided is not None:
            return
        if known is not None and SUREST.index(known.how) <= SUREST.index(lost.how):
            return
        before, first = self.judges, not self.lost
        self.lost[lost.rank] = lost
        self.judges = [r for r in range(len(self.at)) if r not in self.lost][:JUDGES]
        if first or self.judges != before:  # the decision of a lost judge may still arrive
            self._since = now
        told = self.others if lost.rank == self.rank else self.judges
        self._send(lost, told)
        for other in self.lost.values():  # new judges have not received the earlier reports
            self._send(other, [r for r in self.judges if r not in before])

    def _decide(self, lost: Lost, tell: list[int]) -> None:
        self.decided = lost
        self.out.append((tell, {"decided": [lost.rank, lost.how, lost.why]}))

    def _send(self, lost: Lost, to: list[int]) -> None:
        """Reports a lost rank to other ranks."""
        if to := [r for r in to if r != self.rank]:
            self.out.append((to, {"lost": [lost.rank, lost.how, lost.why]}))
