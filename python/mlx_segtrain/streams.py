"""Streams of tokens, and the shapes of batches of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import numpy as np

Count = TypeVar("Count", int, np.ndarray)

#: A chain that trims starts at a multiple of this, so that there are few distinct shapes, and tiles
#: are full.
TRIM_MULTIPLE = 64
#: The width of a batch of several rows is a multiple of this, so that few kernels are compiled.
PAD_MULTIPLE = 32


@dataclass(frozen=True)
class Stream:
    """A sequence that runs through the layers; `name` is part of the names of its boundary values.

    With `branch`, this many rows at the end are a second sequence, which continues after the first
    `shared` rows as if the rows between were absent. With `parts`, it consists of packed sequences;
    `parts` has the number of rows of each. A sequence starts at position 0 and attends only to
    itself.
    """

    name: str = ""
    shared: int = 0
    branch: int = 0
    parts: tuple[int, ...] = ()

    def of(self, value: str) -> str:
        """Returns the name of this boundary value for this stream."""
        return f"{value} of {self.name}" if self.name else value

    @property
    def segments(self) -> tuple[int, ...] | None:
        """The starts of the parts and the end of the last one, as the ops take them."""
        return tuple(accumulate(self.parts, initial=0)) if self.parts else None


#: The stream of rows that are single sequences.
SINGLE = (Stream(),)
#: The two sequences of pairs.
PAIR = (Stream("chosen"), Stream("rejected"))


def joined(shared: int = 0, branch: int = 0) -> Stream:
    """Returns the stream of pairs whose sequences run together: the chosen one, and the rest of the
    rejected one as a branch."""
    return Stream("pair", shared, branch)


def head_reads(streams: tuple[Stream, ...]) -> tuple[str, ...]:
    """Returns the names of the boundary values that every head reads: h of each stream, and its
    rows in the loss."""
    return tuple(stream.of(value) for stream in streams for value in ("h", "rows"))


def padded(width: Count, batch_size: int) -> Count:
    """Returns the width of a batch whose longest row has `width` tokens, a number or an array."""
    return width if batch_size == 1 else -(-width // PAD_MULTIPLE) * PAD_MULTIPLE


def trim_start(first: Count) -> Count:
    """Returns the first position that a chain which trims keeps, if `first` is the first one with a
    loss."""
    return first // TRIM_MULTIPLE * TRIM_MULTIPLE


@dataclass(frozen=True)
class StreamShape:
    """Streams of `length` tokens, of which the last `trimmed` may be in the loss.

    The last `branch` tokens continue after the first `shared`. For packed streams `part` is the
    mean length, over tokens, of the sequence that a token is in; else 0.
    """

    stream: Stream
    length: int
    trimmed: int
    shared: int = 0
    branch: int = 0
    part: float = 0

    @property
    def longest(self) -> int:
        """The number of tokens of the longer sequence."""
        return max(self.length - self.branch, self.shared + self.branch)


@dataclass(frozen=True)
class BatchShape:
    """The shape of a batch: rows of each stream, and the total of tokens in the loss."""

    rows: int
    streams: tuple[StreamShape, ...]
    loss: int
    accumulates: bool = False  #: its gradient is added to that of earlier batches
    dropout: bool = False
    dora: bool = False

    @classmethod
    def single(cls, rows: int, length: int, trimmed: int, loss: int, **more: bool) -> BatchShape:
        """Returns the shape of rows with one sequence each."""
        return cls(rows, (StreamShape(Stream(), length, trimmed),), loss, **more)

    @classmethod
    def packed(cls, rows: int, length: int, part: float, loss: int) -> BatchShape:
        """Returns the shape of rows of up to `length` tokens, packed from sequences of `part`
        tokens."""
        return cls(rows, (StreamShape(Stream(), length, length, part=min(part, length)),), loss)

    @property
    def length(self) -> int:
        """The number of tokens of the longest sequence."""
        return max(stream.longest for stream in self.streams)

    def stretched(self, length: int) -> BatchShape:
        """Returns the shape scaled so that the longest sequence has this many tokens."""

        def longer(own: StreamShape | BatchShape, *names: str) -> dict[str, int]:
            return {name: -(-length * getattr(own, name) // self.length) for name in names}

        sizes = ("length", "trimmed", "shared", "branch")
        streams = tuple(replace(own, **longer(own, *sizes)) for own in self.streams)
        return replace(self, streams=streams, **longer(self, "loss"))
