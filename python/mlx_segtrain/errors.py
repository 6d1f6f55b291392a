"""What ends a run in one sentence: input that the user can mend, and what happens on the way."""

import re
from collections.abc import Sequence
from typing import Any, Literal

#: Why something ended, as far as that decides what helps: input that has to be changed, a lack of
#: memory, what happened on the way, a process that was killed, a bug of ours.
Fault = Literal["input", "memory", "run", "killed", "bug"]


class InputError(ValueError):
    """Bad input. The message is one sentence: what is wrong, where, and what to do about it.

    The command line prints it without a traceback and exits with code 2; the server answers it with
    `status`. `field` is the field that has to be changed, where that is one.
    """

    status = 400

    def __init__(self, message: str, *, status: int | None = None, field: str | None = None):
        super().__init__(message)
        self.status, self.field = status or self.status, field


#: What MLX and its back ends say when an allocation fails: they have no class for it.
NO_MEMORY = re.compile(r"out.?of.?memory|insufficient memory|alloc", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left."""
    said = isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None
    return said or isinstance(error, MemoryError)


def fault_of(error: BaseException) -> Fault:
    """Why this exception ended a run."""
    if isinstance(error, NoRoom | NoMemory) or is_out_of_memory(error):
        return "memory"
    if isinstance(error, InputError):
        return "input"
    return "run" if isinstance(error, RunError) else "bug"


class NoRoom(InputError):
    """A run whose plan takes more memory than there is."""


class RunError(Exception):
    """A run that cannot go on. The message is one sentence: what happened, at which step, what is
    kept, and what to do.

    The command line prints it without a traceback and exits with code 1; the server answers it with
    `status`.
    """

    status = 500


class NoMemory(RunError):
    """A run for whose next step the device has no memory left, by any plan."""


def either(words: Sequence[str]) -> str:
    """Words in a sentence, one of which is to be chosen."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def shown(value: Any, most: int = 60) -> str:
    """A stranger's value as it may stand in a sentence: in one line, and of `most` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits in decimal
        text = hex(value) if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}…"


def word(value: Any) -> str:
    """The same, of one that should be a word."""
    short = isinstance(value, str) and value.isidentifier() and len(value) <= 60
    return value if short else shown(value)
