"""Reads, writes and converts adapter directories.

writing.py describes our format, and reading.py describes the formats that can be read.
conversion.py converts between formats, merging.py combines adapters, and folding.py merges an
adapter into its base model.
"""

from pathlib import Path

from ..lora.folder import CONFIG, WEIGHTS
from .card import About
from .reading import is_dora, ranks_in, read_adapter, read_stored
from .writing import prompting_of, step_of, write_adapter

__all__ = [
    "WEIGHTS",
    "About",
    "holds_run",
    "is_dora",
    "prompting_of",
    "ranks_in",
    "read_adapter",
    "read_stored",
    "step_of",
    "write_adapter",
]

RUN_FILES = (
    *(WEIGHTS, CONFIG, "metrics.jsonl", "metrics.json", "run.json"),
    *("state", "checkpoints", "best", "tensorboard"),
)


def holds_run(path: Path) -> bool:
    """Returns whether the folder contains any file or folder that a run writes."""
    return any((path / name).exists() for name in RUN_FILES)
