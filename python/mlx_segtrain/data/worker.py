"""A process that tokenizes blocks (workers.py): main(NUMBER) takes the number of a socket to its
parent.

It ends as soon as its parent does, for whatever reason and whatever it is doing.
"""

import gc
import os
import queue
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any

from ..torchless import hide_torch


def main(number: str) -> None:
    # Ctrl-C in a terminal: the parent decides when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hide_torch()
    wire: Any = Connection(int(number))
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                asked.put(wire.recv())
        except (EOFError, OSError):
            os._exit(0)

    tokenizer, options = wire.recv()
    threading.Thread(target=listen, daemon=True).start()
    from .workers import tokenized

    gc.freeze()
    while True:
        index, block, file = asked.get()
        wire.send(tokenized(index, block, file, tokenizer, options))
