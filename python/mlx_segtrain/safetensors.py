"""Headers of safetensors files, checked before anything else reads the file.

The format: a length (uint64, little-endian), so many bytes of JSON, then the data. The safetensors
package checks dtypes, shapes and places. Here is what it lets pass: a header that is large without
need, names that are none or stand twice, data that are still being fetched.
"""

import json
import re
import struct
from pathlib import Path
from typing import Any

import safetensors

from .errors import InputError, reason
from .files import open_regular

#: By path of the tensor: dtype as safetensors writes it (U32, BF16, …), and shape.
Tensors = dict[str, tuple[str, tuple[int, ...]]]

#: Bytes of a number, by dtype.
SIZES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "C64": 8},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
#: Dtypes of what is computed with.
FLOATS = ("F64", "F32", "F16", "BF16")
#: Bytes of a header, tensors that it names, and dimensions of each, at most. The largest models
#: have some hundred in a file, their experts apart ten thousands.
MOST, TENSORS, DIMENSIONS = 32 << 20, 100_000, 8
#: Names go into sentences and, at last, into paths of modules: printable, and no line of text.
NAME = re.compile(r"[!-~]{1,256}")


def read_header(file: Path, *, whole: bool = True) -> Tensors:
    """Names, dtypes and shapes of a safetensors file; what comes after the header is not read.

    InputError if it is none, or, if the file is to be `whole`, header and data do not fit.
    """
    try:
        with open_regular(file) as opened:
            total = opened.seek(0, 2)
            opened.seek(0)
            (size,) = struct.unpack("<Q", opened.read(8))
            if size > min(MOST, total - 8):
                raise ValueError("it ends within its header, or the header is too long")
            text = opened.read(size)
        # Each tensor has an object and two lists: counted before there are as many in memory.
        if text.count(b"{") > TENSORS + 2 or text.count(b"[") > 2 * TENSORS:
            raise ValueError(f"its header names more than {TENSORS:,} tensors")
        if text.count(b",") > 12 * TENSORS or text.count(b'"') > 20 * TENSORS:
            raise ValueError("its header holds more than tensors need")
        if (refusal := _refusal(text)) not in ("", _NO_DATA):
            raise ValueError(refusal)
        entries = json.loads(text, object_pairs_hook=_once)
        entries.pop("__metadata__", None)
        tensors = {name: _checked(name, entry) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if whole and end != total - 8 - size:
            raise ValueError(f"its tensors take {end} bytes, and {total - 8 - size} are there")
        return tensors
    except (OSError, ValueError, struct.error, RecursionError) as error:
        said = getattr(error, "strerror", None) or reason(error)
        raise InputError(f"{file} is not a readable safetensors file: {said}.") from None


def _refusal(text: bytes) -> str:
    """What the safetensors package says of a header; nothing if no data are to follow it."""
    try:
        safetensors.deserialize(struct.pack("<Q", len(text)) + text)
    except safetensors.SafetensorError as error:
        return repr(str(error).removeprefix("Error while deserializing: "))[1:-1]
    return ""


#: What it says of a header that is right, because no data follow it here.
_NO_DATA = _refusal(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}')


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


def _checked(name: str, entry: Any) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a tensor. The package takes an entry in other forms of JSON, too."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name[:40]!r} is no name of a tensor")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its entry of {name} is not dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str):
        raise ValueError(f"{name} has the dtype {str(entry['dtype'])[:20]}")
    if len(entry["shape"]) > DIMENSIONS:
        raise ValueError(f"{name} has no shape")
    return entry["dtype"], tuple(entry["shape"])
