"""Built-in checks of completions. Each check returns scores from 0 to 1 and runs no untrusted
code."""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import re2

from ..errors import InputError, reason, shown

MINUS = "\u2212"  #: the minus sign of typeset text
SIGN = f"[-+{MINUS}]?"
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
#: Matches a number in a text. The number may have thousands separators, or begin with a point.
NUMBER = re.compile(rf"{SIGN}(?:{DIGITS}|(?<!\w)\.\d+)(?:[eE]{SIGN}\d+)?")
#: Numbers count as equal if their relative difference is at most this.
ACCURACY = 1e-6

Check = Callable[..., list[float]]


def _fault(text: str) -> InputError:
    return InputError(f"rewards: {text}", field="rewards")


def check_of(spec: str) -> Check:
    """Returns the check that `spec` specifies as `name:argument`. Raises InputError if the name is
    unknown or the argument is wrong."""
    name, _, argument = spec.partition(":")
    if name not in CHECKS:
        raise _fault(
            f"{shown(spec, 80)} is not a check; use one of {', '.join(CHECKS)} (docs/grpo.md), or "
            "set reward_functions to your own functions."
        )
    if not argument:
        raise _fault(f"{name} needs an argument, as in {EXAMPLES[name]}.")
    return CHECKS[name](argument)


def column_of(spec: str) -> str | None:
    """Returns the name of the column that a check reads, or None if it reads none."""
    name, _, argument = spec.partition(":")
    return argument if CHECKS.get(name) in (_exact, _number) else None


def _compared(column: str, agree: Callable[[str, str], bool]) -> Check:
    """Returns a check that passes if `agree` is true for the completion and the value of the
    column."""

    def check(completions: Sequence[str], **columns: Any) -> list[float]:
        if column not in columns or None in columns[column]:
            raise KeyError(f'rows have no column "{column}"')
        pairs = zip(completions, map(str, columns[column]), strict=True)
        return [float(agree(*pair)) for pair in pairs]

    return check


def _exact(column: str) -> Check:
    """Returns a check that passes if the whole completion equals the value of the column."""
    return _compared(column, lambda text, wanted: text.strip() == wanted.strip())


def _number(column: str) -> Check:
    """Returns a check that passes if the last number in the completion equals the last number in
    the value of the column."""

    def equal(text: str, wanted: str) -> bool:
        x, y = last_number(text), last_number(wanted)
        return x is not None and y is not None and math.isclose(x, y, rel_tol=ACCURACY)

    return _compared(column, equal)


def last_number(text: str) -> float | None:
    """Returns the last number in a text, or None if there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace(MINUS, "-")) if found else None


def _regex(pattern: str) -> Check:
    """Returns a check that passes if the pattern matches somewhere in the completion. Matching
    takes linear time."""
    try:
        compiled = re2.compile(pattern)
    except re2.error as error:
        raise _fault(f"{shown(pattern, 80)} is not a valid RE2 pattern ({error}).") from None

    def check(completions: Sequence[str], **columns: Any) -> list[float]:
        return [float(compiled.search(text) is not None) for text in completions]

    return check


def _json_schema(text: str) -> Check:
    """Returns a check that passes if the whole completion is JSON that matches the schema."""
    try:
        from jsonschema_rs import validator_for  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise _fault(
            "json_schema needs a package that is not installed: run pip install "
            '"mlx-segtrain[rewards]".'
        ) from None
    try:
        # References to other documents are not followed: schemas may come from clients, who could
        # otherwise make the server open documents of their choice.
        validator = validator_for(json.loads(text), offline=True)
    except Exception as error:  # the package raises errors of several kinds
        raise _fault(f"{shown(text, 80)} is not a valid JSON schema ({reason(error)}).") from None

    def check(completions: Sequence[str], **columns: Any) -> list[float]:
        return [float(_takes(validator, text)) for text in completions]

    return check


def _takes(validator: Any, text: str) -> bool:
    try:
        return bool(validator.is_valid(json.loads(text)))
    except (ValueError, RecursionError):
        return False


def _length(most: str) -> Check:
    """Returns a check of a completion's length. The score is 1 up to `most` tokens, and falls
    linearly to 0 at twice as many."""
    if not most.isdecimal() or int(most) < 1:
        raise _fault(f"length needs a number of tokens, as in length:100; got {shown(most, 40)}.")

    def check(completion_tokens: Sequence[int], **columns: Any) -> list[float]:
        return [min(1.0, max(0.0, 2 - n / int(most))) for n in completion_tokens]

    return check


CHECKS: dict[str, Callable[[str], Check]] = {
    "exact": _exact,
    "number": _number,
    "regex": _regex,
    "json_schema": _json_schema,
    "length": _length,
}
EXAMPLES = {
    "exact": "exact:answer",
    "number": "number:answer",
    "regex": "regex:^yes",
    "json_schema": 'json_schema:{"type": "object"}',
    "length": "length:100",
}
