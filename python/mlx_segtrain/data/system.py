"""Finds the system message that all rows of a data set share."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

from .encoding import Options
from .formats import checked
from .sources import Source, rows_of

#: The number of rows to check.
LOOKED_AT = 64


def system_message(source: Source, options: Options) -> str | None:
    """Returns the system message that the first LOOKED_AT rows share, or None if their system
    messages differ or are missing. Raises InputError if the rows cannot be read."""
    found: set[str | None] = set()
    for name, row in islice(rows_of(source), LOOKED_AT):
        record = checked(dict(row), name, options.format, options.columns)
        found.add(_system_of(record.row))
        if len(found) > 1:
            return None
    return found.pop() if found else None


def _system_of(row: Mapping[str, Any]) -> str | None:
    if isinstance(own := row.get("system"), str) and own:
        return own
    for turns in (row.get("messages"), row.get("prompt")):
        if isinstance(turns, list) and turns and turns[0].get("role") == "system":
            content = turns[0].get("content")
            return content if isinstance(content, str) else None
    return None
