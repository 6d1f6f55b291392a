"""Wraps text, and formats commands so that they can be pasted into a shell."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from typing import Any


def wrapped(text: str, width: int, indent: int = 0) -> str:
    """Wraps a text between words, and indents all lines except the first."""
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, max(width, indent + 20), subsequent_indent=" " * indent, **how)


def hanging(name: str, text: str, column: int, width: int) -> str:
    """Returns a name and its text in two columns. The text starts at `column` and is wrapped."""
    lines = wrapped(text, width - column).splitlines() or [""]
    return "\n".join(
        f"{name if i == 0 else '':<{column}}{line}" for i, line in enumerate(lines)
    ).rstrip()


def command_line(argv: Sequence[str], width: int) -> str:
    """Returns a command for a shell. A command longer than `width` is split into several lines."""
    words = [shlex.quote(word) if word != "…" else word for word in argv]
    text = " ".join(words)
    if len(text) <= width:
        return text
    lines, line = [], words[0]
    for i, word in enumerate(words[1:], 1):
        # A flag and its value stay on one line.
        held = [word, *words[i + 1 : i + 2]] if word.startswith("-") else [word]
        if len(" ".join([line, *held])) > width - 2 and word.startswith("-"):
            lines.append(line)
            line = f"    {word}"
        else:
            line += f" {word}"
    return " \\\n".join([*lines, line])


def duration(seconds: float) -> str:
    """Formats a duration in seconds as 7s, 3m20s or 2h05m."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total // 60 % 60:02d}m"
