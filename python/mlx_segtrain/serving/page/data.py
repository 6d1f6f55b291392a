"""What a data set trains: counts, lengths, and its first rows token by token."""

from itertools import groupby

from nicegui import ui

from ...data import Preview, Report
from . import text
from .frame import fact, facts, notice, tag

#: Tokens of a row that are shown: a page of a hundred thousand helps nobody.
SHOWN = 1500


class Tokens(ui.element, component="tokens.js"):
    """Tokens of a row, marked where they are trained."""

    def __init__(self, preview: Preview):
        super().__init__()
        own = preview.tokens[:SHOWN]
        self._props["runs"] = [
            (trained, [(_visible(text), weight) for text, _, weight in run])
            for trained, run in groupby(own, key=lambda token: token[1])
        ]


def _visible(token: str) -> str:
    return token.replace("\n", "↵\n").replace("\t", "⇥")


def show_report(report: Report) -> None:
    """Within the element that is open."""
    if not report.ok:
        notice(report.error or "the data cannot be read.", "bad").props("role=alert")
    with facts():
        fact("Format", report.format or "unknown")
        fact("Rows to train", f"{report.n_train:,}")
        fact("Rows to validate", f"{report.n_valid:,}")
        if report.length_max is not None:
            fact("Tokens a row, median", f"{report.length_median:,}")
            fact("95 of 100 rows up to", f"{report.length_p95:,} tokens")
            fact("Longest row", f"{report.length_max:,} tokens")
        if report.samples not in (None, report.n_train):
            fact("Samples", f"{report.samples:,}")
        if report.prompt_format:
            fact("Prompts", "chat template" if report.prompt_format == "chat" else "raw")
        if report.tokens:
            share = (report.supervised_tokens or 0) / report.tokens
            fact("Trained tokens", f"{report.supervised_tokens:,} ({text.percent(share)})")
    for sentence in report.remarks:
        notice(f"{sentence}.", "warn")
    if not report.previews:
        return
    with ui.element("div").classes("row-line small"):
        tag("span", "First rows, token by token:", "muted")
        with ui.element("span").classes("tokens legend"), ui.element("mark"):
            tag("span", "trained")
        with ui.element("span").classes("tokens legend"):
            tag("span", "only read")
    for preview in report.previews:
        tag("div", preview.source, "small muted wrap")
        for sentence in preview.findings:
            notice(f"{sentence}.", "warn")
        Tokens(preview)
        if len(preview.tokens) > SHOWN:
            tag("div", f"and {len(preview.tokens) - SHOWN:,} more tokens", "small muted")
