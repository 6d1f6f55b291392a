"""Exceptions for bad input and for failures during a run. Each message is one sentence."""

import re
from collections.abc import Sequence
from typing import Any, Literal

#: Why a run failed: bad input, too little memory, an error during the run, a killed process, or a
#: bug in this package.
Fault = Literal["input", "memory", "run", "killed", "bug"]


class InputError(ValueError):
    """Raised for invalid input. The message is one sentence that says what is wrong, where, and how
    to fix it.

    The command line prints it without a traceback and exits with code 2; the server responds with
    `status`. `field` is the name of the configuration field that must be changed, if there is one.
    """

    status = 400

    def __init__(self, message: str, *, status: int | None = None, field: str | None = None):
        super().__init__(message)
        self.status, self.field = status or self.status, field


#: Matches the messages of failed allocations in MLX and its back ends, which define no exception
#: class for this case.
NO_MEMORY = re.compile(r"out.?of.?memory|insufficient memory|alloc", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether this error means that the device or the machine ran out of memory."""
    said = isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None
    return said or isinstance(error, MemoryError)


def fault_of(error: BaseException) -> Fault:
    """Returns the Fault of an exception that ended a run."""
    if isinstance(error, NoRoom | NoMemory) or is_out_of_memory(error):
        return "memory"
    if isinstance(error, InputError):
        return "input"
    return "run" if isinstance(error, RunError) else "bug"


class NoRoom(InputError):
    """Raised when the memory plan of a run needs more memory than is available."""


class RunError(Exception):
    """Raised when a run cannot continue. The message is one sentence that says what happened, at
    which step, what has been saved, and what to do.

    The command line prints it without a traceback and exits with code 1; the server responds with
    `status`.
    """

    status = 500


class NoMemory(RunError):
    """Raised when the device has too little memory for the next step of a run, even with the plan
    that needs the least memory."""


def reason(error: BaseException, most: int = 200) -> str:
    """Returns the message of an error on one line, cut to `most` characters, or the name of its
    class if it has no message."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def named_reason(error: BaseException) -> str:
    """Returns the class and the message of an error raised by other code, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def either(words: Sequence[str]) -> str:
    """Joins alternatives for use in a sentence, as "a, b or c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def shown(value: Any, most: int = 60) -> str:
    """Returns an untrusted value in a form that is safe in a message: on one line, and cut to
    `most` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to format an integer of more than 4300 digits
        text = hex(value) if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}…"


def word(value: Any) -> str:
    """Returns an untrusted value that should be a word, in a form that is safe in a message."""
    short = isinstance(value, str) and value.isidentifier() and len(value) <= 60
    return value if short else shown(value)
