"""Reads and checks the header of a safetensors file before anything else reads the file.

A file consists of a length (uint64, little-endian), a JSON header of this length, and the data. The
safetensors package checks dtypes, shapes and offsets. This module also rejects some files that the
package accepts: files with a needlessly large header or with invalid or repeated names, and files
that are still being downloaded.
"""

import json
import re
import struct
from pathlib import Path
from typing import Any

import safetensors

from .errors import InputError, reason
from .files import open_regular

#: The dtype, as safetensors writes it (U32, BF16, …), and the shape of each tensor, keyed by the
#: tensor's name.
Tensors = dict[str, tuple[str, tuple[int, ...]]]

#: The number of bytes per element for each dtype.
SIZES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "C64": 8},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
#: The floating-point dtypes.
FLOATS = ("F64", "F32", "F16", "BF16")
#: The maximum size of a header in bytes, the maximum number of tensors in it, and the maximum
#: number of dimensions of a tensor. The largest models have a few hundred tensors per file, or tens
#: of thousands if experts are stored separately.
MOST, TENSORS, DIMENSIONS = 32 << 20, 100_000, 8
#: Names must be printable and have no line breaks, because they become parts of messages and module
#: paths.
NAME = re.compile(r"[!-~]{1,256}")


def read_header(file: Path, *, whole: bool = True) -> Tensors:
    """Returns the names, dtypes and shapes of the tensors in a safetensors file without reading
    past its header.

    Raises InputError if the header is invalid. With `whole`, also raises it if the size of the data
    does not match the header.
    """
    try:
        with open_regular(file) as opened:
            total = opened.seek(0, 2)
            opened.seek(0)
            (size,) = struct.unpack("<Q", opened.read(8))
            if size > min(MOST, total - 8):
                raise ValueError("it ends within its header, or the header is too long")
            text = opened.read(size)
        # In the header, each tensor has an object and two lists. They are counted first, so that a
        # header with too many of them is rejected before parsing it uses much memory.
        if text.count(b"{") > TENSORS + 2 or text.count(b"[") > 2 * TENSORS:
            raise ValueError(f"its header names more than {TENSORS:,} tensors")
        if text.count(b",") > 12 * TENSORS or text.count(b'"') > 20 * TENSORS:
            raise ValueError("its header is too large for its number of tensors")
        if (refusal := _refusal(text)) not in ("", _NO_DATA):
            raise ValueError(refusal)
        entries = json.loads(text, object_pairs_hook=_once)
        entries.pop("__metadata__", None)
        tensors = {name: _checked(name, entry) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if whole and end != total - 8 - size:
            raise ValueError(
                f"its header describes {end} bytes of data, but the file has {total - 8 - size}"
            )
        return tensors
    except (OSError, ValueError, struct.error, RecursionError) as error:
        said = getattr(error, "strerror", None) or reason(error)
        raise InputError(f"{file} is not a readable safetensors file: {said}.") from None


def _refusal(text: bytes) -> str:
    """Returns the error message of the safetensors package for a header, or "" if it accepts the
    header."""
    try:
        safetensors.deserialize(struct.pack("<Q", len(text)) + text)
    except safetensors.SafetensorError as error:
        return repr(str(error).removeprefix("Error while deserializing: "))[1:-1]
    return ""


#: The error message of the package for a valid header that is not followed by data.
_NO_DATA = _refusal(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}')


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is repeated in its header")
    return found


def _checked(name: str, entry: Any) -> tuple[str, tuple[int, ...]]:
    """Returns the dtype and the shape of a tensor, given its entry in the header. Rejects unusual
    forms of entries that the safetensors package accepts."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name[:40]!r} is not a valid tensor name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its entry for {name} must have dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str):
        raise ValueError(f"{name} has the invalid dtype {str(entry['dtype'])[:20]}")
    if len(entry["shape"]) > DIMENSIONS:
        raise ValueError(f"{name} has too many dimensions")
    return entry["dtype"], tuple(entry["shape"])
