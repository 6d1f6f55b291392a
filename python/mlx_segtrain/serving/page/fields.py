"""A run's parameters as a form, from the schema alone. Only what was changed is sent."""

import json
from collections.abc import Callable, Iterable
from typing import Any

from nicegui import ui

from ...config import EFFECTIVE, TrainConfig
from ..api.forms import FieldRow, rows_of_fields
from .frame import tag

#: The few that people change first; then the rest, in groups. What stands nowhere is in "More".
FIRST = "method rank scale iters epochs learning_rate max_seq_length batch_size adapter_path"
GROUPS = {
    "Adapter": "target_modules num_layers rank_scaling rs_lora use_dora lora_dropout warm_start",
    "Optimizer": "optimizer lr_schedule warmup_iters lora_plus_ratio weight_decay grad_clip_norm "
    "grad_accumulation_steps on_spike seed deterministic",
    "Memory": "memory_budget_gb segment_size grad_checkpoint",
    "Data": "train_on append_eos prompt_format chat_template_kwargs strict",
    "Preference": "dpo_beta dpo_loss label_smoothing reference_free orpo_lambda sft_scope "
    "simpo_beta simpo_gamma",
    "Evaluation and checkpoints": "steps_per_report steps_per_eval early_stopping_patience "
    "keep_best save_checkpoints steps_per_save keep_checkpoints sample_prompts sample_tokens "
    "report_to overwrite",
}
#: Chosen elsewhere on the page, or by a button of a job.
ELSEWHERE = ("model_dir", "data_dir", "resume")
#: Names that are not just words with underscores.
NAMES = {
    "iters": "Steps",
    "lr_schedule": "Learning rate schedule",
    "max_seq_length": "Longest row, tokens",
    "batch_size": "Batch size, rows",
    "adapter_path": "Adapter folder",
    "target_modules": "Linears",
    "num_layers": "Layers",
    "rs_lora": "rsLoRA",
    "use_dora": "DoRA",
    "lora_dropout": "Dropout",
    "warmup_iters": "Warmup, steps",
    "lora_plus_ratio": "LoRA+ ratio",
    "grad_clip_norm": "Gradient clipping, norm",
    "grad_accumulation_steps": "Gradient accumulation, batches",
    "memory_budget_gb": "Memory budget, GB",
    "segment_size": "Segment, layers",
    "grad_checkpoint": "Checkpoint every layer",
    "append_eos": "End responses with EOS",
    "prompt_format": "Plain prompts",
    "chat_template_kwargs": "Template variables",
    "strict": "Refuse incomplete rows",
    "train_on": "Trained turns",
    "dpo_beta": "DPO beta",
    "dpo_loss": "DPO loss",
    "orpo_lambda": "ORPO lambda",
    "sft_scope": "ORPO cross-entropy",
    "simpo_beta": "SimPO beta",
    "simpo_gamma": "SimPO gamma",
    "on_spike": "At a loss spike",
    "early_stopping_patience": "Stop early after, evaluations",
    "steps_per_report": "Report every, steps",
    "steps_per_eval": "Evaluate every, steps",
    "steps_per_save": "Checkpoint every, steps",
    "keep_best": "Keep the best adapter",
    "save_checkpoints": "Keep every evaluation's adapter",
    "overwrite": "Overwrite the adapter folder",
    "report_to": "Trackers",
}
#: Lists of which a word may have spaces: a line each.
LINES = ("sample_prompts",)


def title(name: str) -> str:
    return NAMES.get(name, name.replace("_", " ").capitalize())


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
        if row.name in LINES:
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
        if self.row.name in LINES:
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
            value = ("\n" if self.row.name in LINES else ", ").join(map(str, value))
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
        rows = {row.name: row for row in rows_of_fields() if row.name not in ELSEWHERE}
        self.on_change = on_change
        with ui.element("div").classes("fields"):
            self._add(rows.pop(name) for name in FIRST.split() if name in rows)
        groups = {name: words.split() for name, words in GROUPS.items()}
        known = {name for names in groups.values() for name in names}
        groups["More"] = [name for name in rows if name not in known]
        with ui.element("div"):
            for group, names in groups.items():
                own = [rows[name] for name in names if name in rows]
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
            if name in (*GROUPS["Preference"].split(), "train_on"):
                about = EFFECTIVE[name][0]
                if name == "label_smoothing":  # it depends on the loss, too, which may be changed
                    about = EFFECTIVE["dpo_beta"][0]
                own.show(about(base))
        self.groups["Preference"].set_visibility(self.method != "sft")
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

    def complain(self, message: str) -> None:
        """Shows a sentence at the field that it begins with, if it does."""
        name = message.split(maxsplit=1)[0] if message else ""
        for own in self.fields.values():
            own.frame.complain(message if own.row.name == name else "")
        for group, names in GROUPS.items():
            if name in names.split():
                self.groups[group].open()
