"""A request for a completion."""

import time
from itertools import count

from ...generation.batching import Answer
from ...generation.decoding import Options, Piece
from .mounting import Selected
from .pieces import Outbox

_numbers = count()


class Request(Answer):
    """A completion whose pieces are read in an event loop. Instances must be created on the loop's
    thread, while the loop is running."""

    def __init__(self, prompt: list[int], selected: Selected, options: Options):
        super().__init__(prompt, selected.base, options)
        self.selected = selected
        self.outbox = Outbox()
        self.number = next(_numbers)
        self.asked = self.since = (
            time.monotonic()
        )  #: `since` is the time when the request began to wait, or when its turn began

    def give(self, piece: Piece) -> None:
        self.outbox.put(piece)
