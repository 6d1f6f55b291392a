"""A run's parameters as a form, from the schema alone. Only what was changed is sent."""

import json
from collections.abc import Callable, Iterable
from typing import Any, get_args

from nicegui import ui

from ...config import FACETS, TrainConfig
from ...errors import InputError
from ...fields import Group
from ..api.forms import FieldRow, rows_of_fields
from .frame import tag

GROUPS: tuple[Group, ...] = get_args(Group)


def title(name: str) -> str:
    return FACETS[name].title or name.replace("_", " ").capitalize()


def id_of(control: ui.element) -> str:
    """The HTML id of a control that a label is tied to."""
    return f"control-{control.id}"


class Labelled:
    """Label, help and error of a control that is made within it and then given to `holds`."""

    def __init__(self, label: str, about: str, key: str, classes: str):
        with ui.element("div").classes(f"field {classes}") as self.box:
            with ui.element("div").classes("name"):
                self.label = tag("label", label)
                if key:
                    tag("span", key, "mono").props("aria-hidden=true")
            self.slot = ui.element("div")
            self.wrong = tag("div", "", "wrong")
            self.about = tag("div", about, "about") if about else None

    def holds(self, control: ui.element) -> None:
        """Ties the label, the help and the error to the control."""
        self.control, id = control, id_of(control)
        told = " ".join(own.html_id for own in (self.wrong, self.about) if own)
        control.props("outlined dense").props.update({"for": id, "aria-describedby": told})
        self.label.props["for"] = id

    def complain(self, message: str) -> None:
        if message == self.wrong.text:
            return
        self.wrong.set_text(message)
        self.box.classes(**{"add" if message else "remove": "invalid"})
        self.control.props["aria-invalid"] = str(bool(message)).lower()


class FormField:
    """One parameter: what was given, if anything was."""

    def __init__(self, row: FieldRow, on_change: Callable[[], Any]):
        self.row = row
        about = row.description
        if not row.choices and row.type != "bool":
            kinds = row.allowed.replace(">=", "≥").replace("<=", "≤")
            about = f"{about} Takes {kinds}."
        wide = row.is_list or row.name == "adapter_path" or row.type == "Path"
        self.frame = Labelled(title(row.name), about, row.name, "across" if wide else "")
        self.frame.label.props["title"] = row.name
        with self.frame.slot:
            self.control = self._control()
        self.frame.holds(self.control)
        self.shown = True

        def changed() -> Any:
            self.frame.complain("")
            self.frame.box.classes(**{"add" if self.given() is not None else "remove": "changed"})
            return on_change()

        self.control.on_value_change(changed)

    def _control(self) -> Any:
        row = self.row
        if row.type == "bool" or (row.choices and not row.is_list):
            words = row.choices or ["true", "false"]
            names = {"true": "yes", "false": "no"} if row.type == "bool" else {}
            default = names.get(row.default, row.default)
            others = {word: names.get(word, word) for word in words if word != row.default}
            return ui.select({"": f"{default} (default)", **others}, value="").props(
                "options-dense"
            )
        if FACETS[row.name].texts:
            return ui.textarea(placeholder="none: one prompt a line").props("autogrow rows=2")
        made = ui.input(placeholder=self.hint())
        if row.type in ("int", "float"):
            made.props("inputmode=decimal autocomplete=off")
        return made

    def hint(self, default: str | None = None) -> str:
        if self.row.name == "adapter_path":
            return "a new folder in the server's store"
        return default or self.row.default

    def given(self) -> Any:
        """The value to send; None for the default."""
        text = (self.control.value or "").strip()
        if not text or not self.shown:
            return None
        if FACETS[self.row.name].texts:
            return [line.strip() for line in text.splitlines() if line.strip()]
        if self.row.is_list:
            return text.replace(",", " ").split()
        if self.row.type == "bool":
            return text == "true"
        for parse in (int, float):
            try:
                return parse(text)
            except ValueError:
                pass
        return text

    def put(self, value: Any) -> None:
        """Shows a value, as of an earlier run."""
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, dict):
            value = json.dumps(value) if value else ""
        elif isinstance(value, list):
            value = ("\n" if FACETS[self.row.name].texts else ", ").join(map(str, value))
        text = str(value)
        if isinstance(self.control, ui.select) and text not in self.control.options:
            text = ""
        self.control.set_value(text)

    def show(self, shown: bool) -> None:
        self.shown = shown
        self.frame.box.set_visibility(shown)


class Form:
    """All parameters of a run but model and data."""

    def __init__(self, on_change: Callable[[], Any]):
        self.fields: dict[str, FormField] = {}
        self.groups: dict[str, ui.expansion] = {}
        self.on_change = on_change
        # Paths, which are wide, come last in their block.
        ordered = sorted(rows_of_fields(), key=lambda row: row.type == "Path")
        rows = [(FACETS[row.name].group, row) for row in ordered]
        first, *rest = ([row for own, row in rows if own == group] for group in GROUPS)
        with ui.element("div").classes("fields"):
            self._add(first)
        with ui.element("div"):
            for group, own in zip(GROUPS[1:], rest, strict=True):
                if not own:
                    continue
                what = " · ".join(title(row.name).partition(",")[0] for row in own[:4])
                caption = what + (" · …" if len(own) > 4 else "")
                self.groups[group] = made = ui.expansion(group, caption=caption).classes("group")
                with made, ui.element("div").classes("fields"):
                    self._add(own)
        self._suit()

    def _add(self, rows: Iterable[FieldRow]) -> None:
        for row in rows:
            self.fields[row.name] = FormField(row, self._changed)

    def _changed(self) -> Any:
        self._suit()
        return self.on_change()

    @property
    def method(self) -> str:
        return self.fields["method"].given() or "sft"

    def _suit(self) -> None:
        """Shows what has an effect with the method, and its defaults."""
        where = {"model_dir": ".", "data_dir": ".", "adapter_path": "."}
        base = TrainConfig.model_validate({**where, "method": self.method})
        for name, own in self.fields.items():
            own.show(self.method in (FACETS[name].methods or (self.method,)))
        for group, box in self.groups.items():
            own = (own for name, own in self.fields.items() if FACETS[name].group == group)
            box.set_visibility(any(field.shown for field in own))
        rate = self.fields["learning_rate"]
        rate.control.props["placeholder"] = f"{base.learning_rate:g}"

    def values(self) -> dict[str, Any]:
        """What was changed."""
        found = {name: own.given() for name, own in self.fields.items()}
        return {name: value for name, value in found.items() if value is not None}

    def put(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name in self.fields:
                self.fields[name].put(value)

    def complain(self, error: InputError | None) -> None:
        """Shows what is wrong at the field that it is about, if there is one; None is nothing."""
        name = error.field if error else None
        for own in self.fields.values():
            own.frame.complain(str(error) if own.row.name == name else "")
        if name in self.fields and (group := FACETS[name].group):
            self.groups[group].open()
