"""What is done with an adapter: evaluate, fold, export, merge. All of them are jobs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import ui

from ...config import affecting
from ...errors import InputError
from ..jobs.row import Row
from ..service import Service
from . import text
from .fields import Labelled
from .frame import Announcer, badge, button, empty, fact, facts, link, notice, tag

#: Of a run's configuration, what a loss depends on.
MEASURED = ("model_dir", "data_dir", *affecting("loss"))
FORMATS = {
    "peft": "Hugging Face PEFT",
    "mlx-lm": "mlx-lm",
    "gguf": "GGUF, for llama.cpp",
}
#: Facts of an outcome: their name, and how their values are said.
FACTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "steps": ("Steps", "{:,}".format),
    "final_train_loss": ("Last training loss", text.fixed),
    "first_val_loss": ("First validation loss", text.fixed),
    "final_val_loss": ("Last validation loss", text.fixed),
    "best_val_loss": ("Best validation loss", text.fixed),
    "best_step": ("Best at step", "{:,}".format),
    "wall_s": ("Time", text.duration),
    "tokens_per_sec": ("Speed", "{:,.0f} tokens/s".format),
    "peak_gb": ("Peak memory", text.gb),
    "planned_gb": ("Planned memory", text.gb),
    "process_gb": ("Memory of the process", text.gb),
    "loss": ("Loss, nats per token", text.fixed),
    "perplexity": ("Perplexity", "{:,.3f}".format),
    "tokens": ("Trained tokens", "{:,}".format),
    "rows": ("Rows", "{:,}".format),
    "truncated": ("Rows cut off", "{:,}".format),
    "dropped": ("Rows left out", "{:,}".format),
    "lost": ("Share of the update lost in rounding", lambda share: text.percent(share, 2)),
    "linears": ("Linears", "{:,}".format),
    "linears_in_all": ("Linears in all of them", "{:,}".format),
    "linears_in_some": ("Linears in some of them", "{:,}".format),
    "size_bytes": ("Size", text.size),
    "method": ("Format", str),
    "rank": ("Largest rank", str),
    "url": ("Repository", str),
}


class After:
    """The actions of a run that is done."""

    def __init__(self, service: Service, row: Row, announce: Announcer):
        self.service, self.row, self.announce = service, row, announce
        self.values: dict[str, Any] = row.values
        self.model, self.adapter = self.values["model_dir"], row.output_path or ""
        self.shown: list[tuple[str, str, float]] = []
        self.known: dict[str, bool] = {}  #: whether a job is one of this run

    async def show(self) -> None:
        others = [str(own.path) for own in await self.service.adapters(Path(self.model))]
        self.others = [path for path in others if path != self.adapter]
        with ui.element("div").classes("actions"):
            chat = f"/finetune/chat?model={quote(self.model)}&adapter={quote(self.adapter)}"
            button("Chat with it", lambda: ui.navigate.to(chat), "primary", "chat")
        with ui.element("div"):
            for name, about, make in (
                ("Evaluate", "loss with and without the adapter", self._evaluate),
                ("Fold", "into a model without an adapter", self._fold),
                ("Export", "for PEFT, mlx-lm or llama.cpp", self._export),
                ("Merge", "with another adapter", self._merge),
            ):
                group = ui.expansion(name, caption=about, group="after").classes("group")
                with group, ui.element("form").classes("stack").props("novalidate") as form:
                    form.on("submit.prevent", make())
        self.jobs = ui.element("div").classes("stack")
        self.refresh()
        ui.timer(1.5, self.refresh)

    # The forms; each returns what its submit does.

    def _evaluate(self) -> Callable[[], None]:
        split = _select("Rows", {"valid": "valid.jsonl", "train": "train.jsonl"}, "valid")
        problem = self._end("Evaluate both")

        def start() -> None:
            own = {key: self.values[key] for key in self.values if key in MEASURED}
            with_it = {**own, "adapter_path": self.adapter}
            self._submit(
                problem,
                lambda: self.service.evaluate(with_it, split.value),
                lambda: self.service.evaluate(own, split.value),
            )

        return start

    def _fold(self) -> Callable[[], None]:
        with ui.element("div").classes("fields"):
            how = {
                "": "as the base has them (default)",
                **{str(n): f"{n} bits" for n in (2, 3, 4, 5, 6, 8)},
                "dense": "not quantized",
            }
            bits = _select("Weights", how, "", "Fewer bits round away more of the update.")
            kinds = {"": "the base's (default)"}
            kinds |= {name: name for name in ("float32", "bfloat16", "float16")}
            dtype = _select("Type of what is not quantized", kinds, "")
            folder = _folder("model")
        problem = self._end("Fold into the base")

        def start() -> None:
            dense = bits.value == "dense"
            self._submit(
                problem,
                lambda: self.service.enqueue(
                    "fold",
                    model_dir=self.model,
                    adapter_path=self.adapter,
                    dequantize=dense,
                    bits=int(bits.value) if bits.value and not dense else None,
                    dtype=dtype.value or None,
                    output_dir=_given(folder),
                ),
            )

        return start

    def _export(self) -> Callable[[], None]:
        with ui.element("div").classes("fields"):
            method = _select("Format", FORMATS, "peft")
            folder = _folder("export")
        problem = self._end("Export the adapter")
        return lambda: self._submit(
            problem,
            lambda: self.service.enqueue(
                "export",
                adapter_path=self.adapter,
                base_model=self.model,
                method=method.value,
                output_dir=_given(folder),
            ),
        )

    def _merge(self) -> Callable[[], None]:
        if not self.others:
            empty("No other adapter of this model was found: train another one first.")
            return lambda: None
        with ui.element("div").classes("fields"):
            names = {path: text.tail(path, 2) for path in self.others}
            other = _select("Other adapter", names, None)
            own_weight = _input("Weight of this one", "1")
            other_weight = _input("Weight of the other", "1")
            folder = _folder("merged")
        problem = self._end("Merge both")

        def merge() -> Row:
            if other.value is None:
                raise InputError("choose the other adapter.")
            try:
                scales = [float(own.value or 1) for own in (own_weight, other_weight)]
            except ValueError:
                raise InputError("a weight is a number, as 0.5.") from None
            both, out = [self.adapter, other.value], _given(folder)
            return self.service.enqueue("merge", adapters=both, scales=scales, output_dir=out)

        return lambda: self._submit(problem, merge)

    def _end(self, name: str) -> ui.element:
        with ui.element("div").classes("actions"):
            button(name, None, "primary").props("type=submit")
        return ui.element("div").props("role=alert")

    def _submit(self, problem: ui.element, *starts: Callable[[], Row]) -> None:
        problem.clear()
        try:
            rows = [start() for start in starts]
        except InputError as error:
            with problem:
                notice(str(error), "bad")
            return
        self.announce(f"{rows[0].job_kind.title} has been queued.")
        self.refresh()

    # The jobs that came of it

    def refresh(self) -> None:
        rows = [row for row in self.service.jobs.newest(200) if self._is_of_this(row)][:20]
        seen = [(row.id, row.status, row.progress) for row in rows]
        if seen == self.shown:
            return
        self.shown = seen
        self.jobs.clear()
        with self.jobs:
            for row in map(self._whole, rows):
                with ui.element("div").classes("row-line"):
                    badge(row.status)
                    link(f"{row.job_kind.title}: {row.name}", f"/finetune/job/{row.id}")
                    tag("span", said(row), "muted wrap")

    def _whole(self, row: Row) -> Row:
        return self.service.jobs.find(row.id) or row

    def _is_of_this(self, row: Row) -> bool:
        """Looked up once: lists come without configurations."""
        if row.id not in self.known:
            whole = self._whole(row)
            self.known[row.id] = bool(whole.config_json) and self._names_this(whole)
        return self.known[row.id]

    def _names_this(self, row: Row) -> bool:
        values = row.values
        if row.kind == "evaluate" and "adapter_path" not in values:
            own = {key: self.values.get(key) for key in ("model_dir", "data_dir")}
            return own == {key: values.get(key) for key in own}
        paths = [values.get("adapter_path"), *values.get("adapters", [])]
        return not row.job_kind.trains and self.adapter in paths


def said(row: Row) -> str:
    """The outcome of a job, in a few words."""
    if row.status != "done":
        return row.error or row.message or ""
    found = row.result or {}
    match row.kind:
        case "evaluate":
            split = row.values.get("split")
            return (
                f"loss {found['loss']:.4f} over {text.counted(found['tokens'], 'token')} ({split})"
            )
        case "push":
            return found["url"]
        case "fold":
            return f"{text.percent(found['lost'], 1)} of the update lost, {found_path(row)}"
        case "finetune":
            last, train = found.get("final_val_loss"), found.get("final_train_loss")
            return f"validation loss {last:.4f}" if last else f"loss {text.fixed(train)}"
    return found_path(row)


def found_path(row: Row) -> str:
    return row.output_path or ""


def show_result(row: Row) -> None:
    """All of a job's outcome."""
    found: dict[str, Any] = row.result or {}
    if row.kind == "fold" and (swallowed := found.get("swallowed")):
        names = ", ".join(swallowed[:5]) + (" …" if len(swallowed) > 5 else "")
        notice(
            f"{text.counted(len(swallowed), 'linear')} lost more than a tenth of the update in "
            f"rounding ({names}): fold with more bits, or not quantized.",
            "warn",
        )
    with facts("wide"):
        for name, (title, in_words) in FACTS.items():
            if found.get(name) is not None:
                fact(title, in_words(found[name]))
        for name, value in (found.get("metrics") or {}).items():
            fact(text.titled(name), text.fixed(value))
        if row.output_path:
            fact("Folder", row.output_path)


def _select(label: str, options: dict[Any, str], value: Any, about: str = "") -> ui.select:
    field = Labelled(label, about, "", "")
    with field.slot:
        made = ui.select(options, value=value)
    field.holds(made)
    return made


def _input(label: str, placeholder: str, about: str = "", classes: str = "") -> ui.input:
    field = Labelled(label, about, "", classes)
    with field.slot:
        made = ui.input(placeholder=placeholder)
    field.holds(made)
    return made


def _folder(kind: str) -> ui.input:
    return _input("Folder to write", f"a new folder in the server's store ({kind})", "", "across")


def _given(control: ui.input) -> str | None:
    return (control.value or "").strip() or None
