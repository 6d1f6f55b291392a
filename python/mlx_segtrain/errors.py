"""Exceptions with a message of one sentence, for bad input and for failures during a run."""

import re
from collections.abc import Sequence
from typing import Any, Literal

#: Why a run ended: input that must be changed, too little memory, a failure during the run, a
#: killed process, or a bug in this package.
Fault = Literal["input", "memory", "run", "killed", "bug"]


class InputError(ValueError):
    """Bad input. The message is one sentence: what is wrong, where, and what to do about it.

    The command line prints it without a traceback and exits with code 2; the server answers with
    `status`. `field` names the configuration field that has to be changed, if there is one.
    """

    status = 400

    def __init__(self, message: str, *, status: int | None = None, field: str | None = None):
        super().__init__(message)
        self.status, self.field = status or self.status, field


#: Messages of MLX and its back ends when an allocation fails; they have no exception class for it.
NO_MEMORY = re.compile(r"out.?of.?memory|insufficient memory|alloc", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether the device or the machine ran out of memory."""
    said = isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None
    return said or isinstance(error, MemoryError)


def fault_of(error: BaseException) -> Fault:
    """Returns why this exception ended a run."""
    if isinstance(error, NoRoom | NoMemory) or is_out_of_memory(error):
        return "memory"
    if isinstance(error, InputError):
        return "input"
    return "run" if isinstance(error, RunError) else "bug"


class NoRoom(InputError):
    """The memory plan of a run needs more than the available memory."""


class RunError(Exception):
    """A run cannot continue. The message is one sentence: what happened, at which step, what is
    kept, and what to do.

    The command line prints it without a traceback and exits with code 1; the server answers with
    `status`.
    """

    status = 500


class NoMemory(RunError):
    """No plan leaves the device enough memory for the next step of a run."""


def reason(error: BaseException, most: int = 200) -> str:
    """Returns an error's message in one line; the name of its class if it has no message."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def named_reason(error: BaseException) -> str:
    """Returns the class and the message of an error that other code raised, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def either(words: Sequence[str]) -> str:
    """Joins alternatives for a sentence: "a, b or c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def shown(value: Any, most: int = 60) -> str:
    """Returns an untrusted value in a form that is safe in a message: on one line, cut to `most`
    characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits in decimal
        text = hex(value) if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}…"


def word(value: Any) -> str:
    """Like `shown`, for a value that should be a word."""
    short = isinstance(value, str) and value.isidentifier() and len(value) <= 60
    return value if short else shown(value)
