"""/finetune/job/ID: a job while it runs and after. What is shown comes from its log alone."""

import asyncio
from typing import Any

from nicegui import background_tasks, ui

from ...errors import InputError
from ...events import Event
from ...objectives import OBJECTIVES
from ..jobs.row import Row
from ..service import Service
from . import text
from .after import After, show_result
from .charts import COLORS, DASHES, Line, chart, draw, lines_of
from .frame import (
    Announcer,
    badge,
    button,
    card,
    confirm,
    empty,
    fact,
    facts,
    frame,
    link,
    notice,
    tag,
)
from .logview import LogView
from .runs import Run, Runs

#: Seconds between looks at the log.
LOOK_S = 0.5
#: The small charts: curves, title, unit.
SMALL = {
    "Learning rate": (("learning_rate",), ""),
    "Speed, tokens/s": (("tokens_per_sec",), " tokens/s"),
    "Gradient norm": (("grad_norm",), ""),
    "Memory, GB (dashed: now)": (("peak_gb", "active_gb"), " GB"),
}
DELETED = ("deleted",)
LABELS = {"peak_gb": "peak", "active_gb": "now", "val": "validation", "train": "training"}


async def job(service: Service, runs: Runs, id: str) -> None:
    row = service.jobs.find(id)
    with frame(service, row.name if row else "No such job", "") as announce:
        if row is None:
            tag("h1", "No such job")
            empty(f"There is no job {id} (any more).")
            link("All jobs", "/finetune/jobs")
            return
        await JobView(service, runs, row, announce).show()


class JobView:
    """One page's view of a job."""

    def __init__(self, service: Service, runs: Runs, row: Row, announce: Announcer):
        self.service, self.runs, self.row, self.announce = service, runs, row, announce
        self.values: dict[str, Any] = row.values
        self.kind = row.job_kind
        self.trains = self.kind.trains
        self.client = ui.context.client
        self.looking = self.acted = False
        self.state: tuple[Any, ...] = ()  #: that is shown
        self.told_of: tuple[Any, ...] = ()  #: the warnings and samples that are shown
        self.tiles: dict[str, Any] = {}

    async def show(self) -> None:
        with ui.element("div").classes("row-line between"):
            with ui.element("div"):
                tag("h1", self.row.name)
                tag("p", f"{self.kind.title} · {self.row.id}", "muted small")
            self.buttons = ui.element("div").classes("actions")
        with card(""):
            self._head()
        self.outcome = ui.element("div").classes("stack")
        if self.trains:
            self._curves()
        self.told = ui.element("div").classes("stack")
        self.log = LogView()
        with card("Configuration"):
            self._configuration()
        # A long log takes a while to read: then the page comes before it.
        await asyncio.wait({background_tasks.create(self._look(), name="look")}, timeout=0.8)
        ui.timer(LOOK_S, self._look)

    # What does not change

    def _head(self) -> None:
        with ui.element("div").classes("row-line between"):
            self.badge = ui.element("div")
            self.times = tag("span", "", "muted small")
        self.bar = (
            ui.element("div")
            .classes("meter")
            .props('role=progressbar aria-label="Progress" aria-valuemin=0 aria-valuemax=100')
        )
        with self.bar:
            self.filled = ui.element("div")
        self.progress = tag("p", "Reading the log …", "wrap")
        if not self.trains:
            return
        with facts("tiles"):
            for name in (
                "Training loss",
                "Validation loss",
                "Learning rate",
                "Speed",
                "Gradient norm",
                "Peak memory",
            ):
                with ui.element("div"):
                    tag("dt", name)
                    with ui.element("dd"):
                        self.tiles[name] = (tag("span", "–"), tag("div", "", "more"))

    def _curves(self) -> None:
        with card(f"Loss, {OBJECTIVES[self.values.get('method', 'sft')].unit}"):
            self.loss = chart("Training and validation loss over steps", [], tall=True)
            self.no_loss = tag("p", "", "empty")
        with card("Over the steps") as self.over:
            self.charts = ui.element("div").classes("charts")
            self.small: dict[str, ui.echart] = {}

    def _configuration(self) -> None:
        with facts("wide"):
            for name, value in self.values.items():
                if value is not None:
                    shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                    fact(name, shown)

    # What does

    async def _look(self) -> None:
        if not self.looking:
            self.looking = True
            try:
                await self._look_now()
            finally:
                self.looking = False

    async def _look_now(self) -> None:
        row = self.service.jobs.find(self.row.id)
        if row is None:  # on another page
            if self.state != DELETED:
                self.state = DELETED
                self.buttons.clear()
                with self.outcome:
                    notice("The job has been deleted.", "warn").props("role=alert")
            return
        run, news = await self.runs.read(row.id)
        if self.client.is_deleted:
            return
        first, before, self.row = not self.state, self.row, row
        state = (row.status, row.cancelling)
        if state != self.state:
            self.state = state
            self._show_buttons()
            self.badge.clear()
            with self.badge:
                badge(row.status)
            if not first:
                self.announce(f"The job is {row.status}.")
            await self._show_outcome(run)
        self._show_progress(run)
        if news or first or before.status != row.status:
            if self.trains:
                self._show_tiles(run)
                self._draw(run)
            self._show_told(run)
            await self.log.show(run)

    def _show_buttons(self) -> None:
        row = self.row
        self.buttons.clear()
        with self.buttons:
            if row.status in ("queued", "running"):
                words = "Do not wait for the step" if row.cancelling else "Cancel"
                button(words, self._cancel, "danger", "stop")
            if row.status in ("failed", "cancelled"):
                words = "Resume" if self.trains else "Run again"
                button(words, self._resume, "primary", "play_arrow")
            if self.trains:
                button(
                    "New run like this",
                    lambda: ui.navigate.to(f"/finetune?origin={row.id}"),
                    icon="content_copy",
                )
            if row.ended:
                button("Delete", self._delete, "danger", "delete")
        if self.acted:  # the button that had the focus is gone
            first = f"getHtmlElement({self.buttons.id}).querySelector('button')?.focus()"
            self.client.run_javascript(f"if (document.activeElement === document.body) {first}")

    def _cancel(self) -> None:
        self._do(lambda: self.service.jobs.cancel(self.row.id))

    def _resume(self) -> None:
        self._do(lambda: self.service.resume(self.row.id))

    def _do(self, action: Any) -> None:
        try:
            action()
            self.acted = True
        except (InputError, KeyError) as error:
            ui.notify(str(error), type="warning")

    async def _delete(self) -> None:
        kept = f" What it wrote stays in {self.row.output_path}." if self.row.output_path else ""
        if await confirm(
            "Delete this job?", f"The job and its log are forgotten.{kept}", "Delete the job"
        ):
            self._do(lambda: self.service.jobs.remove(self.row.id))
            ui.navigate.to("/finetune/jobs")

    async def _show_outcome(self, run: Run) -> None:
        row = self.row
        self.outcome.clear()
        with self.outcome:
            if row.status == "failed":
                notice(f"Failed: {row.error or 'its log says why'}", "bad").props("role=alert")
            elif row.status == "cancelled":
                notice(f"Cancelled: {row.message or 'nothing was kept'}.", "warn")
            elif row.status == "done":
                with card("Result"):
                    show_result(row)
                if self.trains and row.output_path:
                    with card("Use the adapter"):
                        await After(self.service, row, self.announce).show()

    def _show_progress(self, run: Run) -> None:
        row, share = self.row, self.row.progress
        if row.status in ("failed", "cancelled") and run.iters:
            share = run.step / run.iters  # the job's own is that of its end
        percent = round(100 * share)
        self.bar.props["aria-valuenow"] = percent
        self.filled.style(f"width: {percent}%")
        parts = []
        if self.trains and run.iters and row.status != "queued":
            parts.append(f"Step {run.step:,} of {run.iters:,}")
        if row.status == "queued":
            busy = self.kind.computes and self.service.jobs.training
            parts.append("Waits for the job that computes now" if busy else "Starts in a moment")
        else:
            parts.append(text.percent(share))
        if row.status == "running":
            if row.cancelling:
                parts.append("cancelling: it ends behind the step that is being taken")
            elif run.stage == "train" or run.train:
                left = run.left_s
                parts.append("" if left is None else f"about {text.duration(left)} left")
            else:
                parts.append(run.message)
        self.progress.set_text(" · ".join(part for part in parts if part))
        ran = f" · ran {text.took(row)}" if row.started_at else ""
        self.times.set_text(f"created {text.ago(row.created_at)}{ran}")

    def _show_tiles(self, run: Run) -> None:
        last, val = run.train, run.val
        best = run.curve("val").lowest
        told = {
            "Training loss": (text.fixed(last.get("loss")), ""),
            "Validation loss": (
                text.fixed(val.get("loss")),
                f"from {text.fixed(run.first_val)}, best {text.fixed(best)}"
                if best is not None
                else "no evaluation yet",
            ),
            "Learning rate": (text.rate(last.get("learning_rate")), ""),
            "Speed": (
                f"{last['tokens_per_sec']:,.0f} tokens/s" if last else "–",
                f"{last['step_s']:.2f} s a step" if last else "",
            ),
            "Gradient norm": (text.fixed(last.get("grad_norm"), 3), ""),
            "Peak memory": (text.gb(last.get("peak_gb")), _planned(run)),
        }
        for name, words in told.items():
            for label, word in zip(self.tiles[name], words, strict=True):
                label.set_text(word)

    def _draw(self, run: Run) -> None:
        lines = [
            *lines_of("training", run.curve("train"), COLORS[0]),
            Line("validation", run.curve("val").points, COLORS[1], "dashed", marked=True),
        ]
        drawn = any(line.points for line in lines)
        self.no_loss.set_visibility(not drawn)
        ended = self.row.ended
        self.no_loss.set_text("No step was taken." if ended else "It begins with the first step.")
        self.loss.set_visibility(drawn)
        # Up to the run's end, unless its curve would be a scratch at the edge.
        end = run.iters if run.iters and run.step >= run.iters / 5 else None
        draw(self.loss, lines, legend=True, end=end)
        extra = {text.titled(name): ((name,), "") for name in run.extra(run.train)}
        for title, (names, unit) in {**SMALL, **extra}.items():
            own = [
                line
                for i, name in enumerate(names)
                for line in lines_of(LABELS.get(name, title), run.curve(name), COLORS[i], DASHES[i])
            ]
            if not any(line.points for line in own):
                continue
            if title not in self.small:
                with self.charts, ui.element("div"):
                    tag("h3", title, "heading")
                    self.small[title] = chart(f"{title} over steps", own, unit=unit, end=end)
            else:
                draw(self.small[title], own, unit=unit, end=end)
        self.over.set_visibility(bool(self.small))

    def _show_told(self, run: Run) -> None:
        told = (len(run.warnings), len(run.samples), run.samples and run.samples[-1])
        if told == self.told_of:
            return
        self.told_of = told
        self.told.clear()
        with self.told:
            if run.warnings:
                with card(f"Warnings ({len(run.warnings)})"):
                    for message in list(run.warnings)[-20:]:
                        notice(message, "warn")
            if run.samples:
                with card("Samples"):
                    _show_samples(list(run.samples))


def _planned(run: Run) -> str:
    if run.planned_gb is None or run.budget_gb is None:
        return ""
    return f"planned {text.gb(run.planned_gb)} of {text.gb(run.budget_gb)}"


def _show_samples(samples: list[Event]) -> None:
    """Each prompt's answers, the newest first."""
    prompts = dict.fromkeys(str(own.get("prompt")) for own in samples)
    for prompt in prompts:
        tag("h3", prompt, "heading wrap")
        own = [x for x in reversed(samples) if x.get("prompt") == prompt]
        with facts("samples"):
            for event in own[:6]:
                fact(f"step {event.get('step')}", str(event.get("text")))
