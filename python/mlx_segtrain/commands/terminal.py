"""Runs and data sets, shown to people: with bar and colour on a terminal, else as plain lines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from mlx_segtrain.data.notes import FINDINGS
from mlx_segtrain.events import Event, speed

if TYPE_CHECKING:
    from mlx_segtrain.adapters import conversion, discovery, folding
    from mlx_segtrain.data import Preview, Report
    from mlx_segtrain.models.conversion import Made
    from mlx_segtrain.ops import selfcheck as doctor
    from mlx_segtrain.planning.report import PlanReport
    from mlx_segtrain.training import EvalResult, Verified

TRAINED = ("green underline", "green reverse")  # of neighbouring tokens, to tell them apart
CONTEXT = ("default", "dim")


def answer(found: Any, show: Callable[[Any], None], as_json: bool, ok: bool | None = None) -> int:
    """Print a dataclass, or a list of them, as JSON or as `show` does, and return the exit code.

    The JSON object has `ok` where it is given; if it is False, the code is 1.
    """
    if as_json:
        said = found if ok is None else asdict(found) | {"ok": ok}
        print(json.dumps(said, default=lambda x: str(x) if isinstance(x, Path) else asdict(x)))
    else:
        show(found)
    return int(ok is False)


def as_it_is(console: Console) -> Callable[[str | Text], None]:
    """Print a text on one line, however long, with its brackets."""
    return partial(console.print, markup=False, soft_wrap=True)


class Terminal:
    """Show events (use it as on_event): `with Terminal() as show: train(config, show)`.

    The bar is drawn only where the console is a terminal; everything else is one line per event.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.iters = 0
        self.gone = False
        self.console = console or Console(highlight=False)
        self._line = as_it_is(self.console)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._waiting: TaskID | None = None
        self._told = 0.0

    def __enter__(self) -> Terminal:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event; `failed` is not shown, since its exception follows.

        Where the terminal or the reader of the output has gone away, nothing is shown any more.
        """
        if self.gone:
            return
        try:
            self._show(event)
        except (OSError, SystemExit):  # the second is rich's answer to a pipe without a reader
            self.gone = True

    def _show(self, event: Event) -> None:
        if event["type"] == "stage":
            self._stage(event)
        elif event["type"] == "metric" and event["kind"] == "val":
            text = f"loss {event['loss']:.4f}"
            if event["perplexity"] is not None:
                text += f", perplexity {event['perplexity']:.2f}"
            if "accuracy" in event:
                text += f", accuracy {event['accuracy']:.1%}, margin {event['margin']:.3f}"
            self._line(f"step {event['step']}: validation {text}")
        elif event["type"] == "metric" and event["kind"] == "score":
            found = event.get("scores") or {"failed": event.get("error")}
            text = ", ".join(f"{name} {x}" for name, x in found.items())
            self._line(f"step {event['step']}: score {text}")
        elif event["type"] == "warning":
            self._line(f"warning: {event['message']}")
        elif event["type"] == "sample":
            self._line(f"step {event['step']}: {event['prompt']}")
            self._line(f"  -> {event['text'].strip()}")
        elif event["type"] == "metric":
            self._train(event)

    def _stage(self, event: Event) -> None:
        if "share" in event:
            return self._wait(event)
        if self._waiting is not None:
            self._bar.remove_task(self._waiting)
            self._waiting = None
        if event["stage"] == "train":
            self.iters = event["iters"]
            done = event["step"]
            self._task = self._bar.add_task(
                "train", total=self.iters, completed=done, status=f"{done}/{self.iters}"
            )
        if event["stage"] != "done" and event.get("message"):
            self._line(event["message"])

    def _wait(self, event: Event) -> None:
        """What a stage waits for, downloads or rows to be tokenized: a bar, or a line every ten
        seconds."""
        share, now = event["share"], time.monotonic()
        if not self.console.is_terminal:
            if now - self._told > 10 or share == 1:
                self._told = now
                self._line(event["message"])
            return
        if self._waiting is None:
            self._waiting = self._bar.add_task(event["stage"], total=None, status="")
        left_s = event.get("left_s")
        left = "" if left_s is None else f"  {duration(left_s)} left"
        total = None if share is None else 1.0
        status = event["message"] + left
        self._bar.update(self._waiting, completed=share or 0, total=total, status=status)

    def _train(self, event: Event) -> None:
        assert self._task is not None  # the stage `train` comes before its metrics
        left_s = event["step_s"] * (self.iters - event["step"])
        accuracy = f"  accuracy {event['accuracy']:.0%}" if "accuracy" in event else ""
        status = (
            f"loss {event['loss']:.4f}{accuracy}  {speed(event)}  "
            f"peak {event['peak_gb']:.2f} GB  {duration(left_s)} left"
        )
        step = f"{event['step']}/{self.iters}"
        self._bar.update(self._task, completed=event["step"], status=f"{step}  {status}")
        if not self.console.is_terminal:
            self._line(f"step {step}: {status}")


def errors() -> Console:
    """Where what is no result is shown."""
    return Console(stderr=True, highlight=False)


@contextmanager
def downloads() -> Iterator[Callable[[Event], None]]:
    """Show what is downloaded and tokenized, and no other event, where results are not."""
    with Terminal(errors()) as show:
        yield lambda event: show(event) if "share" in event else None


def duration(seconds: float) -> str:
    """Seconds as 7s, 3m20s or 2h05m."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total // 60 % 60:02d}m"


def show_report(report: Report, console: Console | None = None) -> None:
    """Print what a data set trains; its first rows token by token where a tokenizer was given."""
    console = console or Console(highlight=False)
    line = as_it_is(console)
    line(f"format   {formats(report)}")
    line(f"rows     {report.n_train:,} to train, {report.n_valid:,} to validate")
    if report.samples is not None:
        line(f"samples  {report.samples:,}, with {report.trained_turns:,} trained turns")
    if report.prompt_format == "chat":
        line("prompts  go through the chat template")
    elif report.prompt_format == "raw":
        line("prompts  are raw, without the chat template")
    if report.length_max is None:
        line("give --model to count tokens and to see which of them are trained")
        return
    line(
        f"length   {report.length_min} to {report.length_max} tokens, "
        f"median {report.length_median}, 95 % have at most {report.length_p95}"
    )
    line(f"tokens   {report.tokens:,} to run, {report.supervised_tokens:,} of them in the loss")
    for row in bars(report):
        line(f"         {row}")
    if report.longest:
        line(f"longest  {', '.join(f'{place} ({n:,} tokens)' for place, n in report.longest)}")
    for name, text in epochs(report).items():
        line(f"{name:8} {text}")
    if report.duplicates:
        line(f"equal    {report.duplicates:,} rows are equal to an earlier one (see --dedup)")
    line(f"rows cut {report.truncated:,} truncated, {report.dropped:,} dropped")
    for sentence in report.remarks:
        line(f"warning: {sentence}")
    for name, rows in report.findings.items():
        if len(rows) > 1:
            line(f"{FINDINGS[name]}: {', '.join(rows)}")
    if report.previews:
        line("")
        line(
            Text.assemble(("trained", TRAINED[0]), " and ", ("context", CONTEXT[1]), " tokens:")
            if console.is_terminal
            else "trained tokens stand in ⟦ ⟧, all others are context:"
        )
    for preview in report.previews:
        line("")
        line(preview.source)
        for sentence in preview.findings:
            line(f"warning: {sentence}")
        line(_coloured(preview) if console.is_terminal else _marked(preview))


def formats(report: Report) -> str:
    """The format of a data set's rows, or several with their counts."""
    if len(report.formats) < 2:
        return str(report.format)
    return ", ".join(f"{n:,} {name}" for name, n in sorted(report.formats.items()))


def bars(report: Report, width: int = 40) -> list[str]:
    """A line for each range of lengths: from, to, a bar, and how many samples have them."""
    if not report.histogram:
        return []
    most = max(own.count for own in report.histogram)
    ends = len(f"{report.histogram[-1].last:,}")
    return [
        f"{x.first:>{ends},} to {x.last:>{ends},} {_bar(x.count / most * width)} {x.count:,}"
        for x in report.histogram
    ]


def _bar(length: float) -> str:
    """As long as that, in eighths of a character."""
    whole, rest = divmod(round(length * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[rest].strip()


def epochs(report: Report) -> dict[str, str]:
    """What an epoch takes, as the rows are and packed, in words."""
    said = {}
    if (own := report.epoch) is not None:
        said["epoch"] = f"{own.steps:,.6g} steps, {own.unused:.1%} of the tokens are padding"
        if own.seconds is not None:
            said["epoch"] += f", about {duration(own.seconds)}"
    if (own := report.packed) is not None:
        said["packed"] = (
            f"{own.steps:,.6g} steps, {own.rows:,} rows that are {1 - own.unused:.1%} full (see "
            "--packing)"
        )
    return said


def show_checks(report: doctor.Report, console: Console | None = None) -> None:
    """Print whether a device's kernels are right, and below the table why one is not."""
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
        line("a kernel that is off is not used on this device: the next implementation serves")


def _coloured(preview: Preview) -> Text:
    text = Text()
    for j, (token, trained, _) in enumerate(preview.tokens):
        text.append(token, (TRAINED if trained else CONTEXT)[j % 2])
    return text


def _marked(preview: Preview) -> str:
    parts = []
    for trained, run in groupby(preview.tokens, key=lambda token: token[1]):
        text = "".join(token for token, _, _ in run)
        parts.append(f"⟦{text}⟧" if trained else text)
    return "".join(parts)


def show_plan(report: PlanReport) -> None:
    """Print what a run would take."""

    def gb(n: int) -> str:
        return f"{n / 1e9:.2f} GB"

    def line(name: str, text: str) -> None:
        print(f"{name:<12}  {text}")

    line("batch", f"{report.rows} × {report.tokens} tokens, {report.trained_tokens} trained")
    line("budget", gb(report.budget))
    if not report.predicted:
        line("weights", gb(report.weights))
        line("plan", report.plan)
        return
    line("plan", report.plan)
    line("peak", f"{gb(report.peak)}, predicted")
    for name, n in report.parts.items():
        line("", f"{gb(n)}  {name}")
    line("recomputed", f"{report.recomputed:.0%} of the work that must be done")
    made = f"; the model was made for {report.max_length}" if report.max_length else ""
    line("longest", f"{report.longest} tokens a row fit in the budget{made}")
    for other in report.alternatives:
        if other.fits:
            pace = "as fast" if abs(other.slower) < 0.005 else f"{other.slower:+.0%} work"
            text = f"{other.plan}; {gb(other.peak)}, {pace}"
        else:
            text = f"does not fit: {gb(other.peak)} at least"
        longest = f"up to {other.longest} tokens" if other.longest else "no length fits"
        line(f"in {gb(other.budget)}", f"{text}; {longest}")
    if report.ranks:
        line("ranks", "  each sends      computes       adds up   as fast as one")
    for own in report.ranks:
        times = f"{own.compute_s:>12.3g} s{own.add_s:>12.3g} s"
        speed = f"{own.speedup:>9.3g} times ({own.speedup / own.ranks:.0%})"
        line(f"{own.ranks:>5}", f"{own.sent / 1e6:>9,.1f} MB{times}{speed}")


def show_verified(found: Verified) -> None:
    """Print which parts of a run have changed since."""
    ended = "has not ended" if found.step is None else f"{found.step} of {found.iters} steps"
    print(f"{'run':12s}  {found.run}: {ended}")
    for part, faults in found.parts.items():
        print(f"{part:12s}  {'; '.join(faults) or 'the same'}")


def show_evaluation(result: EvalResult) -> None:
    """Print a loss, and how many tokens it was measured on."""
    per = "pair" if result.metrics else "token"
    print(f"loss        {result.loss:.4f} nats per {per}")
    for name, x in result.metrics.items():
        print(f"{name.replace('_', ' '):16s}{x:.4f}")
    if result.perplexity is not None:
        print(f"perplexity  {result.perplexity:.3f}")
    print(f"tokens      {result.tokens:,} trained, in {result.rows:,} rows")
    print(f"rows cut    {result.truncated:,} truncated, {result.dropped:,} dropped")


def show_converted(done: conversion.Converted) -> None:
    """Print what an adapter that was written holds, and how far it is from what was read."""
    ranks = ", ".join(map(str, done.ranks))
    print(f"adapter     {done.path}")
    print(f"linears     {done.linears}, of rank {ranks}")
    print(f"read again  |ΔW·x| up to {done.update:.4g}, off by {done.difference:.2g} at most")


def show_made(made: Made) -> None:
    """Print a model that was converted."""
    print(f"model    {made.path}, {made.size / 1e9:.2f} GB (it was {made.before / 1e9:.2f} GB)")


def wide() -> Console:
    """A console that breaks no name where there is no terminal to fit into."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def show_fold(report: folding.Report) -> None:
    """Print what a fold did to each linear, and which updates it swallowed."""
    table = Table("linear", box=box.SIMPLE_HEAD)
    for name in ("bits", "update / weight", "lost", "rounding / update"):
        table.add_column(name, justify="right")
    swallowed = report.swallowed
    for own in report.linears:
        bits = "dense" if own.bits is None else str(own.bits)
        share = f"{own.update / own.weight:.2e}" if own.weight else "–"
        style = "bold red" if own in swallowed else ""
        row = (bits, share, f"{own.lost:.1%}", f"{own.error:.2f}")
        table.add_row(escape(own.path), *row, style=style)
    wide().print(table)
    print(f"model    {report.path}, {report.size / 1e9:.2f} GB")
    print(f"copied   {report.untouched:,} tensors as they were")
    print(f"lost     {report.lost:.1%} of the update")
    if swallowed:
        quantized = any(own.bits is not None for own in swallowed)
        way = "--bits 8 or --dequantize" if quantized else "--dequantize --dtype float32"
        print(
            f"warning: in {len(swallowed)} of {len(report.linears)} linears more than a tenth of "
            f"the update is lost to the grid of the folded weight. Fold with {way}, or serve base "
            "and adapter apart."
        )


def show_adapters(found: Sequence[discovery.Found]) -> None:
    """Print adapters, and below the table why one cannot be used."""
    asked = any(own.fits is not None for own in found)
    columns = ("adapter", "base", "kind", "rank", "linears", "step", "best loss", "MB")
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
        print("no adapters here")
    for own in found:
        if own.fault is not None:
            print(f"left out: {own.fault}")
