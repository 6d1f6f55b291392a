"""A process that handles untrusted templates, tokenizers and data (started by parent.py).

It reads commands from a socket and replies to them. Each command or reply is JSON, preceded by its
length in 4 bytes. The command `fork` creates a child process, which inherits the loaded libraries
and tokenizer; `kill` ends a child process. Every other command runs a method `do_…`, with limits on
CPU time and memory. The operating system enforces these limits, even if the server has ended. The
process cannot write files, and receives few environment variables and open files.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import InputError, reason
from ...processes import MEMORY, set_limit
from ...torchless import hide_torch
from .. import opening
from ..roots import Roots

Values = dict[str, Any]

#: Maximum number of tokens in the previewed rows of a report on a data set.
SHOWN = 100_000
#: Maximum number of characters in a token. This limits the length of a completion, which might
#: repeat the longest token over and over.
LONGEST_TOKEN = 2000
#: Maximum factor by which the replacements of a decoder may lengthen a text.
MOST_GROWTH = 8
#: Maximum number of characters in an error message.
LONGEST = 500


class Child:
    """The state of a process. A forked process inherits only the loaded tokenizer."""

    def __init__(self, wire: socket.socket):
        self.wire = wire
        self.tokenizer: Any = None
        self.children: set[int] = set()

    def run(self) -> None:
        """Runs commands until the socket is closed."""
        while (frame := receive(self.wire)) is not None:
            values, files = frame
            op, limits = values.pop("op"), values.pop("limits", None)
            if op == "fork":
                self._fork(files)
                continue
            try:
                if limits is not None:
                    limit(**limits)
                answer = {"value": getattr(self, f"do_{op}")(**values)}
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic in Rust is not an Exception
                kind = "memory" if isinstance(error, MemoryError) else type(error).__name__
                answer = {"error": reason(error, LONGEST), "kind": kind}
            if limits is not None:
                set_limit(resource.RLIMIT_CPU)
            send(self.wire, answer)

    def _fork(self, files: list[int]) -> None:
        pid = os.fork()
        if pid:
            os.close(files[0])
            self.children.add(pid)
            send(self.wire, {"value": pid})
            return
        try:
            self.wire.close()
            self.wire, self.children = socket.socket(fileno=files[0]), set()
            self.run()
        finally:
            os._exit(0)

    def do_kill(self, pid: int) -> None:
        if pid in self.children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self.children.remove(pid)

    def do_load(self, folder: str) -> None:
        """Loads the tokenizer from a model's folder, for this process and its child processes."""
        from ...models import load_tokenizer

        _check_decoder(Path(folder))
        self.tokenizer = load_tokenizer(folder)
        longest = max(map(len, self.tokenizer.get_vocab()), default=0)
        if longest > LONGEST_TOKEN:
            raise InputError(f"a token has {longest} characters, but the limit is {LONGEST_TOKEN}")

    def do_encode(self, text: str, most: int) -> list[int] | int:
        from ...data.template import raw_ids

        return _few(raw_ids(self.tokenizer, text), most)

    def do_chat(self, messages: list[Any], variables: Values, most: int) -> list[int] | int:
        from ...data.template import prompt_ids

        return _few(prompt_ids(self.tokenizer, messages, variables), most)

    def do_calls(self, texts: list[str], tools: list[Any] | None) -> list[list[Any] | None]:
        """Returns the tool calls in each text, or None for a text without tool calls."""
        from ...generation.parts import read_calls

        return [read_calls(self.tokenizer, text, tools) for text in texts]

    def do_inspect(self, path: str, n_preview: int, how: Values, roots: list[str]) -> Values:
        """Returns the report on a data set as JSON values."""
        opening.open_too(roots)
        from ...data import Options, inspect

        report = inspect(Path(path), self.tokenizer, Options(**how), n_preview=n_preview)
        left = SHOWN
        for preview in report.previews:
            del preview.tokens[left:]
            left -= len(preview.tokens)
        return asdict(report)

    def do_nothing(self) -> None:
        """Does nothing. The reply shows that the process is running."""


def _check_decoder(folder: Path) -> None:
    """Raises InputError for a decoder whose regular expressions might take forever, or whose
    replacements make texts very long. This check is needed because tokens are not decoded in this
    process, but in the engine's thread, which serves all requests."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    parts, growth = [json.loads(file.read_text(encoding="utf-8")).get("decoder")], 1.0
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        if not isinstance(part, dict):
            continue
        replaces, pattern = part.get("type") == "Replace", part.get("pattern")
        found = pattern.get("String") if isinstance(pattern, dict) else pattern
        text = found if isinstance(found, str) else ""
        if "Regex" in part or (replaces and not text):
            raise InputError("its decoder contains a regular expression, which is not supported")
        if replaces:
            growth *= max(1.0, len(str(part.get("content"))) / len(text))
            if growth > MOST_GROWTH:
                raise InputError(
                    f"its decoder can expand text to more than {MOST_GROWTH} times its length, "
                    "which is not supported"
                )
        parts += part.values()


def _few(tokens: Any, most: int) -> list[int] | int:
    """Returns the tokens or, if there are more than `most`, only their number."""
    return len(tokens) if len(tokens) > most else list(tokens)


def receive(wire: socket.socket) -> tuple[Values, list[int]] | None:
    """Returns the next frame and its file descriptors, or None if the socket is closed."""
    head, files, _, _ = socket.recv_fds(wire, 4, 1)
    while head and len(head) < 4:
        head += wire.recv(4 - len(head))
    if not head:
        return None
    (size,) = struct.unpack("<I", head)
    body = bytearray(size)
    view = memoryview(body)
    while view:
        n = wire.recv_into(view)
        if not n:
            return None
        view = view[n:]
    return json.loads(body), list(files)


def send(wire: socket.socket, values: Values, files: tuple[int, ...] = ()) -> None:
    body = json.dumps(values).encode()
    socket.send_fds(wire, [struct.pack("<I", len(body))], files)
    wire.sendall(body)


def limit(seconds: float, memory: int) -> None:
    """Limits the CPU time (in seconds) and the memory (in bytes) that this process may use from now
    on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soon = int(used.ru_utime + used.ru_stime + seconds) + 1
    set_limit(resource.RLIMIT_CPU, soon)
    MEMORY.allow(memory)


def main(file: str, store: str = "", *folders: str) -> None:
    """Runs the process. `file` is the descriptor of the socket; the other arguments are the result
    of opening.confined()."""
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))
    # Ctrl-C in the terminal also reaches this process, but the server decides when the process
    # ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setrecursionlimit(1000)
    hide_torch()
    import mlx_lm.utils
    import transformers

    from ... import data, models

    assert data and models and mlx_lm.utils and transformers.AutoTokenizer  # loaded for all forks
    if folders:
        opening.confine(Roots(map(Path, folders), Path(store)))
    Child(socket.socket(fileno=int(file))).run()
