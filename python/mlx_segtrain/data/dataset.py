"""Creates data sets of tokenized and truncated rows, and counts what was truncated or dropped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import InputError
from ..events import OnEvent
from .cache import read_samples
from .columns import Columns, Lazy
from .encoding import Encoder, Options, Pair, Row, sequences
from .notes import Notes
from .packing import Packing
from .samples import Samples
from .sources import Source, rows_in, sources_of
from .splitting import duplicates, held_out, in_both, repeated
from .template import Tokenizer

Split = Literal["train", "valid"]


@dataclass(frozen=True)
class Dataset:
    """The samples of a split that have tokens in the loss.

    `rows` contains Row or Pair objects, which may be created on access. Code that needs properties
    of all rows should therefore use `columns`. `format` is a name in formats.FORMATS, or "mixed".
    `n_rows` counts the rows that were read. `truncated` counts the rows that were truncated (or,
    for pairs, that lost part of a response), `prompts_cut` counts the rows that lost the beginning
    of their prompt, and `dropped` counts the samples that had no token left in the loss. `pad_id`
    fills short rows. `notes` contains the findings about the rows, and `said` contains sentences
    about rows that were dropped or held out. `name` is the name of the source. `packed` is the
    length, in tokens, of the rows into which samples are packed, or 0 without packing.
    """

    rows: Sequence[Any]
    columns: Columns
    format: str
    n_rows: int
    pad_id: int
    truncated: int = 0
    dropped: int = 0
    prompts_cut: int = 0
    notes: Notes = field(default_factory=Notes)
    name: str = ""
    said: tuple[str, ...] = ()
    packed: int = 0

    @classmethod
    def of(cls, rows: Sequence[Any], pad_id: int = 0, format: str = "text") -> "Dataset":
        """Creates a data set from rows in memory."""
        return cls(rows, Columns.of(rows), format, len(rows), pad_id)

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """The number of tokens that an epoch processes."""
        return int(self.columns.run.sum())

    @property
    def supervised_tokens(self) -> int:
        """The number of tokens per epoch that are in the loss."""
        return int(self.columns.trained.sum())

    def map(self, change: Callable[[int, Any], Any]) -> "Dataset":
        """Returns the data set with each row replaced by `change(index, row)`. `change` must
        preserve the properties that `columns` stores."""
        rows = self.rows
        return replace(self, rows=Lazy(len(rows), lambda i: change(i, rows[i])))

    def take(self, chosen: np.ndarray) -> "Dataset":
        """Returns a data set with the samples at these indices."""
        rows = self.rows
        picked = Lazy(len(chosen), lambda i: rows[int(chosen[i])])
        return replace(self, rows=picked, columns=self.columns.take(chosen))

    def in_rows_of(self, tokens: int) -> "Dataset":
        """Returns the data set with its samples packed into rows of this many tokens. No sample may
        be longer than a row."""
        return replace(self, packed=tokens)

    @cached_property
    def packing(self) -> Packing:
        """The placement of samples in packed rows."""
        return Packing.of(self.columns.length[:, 0], self.packed)

    def apart(self) -> "Dataset":
        """Returns the pairs with `shared` set to 0, so that both sequences are computed in full."""
        columns = replace(self.columns, shared=np.zeros_like(self.columns.shared))
        return replace(self.map(lambda _, pair: replace(pair, shared=0)), columns=columns)

    @property
    def summary(self) -> str:
        """A description of the numbers of rows, samples and tokens, and of how plain prompts are
        handled."""
        said = f"{self.n_rows:,} rows"
        if len(self) != self.n_rows:
            said += f" give {len(self):,} samples"
        said += (
            f", {self.tokens:,} tokens to process, {self.supervised_tokens:,} of them in the loss"
        )
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
        """Returns the values for metrics.json."""
        return {**self.notes.as_json(), **self.counts}


def load_dataset(
    data: Any,
    tokenizer: Tokenizer,
    options: Options,
    model_dir: Path | None = None,
    on_event: OnEvent | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Reads training rows and, if there are any, validation rows. Raises InputError.

    `data` is either the data to pass to sources_of or the result of sources_of. `model_dir` is the
    folder of the model to which the tokenizer belongs; if it is given, the tokens of large data
    sets are cached (cache.py). `on_event` receives progress events.
    """
    train, valid = data if isinstance(data, tuple) else sources_of(data, tell=on_event)
    return parts(train, valid, Reading(tokenizer, options, model_dir, on_event))


def load_split(
    data: Any,
    tokenizer: Tokenizer,
    options: Options,
    split: Split = "train",
    model_dir: Path | None = None,
    on_event: OnEvent | None = None,
) -> Dataset | None:
    """Reads only one of the two splits that load_dataset reads. Returns None if the data has no
    such split."""
    read = Reading(tokenizer, options, model_dir, on_event)
    train, valid = data if isinstance(data, tuple) else sources_of(data, tell=on_event)
    if split == "valid" and valid is not None:
        _check_val_split(valid, options)
        return read.whole(valid)
    own, held = _parts(train, valid, read)
    return own if split == "train" else held


class Reading:
    """Reads and tokenizes each source only once. See load_dataset for the arguments."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: Options,
        model_dir: Path | None = None,
        on_event: OnEvent | None = None,
    ):
        self.encoder, self.options = Encoder(tokenizer, options), options
        self._how = (tokenizer, options, model_dir, on_event or (lambda event: None))
        self._read: dict[int, Samples] = {}

    def samples(self, source: Source) -> Samples:
        """Returns all samples of a source. Raises InputError."""
        if id(source) not in self._read:
            samples = read_samples(source, *self._how)
            if not samples.n_rows:
                raise InputError(f"{source.name} has no rows; add some.")
            if not len(samples):
                reason = "their label is false; method kto also trains on such rows"
                raise _nothing(samples.n_rows, source.name, reason)
            self._read[id(source)] = samples
        return self._read[id(source)]

    def check(self, source: Source) -> None:
        """Raises InputError if `strict` is set and there are findings about a source's rows."""
        if self.options.strict and (faults := self.samples(source).notes().faults()):
            raise InputError(f"{source.name}: {faults[0]}; fix the rows, or turn strict off.")

    def whole(self, source: Source) -> Dataset:
        """Returns all samples of a source as a data set. Raises InputError."""
        samples = self.samples(source)
        self.check(source)
        return fit(source.name, samples, np.arange(len(samples)), self.encoder)


def parts(train: Source, valid: Source | None, read: Reading) -> tuple[Dataset, Dataset | None]:
    """Returns the training rows and, if there are any, the validation rows of the sources. Raises
    InputError."""
    own, held = _parts(train, valid, read)
    is_chat = own.notes.prompt_format is None and "text" not in own.notes.formats
    if read.options.prompt_format == "raw" and read.encoder.has_template and is_chat:
        raise InputError(
            f"prompt_format raw has no effect on the rows of {own.name}, because all of them have "
            "messages, which need the chat template: leave prompt_format out.",
            field="prompt_format",
        )
    if valid is None:
        return own, held
    held = read.whole(valid)
    if count := in_both(read.samples(valid), read.samples(train)):
        said = f"{count:,} of {held.n_rows:,} rows are also in {own.name}"
        held = replace(held, said=(*held.said, said))
    return own, held


def _parts(train: Source, valid: Source | None, read: Reading) -> tuple[Dataset, Dataset | None]:
    """Returns the training rows, without duplicates if `dedup` is set, and the validation rows held
    out from them. The second result is None if no row is held out, for example because `valid` is
    given."""
    options, samples, said = read.options, read.samples(train), ()
    read.check(train)
    chosen = np.arange(len(samples))
    if options.dedup and (count := duplicates(samples)):
        chosen = chosen[~repeated(samples)]
        said = (f"{count:,} rows that repeat an earlier row are dropped (dedup)",)
    asked = options.val_split
    if valid is not None:
        _check_val_split(valid, options)
    held = held_out(samples, chosen, 0 if valid else asked, options.seed)
    if held.all():
        raise InputError(
            f"val_split = {asked} holds out all rows of {train.name}: lower val_split.",
            field="val_split",
        )
    own = fit(train.name, samples, chosen[~held], read.encoder)
    if not held.any():
        if valid is None and asked not in ("auto", 0):
            raise InputError(
                f"val_split = {asked} would hold out no rows of {train.name}, because identical "
                "rows stay together: raise val_split.",
                field="val_split",
            )
        return replace(own, said=(*own.said, *said)), None
    apart = fit(f"held out of {train.name}", samples, chosen[held], read.encoder)
    count = f"{apart.n_rows:,} of {own.n_rows + apart.n_rows:,}"
    said += (f"{count} rows are held out for validation (val_split {asked})",)
    return replace(own, said=(*own.said, *said)), apart


def _check_val_split(valid: Source, options: Options) -> None:
    """Raises InputError if rows should be held out although there are validation rows."""
    if options.val_split not in ("auto", 0):
        raise InputError(
            f"val_split has no effect, because validation rows are read from {valid.name}: leave "
            "val_split out, or remove these rows.",
            field="val_split",
        )


def remarks(data: Any, train: Dataset, valid: Dataset | None, *sources: Source | None) -> list[str]:
    """Returns notes on data that is left out and on problems with the data."""
    said = []
    for own in (train, valid):
        if own is None:
            continue
        counts = (
            (own.truncated, "rows are truncated to max_seq_length"),
            (own.prompts_cut, "rows lost the beginning of their prompt to max_seq_length"),
            (own.dropped, "samples are dropped: they have no token in the loss"),
        )
        found = [*own.said, *(f"{count:,} {what}" for count, what in counts if count)]
        found += [*own.notes.left_out(), *own.notes.faults()]
        said += [f"{own.name}: {sentence}" for sentence in found]
    if isinstance(data, Path) and data.is_dir():
        read = {name for source in sources if source for name in source.files}
        if names := [path.name for path in rows_in(data) if path.name not in read]:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            said.append(
                f"files of {data} that are not read: {shown} (training rows are read from a file "
                "called train, validation rows from valid or validation)"
            )
        if valid is None:
            said.append(f"{data} has no validation file, so there is no validation loss")
    return said


def fit(name: str, samples: Samples, chosen: np.ndarray, encoder: Encoder) -> Dataset:
    """Returns the chosen samples, truncated to max_seq_length tokens. Raises InputError if no token
    is left in the loss."""
    if samples.format == "prompt":
        return _prompts(name, samples, chosen, encoder)
    most = encoder.options.max_seq_length
    columns = samples.columns(most).take(chosen)
    over = samples.lengths[chosen].max(1, initial=0) > most
    truncated, cut = over.copy(), np.zeros(len(chosen), bool)
    # In pairs and in rows with a label, the prompt is truncated first, to keep the responses whole
    # if possible.
    if (columns.length.shape[1] == 2 or encoder.options.labelled) and over.any():
        at = np.flatnonzero(over)
        short = [shorten(samples.row(int(chosen[i])), encoder) for i in at]
        own = Columns.of([row for row, _, _ in short])
        for one in fields(own):
            getattr(columns, one.name)[at] = getattr(own, one.name)
        truncated[at], cut[at] = zip(*((end, start) for _, end, start in short), strict=True)
    kept = (columns.trained > 0).all(1)
    notes = samples.notes(None if len(chosen) == len(samples) else chosen)
    if not kept.any():
        every = samples.columns(WHOLE).take(chosen)
        longest = int(every.length[(every.trained > 0).all(1)].max(initial=0))
        reason = (
            f"all tokens in the loss are beyond max_seq_length = {most}; raise it (the longest row "
            f"has {longest} tokens)"
            if longest
            else "no row has an assistant turn or text in the loss"
        )
        raise _nothing(notes.rows, name, reason)
    rows = chosen[kept]
    return Dataset(
        rows=Lazy(len(rows), lambda i: shorten(samples.row(int(rows[i])), encoder)[0]),
        columns=columns.take(np.flatnonzero(kept)),
        format=samples.format,
        n_rows=notes.rows,
        pad_id=encoder.pad_id,
        truncated=int(truncated[kept].sum()),
        dropped=int((~kept).sum()),
        prompts_cut=int(cut[kept].sum()),
        notes=notes,
        name=name,
    )


def _nothing(n_rows: int, name: str, reason: str) -> InputError:
    return InputError(f"none of the {n_rows} rows of {name} has anything to train on: {reason}.")


def _prompts(name: str, samples: Samples, chosen: np.ndarray, encoder: Encoder) -> Dataset:
    """Returns the chosen prompts, except prompts that are too long to leave room for a completion.
    Raises InputError if no prompt is left."""
    options = encoder.options
    most = options.max_seq_length - options.max_completion_tokens
    columns = samples.columns(WHOLE).take(chosen)
    kept = columns.length[:, 0] <= most
    notes = samples.notes(None if len(chosen) == len(samples) else chosen)
    room = f"max_seq_length - max_completion_tokens = {most} tokens"
    if not kept.any():
        raise InputError(
            f"all prompts of {name} are longer than {room} (the shortest has "
            f"{int(columns.length.min())}): raise max_seq_length."
        )
    rows, long = chosen[kept], int((~kept).sum())
    said = (f"{long:,} prompts of more than {room} are dropped",) if long else ()
    return Dataset(
        rows=Lazy(len(rows), lambda i: samples.row(int(rows[i]))),
        columns=columns.take(np.flatnonzero(kept)),
        format=samples.format,
        n_rows=notes.rows,
        pad_id=encoder.pad_id,
        notes=notes,
        name=name,
        said=said,
    )


#: A limit that exceeds the number of tokens in any row, so that nothing is truncated.
WHOLE = 2**31 - 1


def shorten(row: Row | Pair, encoder: Encoder) -> tuple[Any, bool, bool]:
    """Truncates a row to max_seq_length tokens. Returns the truncated row, whether its end was
    truncated, and whether its beginning was truncated.

    Rows are truncated on the right. In pairs and in rows with labels, the prompt is truncated
    first, on the left, but keeps BOS and its last token. Both prompts of a pair lose the same
    number of tokens.
    """
    sides, n = sequences(row), encoder.options.max_seq_length
    over = max(map(len, sides)) - n
    if isinstance(row, Row) and not encoder.options.labelled:
        return replace(row, ids=row.ids[:n], weights=row.weights[:n]), over > 0, False
    prompts = [int(np.argmax(own.weights != 0)) for own in sides]
    bos = len(encoder.bos) if all(encoder.begins(own.ids) for own in sides) else 0
    cut = max(0, min(over, min(prompts) - bos - 1))

    def shorter(own: Row) -> Row:
        keep = np.r_[0:bos, bos + cut : len(own)][:n]
        return replace(own, ids=own.ids[keep], weights=own.weights[keep])

    short = [shorter(own) for own in sides]
    whole = Pair.of(short[0], short[1], row.source) if isinstance(row, Pair) else short[0]
    return whole, over > cut, cut > 0
