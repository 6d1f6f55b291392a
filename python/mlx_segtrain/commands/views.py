"""Prints the results of commands as text, in colour on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mlx_segtrain.commands.terminal import as_it_is, width_of
from mlx_segtrain.commands.words import duration, hanging
from mlx_segtrain.data.notes import FINDINGS

if TYPE_CHECKING:
    from mlx_segtrain.adapters import conversion, discovery, folding
    from mlx_segtrain.data import Preview, Report
    from mlx_segtrain.models.conversion import Made
    from mlx_segtrain.ops import selfcheck as doctor
    from mlx_segtrain.planning.report import PlanReport
    from mlx_segtrain.training import EvalResult, ScoreResult, Verified

#: Styles for tokens in the loss and for all other tokens. Each kind has two alternating styles, so
#: that the boundaries between tokens are visible.
TRAINED = ("green underline", "green reverse")
CONTEXT = ("default", "dim")
#: The number of layers to show in the report on a merge.
WORST = 8


def show_report(report: Report, console: Console | None = None) -> None:
    """Prints the report on a data set, with the tokens of its first rows."""
    console = console or Console(highlight=False)
    line = as_it_is(console, indent=9)
    line(f"format   {formats(report)}")
    line(f"rows     {report.n_train:,} to train, {report.n_valid:,} to validate")
    if report.samples is not None:
        line(f"samples  {report.samples:,}, with {report.trained_turns:,} turns in the loss")
    if report.prompt_format == "chat":
        line("prompts  go through the chat template")
    elif report.prompt_format == "raw":
        line("prompts  are raw, without the chat template")
    if report.length_max is None:
        line("pass --model to count tokens and to see which of them are in the loss")
        return
    line(
        f"length   {report.length_min} to {report.length_max} tokens, "
        f"median {report.length_median}, 95 % have at most {report.length_p95}"
    )
    if report.tokens is not None:
        loss = f"{report.supervised_tokens:,} of them in the loss"
        line(f"tokens   {report.tokens:,} to process, {loss}")
    for row in bars(report):
        line(f"         {row}")
    if report.longest:
        line(f"longest  {', '.join(f'{place} ({n:,} tokens)' for place, n in report.longest)}")
    for name, text in epochs(report).items():
        line(f"{name:8} {text}")
    if report.duplicates:
        line(f"repeated {report.duplicates:,} rows repeat an earlier row (see --dedup)")
    if report.truncated is not None:
        line(f"rows cut {report.truncated:,} truncated, {report.dropped:,} dropped")
    for sentence in report.remarks:
        line(f"warning: {sentence}")
    for name, rows in report.findings.items():
        if len(rows) > 1:
            line(f"{FINDINGS[name]}: {', '.join(rows)}")
    if report.previews:
        line("")
        line(
            Text.assemble(("in the loss", TRAINED[0]), ", ", ("context only", CONTEXT[1]), ":")
            if console.is_terminal
            else "tokens in the loss are in ⟦ ⟧, all others are context:"
        )
    for preview in report.previews:
        line("")
        line(preview.source)
        for sentence in preview.findings:
            line(f"warning: {sentence}")
        line(_coloured(preview) if console.is_terminal else _marked(preview))


def formats(report: Report) -> str:
    """Returns the format of a data set's rows. If there are several formats, returns each with its
    count."""
    if len(report.formats) < 2:
        return str(report.format)
    return ", ".join(f"{n:,} {name}" for name, n in sorted(report.formats.items()))


def bars(report: Report, width: int = 40) -> list[str]:
    """Returns a line for each range of lengths, with its lower and upper end, a bar, and the number
    of samples."""
    if not report.histogram:
        return []
    most = max(own.count for own in report.histogram)
    ends = len(f"{report.histogram[-1].last:,}")
    return [
        f"{x.first:>{ends},} to {x.last:>{ends},} {_bar(x.count / most * width)} {x.count:,}"
        for x in report.histogram
    ]


def _bar(length: float) -> str:
    """Returns a bar of this length in characters. Its resolution is an eighth of a character."""
    whole, rest = divmod(round(length * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[rest].strip()


def epochs(report: Report) -> dict[str, str]:
    """Describes the length of an epoch, with and without packing."""
    found = {}
    if (own := report.epoch) is not None:
        found["epoch"] = f"{own.steps:,.6g} steps, {own.unused:.1%} of the tokens are padding"
        if own.seconds is not None:
            found["epoch"] += f", about {duration(own.seconds)}"
    if (own := report.packed) is not None:
        rows = f"{own.rows:,} rows that are {1 - own.unused:.1%} full (see --packing)"
        found["packed"] = f"{own.steps:,.6g} steps, {rows}"
    return found


def show_checks(report: doctor.Report, console: Console | None = None) -> None:
    """Prints a table of kernel checks on a device, followed by the reasons for failures."""
    console = console or Console(highlight=False)
    line = as_it_is(console)
    line(f"device         {report.device} ({'GPU' if report.gpu else 'CPU'})")
    line(f"MLX            {report.mlx}")
    line(f"mlx-segtrain   {report.version}")
    bad = Text("off" if report.gpu else "wrong", "bold red")
    table = Table("kernel", "case", "result", box=box.SIMPLE_HEAD)
    for name in ("error", "ms", "plain ms"):
        table.add_column(name, justify="right")
    for x in report.checks:
        times = ("–" if ms is None else f"{ms:.2f}" for ms in (x.ms, x.plain_ms))
        error = "–" if x.error is None else f"{x.error:.1e}"
        table.add_row(x.op, x.case, bad if x.reason else Text("ok", "green"), error, *times)
    console.print(table)
    for x in report.checks:
        if x.reason:
            line(f"{x.op}{x.case and f' ({x.case})'}: {x.reason}")
    if report.ok:
        line("every kernel agrees with the plain code")
    elif report.gpu:
        line("a kernel that is off is not used on this device; another implementation replaces it")


def _coloured(preview: Preview) -> Text:
    text = Text()
    for j, (token, trained, _) in enumerate(preview.tokens):
        text.append(token, (TRAINED if trained else CONTEXT)[j % 2])
    return text


def _marked(preview: Preview) -> str:
    return "".join(f"⟦{x}⟧" if trained else x for x, trained in merged(preview.tokens))


def merged(tokens: Iterable[tuple[str, bool, float]]) -> Iterator[tuple[str, bool]]:
    """Yields the text of each run of consecutive tokens that are all in the loss or all outside it,
    and whether they are in the loss."""
    for trained, run in groupby(tokens, key=lambda token: token[1]):
        yield "".join(token for token, *_ in run), trained


def show_plan(report: PlanReport) -> None:
    """Prints a memory plan."""

    def gb(n: int) -> str:
        return f"{n / 1e9:.2f} GB"

    width = width_of(Console(highlight=False))

    def line(name: str, text: str) -> None:
        print(hanging(name, text, 14, width))

    rows = f"{report.rows} row{'s' * (report.rows != 1)}"
    line("batch", f"{rows} of {report.tokens:,} tokens, {report.trained_tokens:,} in the loss")
    for own in report.pipeline:
        peak = "" if own.peak is None else f"; peak {gb(own.peak)} of {gb(own.budget)}"
        there, back = (f"{n / 1e6:,.1f} MB" for n in own.sent)
        sends = [f"{there} on"] * bool(own.sent[0]) + [f"{back} back"] * bool(own.sent[1])
        text = f"layers {own.layers}, {gb(own.weights)} of weights{peak}; busy {own.busy:.0%}"
        more = f"; sends {' and '.join(sends)} for each batch" if sends else ""
        line(f"rank {own.rank}", text + more)
    if report.pipeline:
        line("", "the lines below describe the rank that is closest to its budget")
    line("budget", gb(report.budget))
    if not report.predicted:
        line("weights", gb(report.weights))
    line("plan", report.plan)
    if not report.predicted:
        return
    line("peak", f"{gb(report.peak)}, predicted")
    for name, n in report.parts.items():
        line("", f"{gb(n)}  {name}")
    if report.rollout_peak is not None:
        line("rollouts", f"{gb(report.rollout_peak)}, {report.rollout_batch} completions at once")
    line("recomputed", f"{report.recomputed:.0%} of the work of a plan without recomputation")
    line("longest", _longest(report.longest, report.max_length))
    for other in report.alternatives:
        if other.fits:
            pace = "as fast" if abs(other.slower) < 0.005 else f"{other.slower:+.0%} work"
            text = f"{other.plan}; {gb(other.peak)}, {pace}"
        else:
            text = f"does not fit: needs at least {gb(other.peak)}"
        line(f"in {gb(other.budget)}", f"{text}; {_longest(other.longest, report.max_length)}")
    if report.ranks:
        line("ranks", "  each sends      computes       adds up     speedup")
    for own in report.ranks:
        times = f"{own.compute_s:>12.3g} s{own.add_s:>12.3g} s"
        speed = f"{own.speedup:>9.3g} times ({own.speedup / own.ranks:.0%})"
        line(f"{own.ranks:>5}", f"{own.sent / 1e6:>9,.1f} MB{times}{speed}")
    if report.ranks and report.rollout_batch is not None:
        line("", "This assumes one update with one pass on each rank, and excludes generation.")


def _longest(tokens: int, most: int | None) -> str:
    if not tokens:
        return "no length fits"
    if tokens == most:
        return f"rows of {tokens:,} tokens fit, the model's context length"
    known = f" (the model's context length is {most:,})" if most else ""
    return f"rows of up to {tokens:,} tokens fit{known}"


def show_verified(found: Verified) -> None:
    """Prints which inputs of a run have changed."""
    ended = "has not ended" if found.step is None else f"{found.step} of {found.iters} steps"
    print(f"{'run':12s}  {found.run}: {ended}")
    for part, faults in found.parts.items():
        print(f"{part:12s}  {'; '.join(faults) or 'the same'}")


def show_evaluation(result: EvalResult, unit: str) -> None:
    """Prints a loss with its unit, and the number of tokens on which it was measured."""
    print(f"loss        {result.loss:.4f} {unit}")
    width = max(15, *map(len, result.metrics)) + 1 if result.metrics else 0
    for name, x in result.metrics.items():
        print(f"{name.replace('_', ' '):{width}s}{x:.4f}")
    if result.perplexity is not None:
        print(f"perplexity  {result.perplexity:.3f}")
    print(f"tokens      {result.tokens:,} in the loss, in {result.rows:,} rows")
    print(f"rows cut    {result.truncated:,} truncated, {result.dropped:,} dropped")


def show_score(result: ScoreResult) -> None:
    """Prints the mean rewards and the pass rates of completions."""
    print(f"reward      {result.reward:.4f} (standard deviation {result.reward_std:.4f})")
    for name, x in result.rewards.items() if len(result.rewards) > 1 else ():
        print(f"  {name:10s}{x:.4f}")
    for k, x in result.pass_at.items():
        print(f"{f'pass@{k}':12s}{x:.1%}")
    print(f"length      {result.length:.1f} tokens, {result.truncated:.1%} truncated")
    print(f"measured    {result.completions} completions of each of {result.rows:,} prompts")


def show_converted(done: conversion.Converted) -> None:
    """Prints the path, layers and ranks of a converted adapter, and how much it differs from the
    original."""
    ranks = ", ".join(map(str, done.ranks))
    print(f"adapter     {done.path}")
    print(f"layers      {done.linears} linear layers of rank {ranks}")
    print(f"verified    |ΔW·x| up to {done.update:.4g} differs by at most {done.difference:.2g}")


def show_made(made: Made) -> None:
    """Prints the folder and the size of a converted model."""
    print(f"model    {made.path}, {made.size / 1e9:.2f} GB (before: {made.before / 1e9:.2f} GB)")


def wide() -> Console:
    """Returns a console that is wide enough for long names even if the output is not a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def show_fold(report: folding.Report) -> None:
    """Prints the result of a merge, and the linear layers that lost the largest shares of their
    updates."""
    table = Table("layer", box=box.SIMPLE_HEAD)
    for name in ("bits", "update", "lost", "rounding"):
        table.add_column(name, justify="right")
    swallowed, say = report.swallowed, as_it_is(wide())
    for own in sorted(report.linears, key=lambda own: -own.lost)[:WORST]:
        bits = "dense" if own.bits is None else str(own.bits)
        share = f"{own.update / own.weight:.2e}" if own.weight else "–"
        style = "bold red" if own in swallowed else ""
        row = (bits, share, f"{own.lost:.1%}", f"{own.error:.2f}")
        table.add_row(escape(own.path), *row, style=style)
    print(f"model    {report.path}, {report.size / 1e9:.2f} GB")
    print(f"merged   {len(report.linears):,} linear layers")
    print(f"copied   {report.untouched:,} tensors unchanged")
    print(f"lost     {report.lost:.1%} of the update")
    if table.rows:
        left = len(report.linears) - len(table.rows)
        more = f" ({left:,} more: see --json)" if left else ""
        say(
            f"\nlayers that lost the most{more}; update is relative to the weight, rounding to the "
            "update:"
        )
        wide().print(table)
    if swallowed:
        quantized = any(own.bits is not None for own in swallowed)
        way = "--bits 8 or --dequantize" if quantized else "--dequantize --dtype float32"
        say(
            f"warning: {len(swallowed)} of {len(report.linears)} linear layers lost more than a "
            f"tenth of the update to rounding. Merge with {way}, or serve the adapter without "
            "merging it."
        )


def show_adapters(found: Sequence[discovery.Found]) -> None:
    """Prints a table of adapters, followed by the reasons why other adapters cannot be used."""
    asked = any(own.fits is not None for own in found)
    columns = ("adapter", "base", "kind", "rank", "layers", "step", "best loss", "MB")
    table = Table(*columns, *(("fits",) if asked else ()), box=box.SIMPLE_HEAD)
    for own in (own for own in found if own.fault is None):
        ranks = ", ".join(map(str, own.ranks))
        best = "–" if own.best_loss is None else f"{own.best_loss:.4f}"
        step = "–" if own.step is None else str(own.step)
        base = own.base.rstrip("/").rsplit("/", 1)[-1] or "–"
        row = [escape(str(own.path)), escape(base), own.kind, ranks, str(own.linears), step, best]
        row.append(f"{own.size / 1e6:.1f}")
        table.add_row(*row, *(("yes" if own.fits else "no",) if asked else ()))
    if table.rows:
        wide().print(table)
    else:
        print("no adapters found")
    for own in found:
        if own.fault is not None:
            print(f"left out: {own.fault}")
