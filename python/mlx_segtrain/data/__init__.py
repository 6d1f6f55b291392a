"""Converts training data into batches of token ids, with a loss weight for each token."""

from .batching import (
    AnyBatch,
    Batch,
    PairBatch,
    batches,
    batches_in_epoch,
    eval_batches,
    one_row,
    padding,
)
from .columns import Columns
from .dataset import Dataset, load_dataset, load_split
from .encoding import Options, Pair, Row
from .inspection import Preview, Report, inspect
from .prompting import Prompting

__all__ = [
    "AnyBatch",
    "Batch",
    "Columns",
    "Dataset",
    "Options",
    "Pair",
    "PairBatch",
    "Preview",
    "Prompting",
    "Report",
    "Row",
    "batches",
    "batches_in_epoch",
    "eval_batches",
    "inspect",
    "load_dataset",
    "load_split",
    "one_row",
    "padding",
]
