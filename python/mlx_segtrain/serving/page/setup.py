"""/finetune: model, data, parameters; whether it fits; and the start of a run."""

import asyncio
from typing import Any

from nicegui import background_tasks, ui

from ...config import affecting
from ...errors import InputError
from ..catalog import DataFolder, Model
from ..service import Plan, Service
from . import text
from .data import show_report
from .fields import Form, Labelled
from .frame import Announcer, button, card, empty, fact, facts, frame, looking, notice, tag

#: Seconds without a change behind which the planner is asked.
PAUSE_S = 0.35
#: Parameters that the report on the data depends on.
INSPECTED = affecting("rows")
#: Choices from which on one can type to find one.
MANY = 12


async def setup(service: Service, origin: str | None) -> None:
    with frame(service, "New run", "/finetune") as announce:
        tag("h1", "New run")
        await Setup(service, announce).show(origin)


class Setup:
    """The form of one page."""

    def __init__(self, service: Service, announce: Announcer):
        self.service, self.announce = service, announce
        self.client = ui.context.client
        self.asked = 0  # the last question to the planner: earlier answers are late
        self.reported: tuple[Any, ...] = ()  # what the report that is shown is of
        self.starting = False

    async def show(self, origin: str | None) -> None:
        with looking("models and data sets"):
            models, datasets = await asyncio.gather(self.service.models(), self.service.datasets())
        if self.client.is_deleted:
            return
        self.models = {model.path: model for model in models}
        with ui.element("form").classes("two").props("novalidate") as form:
            form.on("submit.prevent", self._start)
            with ui.element("div").classes("stack"):
                with card("Model and data"):
                    self._choose_model()
                    self._choose_data(datasets)
                with card("Parameters"):
                    self.form = Form(self._changed)
            with ui.element("div").classes("stack stick"), card("Plan"):
                self.verdict = ui.element("div").classes("stack")
                self.problem = ui.element("div").props("role=alert")
                self.start = button("Start training", None, "primary wide", "play_arrow")
                self.start.props("type=submit")
        self._fill(origin)
        await self._plan()

    # Model and data

    def _choose_model(self) -> None:
        field = Labelled("Model", "", "model_dir", "across")
        with field.slot:
            options = {path: described(model) for path, model in self.models.items()}
            self.model = ui.select(options, with_input=len(options) > MANY)
        field.holds(self.model)
        if not self.models:
            where = " or ".join(map(str, self.service.roots.folders))
            empty(
                f"No model found below {where}: put the folder of an MLX model there, or start "
                "the server with its path."
            )
        self.about_model = ui.element("div")
        self.model.on_value_change(self._model_changed)

    def _model_changed(self) -> Any:
        self.about_model.clear()
        if model := self.models.get(self.model.value):
            with self.about_model, facts():
                fact("Family", model.family)
                fact("Weights", f"{model.bits} bits" if model.bits else "not quantized")
                fact("Parameters", text.many(model.parameters))
                fact("Size on disk", text.size(model.size_bytes))
                if model.max_length:
                    fact("Made for up to", f"{model.max_length:,} tokens")
                fact("Computed by", "our own ops" if model.fast else "mlx-lm's layers")
        return self._changed()

    def _choose_data(self, datasets: list[DataFolder]) -> None:
        options = {own.path: _described_data(own) for own in datasets}
        with ui.element("div").classes("fields halves"):
            field = Labelled("Data set", "Folders with train.jsonl, found on disk.", "data_dir", "")
            with field.slot:
                self.data = ui.select(options, with_input=len(options) > MANY, clearable=True)
            field.holds(self.data)
            field = Labelled("or its path", "A folder with train.jsonl, or a .jsonl file.", "", "")
            with field.slot:
                self.path = ui.input(placeholder="/path/to/folder").props("autocomplete=off")
            field.holds(self.path)
        if not datasets:
            where = " or ".join(map(str, self.service.roots.folders))
            empty(
                f"No data set found below {where}: put train.jsonl (and valid.jsonl) into a folder "
                "there, or give a path."
            )
        self.data.on_value_change(lambda: self._one_of(self.data, self.path, ""))
        self.path.on_value_change(lambda: self._one_of(self.path, self.data, None))
        with ui.element("div").classes("actions"):
            self.look = button("Inspect data", self._inspect, icon="search")
            tag("span", "Counts, lengths, and what of the first rows is trained.", "muted small")
        self.report = ui.element("div").classes("stack")

    def _one_of(self, given: Any, other: Any, nothing: Any) -> None:
        """A folder is chosen or typed: the last of both counts."""
        if given.value:
            other.set_value(nothing)
        self._outdate()

    @property
    def place(self) -> str:
        return (self.path.value or "").strip() or self.data.value or ""

    async def _inspect(self) -> None:
        self._complain("")
        if not self.place:
            return self._complain("Choose a data set, or give its path, to inspect it.")
        values, self.reported = self.form.values(), self._inspected()
        length = values.get("max_seq_length")
        length = length if isinstance(length, int) and length > 1 else 512
        how = {key: values[key] for key in INSPECTED if key in values}
        how |= {"method": self.form.method, "max_seq_length": length}
        self.look.props("loading")
        self.announce("Inspecting the data.")
        self.report.clear()
        try:
            report = await self.service.inspect(self.place, self.model.value, **how)
        except InputError as error:
            return self._complain(str(error))
        finally:
            self.look.props(remove="loading")
        if self.client.is_deleted:
            return
        with self.report:
            if self.model.value is None:
                notice("Choose a model to see lengths and tokens.")
            show_report(report)
        self.announce(f"{report.n_train:,} rows to train." if report.ok else str(report.error))

    # Plan and start

    def _fill(self, origin: str | None) -> None:
        """With the values of an earlier run, or with what there is only one of."""
        row = self.service.jobs.find(origin) if origin else None
        if row is not None and row.job_kind.trains:
            values = row.values
            self._choose(values.pop("model_dir", None), values.pop("data_dir", None))
            for name in ("adapter_path", "resume", "overwrite"):
                values.pop(name, None)
            self.form.put(values)
            return
        base = self.service.base
        served = str(base.path) if base else None
        self._choose(served or (next(iter(self.models)) if len(self.models) == 1 else None), None)

    def _choose(self, model: str | None, data: str | None) -> None:
        if model in self.models:
            self.model.set_value(model)
        if data in self.data.options:
            self.data.set_value(data)
        elif data:
            self.path.set_value(data)

    def _inspected(self) -> tuple[Any, ...]:
        """What the report on the data depends on."""
        values = self.form.values()
        return self.place, self.model.value, *map(values.get, INSPECTED)

    def _outdate(self) -> None:
        if self.reported and self.reported != self._inspected():
            self.reported = ()
            self.report.clear()
            with self.report:
                notice("Something has changed since: inspect the data again.")

    def _changed(self) -> None:
        self._outdate()
        self.asked += 1
        background_tasks.create(self._plan_soon(self.asked), name="plan")

    async def _plan_soon(self, asked: int) -> None:
        await asyncio.sleep(PAUSE_S)
        if asked == self.asked:
            await self._plan()

    async def _plan(self) -> None:
        asked, plan, fault = self.asked, None, None
        if self.model.value is not None:
            values = {**self.form.values(), "model_dir": self.model.value}
            try:
                plan = await self.service.plan(values)
            except InputError as error:
                fault = error
        if self.client.is_deleted or asked != self.asked:
            return
        self.form.complain(fault)
        self.verdict.clear()
        with self.verdict:
            if self.model.value is None:
                empty("Choose a model to see whether a run fits this machine.")
            elif plan is None:
                notice(_sentence(str(fault)), "bad")
            else:
                _show_plan(plan)
        self.announce(plan.message if plan else str(fault or ""))

    async def _start(self) -> None:
        if self.starting:  # Enter was pressed twice
            return
        self._complain("")
        for value, what in ((self.model.value, "a model"), (self.place, "a data set")):
            if not value:
                return self._complain(f"Choose {what} first.")
        values = {**self.form.values(), "model_dir": self.model.value, "data_dir": self.place}
        self.start.props("loading")
        self.starting = True
        try:
            await self.service.plan(values)  # or the run would find out, a while later
            row = self.service.submit(values)
        except InputError as error:
            self.starting = False
            self.start.props(remove="loading")
            self.form.complain(error)
            return self._complain(str(error))
        ui.navigate.to(f"/finetune/job/{row.id}")

    def _complain(self, message: str) -> None:
        self.problem.clear()
        if message:
            with self.problem:
                notice(_sentence(message), "bad")


def _sentence(message: str) -> str:
    return message if message.endswith((".", "?", "!")) else message + "."


def described(model: Model) -> str:
    bits = f"{model.bits} bits" if model.bits else "not quantized"
    about = (model.family, text.many(model.parameters), bits, text.size(model.size_bytes))
    return f"{model.id} · {' · '.join(about)}"


def _described_data(own: DataFolder) -> str:
    more = "" if own.has_valid else " · no valid.jsonl"
    return f"{text.tail(own.path, 2)} · {text.size(own.size_bytes)}{more}"


def _show_plan(plan: Plan) -> None:
    if plan.fits:
        notice(plan.message.replace("fits", "Fits", 1), "good")
    else:
        notice(_sentence(plan.message), "warn")
    own: dict[str, Any] | None = plan.plan
    if own is None or not own["predicted"]:
        return
    share = own["peak"] / own["budget"]
    words = f"{text.percent(share)} of the budget"
    with ui.element("div").classes("meter").props("role=img") as meter:
        meter.props["aria-label"] = words
        ui.element("div").style(f"width: {min(1, share):.1%}")
    with facts("lines"):
        fact("Peak", f"{text.size(own['peak'])}, {words}")
        fact("Budget", text.size(own["budget"]))
        fact("Longest row that fits", f"{own['longest']:,} tokens")
        if own["max_length"]:
            fact("Model made for", f"{own['max_length']:,} tokens")
        fact("Batch", f"{own['rows']:,} × {own['tokens']:,} tokens")
        if own["recomputed"]:
            fact("Computed twice", text.percent(own["recomputed"]))
    with ui.expansion("Where the memory goes").classes("group"), facts("lines"):
        for name, size in sorted(own["parts"].items(), key=lambda part: -part[1]):
            fact(name, text.size(size))
    tag("p", f"Plan: {own['plan']}", "small muted wrap")
