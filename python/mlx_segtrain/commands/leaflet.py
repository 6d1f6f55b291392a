"""Writes the report of `inspect` as one HTML file that has no scripts and no external resources."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from mlx_segtrain.commands.views import epochs, formats, merged
from mlx_segtrain.data import Preview, Report
from mlx_segtrain.data.notes import FINDINGS
from mlx_segtrain.errors import InputError
from mlx_segtrain.files import write_text

#: The maximum number of tokens to show per row.
SHOWN = 1500
STYLE = """
:root { color-scheme: light dark; --bar: #4a7dbd; --mark: #cfe8cf; --line: #8884 }
@media (prefers-color-scheme: dark) { :root { --mark: #24502a } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } td.wide { width: 24rem }
td div { background: var(--bar); height: .8rem; min-width: 1px } tr.cut div { background: #c0643c }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line);
padding: .6rem } mark { background: var(--mark); color: inherit } .bad { color: #b3401f }
"""


def write_report(file: Path, report: Report, data: Path | None, most: int) -> None:
    """Writes the page. `most` is max_seq_length. Raises InputError if the file cannot be
    written."""
    try:
        text = page(report, "the data" if data is None else data.name, most)
        write_text(file, text.encode("utf-8", "replace").decode())  # file names may not be UTF-8
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror or error}.") from error


def page(report: Report, title: str, most: int) -> str:
    """Returns a report as HTML."""
    title = escape(title)
    parts = [f"<h1>{title}</h1>"]
    if report.error is not None:
        parts.append(f'<p class="bad">{escape(report.error)}</p>')
    parts.append(_table(_facts(report)))
    if report.histogram:
        parts += ["<h2>Tokens per sample</h2>", _histogram(report, most)]
    if report.longest:
        rows = ((place, f"{n:,} tokens") for place, n in report.longest)
        parts += ["<h2>Longest rows</h2>", _table(rows)]
    if report.remarks:
        items = "".join(f"<li>{escape(own)}</li>" for own in report.remarks)
        parts.append(f"<h2>Omitted data and problems</h2><ul>{items}</ul>")
    if report.findings:
        rows = ((FINDINGS[name], ", ".join(own)) for name, own in report.findings.items())
        parts += ["<h2>Rows with problems</h2>", _table(rows)]
    if report.previews:
        parts.append("<h2>First rows</h2><p><mark>Marked</mark> tokens are in the loss.</p>")
        parts += map(_preview, report.previews)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    counts = (
        ("Training rows", report.n_train),
        ("Validation rows", report.n_valid),
        ("Samples", report.samples),
        ("Turns in the loss", report.trained_turns),
        ("Rows that repeat an earlier row", report.duplicates),
        ("Tokens to process", report.tokens),
        ("Tokens in the loss", report.supervised_tokens),
        ("Tokens per sample, median", report.length_median),
        ("Tokens per sample, 95th percentile", report.length_p95),
        ("Truncated", report.truncated),
        ("Dropped", report.dropped),
    )
    facts = [(name, f"{n:,}") for name, n in counts if n is not None]
    lengths = [(name.capitalize(), text) for name, text in epochs(report).items()]
    return [("Format", formats(report)), *facts, *lengths]


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{''.join(cells)}</table>"


def _histogram(report: Report, most: int) -> str:
    """Returns a histogram of the samples' lengths as an HTML table. The bars of truncated samples
    have a different colour."""
    top = max(own.count for own in report.histogram) or 1
    rows = (
        f'<tr{" class=cut" if own.first > most else ""}><td class="n">{own.first:,} to '
        f'{own.last:,}</td><td class="wide"><div style="width:{100 * own.count / top:.1f}%">'
        f'</div></td><td class="n">{own.count:,}</td></tr>'
        for own in report.histogram
    )
    return f"<table>{''.join(rows)}</table>"


def _preview(own: Preview) -> str:
    runs = (
        f"<mark>{escape(text)}</mark>" if trained else escape(text)
        for text, trained in merged(own.tokens[:SHOWN])
    )
    more = len(own.tokens) - SHOWN
    left = f"<p>and {more:,} more tokens</p>" if more > 0 else ""
    findings = "".join(f'<p class="bad">{escape(x)}</p>' for x in own.findings)
    return f"<h3>{escape(own.source)}</h3>{findings}<pre>{''.join(runs)}</pre>{left}"
