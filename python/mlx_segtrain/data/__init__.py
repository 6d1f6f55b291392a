"""Training data: JSONL rows to token ids with a loss weight for each token, and batches of them."""

from mlx_segtrain.data.batching import AnyBatch, Batch, PairBatch, batches, eval_batches, one_row
from mlx_segtrain.data.dataset import Dataset, load_dataset, load_split
from mlx_segtrain.data.encoding import Options, Pair, Row
from mlx_segtrain.data.inspection import Preview, Report, inspect
from mlx_segtrain.data.prompting import Prompting

__all__ = [
    "AnyBatch",
    "Batch",
    "Dataset",
    "Options",
    "Pair",
    "PairBatch",
    "Preview",
    "Prompting",
    "Report",
    "Row",
    "batches",
    "eval_batches",
    "inspect",
    "load_dataset",
    "load_split",
    "one_row",
]
