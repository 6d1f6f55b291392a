"""Determines the order in which rows are used, and pads batches."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, count, islice

import numpy as np

from ..errors import InputError
from ..streams import padded
from .columns import Columns
from .dataset import Dataset
from .encoding import Pair, Row


@dataclass(frozen=True)
class Batch:
    """A batch of B sequences: `tokens` is int32 [B, T]; `weights` is float32 [B, T], 0 on padding.

    `rows` contains indices into the data, and `lengths` counts tokens without padding; both are
    int64 of shape [B]. `reference` is float32 [B], or None. `numbers` maps names to additional
    values for each token, float32 [B, T] and 0 on padding. In a `packed` batch, the B sequences
    follow one another without padding, and tokens, weights and numbers have the shape [1, T].
    """

    tokens: np.ndarray
    weights: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    reference: np.ndarray | None = None
    packed: bool = False
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def padding(self) -> int:
        """The number of padding tokens."""
        return self.tokens.size - int(self.lengths.sum())


@dataclass(frozen=True)
class PairBatch:
    """Both complete sequences of each pair. The first `shared` tokens are the same in both
    sequences of every pair. `reference` is None, or float32 [2B]: the reference values of the
    chosen responses, followed by those of the rejected responses."""

    chosen: Batch
    rejected: Batch
    shared: int
    rows: np.ndarray
    reference: np.ndarray | None = None


AnyBatch = Batch | PairBatch


def batches(dataset: Dataset, batch_size: int, seed: int, start: int = 0) -> Iterator[AnyBatch]:
    """Yields an endless sequence of training batches, beginning with batch number `start`. The
    sequence depends only on the arguments.

    The order is different in every epoch. Rows of similar length share a batch, and every batch has
    the same proportion of labels as the data. If the number of rows is not a multiple of
    `batch_size`, each epoch leaves out the remainder, and successive epochs leave out different
    rows. If the data set is packed, each batch consists of `batch_size` packed rows, and the last
    batch of an epoch contains the remaining rows. Raises InputError if the data set is not packed
    and has fewer rows than `batch_size`.
    """
    n = len(dataset)
    if n < batch_size and not dataset.packed:
        raise InputError(
            f"the training data has only {n} rows with tokens in the loss, but batch_size is "
            f"{batch_size}; lower batch_size or add rows."
        )
    first, skip = divmod(start, int(batches_in_epoch(dataset, batch_size)))
    epochs = (epoch_rows(dataset, batch_size, seed, epoch) for epoch in count(first))
    windows = islice(chain.from_iterable(epochs), skip, None)
    return (_batch(dataset, rows, batch_size) for rows in windows)


def batches_in_epoch(dataset: Dataset, batch_size: int) -> float:
    """Returns the number of batches in an epoch. If the data set is not packed, this is the number
    of rows divided by `batch_size`, which may be fractional."""
    if dataset.packed:
        return math.ceil(len(dataset.packing) / batch_size)
    return len(dataset) / batch_size


def epoch_rows(dataset: Dataset, batch_size: int, seed: int, epoch: int) -> Iterable[np.ndarray]:
    """Returns the row indices of each batch of one epoch. They depend only on the seed and the
    epoch."""
    if dataset.packed:
        return _joined(dataset.packing.epoch(seed, epoch), batch_size)
    n = len(dataset)
    # The rows that are left out rotate: no row is left out in two successive epochs, and all rows
    # are left out equally often.
    circle = np.random.default_rng([seed, 0]).permutation(n)
    out = circle[(epoch * (n % batch_size) + np.arange(n % batch_size)) % n]
    taken = np.ones(n, bool)
    taken[out] = False
    rows = np.flatnonzero(taken)
    order = _alike(dataset.columns.take(rows))
    windows = rows[order].reshape(-1, batch_size)
    return np.random.default_rng([seed, 1, epoch]).permutation(windows)


def _alike(columns: Columns) -> np.ndarray:
    """Returns the row indices, ordered so that rows of similar length are adjacent.

    The rows of each label are sorted separately and then mixed evenly. Otherwise, if the rows of
    one label were longer, some batches would contain only rows of that label.
    """
    place = np.empty(len(columns.sign))
    for sign in (1, -1):
        own = np.flatnonzero(columns.sign == sign)
        own = own[np.argsort(columns.run[own], kind="stable")]
        place[own] = (np.arange(len(own)) + 0.5) / max(len(own), 1)
    return np.argsort(place, kind="stable")


def _joined(rows: Iterator[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Yields the indices of the samples in each group of `batch_size` packed rows."""
    while some := list(islice(rows, batch_size)):
        yield np.concatenate(some)


def eval_batches(dataset: Dataset, batch_size: int) -> Iterator[AnyBatch]:
    """Yields batches that together contain every row exactly once. If the data set is packed, the
    batches consist of packed rows; otherwise, the rows are in file order. The last batch may be
    smaller."""
    if dataset.packed:
        windows: Iterable[np.ndarray] = epoch_rows(dataset, batch_size, 0, 0)
    else:
        windows = (
            np.arange(start, min(start + batch_size, len(dataset)))
            for start in range(0, len(dataset), batch_size)
        )
    return (_batch(dataset, rows, batch_size) for rows in windows)


def padding(dataset: Dataset, batch_size: int) -> float:
    """Returns the fraction of an epoch's tokens that are padding, counting both sequences of a
    pair. For packed data, returns the unused fraction of the packed rows."""
    if dataset.packed:
        return 1 - dataset.tokens / (len(dataset.packing) * dataset.packed)
    columns = dataset.columns
    windows = np.asarray(epoch_rows(dataset, batch_size, 0, 0))
    lengths = columns.length[windows]  # [batches, B, s]
    widths = padded(lengths.max(1), batch_size) * batch_size
    return 1 - float(lengths.sum() / widths.sum())


def described(dataset: Dataset, batch_size: int) -> str:
    """Describes in words the number of batches in an epoch and the share of padding."""
    if (count := int(batches_in_epoch(dataset, batch_size))) == 0:
        return "less than one batch"
    said = f"{count:,} batch{'es' if count > 1 else ''} per epoch"
    if batch_size == 1 and not dataset.packed:
        return said
    share = padding(dataset, batch_size)
    if dataset.packed:
        return (
            f"{said}, packed: on average {len(dataset) / len(dataset.packing):.1f} rows fill "
            f"{1 - share:.1%} of {dataset.packed:,} tokens"
        )
    return f"{said}; {share:.1%} of the tokens are padding"


def one_row(dataset: Dataset, i: int) -> AnyBatch:
    """Returns a batch that contains only the row with index `i`."""
    return _batch(dataset, np.array([i]), 1)


def _batch(dataset: Dataset, rows: np.ndarray, batch_size: int) -> AnyBatch:
    own = [dataset.rows[i] for i in rows]
    if dataset.packed:
        tokens, weights = (
            np.concatenate([getattr(row, name) for row in own])[None] for name in ("ids", "weights")
        )
        lengths = np.array([len(row) for row in own])
        numbers = {
            name: np.concatenate([row.numbers[name] for row in own])[None]
            for name in own[0].numbers or ()
        }
        return Batch(tokens, weights, rows, lengths, packed=True, numbers=numbers)
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
    numbers = {name: np.zeros_like(weights) for name in own[0].numbers or ()}
    for b, row in enumerate(own):
        tokens[b, : len(row)] = row.ids
        weights[b, : len(row)] = row.weights
        for name, values in numbers.items():
            values[b, : len(row)] = (row.numbers or {})[name]
    return Batch(tokens, weights, rows, lengths, _reference(own), numbers=numbers)
