"""Reads the symbols that a Mach-O file needs, and the symbols that it defines."""

import struct
from pathlib import Path

MAGIC, SYMTAB = 0xFEEDFACF, 2
#: The bits in a symbol's type.
DEBUGGING, PRIVATE, TYPE, EXTERNAL = 0xE0, 0x10, 0x0E, 0x01


def symbols(path: Path) -> tuple[set[str], set[str]]:
    """Returns the symbols that a 64-bit object file or library needs, and the ones it defines."""
    data = path.read_bytes()
    magic, *_, n_commands = struct.unpack_from("<5I", data)
    if magic != MAGIC:
        raise ValueError(f"{path} is not a 64-bit Mach-O file")
    needed: set[str] = set()
    given: set[str] = set()
    at = 32
    for _ in range(n_commands):
        command, size = struct.unpack_from("<2I", data, at)
        if command == SYMTAB:
            entries, count, names, _ = struct.unpack_from("<4I", data, at + 8)
            for i in range(count):
                name, type_ = struct.unpack_from("<IB", data, entries + 16 * i)
                if type_ & (DEBUGGING | PRIVATE) or not type_ & EXTERNAL:
                    continue
                begin = names + name
                text = data[begin : data.index(b"\0", begin)].decode()
                (given if type_ & TYPE else needed).add(text)
        at += size
    return needed, given
