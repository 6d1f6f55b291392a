"""Reading the rows of JSONL files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import open_regular
from .formats import Record, checked
from .messages import KINDS

MOST_BYTES = 16 << 20  # of a row: four million tokens; parsed, it takes up to sixty times as much


def read_records(path: Path) -> Iterator[Record]:
    """Yields the rows of a JSONL file in order, checked; raises InputError with file and line."""
    try:
        # Bytes, split at \n alone: decoding the file as one text would lose the line of an error.
        with open_regular(path) as file:
            # Not `for line in file`, which reads a line whatever its length.
            for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES + 1), b""), 1):
                source = f"{path.name}:{number}"
                if len(line) > MOST_BYTES:
                    raise InputError(
                        f"{source}: the row has more than {MOST_BYTES >> 20} MiB; "
                        "split it into several."
                    )
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield checked(_parse(line, source), source)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _parse(line: bytes, source: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
        # JSON may spell half of a surrogate pair, which no tokenizer takes.
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8."
        ) from error
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: the row holds a lone surrogate (\\ud800 to \\udfff), not a character; "
            "remove it."
        ) from error
    except RecursionError as error:
        raise InputError(f"{source}: the row is nested too deeply; flatten it.") from error
    except ValueError as error:
        raise InputError(
            f"{source}: the line is not JSON ({error}); each line must hold one object."
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"{source}: the row must be a JSON object, not {KINDS[type(row)]}.")
    return row
