"""What a data set trains, for people to look at before a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..events import OnEvent
from . import dataset
from .dataset import Reading
from .encoding import Encoder, Options, sequences
from .notes import FINDINGS
from .samples import count, format_of
from .sources import sources_of
from .splitting import duplicates
from .template import Tokenizer


@dataclass(frozen=True)
class Preview:
    """One sequence as trained: for each token its text, whether it is trained, and its weight;
    `findings` are sentences about it."""

    source: str
    tokens: list[tuple[str, bool, float]]
    findings: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What `inspect` found.

    `n_train` and `n_valid` count rows, `formats` those of the training file by their form; lengths
    are in tokens before truncation, all of the training file like the counts after them (None
    without a tokenizer). `duplicates` counts rows that are equal to an earlier one. `remarks` say
    what is left out of both files or wrong with them, `findings` name rows of the training file by
    what is wrong with them (notes.FINDINGS). `error` is one sentence.
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
    tokens: int | None = None
    supervised_tokens: int | None = None
    truncated: int | None = None
    dropped: int | None = None
    prompts_cut: int | None = None
    samples: int | None = None
    duplicates: int | None = None
    trained_turns: int | None = None
    prompt_format: str | None = None
    remarks: list[str] = field(default_factory=list)
    findings: dict[str, list[str]] = field(default_factory=dict)
    previews: list[Preview] = field(default_factory=list)


def inspect(
    data: Any,
    tokenizer: Tokenizer | None = None,
    options: Options = Options(method=None),  # noqa: B008 - it cannot be changed
    *,
    n_preview: int = 3,
    model_dir: Path | None = None,
    on_event: OnEvent | None = None,
) -> Report:
    """Checks data (sources.sources_of); what is wrong is in the report, not raised.

    With the folder of the tokenizer's model, its tokens are kept (cache.py).
    """
    report = Report()
    try:
        train, valid = sources_of(data, tell=on_event)
        if tokenizer is None:
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
        rows = [samples.row(i) for i in range(min(n_preview, len(samples)))]
        report.previews = _previews(rows, read.encoder)
        notes = samples.notes()
        report.formats = dict(notes.formats)
        report.samples, report.trained_turns = len(samples), notes.turns
        report.prompt_format, report.findings = notes.prompt_format, notes.where
        report.duplicates = duplicates(samples)
        found, others = dataset.parts(train, valid, read)
        for name, value in found.counts.items():
            setattr(report, name, value)
        if valid is None and others is not None:
            report.n_train, report.n_valid = found.n_rows, others.n_rows
        report.remarks = dataset.remarks(data, found, others, train, valid)
        for source in (train, *([valid] if valid else [])):
            read.check(source)
    except InputError as error:
        report.ok, report.error = False, str(error)
    return report


def _previews(rows: list[Any], encoder: Encoder) -> list[Preview]:
    """Each row after truncation: one sequence, or both of a pair."""
    shown = []
    for row in rows:
        short, _, _ = dataset.shorten(row, encoder)
        for own in sequences(short):
            texts, weights = _texts(own.ids.tolist(), encoder), own.weights.tolist()
            tokens = [(t, w != 0, w) for t, w in zip(texts, weights, strict=True)]
            shown.append(Preview(own.source, tokens, [FINDINGS[name] for name in own.findings]))
    return shown


def _texts(ids: list[int], encoder: Encoder) -> list[str]:
    """The text of every token; a character spread over several tokens is shown at the last."""
    texts, before, shown = [], 0, 0  # ids[before:shown] give the context in which a token decodes
    for j in range(len(ids)):
        known, text = encoder.decode(ids[before:shown]), encoder.decode(ids[before : j + 1])
        whole = not text.endswith("\ufffd") or j + 1 == len(ids)
        texts.append(text[len(known) :] if whole else "")
        if whole:
            before, shown = shown, j + 1
    return texts
