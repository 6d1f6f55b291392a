"""Headers of safetensors files, checked before anything else reads the file.

The format: a length (uint64, little-endian), so many bytes of JSON, then the data. What the header
says must fit the file: a file of a stranger is not read on the word of its header.
"""

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

from .errors import InputError
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
    """Names, dtypes and shapes of a safetensors file; what is behind the header is not read.

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
            header = json.loads(text, object_pairs_hook=_once)
        return _checked(header, total - 8 - size if whole else None)
    except (OSError, ValueError, struct.error, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(f"{file} is not a readable safetensors file: {reason}.") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


def _checked(header: Any, data: int | None) -> Tensors:
    """The tensors of a header with so many bytes of data behind it; ValueError if it is none."""
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    tensors: Tensors = {}
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            texts = entry.values() if isinstance(entry, dict) else (entry,)
            if entry is not None and not all(isinstance(text, str) for text in texts):
                raise ValueError("its metadata are no texts")
            continue
        if not NAME.fullmatch(name):
            raise ValueError(f"{name[:40]!r} is no name of a tensor")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"its entry of {name} is not dtype, shape and data_offsets")
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in SIZES:
            raise ValueError(f"{name} has the dtype {str(dtype)[:20]}")
        if not (_counts(shape) and len(shape) <= DIMENSIONS):
            raise ValueError(f"{name} has no shape")
        if not (_counts(span) and len(span) == 2):
            raise ValueError(f"{name} has no place")
        if math.prod(shape) * SIZES[dtype] != span[1] - span[0]:
            raise ValueError(f"{name} has another size than its shape")
        tensors[name] = dtype, tuple(shape)
        spans.append(span)
    end = 0
    for begin, after in sorted(spans):
        if begin != end:
            raise ValueError("its tensors overlap, or leave gaps")
        end = after
    if data not in (end, None):
        raise ValueError(f"its tensors take {end} bytes, and {data} are there")
    return tensors


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in values
    )
