"""Streams of tokens: their names, how they are cut, and how many tokens a batch has of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import numpy as np

Count = TypeVar("Count", int, np.ndarray)

#: A chain that trims begins at a multiple of it: few distinct shapes, and whole tiles.
TRIM_MULTIPLE = 64
#: Widths of batches of several rows are multiples of it, so that few kernels are compiled.
PAD_MULTIPLE = 32


@dataclass(frozen=True)
class Stream:
    """A sequence that runs through the layers; if there are others, boundary values have its name.

    With `branch`, its last rows are a second sequence, which continues after the first `shared`
    rows as if those between were not there. With `parts`, it is several sequences of so many rows
    each, packed one after the other: each begins at position 0, and sees none of the others.
    """

    name: str = ""
    shared: int = 0
    branch: int = 0
    parts: tuple[int, ...] = ()

    def of(self, value: str) -> str:
        """The name of this stream's own boundary value."""
        return f"{value} of {self.name}" if self.name else value

    @property
    def segments(self) -> tuple[int, ...] | None:
        """Where its parts begin, and where the last one ends, as the ops take them."""
        return tuple(accumulate(self.parts, initial=0)) if self.parts else None


#: A row, or rows, alone.
SINGLE = (Stream(),)
#: The two sequences of pairs.
PAIR = (Stream("chosen"), Stream("rejected"))


def joined(shared: int = 0, branch: int = 0) -> Stream:
    """Both sequences of pairs in one: the chosen one, and what differs of the other."""
    return Stream("pair", shared, branch)


def head_reads(streams: tuple[Stream, ...]) -> tuple[str, ...]:
    """Boundary values that every head reads: of each stream h and the rows of it that count."""
    return tuple(stream.of(value) for stream in streams for value in ("h", "rows"))


def padded(width: Count, batch_size: int) -> Count:
    """The width of a batch whose longest row has `width` tokens: one, or an array of them."""
    return width if batch_size == 1 else -(-width // PAD_MULTIPLE) * PAD_MULTIPLE


def trim_start(first: Count) -> Count:
    """The position from which a chain that trims runs, if the first one with a loss is `first`."""
    return first // TRIM_MULTIPLE * TRIM_MULTIPLE


@dataclass(frozen=True)
class StreamShape:
    """Streams of `length` tokens, of which the last `trimmed` may be in the loss.

    The last `branch` continue after the first `shared`. Of packed ones `part` is the length of the
    sequence that a token is in, on average; else 0.
    """

    stream: Stream
    length: int
    trimmed: int
    shared: int = 0
    branch: int = 0
    part: float = 0

    @property
    def longest(self) -> int:
        """Tokens of the longer sequence."""
        return max(self.length - self.branch, self.shared + self.branch)


@dataclass(frozen=True)
class BatchShape:
    """So many rows of each stream; `loss` tokens count, in all."""

    rows: int
    streams: tuple[StreamShape, ...]
    loss: int
    accumulates: bool = False  #: onto the gradient of batches before
    dropout: bool = False
    dora: bool = False

    @classmethod
    def single(cls, rows: int, length: int, trimmed: int, loss: int, **more: bool) -> BatchShape:
        """Rows of one sequence each."""
        return cls(rows, (StreamShape(Stream(), length, trimmed),), loss, **more)

    @classmethod
    def packed(cls, rows: int, length: int, part: float, loss: int) -> BatchShape:
        """Rows of up to `length` tokens, of sequences of `part` tokens."""
        return cls(rows, (StreamShape(Stream(), length, length, part=min(part, length)),), loss)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(stream.longest for stream in self.streams)

    def stretched(self, length: int) -> BatchShape:
        """The same in proportion, with so many tokens in the longest sequence."""

        def longer(n: int) -> int:
            return -(-length * n // self.length)

        streams = tuple(
            replace(
                x,
                length=longer(x.length),
                trimmed=longer(x.trimmed),
                shared=longer(x.shared),
                branch=longer(x.branch),
            )
            for x in self.streams
        )
        return replace(self, streams=streams, loss=longer(self.loss))
