"""What a data set trains, for people to look at before a run."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from ..events import OnEvent
from . import dataset
from .encoding import Encoder, Options, sequences
from .notes import FINDINGS
from .sources import sources_of
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

    `n_train` and `n_valid` count rows read; lengths are in tokens before truncation, all of the
    training file like the counts after them (None without a tokenizer). `remarks` say what is left
    out of both files or wrong with them, `findings` name rows of the training file by what is wrong
    with them (notes.FINDINGS). `error` is one sentence.
    """

    ok: bool = True
    error: str | None = None
    format: str | None = None
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
    tell: OnEvent = lambda event: None,
) -> Report:
    """Checks data (sources.sources_of); what is wrong is in the report, not raised."""
    report = Report()
    try:
        train, valid = sources_of(data, tell=tell)
        report.format, report.n_train, _ = dataset.read(train, options)
        if valid:
            _, report.n_valid, _ = dataset.read(valid, options)
        if tokenizer is None:
            return report
        encoder = Encoder(tokenizer, options)
        _, _, rows = dataset.read(train, options, encoder)
        lengths = np.percentile(list(map(len, rows)), (0, 50, 95, 100), method="higher")
        report.length_min, report.length_median, report.length_p95, report.length_max = map(
            int, lengths
        )
        report.previews = _previews(rows[:n_preview], encoder)
        notes = encoder.notes
        report.samples, report.trained_turns = len(rows), notes.turns
        report.prompt_format, report.findings = notes.prompt_format, notes.where
        found = dataset.fit(train.name, report.format, rows, encoder)
        for name, count in found.counts.items():
            setattr(report, name, count)
        others = dataset.load_split(valid, tokenizer, options) if valid else None
        report.remarks = dataset.remarks(data, found, others, train, valid)
        if options.strict:
            dataset.refuse_faults(train.name, notes)
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
