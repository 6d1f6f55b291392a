"""Stores the properties of all samples in arrays, so that a run can read them without creating a
Row object for each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, overload

import numpy as np

from .encoding import Row, sequences


class Lazy(Sequence[Any]):
    """A sequence of n items; `make(index)` creates an item when it is accessed."""

    def __init__(self, n: int, make: Callable[[int], Any]):
        self._n, self._make = n, make

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: Any) -> Any:
        found = range(self._n)[index]  # raises IndexError
        return self._make(found) if isinstance(found, int) else [self._make(i) for i in found]


@dataclass(frozen=True)
class Columns:
    """Arrays with the properties of n samples of s sequences each; s is 2 for pairs and 1 for other
    samples.

    The following are int64 [n, s]: `length` is the number of tokens; `first` is the index of the
    first token in the loss, or the length if no token is in the loss; `trained` is the number of
    tokens in the loss; `top` is the largest token id, including truncated tokens. The following are
    int64 [n]: `shared` is Pair.shared, or 0; `sign` is −1 for rows with an undesirable response,
    whose weights are below 0, and 1 for other rows.
    """

    length: np.ndarray
    first: np.ndarray
    trained: np.ndarray
    top: np.ndarray
    shared: np.ndarray
    sign: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Any]) -> Columns:
        """Returns the arrays for Row or Pair objects in memory."""
        parts = [list(map(_numbers, sequences(row))) for row in rows]
        table = np.array(parts or np.zeros((0, 1, 4)), np.int64)
        shared = np.array([getattr(row, "shared", 0) for row in rows], np.int64)
        length, first, trained, top = np.moveaxis(table, 2, 0)
        signs = [-1 if sequences(row)[0].weights.min(initial=0) < 0 else 1 for row in rows]
        return cls(length, first, trained, top, shared, np.array(signs, np.int64))

    @property
    def run(self) -> np.ndarray:
        """The number of tokens that the model processes for each sample, int64 [n]."""
        return self.length.sum(1) - self.shared

    def take(self, chosen: np.ndarray) -> Columns:
        """Returns the columns of the samples that `chosen` selects, by index or by mask."""
        return replace(self, **{own.name: getattr(self, own.name)[chosen] for own in fields(self)})


def _numbers(row: Row) -> tuple[int, int, int, int]:
    """Returns the values of `length`, `first`, `trained` and `top` for a sequence."""
    trained = np.flatnonzero(row.weights)
    n = len(row)
    return n, int(trained[0]) if trained.size else n, trained.size, int(row.ids.max(initial=0))
