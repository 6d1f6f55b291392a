"""/finetune/jobs: all jobs, and the losses of several runs in one chart."""

import json
from typing import Any

from nicegui import ui

from ..jobs.row import Row
from ..service import Service
from . import text
from .after import said
from .charts import COLORS, DASHES, Line, chart, draw
from .frame import badge, card, empty, frame, link, tag
from .runs import Runs

#: Jobs that are listed; runs that are compared at once.
LISTED, COMPARED = 200, 6


def jobs(service: Service, runs: Runs, compare: str) -> None:
    with frame(service, "Jobs", "/finetune/jobs"):
        tag("h1", "Jobs")
        JobsView(service, runs, compare.split(",") if compare else []).show()


class JobsView:
    def __init__(self, service: Service, runs: Runs, chosen: list[str]):
        self.service, self.runs, self.chosen = service, runs, chosen[:COMPARED]
        self.client = ui.context.client
        self.listed: list[str] = []
        self.cells: dict[str, dict[str, Any]] = {}
        self.comparing = False
        self.drawn: tuple[Any, ...] = ()

    def show(self) -> None:
        with card("Compare runs") as self.comparison:
            self.how = tag("p", "", "muted")
            self.chart = chart("Losses of the chosen runs over steps", [], tall=True)
            self.table = ui.element("div").classes("scroll nowrap")
            self.table.props('tabindex=0 role=region aria-label="The runs in numbers"')
        with card(""):
            self.list = ui.element("div").classes("scroll")
        self._list()
        ui.timer(1.0, self._look)

    async def _look(self) -> None:
        rows = self._list()
        if not self.comparing:
            self.comparing = True
            try:
                await self._compare(rows)
            finally:
                self.comparing = False

    def _list(self) -> list[Row]:
        rows = self.service.jobs.newest(LISTED)
        if [row.id for row in rows] != self.listed or not self.cells:
            self._build(rows)
        for row in rows:
            self._refresh(row)
        return rows

    def _build(self, rows: list[Row]) -> None:
        self.listed, self.cells = [row.id for row in rows], {}
        self.list.clear()
        self.comparison.set_visibility(any(row.job_kind.trains for row in rows))
        with self.list:
            if not rows:
                empty("No job yet: start one under New run.")
                link("New run", "/finetune")
                return
            with ui.element("table").classes("list folds"):
                tag("caption", "All jobs, the newest first", "sr-only")
                with ui.element("thead"), ui.element("tr"):
                    for name in (
                        "Compare",
                        "Job",
                        "Status",
                        "Progress",
                        "Outcome",
                        "Created",
                        "Ran",
                    ):
                        tag("th", name).props("scope=col")
                with ui.element("tbody"):
                    for row in rows:
                        self._build_row(row)
            if len(rows) == LISTED:
                empty(f"These are the last {LISTED} jobs.")

    def _whole(self, row: Row) -> Row:
        """With its configuration, which lists come without."""
        return self.service.jobs.find(row.id) or row

    def _build_row(self, row: Row) -> None:
        name = self._whole(row).name
        with ui.element("tr"):
            with ui.element("td").classes("tight"):
                if row.job_kind.trains:
                    box = ui.checkbox(
                        value=row.id in self.chosen,
                        on_change=lambda event: self._choose(row.id, event.value),
                    ).props("dense")
                    box.props["aria-label"] = f"Compare {row.id}"
            with ui.element("td").classes("main"):
                link(name, f"/finetune/job/{row.id}")
                tag("div", f"{row.job_kind.title} · {row.id}", "muted small")
            status = ui.element("td").classes("tight")
            with ui.element("td").classes("tight"):
                with ui.element("div").classes("meter").props("aria-hidden=true") as meter:
                    filled = ui.element("div")
                share = tag("span", "", "small muted")
            outcome = tag("td", "", "small")
            created, ran = tag("td", "", "tight small muted"), tag("td", "", "tight small muted")
        created.props["title"] = f"{row.created_at} UTC"
        self.cells[row.id] = {
            **{
                "status": status,
                "filled": filled,
                "meter": meter,
                "share": share,
                "outcome": outcome,
            },
            **{"created": created, "ran": ran, "was": None},
        }

    def _refresh(self, row: Row) -> None:
        cells = self.cells.get(row.id)
        if cells is None:
            return
        changed = cells["was"] != row.status
        if changed:
            cells["was"] = row.status
            cells["status"].clear()
            with cells["status"]:
                badge(row.status)
        cells["meter"].set_visibility(row.status in ("queued", "running"))
        cells["filled"].style(f"width: {row.progress:.0%}")
        broken = row.status in ("failed", "cancelled")
        cells["share"].set_text("–" if broken else text.percent(row.progress))
        if changed or row.status != "done":
            cells["outcome"].set_text(said(self._whole(row) if row.status == "done" else row))
        cells["created"].set_text(text.ago(row.created_at))
        cells["ran"].set_text(text.took(row))

    # Comparison

    async def _choose(self, id: str, chosen: bool | None) -> None:
        self.chosen = [own for own in self.chosen if own != id] + ([id] if chosen else [])
        self.chosen = self.chosen[-COMPARED:]
        address = "/finetune/jobs" + (f"?compare={','.join(self.chosen)}" if self.chosen else "")
        ui.run_javascript(f"history.replaceState(null, '', {json.dumps(address)})")
        await self._look()

    async def _compare(self, rows: list[Row]) -> None:
        known = {row.id: row for row in rows if row.job_kind.trains}
        chosen = [self._whole(known[id]) for id in self.chosen if id in known]
        self.how.set_text(
            f"Tick up to {COMPARED} runs below to see their losses in one chart."
            if not chosen
            else "Solid: training loss; marked: validation loss. By step."
        )
        read = [(await self.runs.read(row.id))[0] for row in chosen]
        if self.client.is_deleted:
            return
        state = tuple((run.id, run.place) for run in read)
        if state == self.drawn and self.drawn:
            return
        self.drawn = state
        self.chart.set_visibility(bool(chosen))
        lines = []
        for i, (row, run) in enumerate(zip(chosen, read, strict=True)):
            name = f"{i + 1}: {text.tail(row.output_path)}"
            lines.append(Line(name, run.curve("train").points, COLORS[i]))
            val = run.curve("val").points
            lines.append(Line(f"{name}, validation", val, COLORS[i], DASHES[1], marked=True))
        draw(self.chart, lines, legend=False)
        self.table.clear()
        if chosen:
            with self.table:
                _table(chosen, read)


def _table(rows: list[Row], runs: list[Any]) -> None:
    """What the runs came to, and in which parameters they differ."""
    values = [row.values for row in rows]
    names = dict.fromkeys(name for own in values for name in own)
    own_places = ("adapter_path", "resume", "overwrite")
    differ = [
        name
        for name in names
        if name not in own_places and len({str(own.get(name)) for own in values}) > 1
    ]
    heads = ("Run", *differ, "Step", "Training loss", "Validation loss", "Best", "Tokens/s", "Peak")
    with ui.element("table").classes("list"):
        tag("caption", "The runs that are compared", "sr-only")
        with ui.element("thead"), ui.element("tr"):
            for i, head in enumerate(heads):
                tag("th", head, "num" if i > len(differ) else "").props("scope=col")
        with ui.element("tbody"):
            for i, (row, own, run) in enumerate(zip(rows, values, runs, strict=True)):
                with ui.element("tr"):
                    with ui.element("td"):
                        ui.element("span").classes("swatch").style(f"color: {COLORS[i]}")
                        link(f"{i + 1}: {text.tail(row.output_path)}", f"/finetune/job/{row.id}")
                    for name in differ:
                        value = own.get(name, "default")
                        tag("td", text.tail(value) if name.endswith("_dir") else str(value))
                    best = run.curve("val").lowest
                    speed = run.train.get("tokens_per_sec")
                    for word in (
                        f"{run.step:,}",
                        text.fixed(run.train.get("loss")),
                        text.fixed(run.val.get("loss")),
                        text.fixed(best),
                        "–" if speed is None else f"{speed:,.0f}",
                        text.gb(run.train.get("peak_gb")),
                    ):
                        tag("td", word, "num")
