"""The order in which rows are seen, and their padding."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice

import numpy as np

from ..errors import InputError
from ..streams import padded
from .dataset import Dataset
from .encoding import Pair, Row


@dataclass(frozen=True)
class Batch:
    """`tokens` int32 [B, T]; `weights` float32 [B, T], 0 on padding.

    `rows` are indices into the data, `lengths` tokens that are no padding, both int64 [B];
    `reference` float32 [B], or None where the rows have none.
    """

    tokens: np.ndarray
    weights: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    reference: np.ndarray | None = None


@dataclass(frozen=True)
class PairBatch:
    """Both sequences of each pair, whole; the first `shared` tokens of all pairs are the same.

    `reference` float32 [2B], chosen ones first, or None.
    """

    chosen: Batch
    rejected: Batch
    shared: int
    rows: np.ndarray
    reference: np.ndarray | None = None


AnyBatch = Batch | PairBatch


def batches(dataset: Dataset, batch_size: int, seed: int, start: int = 0) -> Iterator[AnyBatch]:
    """Endless training batches from batch number `start` on, the same for the same seed.

    Every epoch has a new order. Rows of similar length share a batch. Rows that do not fill a last
    batch sit out one epoch, others the next. Raises InputError for fewer rows than `batch_size`.
    """
    n = len(dataset)
    if n < batch_size:
        raise InputError(
            f"The training data has {n} rows with something to train, fewer than batch_size "
            f"{batch_size}; lower batch_size or add rows."
        )
    first, skip = divmod(start, n // batch_size)
    epochs = (_epoch(dataset, batch_size, seed, epoch) for epoch in count(first))
    windows = islice(chain.from_iterable(epochs), skip, None)
    return (_batch(dataset, rows, batch_size) for rows in windows)


def _epoch(dataset: Dataset, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Row indices [batches, batch_size] of one epoch, a function of seed and epoch alone."""
    n = len(dataset)
    # Who sits out goes round a fixed circle: nobody twice in a row, everybody equally often.
    circle = np.random.default_rng([seed, 0]).permutation(n)
    out = circle[(epoch * (n % batch_size) + np.arange(n % batch_size)) % n]
    rows = np.setdiff1d(np.arange(n), out)
    order = np.argsort(dataset.columns.run[rows], kind="stable")
    windows = rows[order].reshape(-1, batch_size)
    return np.random.default_rng([seed, 1, epoch]).permutation(windows)


def eval_batches(dataset: Dataset, batch_size: int) -> Iterator[AnyBatch]:
    """Every row once, in the order of the file; the last batch may have fewer rows."""
    for start in range(0, len(dataset), batch_size):
        rows = np.arange(start, min(start + batch_size, len(dataset)))
        yield _batch(dataset, rows, batch_size)


def one_row(dataset: Dataset, i: int) -> AnyBatch:
    """The row of this index alone."""
    return _batch(dataset, np.array([i]), 1)


def _batch(dataset: Dataset, rows: np.ndarray, batch_size: int) -> AnyBatch:
    own = [dataset.rows[i] for i in rows]
    if not isinstance(own[0], Pair):
        return _padded(own, rows, batch_size, dataset.pad_id)
    chosen, rejected = (
        _padded([getattr(pair, key) for pair in own], rows, batch_size, dataset.pad_id)
        for key in ("chosen", "rejected")
    )
    return PairBatch(chosen, rejected, min(pair.shared for pair in own), rows, _reference(own))


def _reference(own: list[Row] | list[Pair]) -> np.ndarray | None:
    known = [row.reference for row in own]
    return None if None in known else np.array(known, np.float32).T.reshape(-1)


def _padded(own: list[Row], rows: np.ndarray, batch_size: int, pad_id: int) -> Batch:
    lengths = np.array([len(row) for row in own])
    width = padded(int(lengths.max()), batch_size)
    tokens = np.full((len(own), width), pad_id, np.int32)
    weights = np.zeros((len(own), width), np.float32)
    for b, row in enumerate(own):
        tokens[b, : len(row)] = row.ids
        weights[b, : len(row)] = row.weights
    return Batch(tokens, weights, rows, lengths, _reference(own))
