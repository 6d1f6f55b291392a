"""Shows the progress of a run: as a bar on a terminal, and as plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from mlx_segtrain.commands.output import Output, current, uncopied
from mlx_segtrain.commands.words import command_line, duration, hanging, wrapped
from mlx_segtrain.events import Event, about_ranks, speed

#: Minimum number of columns at which all figures are shown beside the bar.
WIDE = 110
#: The number of columns that stay empty at the end of the bar's line.
ROOM = 3


def answer(found: Any, show: Callable[[Any], None], as_json: bool, ok: bool | None = None) -> int:
    """Prints a dataclass, or a list of dataclasses, as JSON or with `show`. Returns the exit code.

    If `ok` is given, it is added to the JSON object, and it determines the exit code: 0 for True, 1
    for False.
    """
    if as_json:
        value = found if ok is None else asdict(found) | {"ok": ok}
        print(json.dumps(value, default=lambda x: str(x) if isinstance(x, Path) else asdict(x)))
    else:
        show(found)
    return int(ok is False)


def width_of(console: Console) -> int:
    """Returns the width of a terminal. If the console is not a terminal, returns a width at which
    no line is wrapped."""
    return console.width if console.is_terminal else 10**6


def as_it_is(console: Console, indent: int = 0) -> Callable[[str | Text], None]:
    """Returns a function that prints text without interpreting markup. On a terminal, the function
    wraps lines between words, and indents continuation lines by `indent` spaces."""
    show = partial(console.print, markup=False, soft_wrap=True)
    if not console.is_terminal:
        return show

    def fitted(text: str | Text) -> None:
        if isinstance(text, str):
            lines = (wrapped(own, console.width, indent) for own in text.splitlines())
            text = "\n".join(lines)
        show(text)

    return fitted


@dataclass
class Narrowed:
    """Leaves the last columns of the line empty for the ^C that the terminal echoes. If the line
    were full, the ^C would cause a line break, and the bar would be drawn again on the next
    line."""

    inner: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.inner, options.update_width(options.max_width - ROOM))


class Bar(Progress):
    def get_renderable(self) -> RenderableType:
        return Narrowed(super().get_renderable())


class Terminal:
    """Shows the events and steps of a run. Pass the object as `on_event` and its method `step` as
    `on_step`:

        with Terminal() as show:
            train(config, show, on_step=show.step)

    Draws a progress bar if the console is a terminal; otherwise, prints one line per event.
    `output` determines how much is shown and logged; by default, it is the output of the running
    command.
    """

    def __init__(self, console: Console | None = None, output: Output | None = None) -> None:
        self.iters = 0
        self.gone = False
        self.output = output or current()
        self.quiet, self.verbose = self.output.quiet, self.output.verbose
        self.console = console or Console(highlight=False, file=uncopied(sys.stdout))
        self._note = self.output.note
        self._print = as_it_is(self.console)
        self._draws = self.console.is_terminal and not self.quiet and not self.verbose
        self._bar = Bar(
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}", markup=False),
            console=self.console,
            disable=not self._draws,
            expand=True,
        )
        self._task: TaskID | None = None
        self._waiting: TaskID | None = None
        self._told = 0.0
        self._budget: float | None = None  # the budget of the memory plan, in 10⁹ bytes
        self._loss = ""  # the loss of the last evaluation
        self._last: Event | None = None  # the event whose figures are beside the bar

    def __enter__(self) -> Terminal:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Shows an event. Ignores a `failed` event, because its exception is reported later."""
        self._safely(self._show, event)

    def step(self, event: Event) -> None:
        """Advances the bar, and shows the metrics of a step."""
        self._safely(self._step, event)

    def stop_bar(self) -> None:
        """Stops the bar, which stays visible above the results."""
        self._safely(lambda _: self._bar.stop(), None)

    def say(self, text: str) -> None:
        """Shows a result."""
        self._safely(self._say, text)

    def fact(self, name: str, text: str) -> None:
        """Shows a line of a result. Continuation lines are indented to the column where `text`
        starts."""
        self.say(hanging(name, text, 17, width_of(self.console)))

    def command(self, what: str, argv: Sequence[str]) -> None:
        """Shows a command that can be pasted into a shell."""
        text = command_line(argv, width_of(self.console) - 3).replace("\n", "\n  ")
        self._note(f"{what}: {text}")
        show = partial(self.console.print, markup=False, soft_wrap=True)
        self._safely(show, f"{what}:\n  {text}")

    def _safely(self, show: Callable[[Any], None], what: Any) -> None:
        """Shows an item, unless the terminal or the program that reads the output is gone."""
        if self.gone:
            return
        try:
            show(what)
        except (OSError, SystemExit):  # rich raises SystemExit if a pipe is closed
            self.gone = True

    def _say(self, text: str) -> None:
        self._note(text)
        self._print(text)

    def _line(self, text: str) -> None:
        self._note(text)
        if not self.quiet:
            self._print(text)

    def _show(self, event: Event) -> None:
        if event["type"] == "stage":
            self._stage(event)
        elif event["type"] == "metric" and event["kind"] == "val":
            text = f"loss {event['loss']:.4f}"
            self._loss = f"  validation {event['loss']:.4f}"
            if "reward" in event:
                text = f"reward {event['reward']:.3f}, length {event['length']:.1f} tokens"
                self._loss = f"  validation {event['reward']:.3f}"
            if self._last is not None:
                self._draw(self._last)
            if event["perplexity"] is not None:
                text += f", perplexity {event['perplexity']:.2f}"
            if "accuracy" in event:
                text += f", accuracy {event['accuracy']:.1%}"
            if "margin" in event:
                text += f", margin {event['margin']:.3f}"
            self._line(f"step {event['step']}: validation {text}")
        elif event["type"] == "metric" and event["kind"] == "score":
            found = event.get("scores") or {"failed": event.get("error")}
            text = ", ".join(f"{name} {x}" for name, x in found.items())
            self._line(f"step {event['step']}: score {text}")
        elif event["type"] == "warning":
            self._say(f"warning: {event['message']}")
        elif event["type"] == "sample":
            self._line(f"step {event['step']}: {event['prompt']}")
            self._line(f"  -> {event['text'].strip()}")
        elif event["type"] == "metric":
            self._report(event)

    def _report(self, event: Event) -> None:
        line = self._note if self._draws else self._line
        if not self.verbose:  # otherwise _step has already shown it
            line(f"step {event['step']}/{self.iters}: {self._figures(event, wide=True)}")
            if self._draws:
                self._step(event)
        if "ranks" in event:
            line(about_ranks(event))

    def _stage(self, event: Event) -> None:
        if "share" in event:
            return self._wait(event)
        if self._waiting is not None:
            self._bar.remove_task(self._waiting)
            self._waiting = None
        self._budget = event.get("budget_gb", self._budget)
        if event["stage"] == "train":
            self.iters = event["iters"]
            done = event["step"]
            self._task = self._bar.add_task(
                "train", total=self.iters, completed=done, status=f"{done}/{self.iters}"
            )
        if event["stage"] == "done" and self._last is not None and event["progress"] == 1:
            self._draw({**self._last, "left_s": 0.0})
        if event["stage"] != "done" and event.get("message"):
            self._line(event["message"])

    def _wait(self, event: Event) -> None:
        """Shows the progress of a download or of tokenizing, either as a bar or by printing a line
        every 10 seconds."""
        share, now = event["share"], time.monotonic()
        if not self._draws:
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

    def _draw(self, event: Event) -> None:
        assert self._task is not None  # the stage `train` comes before its metrics
        self._last = event
        wide = self.console.width >= WIDE
        figures = f"{self._figures(event, wide)}{self._loss if wide else ''}"
        status = f"{event['step']}/{self.iters}  {figures}"
        self._bar.update(self._task, completed=event["step"], status=status)

    def _step(self, event: Event) -> None:
        self._draw(event)
        if self.verbose:
            step = f"{event['step']}/{self.iters}"
            more = f"  rate {event['learning_rate']:.3g}  gradient {event['grad_norm']:.3g}"
            self._line(f"step {step}: {self._figures(event, wide=True)}{more}")

    def _figures(self, event: Event, wide: bool) -> str:
        """Returns the loss, the speed, the memory and the remaining time. If `wide` is false,
        details are left out."""
        loss = f"loss {event['loss']:.4f}"
        left = f"{duration(event['left_s'])} left"
        of = "" if self._budget is None else f" of {self._budget:.2f}"
        if not wide:
            rate = f"{event['tokens_per_sec']:,.0f} tokens/s"
            return f"{loss}  {rate}  {event['peak_gb']:.2f}{of} GB  {left}"
        if "accuracy" in event:
            loss += f"  accuracy {event['accuracy']:.0%}"
        if "reward" in event:
            loss += f"  reward {event['reward']:.3f}  length {event['length']:.1f}"
        return f"{loss}  {speed(event)}  peak {event['peak_gb']:.2f}{of} GB  {left}"


def errors() -> Console:
    """Returns a console on stderr, for all output except results."""
    return Console(file=uncopied(sys.stderr), highlight=False)


@contextmanager
def waiting() -> Iterator[Callable[[Event], None]]:
    """Shows warnings and the progress of downloads and other long operations on stderr. With
    --verbose, shows every event."""
    with Terminal(errors()) as show:

        def tell(event: Event) -> None:
            if show.verbose or "share" in event or event["type"] == "warning":
                show(event)

        yield tell


def complain(text: str) -> None:
    """Prints a sentence to stderr. On a terminal, the sentence is wrapped."""
    if sys.stderr.isatty():
        text = wrapped(text, Console(stderr=True).width)
    print(text, file=sys.stderr)
