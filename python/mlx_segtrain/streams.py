"""Streams of tokens: their names, how they are cut, and how many tokens of each a batch has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import numpy as np

Count = TypeVar("Count", int, np.ndarray)

#: A chain that trims starts at a multiple of this: few distinct shapes, and whole tiles.
TRIM_MULTIPLE = 64
#: The width of a batch of several rows is a multiple of this, so that few kernels are compiled.
PAD_MULTIPLE = 32


@dataclass(frozen=True)
class Stream:
    """A sequence that runs through the layers; if there are others, boundary values have its name.

    With `branch`, its last rows are a second sequence that continues after the first `shared` rows,
    as if the rows between were absent. With `parts`, it is several packed sequences of that many
    rows each: each starts at position 0 and attends to none of the others.
    """

    name: str = ""
    shared: int = 0
    branch: int = 0
    parts: tuple[int, ...] = ()

    def of(self, value: str) -> str:
        """Returns the name of this stream's own boundary value."""
        return f"{value} of {self.name}" if self.name else value

    @property
    def segments(self) -> tuple[int, ...] | None:
        """Returns where its parts start, and where the last one ends, as the ops take them."""
        return tuple(accumulate(self.parts, initial=0)) if self.parts else None


#: A row, or several rows, without a second stream.
SINGLE = (Stream(),)
#: The two sequences of pairs.
PAIR = (Stream("chosen"), Stream("rejected"))


def joined(shared: int = 0, branch: int = 0) -> Stream:
    """Returns both sequences of pairs as one stream: the chosen one, and the part of the rejected
    one that differs."""
    return Stream("pair", shared, branch)


def head_reads(streams: tuple[Stream, ...]) -> tuple[str, ...]:
    """Returns the names of the boundary values that every head reads: h of each stream, and its
    rows in the loss."""
    return tuple(stream.of(value) for stream in streams for value in ("h", "rows"))


def padded(width: Count, batch_size: int) -> Count:
    """Returns the width of a batch whose longest row has `width` tokens; takes one, or an array of
    them."""
    return width if batch_size == 1 else -(-width // PAD_MULTIPLE) * PAD_MULTIPLE


def trim_start(first: Count) -> Count:
    """Returns the position at which a chain that trims starts, if `first` is the first one with a
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
        """Tokens of the longer sequence."""
        return max(self.length - self.branch, self.shared + self.branch)


@dataclass(frozen=True)
class BatchShape:
    """This many rows of each stream; in total `loss` tokens are in the loss."""

    rows: int
    streams: tuple[StreamShape, ...]
    loss: int
    accumulates: bool = False  #: onto the gradient of earlier batches
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
        """Tokens of the longest sequence."""
        return max(stream.longest for stream in self.streams)

    def stretched(self, length: int) -> BatchShape:
        """Returns the shape scaled in proportion, with this many tokens in the longest sequence."""

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
