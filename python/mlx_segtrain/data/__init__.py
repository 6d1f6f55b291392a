"""Training data: JSONL rows to token ids with a loss weight for each token, and batches of them."""

from mlx_segtrain.data.batching import Batch, batches, eval_batches
from mlx_segtrain.data.dataset import Dataset, load_dataset, load_split
from mlx_segtrain.data.encoding import Row
from mlx_segtrain.data.inspection import Preview, Report, inspect

__all__ = [
    "Batch",
    "Dataset",
    "Preview",
    "Report",
    "Row",
    "batches",
    "eval_batches",
    "inspect",
    "load_dataset",
    "load_split",
]
