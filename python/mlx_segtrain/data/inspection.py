"""Reports which tokens of a data set are in the loss, so that users can check this before a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..events import OnEvent
from . import dataset
from .batching import batches_in_epoch, padding
from .dataset import Reading
from .encoding import Encoder, Options, sequences
from .notes import FINDINGS
from .samples import count, format_of
from .sources import sources_of
from .splitting import duplicates
from .template import Tokenizer

#: How many of the longest rows to list.
LONGEST = 5


@dataclass(frozen=True)
class Preview:
    """A sequence after truncation: the text of each token, whether the token is in the loss, and
    its loss weight. `findings` contains sentences about the sequence."""

    source: str
    tokens: list[tuple[str, bool, float]]
    findings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Bin:
    """The number of samples with `first` to `last` tokens."""

    first: int
    last: int
    count: int


@dataclass(frozen=True)
class Epoch:
    """One pass over the training rows. `rows` counts samples or packed rows, and `steps` counts
    optimizer steps. `unused` is the fraction of tokens that are padding or, for packed data, the
    unused fraction of the rows. `seconds` is None if the time of a step is unknown."""

    rows: int
    steps: float
    unused: float
    seconds: float | None = None


@dataclass
class Report:
    """The result of `inspect`.

    `n_train` and `n_valid` count rows. All other fields except `remarks` describe the training
    rows. `formats` counts these rows by format, and `duplicates` counts rows that repeat an earlier
    one. Lengths, `histogram` and `longest` (pairs of source and length) are measured in tokens,
    before truncation. Without a tokenizer, fields that need one are None or empty. If completions
    are generated for the rows, fields about the loss and about an epoch are None. `epoch`
    describes an epoch without packing; `packed` describes an epoch with packing, if the data can be
    packed. `remarks` contains sentences about omitted data and about problems with the data.
    `findings` maps each finding (a key of notes.FINDINGS) to the first rows that have it. `error`
    is one sentence, or None.
    """

    ok: bool = True
    error: str | None = None
    format: str | None = None
    formats: dict[str, int] = field(default_factory=dict)
    n_train: int = 0
    n_valid: int = 0
    length_min: int | None = None
    length_median: int | None = None
    length_p95: int | None = None
    length_max: int | None = None
    histogram: list[Bin] = field(default_factory=list)
    longest: list[tuple[str, int]] = field(default_factory=list)
    tokens: int | None = None
    supervised_tokens: int | None = None
    truncated: int | None = None
    dropped: int | None = None
    prompts_cut: int | None = None
    samples: int | None = None
    duplicates: int | None = None
    trained_turns: int | None = None
    epoch: Epoch | None = None
    packed: Epoch | None = None
    prompt_format: str | None = None
    remarks: list[str] = field(default_factory=list)
    findings: dict[str, list[str]] = field(default_factory=dict)
    previews: list[Preview] = field(default_factory=list)


def inspect(
    data: Any,
    tokenizer: Tokenizer | None = None,
    options: Options = Options(method=None),  # noqa: B008 - it is immutable
    *,
    n_preview: int = 3,
    batch_size: int = 1,
    accumulation: int = 1,
    step_s: float | None = None,
    model_dir: Path | None = None,
    on_event: OnEvent | None = None,
) -> Report:
    """Checks `data`, which may have any form that sources.sources_of accepts. Reports problems
    instead of raising errors.

    A step has `accumulation` batches of `batch_size` rows and takes `step_s` seconds (None if
    unknown). `model_dir` is the folder of the model to which the tokenizer belongs; if it is given,
    the tokens of large data sets are cached (cache.py).
    """
    report = Report()
    try:
        train, valid = sources_of(data, tell=on_event)
        if tokenizer is None:
            if options.dedup or options.val_split not in ("auto", 0):
                raise InputError(
                    "dedup and val_split have no effect without the tokenizer: pass --model, or "
                    "leave them out."
                )
            report.formats = dict(count(train, options))
            report.format, report.n_train = format_of(report.formats), sum(report.formats.values())
            report.n_valid = count(valid, options).total() if valid else 0
            return report
        read = Reading(tokenizer, options, model_dir, on_event)
        samples = read.samples(train)
        report.format, report.n_train = samples.format, samples.n_rows
        report.n_valid = read.samples(valid).n_rows if valid else 0
        lengths = samples.lengths.sum(1) - samples.shared
        report.length_min, report.length_median, report.length_p95, report.length_max = map(
            int, np.percentile(lengths, (0, 50, 95, 100), method="higher")
        )
        report.histogram = _histogram(lengths, options.max_seq_length)
        longest = np.argsort(-lengths, kind="stable")[:LONGEST]
        report.longest = [(samples.row(int(i)).source, int(lengths[i])) for i in longest]
        rows = [samples.row(i) for i in range(min(n_preview, len(samples)))]
        report.previews = _previews(rows, read.encoder)
        notes = samples.notes()
        report.formats = dict(notes.formats)
        report.prompt_format, report.findings = notes.prompt_format, notes.where
        report.duplicates = duplicates(samples)
        found, others = dataset.parts(train, valid, read)
        report.n_train, report.n_valid = found.n_rows, others.n_rows if others else 0
        if found.format != "prompt":  # the loss of prompts covers only completions
            report.samples, report.trained_turns = len(samples), notes.turns
            for name, value in found.counts.items():
                setattr(report, name, value)
            report.epoch = _epoch(found, batch_size, accumulation, step_s)
            if found.columns.length.shape[1] == 1 and not options.labelled:  # no pairs, no labels
                packed = found.in_rows_of(options.max_seq_length)
                report.packed = _epoch(packed, batch_size, accumulation)
        report.remarks = dataset.remarks(data, found, others, train, valid)
        for source in (train, *([valid] if valid else [])):
            read.check(source)
    except InputError as error:
        report.ok, report.error = False, str(error)
    return report


def _histogram(lengths: np.ndarray, most: int) -> list[Bin]:
    """Counts samples by length, in bins whose upper bounds are powers of two and `most`."""
    top = int(lengths.max())
    ends = {min(2**k, top) for k in range(top.bit_length() + 1)} | {min(most, top)}
    last = np.array(sorted(end for end in ends if end >= lengths.min()))
    counts = np.bincount(np.searchsorted(last, lengths), minlength=len(last))
    first = [int(lengths.min()), *(last[:-1] + 1).tolist()]
    return [Bin(*own) for own in zip(first, last.tolist(), counts.tolist(), strict=True)]


def _epoch(
    data: dataset.Dataset, batch_size: int, count: int, step_s: float | None = None
) -> Epoch | None:
    """Returns a description of an epoch, or None if it has less than one batch."""
    if not data.packed and len(data) < batch_size:
        return None
    steps = batches_in_epoch(data, batch_size) / count
    rows = len(data.packing) if data.packed else len(data)
    seconds = None if step_s is None else steps * step_s
    return Epoch(rows, steps, padding(data, batch_size), seconds)


def _previews(rows: list[Any], encoder: Encoder) -> list[Preview]:
    """Returns a preview of each sequence: one for a row, two for a pair."""
    shown = []
    for row in rows:
        short, _, _ = dataset.shorten(row, encoder)
        for own in sequences(short):
            texts, weights = _texts(own.ids.tolist(), encoder), own.weights.tolist()
            tokens = [(t, w != 0, w) for t, w in zip(texts, weights, strict=True)]
            source = own.source + (", label false" if min(weights, default=0) < 0 else "")
            shown.append(Preview(source, tokens, [FINDINGS[name] for name in own.findings]))
    return shown


def _texts(ids: list[int], encoder: Encoder) -> list[str]:
    """Returns the text of every token. A character that spans several tokens is assigned to the
    last one."""
    texts, before, shown = [], 0, 0  # ids[before:shown] is the context for decoding a token
    for j in range(len(ids)):
        known, text = encoder.decode(ids[before:shown]), encoder.decode(ids[before : j + 1])
        whole = not text.endswith("\ufffd") or j + 1 == len(ids)
        texts.append(text[len(known) :] if whole else "")
        if whole:
            before, shown = shown, j + 1
    return texts
