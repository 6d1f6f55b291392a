"""Decides which samples share a packed row, using a vectorized best-fit-decreasing algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

#: A row is divided into at least this many units, or into single tokens if it has fewer tokens.
#: Lengths are rounded up to whole units, so that many samples have the same size and can be
#: swapped.
UNITS = 1024


@dataclass(frozen=True)
class Packing:
    """The placement of n samples in packed rows. No sample is split.

    The places are the same in every epoch, so all epochs have the same number of rows. In each
    epoch, samples of the same size are distributed differently over the places of that size.

    `sizes`, int16 [n], contains the size of each sample in units. Places are numbered by size, the
    largest first. `places`, int64 [n], lists the numbers of the places row by row; row i consists
    of `places[ends[i]:ends[i + 1]]`.
    """

    sizes: np.ndarray
    places: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray, capacity: int) -> Packing:
        """Packs samples of these lengths, [n] in tokens, into rows of `capacity` tokens."""
        unit = max(1, capacity // UNITS)
        room = capacity // unit
        sizes = np.minimum(-(-lengths // unit), room).astype(np.int16)
        row_of = _best_fit(np.bincount(sizes, minlength=room + 1), room)
        counts = np.bincount(row_of)
        ends = np.concatenate([[0], np.cumsum(counts)])
        return cls(sizes, np.argsort(row_of, kind="stable"), ends)

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.ends) - 1

    def epoch(self, seed: int, epoch: int) -> Iterator[np.ndarray]:
        """Yields the sample indices of each packed row. The result depends only on the seed and the
        epoch."""
        random = np.random.default_rng([seed, 1, epoch])
        samples = random.permutation(len(self.sizes))
        samples = samples[np.argsort(-self.sizes[samples], kind="stable")][self.places]
        return (samples[self.ends[i] : self.ends[i + 1]] for i in random.permutation(len(self)))


def _best_fit(counts: np.ndarray, room: int) -> np.ndarray:
    """Returns the index of the row in which each item is placed. The items are in descending order
    of size. `counts[s]` items have size s.

    Each item is placed in the row that will then have the least room left. All items of one size
    are placed before any smaller item.
    """
    open_rows: dict[int, list[np.ndarray]] = {}  # rows by their remaining room
    found: list[np.ndarray] = [np.zeros(0, np.int64)]
    n_rows = 0

    def put(rows: np.ndarray, left: int) -> None:
        if rows.size and left:
            open_rows.setdefault(left, []).append(rows)

    for size in range(room, 0, -1):
        count = int(counts[size])
        for left in range(size, room + 1):
            each = left // size
            if not count or (left not in open_rows and left < room):
                continue
            rows = np.concatenate(open_rows.pop(left, [np.zeros(0, np.int64)]))
            wanted = -(-count // each)
            if left == room and wanted > rows.size:
                more = wanted - rows.size
                rows = np.concatenate([rows, np.arange(n_rows, n_rows + more)])
                n_rows += more
            used = rows[:wanted]
            last = min(each, count - each * (used.size - 1))
            taken = np.full(used.size, each)
            taken[-1] = last
            found.append(np.repeat(used, taken))
            count -= int(taken.sum())
            put(rows[wanted:], left)
            put(used[:-1], left - each * size)
            put(used[-1:], left - last * size)
    return np.concatenate(found)
