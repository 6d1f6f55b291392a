"""Data sets: every row tokenized once, truncated and counted."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ROWS
from ..errors import InputError, either
from .columns import Columns, Lazy
from .encoding import Encoder, Options, Pair, Row, sequences
from .formats import FORMATS, Record, checked, encode, quoted
from .notes import Notes
from .sources import Source, rows_in, rows_of, source_of, sources_of
from .template import Tokenizer

ROWS_PER_CALL = 512  # given to the tokenizer at once: enough for its threads, small in memory


@dataclass(frozen=True)
class Dataset:
    """The samples of one split that have something to train.

    `rows` are Row, or Pair in the format preference, and may be made when they are asked for: what
    looks at all of them uses `columns`. `format` is messages | prompt-completion | text |
    preference, or mixed; `n_rows` counts the rows read, `truncated` the rows here that were cut, of
    pairs those that lost part of a response, `dropped` those left out since no trained token
    remained; `pad_id` fills short rows; `prompts_cut` counts pairs that lost the beginning of their
    prompt; `notes` says what was found in the rows; `name` is that of the file, for people.
    """

    rows: Sequence[Any]
    columns: Columns
    format: str
    n_rows: int
    pad_id: int
    truncated: int = 0
    dropped: int = 0
    prompts_cut: int = 0
    name: str = "the data"
    notes: Notes = field(default_factory=Notes)

    @classmethod
    def of(cls, rows: Sequence[Any], pad_id: int = 0, format: str = "text") -> "Dataset":
        """Rows that are in memory, as they are."""
        return cls(rows, Columns.of(rows), format, len(rows), pad_id)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens that an epoch runs."""
        return int(self.columns.run.sum())

    @property
    def supervised_tokens(self) -> int:
        """Tokens in the loss of an epoch."""
        return int(self.columns.trained.sum())

    def map(self, change: Callable[[int, Any], Any]) -> "Dataset":
        """With `change(index, row)` in the place of each row; the columns stay."""
        rows = self.rows
        return replace(self, rows=Lazy(len(rows), lambda i: change(i, rows[i])))

    def take(self, chosen: np.ndarray) -> "Dataset":
        """Some samples, by index."""
        rows = self.rows
        picked = Lazy(len(chosen), lambda i: rows[int(chosen[i])])
        return replace(self, rows=picked, columns=self.columns.take(chosen))

    def apart(self) -> "Dataset":
        """Pairs that share nothing."""
        columns = replace(self.columns, shared=np.zeros_like(self.columns.shared))
        return replace(self.map(lambda _, pair: replace(pair, shared=0)), columns=columns)

    @property
    def summary(self) -> str:
        """Rows, samples and tokens, and how plain prompts are read, in a sentence."""
        said = f"{self.n_rows:,} rows"
        if len(self) != self.n_rows:
            said += f" give {len(self):,} samples"
        said += f", {self.tokens:,} tokens to run, {self.supervised_tokens:,} of them in the loss"
        if self.notes.prompt_format == "chat":
            said += "; prompts go through the chat template"
        elif self.notes.prompt_format == "raw":
            said += "; prompts are raw, without the chat template"
        formats = self.notes.formats
        if len(formats) == 1:
            said += f"; their format is {self.format}"
        elif formats:
            counts = ", ".join(f"{n:,} {name}" for name, n in sorted(formats.items()))
            said += f"; their formats are {counts}"
        return said

    @property
    def counts(self) -> dict[str, int]:
        names = ("truncated", "dropped", "prompts_cut", "tokens", "supervised_tokens")
        return {name: getattr(self, name) for name in names}

    def as_json(self) -> dict[str, Any]:
        """What metrics.json says of it."""
        return {**self.notes.as_json(), **self.counts}


def load_dataset(
    data: Any, tokenizer: Tokenizer, options: Options
) -> tuple[Dataset, Dataset | None]:
    """Training and, if there are some, validation rows (sources.sources_of); raises InputError."""
    train, valid = sources_of(data)
    how = (tokenizer, options)
    return load_split(train, *how), None if valid is None else load_split(valid, *how)


def load_split(source: Source | Path, tokenizer: Tokenizer, options: Options) -> Dataset:
    """The rows of a source, or of one file; raises InputError."""
    source = source_of(source) if isinstance(source, Path) else source
    encoder = Encoder(tokenizer, options)
    format, _, rows = read(source, options, encoder)
    if options.strict:
        refuse_faults(source.name, encoder.notes)
    return fit(source.name, format, rows, encoder)


def refuse_faults(name: str, notes: Notes) -> None:
    """InputError if rows are not trained as they are."""
    if faults := notes.faults():
        raise InputError(f"{name}: {faults[0]}; mend the rows, or leave out strict.")


def unread(folder: Path, *sources: Source | None) -> list[str]:
    """Names of files of a folder that look as if they held rows, and are not of the sources."""
    read = {name for source in sources if source for name in source.files}
    return [path.name for path in rows_in(folder) if path.name not in read]


def remarks(data: Any, train: Dataset, valid: Dataset | None, *sources: Source | None) -> list[str]:
    """What is left out of the data or wrong with it, in sentences."""
    said = []
    for own in (train, valid):
        if own is None:
            continue
        counts = (
            (own.truncated, "rows are truncated to max_seq_length"),
            (own.prompts_cut, "pairs lost the beginning of their prompt to max_seq_length"),
            (own.dropped, "samples are dropped: nothing of them is trained"),
        )
        found = [f"{count:,} {what}" for count, what in counts if count]
        found += [*own.notes.left_out(), *own.notes.faults()]
        said += [f"{own.name}: {sentence}" for sentence in found]
    if isinstance(data, Path) and data.is_dir():
        if names := unread(data, *sources):
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            said.append(
                f"not read in {data}: {shown} (training rows are read from the file train, "
                "validation rows from valid or validation)"
            )
        if valid is None:
            said.append(f"{data} has no validation file, so there is no validation loss")
    return said


def read(
    source: Source, options: Options, encoder: Encoder | None = None
) -> tuple[str, int, list[Any]]:
    """The format of a source and the number of its rows; with an encoder Rows or Pairs, not cut.

    InputError for a row that cannot be read, or is not for the method (None: any).
    """
    formats: set[str] = set()
    records = _records(source, options, formats)
    n_rows, rows = 0, []
    while chunk := list(islice(records, ROWS_PER_CALL)):
        n_rows += len(chunk)
        rows += encode(encoder, chunk) if encoder else []
    if not formats:
        raise InputError(f"{source.name} has no rows; put some there.")
    return formats.pop() if len(formats) == 1 else "mixed", n_rows, rows


def _records(source: Source, options: Options, formats: set[str]) -> Iterator[Record]:
    """The records of a source, whose formats are added to `formats` as they come.

    InputError if a record is not for the method, or pairs stand beside other rows.
    """
    method = options.method
    for where, row in rows_of(source):
        record = checked(row, where, options.data_format, options.columns)
        own = FORMATS[record.format]
        if method is not None and own.rows != ROWS[method]:
            wanted = [other for other in FORMATS.values() if other.rows == ROWS[method]]
            if len(wanted) == 1:
                keys = quoted(wanted[0].keys)
                raise InputError(f"{record.source}: method {method} needs the keys {keys}.")
            methods = either([name for name, rows in ROWS.items() if rows == own.rows])
            raise InputError(
                f"{record.source}: the row has {quoted(own.marks)}, which method {method} does not "
                f"train: give method {methods}, or data_format."
            )
        if any(FORMATS[name].rows != own.rows for name in formats):
            raise InputError(
                f"{record.source}: pairs and other rows do not go together; put them into two "
                "files."
            )
        formats.add(record.format)
        yield record


def fit(name: str, format: str, rows: list[Any], encoder: Encoder) -> Dataset:
    """`rows` cut to max_seq_length tokens; InputError if nothing is trained."""
    n_rows = encoder.notes.rows
    short = [shorten(row, encoder) for row in rows]
    found = [own for own in short if _trained(own[0])]
    if not found:
        trained = [own for row in rows if _trained(row) for own in sequences(row)]
        longest = max(map(len, trained), default=0)
        reason = (
            f"all trained tokens lie beyond max_seq_length {encoder.options.max_seq_length}; raise "
            f"it (the longest row has {longest} tokens)"
            if longest
            else "no row has an assistant turn or text that is trained"
        )
        raise InputError(f"{name} has nothing to train in {n_rows} rows: {reason}.")
    kept, truncated, prompts_cut = zip(*found, strict=True)
    return Dataset(
        name=name,
        rows=kept,
        columns=Columns.of(kept),
        format=format,
        n_rows=n_rows,
        pad_id=encoder.pad_id,
        truncated=sum(truncated),
        dropped=len(rows) - len(kept),
        prompts_cut=sum(prompts_cut),
        notes=encoder.notes,
    )


def _trained(row: Row | Pair) -> bool:
    return all(own.weights.any() for own in sequences(row))


def shorten(row: Row | Pair, encoder: Encoder) -> tuple[Any, bool, bool]:
    """A row of at most max_seq_length tokens; whether it lost its end, and whether its beginning.

    It is cut on the right; of a pair first the prompt on the left, as far as its last token. Both
    prompts lose as much, and what the tokenizer puts before a text (BOS) stays.
    """
    sides, n = sequences(row), encoder.options.max_seq_length
    over = max(map(len, sides)) - n
    if isinstance(row, Row):
        return replace(row, ids=row.ids[:n], weights=row.weights[:n]), over > 0, False
    prompts = [int(np.argmax(own.weights != 0)) for own in sides]
    bos = len(encoder.bos) if all(encoder.begins(own.ids) for own in sides) else 0
    cut = max(0, min(over, min(prompts) - bos - 1))

    def shorter(own: Row) -> Row:
        keep = np.r_[0:bos, bos + cut : len(own)][:n]
        return replace(own, ids=own.ids[keep], weights=own.weights[keep])

    chosen, rejected = map(shorter, sides)
    return Pair.of(chosen, rejected, row.source), over > cut, cut > 0
