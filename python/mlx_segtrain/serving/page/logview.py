"""The log of a job, a page at a time: hundreds of thousands of lines are too many for a browser."""

import asyncio

from nicegui import ui

from ...events import Event
from . import text
from .frame import button, card, tag
from .runs import PAGE, Run


class LogView:
    """A page of the log; the newest one grows."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.number: int | None = None  #: of the page that is wanted; None: the newest
        self.number_shown, self.shown = -1, 0  #: of the page that is shown, and its events
        with card("Log"):
            self.view = ui.log(max_lines=3 * PAGE).classes("log")
            self.view.props('tabindex=0 role=log aria-live=off aria-label="Log"')
            with ui.element("div").classes("actions"):
                self.where = tag("span", "", "muted small")
                self.older = button("Older", lambda: self._turn(-1))
                self.newer = button("Newer", lambda: self._turn(1))

    async def show(self, run: Run) -> None:
        self.run = run
        last = len(run.pages) - 1
        number = last if self.number is None else self.number
        if number != self.number_shown:
            self.view.clear()
            self.number_shown, self.shown = number, 0
        events = await asyncio.to_thread(run.page, number)
        for event in events[self.shown :]:
            self.view.push(text.line_of(event) or " ", classes=_class_of(event))
        self.shown = max(self.shown, len(events))
        first = number * PAGE
        self.where.set_text(
            f"Events {first + 1:,} to {first + self.shown:,} of {run.count:,}"
            if run.count
            else "Nothing yet"
        )
        for made, there in ((self.older, number > 0), (self.newer, number < last)):
            made.set_visibility(last > 0)
            made.set_enabled(there)

    async def _turn(self, by: int) -> None:
        assert self.run is not None
        last = len(self.run.pages) - 1
        number = self.number_shown + by
        self.number = None if number >= last else max(0, number)
        await self.show(self.run)


def _class_of(event: Event) -> str:
    kind = event["type"]
    return "val" if event.get("kind") == "val" else "log-line" if kind == "log" else kind
