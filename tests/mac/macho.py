"""Reads the symbols that a Mach-O file needs, and the symbols that it defines."""

import struct
from collections.abc import Iterator
from pathlib import Path

MAGIC, SYMTAB = 0xFEEDFACF, 2
#: The bits in a symbol's type.
DEBUGGING, PRIVATE, TYPE, EXTERNAL = 0xE0, 0x10, 0x0E, 0x01
#: The bit in a symbol's description of a definition that other files may repeat.
WEAK = 0x80


def external(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yields the name, type and description of each symbol that a 64-bit object file or library
    shares with other files."""
    data = path.read_bytes()
    magic, *_, n_commands = struct.unpack_from("<5I", data)
    if magic != MAGIC:
        raise ValueError(f"{path} is not a 64-bit Mach-O file")
    at = 32
    for _ in range(n_commands):
        command, size = struct.unpack_from("<2I", data, at)
        if command == SYMTAB:
            entries, count, names, _ = struct.unpack_from("<4I", data, at + 8)
            for i in range(count):
                name, type_, _, about = struct.unpack_from("<IBBH", data, entries + 16 * i)
                if type_ & EXTERNAL and not type_ & DEBUGGING:
                    begin = names + name
                    yield data[begin : data.index(b"\0", begin)].decode(), type_, about
        at += size


def symbols(path: Path) -> tuple[set[str], set[str]]:
    """Returns the symbols that a 64-bit object file or library needs, and the ones it exports."""
    needed: set[str] = set()
    given: set[str] = set()
    for name, type_, _ in external(path):
        if not type_ & PRIVATE:
            (given if type_ & TYPE else needed).add(name)
    return needed, given


def definitions(path: Path) -> set[str]:
    """Returns the symbols that this object file defines and that no other file may define."""
    return {name for name, type_, about in external(path) if type_ & TYPE and not about & WEAK}
