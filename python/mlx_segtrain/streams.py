"""Streams of tokens, and the shapes of batches, which consist of streams."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import numpy as np

Count = TypeVar("Count", int, np.ndarray)

#: Trimmed sequences start at a multiple of this number, which limits the number of distinct shapes
#: and keeps tiles full.
TRIM_MULTIPLE = 64
#: The width of a batch with several rows is a multiple of this number, which limits how many
#: kernels are compiled.
PAD_MULTIPLE = 32


@dataclass(frozen=True)
class Stream:
    """A kind of sequence that runs through the layers. `name` is part of the names of its boundary
    values.

    If `branch` is not 0, the last `branch` tokens belong to a second sequence, which continues
    after the first `shared` tokens as if the tokens in between were absent. If there are `parts`,
    the stream consists of packed sequences, and `parts` contains the number of tokens of each. Each
    packed sequence starts at position 0 and attends only to itself.
    """

    name: str = ""
    shared: int = 0
    branch: int = 0
    parts: tuple[int, ...] = ()

    def of(self, value: str) -> str:
        """Returns the name of a boundary value in this stream."""
        return f"{value} of {self.name}" if self.name else value

    @property
    def segments(self) -> tuple[int, ...] | None:
        """The starts of the parts and the end of the last part, in the form that the ops expect.
        None if there are no parts."""
        return tuple(accumulate(self.parts, initial=0)) if self.parts else None


#: The stream of a batch whose rows are single sequences.
SINGLE = (Stream(),)
#: The streams for the two sequences of pairs.
PAIR = (Stream("chosen"), Stream("rejected"))


def joined(shared: int = 0, branch: int = 0) -> Stream:
    """Returns the stream for pairs whose two sequences run together: the chosen sequence, followed
    by the rest of the rejected sequence as a branch."""
    return Stream("pair", shared, branch)


def head_reads(streams: tuple[Stream, ...]) -> tuple[str, ...]:
    """Returns the names of the boundary values that every head reads: for each stream, `h` and
    `rows`, the rows in the loss."""
    return tuple(stream.of(value) for stream in streams for value in ("h", "rows"))


def padded(width: Count, batch_size: int) -> Count:
    """Returns the width, including padding, of a batch whose longest row has `width` tokens.
    `width` may be a number or an array."""
    return width if batch_size == 1 else -(-width // PAD_MULTIPLE) * PAD_MULTIPLE


def trim_start(first: Count) -> Count:
    """Returns the first position that trimming keeps, if `first` is the first position with a
    loss."""
    return first // TRIM_MULTIPLE * TRIM_MULTIPLE


@dataclass(frozen=True)
class StreamShape:
    """The shape of a stream. Its sequences have `length` tokens, of which the last `trimmed` remain
    after trimming.

    The last `branch` tokens continue after the first `shared` tokens. In packed streams, `part` is
    the length of the sequence to which a token belongs, averaged over all tokens; in other streams
    it is 0.
    """

    stream: Stream
    length: int
    trimmed: int
    shared: int = 0
    branch: int = 0
    part: float = 0

    @property
    def longest(self) -> int:
        """The number of tokens in the longer sequence of the stream."""
        return max(self.length - self.branch, self.shared + self.branch)


@dataclass(frozen=True)
class BatchShape:
    """The shape of a batch: the number of rows, the shape of each stream, and the total number of
    tokens in the loss."""

    rows: int
    streams: tuple[StreamShape, ...]
    loss: int
    accumulates: bool = False  #: whether gradients are summed over several batches
    dropout: bool = False
    dora: bool = False

    @classmethod
    def single(cls, rows: int, length: int, trimmed: int, loss: int, **more: bool) -> BatchShape:
        """Returns the shape of a batch whose rows have one sequence each."""
        return cls(rows, (StreamShape(Stream(), length, trimmed),), loss, **more)

    @classmethod
    def packed(cls, rows: int, length: int, part: float, loss: int) -> BatchShape:
        """Returns the shape of a batch whose rows have up to `length` tokens and are packed with
        sequences of `part` tokens."""
        return cls(rows, (StreamShape(Stream(), length, length, part=min(part, length)),), loss)

    @property
    def length(self) -> int:
        """The number of tokens in the longest sequence."""
        return max(stream.longest for stream in self.streams)

    def stretched(self, length: int) -> BatchShape:
        """Returns this shape, scaled so that the longest sequence has `length` tokens."""

        def longer(own: StreamShape | BatchShape, *names: str) -> dict[str, int]:
            return {name: -(-length * getattr(own, name) // self.length) for name in names}

        sizes = ("length", "trimmed", "shared", "branch")
        streams = tuple(replace(own, **longer(own, *sizes)) for own in self.streams)
        return replace(self, streams=streams, **longer(self, "loss"))
