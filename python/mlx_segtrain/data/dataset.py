"""Data sets in memory: every row tokenized once, truncated and counted."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlx_segtrain.data.encoding import Encoder, Row
from mlx_segtrain.data.jsonl import Record, read_records
from mlx_segtrain.errors import InputError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

ROWS_PER_CALL = 512  # given to the tokenizer at once: enough for its threads, small in memory


@dataclass(frozen=True)
class Dataset:
    """The rows of one file that have something to train.

    `format` is messages | prompt-completion | text, or mixed; `n_rows` counts the rows read,
    `truncated` the rows here that were cut, `dropped` those left out since no trained token
    remained; `tokens` and `supervised_tokens` count what is here; `pad_id` fills short rows.
    """

    rows: list[Row]
    format: str
    n_rows: int
    truncated: int
    dropped: int
    tokens: int
    supervised_tokens: int
    pad_id: int


def load_dataset(
    data_dir: Path,
    tokenizer: "TokenizerWrapper",
    *,
    max_seq_length: int,
    train_on: str = "assistant",
    append_eos: bool = True,
) -> tuple[Dataset, Dataset | None]:
    """train.jsonl and, if there is one, valid.jsonl of a directory; raises InputError."""
    encoder = Encoder(tokenizer, train_on, append_eos)
    train_path, valid_path = split_paths(Path(data_dir))
    train = fit(train_path, *read(train_path, encoder), tokenizer, max_seq_length)
    if valid_path is None:
        return train, None
    return train, fit(valid_path, *read(valid_path, encoder), tokenizer, max_seq_length)


def load_split(
    path: Path,
    tokenizer: "TokenizerWrapper",
    *,
    max_seq_length: int,
    train_on: str = "assistant",
    append_eos: bool = True,
) -> Dataset:
    """One JSONL file; raises InputError."""
    path = Path(path)
    encoder = Encoder(tokenizer, train_on, append_eos)
    return fit(path, *read(path, encoder), tokenizer, max_seq_length)


def split_paths(data_dir: Path) -> tuple[Path, Path | None]:
    """The training file of a directory, and the validation file if it exists; or InputError."""
    if not data_dir.is_dir():
        raise InputError(f"The data directory {data_dir} does not exist or is not a directory.")
    train, valid = data_dir / "train.jsonl", data_dir / "valid.jsonl"
    if not train.is_file():
        raise InputError(f"{data_dir} has no file train.jsonl; put the training rows there.")
    return train, valid if valid.exists() else None


def merge_format(format: str | None, record: Record) -> str:
    """The format of a file that has had `format` so far and now has `record`."""
    return record.format if format in (None, record.format) else "mixed"


def read(path: Path, encoder: Encoder) -> tuple[str, int, list[Row]]:
    """Format, number of rows read, and the rows, not truncated; raises InputError."""
    records, rows, count, format = read_records(path), [], 0, None
    while chunk := list(islice(records, ROWS_PER_CALL)):
        for record in chunk:
            format = merge_format(format, record)
        count += len(chunk)
        rows += encoder.encode(chunk)
    if format is None:
        raise InputError(f"{path} has no rows; put one JSON object on each line.")
    return format, count, rows


def fit(
    path: Path,
    format: str,
    n_rows: int,
    rows: list[Row],
    tokenizer: "TokenizerWrapper",
    max_seq_length: int,
) -> Dataset:
    """`rows` cut on the right to `max_seq_length` tokens; InputError if nothing is trained."""
    whole = [row for row in rows if row.weights[:max_seq_length].any()]
    kept = [
        Row(row.ids[:max_seq_length], row.weights[:max_seq_length], row.source) for row in whole
    ]
    if not kept:
        longest = max((len(row.ids) for row in rows if row.weights.any()), default=0)
        reason = (
            f"all trained tokens lie beyond max_seq_length {max_seq_length}; raise it (the longest "
            f"row has {longest} tokens)"
            if longest
            else "no row has an assistant turn or text that is trained"
        )
        raise InputError(f"{path} has nothing to train in {n_rows} rows: {reason}.")
    pad_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return Dataset(
        rows=kept,
        format=format,
        n_rows=n_rows,
        truncated=sum(len(row.ids) > max_seq_length for row in whole),
        dropped=len(rows) - len(kept),
        tokens=sum(len(row.ids) for row in kept),
        supervised_tokens=sum(int(np.count_nonzero(row.weights)) for row in kept),
        pad_id=next(pad_id for pad_id in pad_ids if pad_id is not None),
    )
