"""The configuration of a training run, declared once.

From `TrainConfig` come the flags of the command line, the keys of a YAML file, every error message,
and the table in docs/configuration.md (`python -m mlx_segtrain.config` prints it).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from mlx_segtrain.errors import InputError, shown, word

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _expand(value: Any) -> Any:
    if value == "":  # Path("") is the working directory: an unset shell variable must not name it
        raise ValueError("empty path")
    return Path(value).expanduser() if isinstance(value, str) else value


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would read `rank: yes` as 1
        raise ValueError("a boolean is not a number")
    return value


def _all_or_last(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("neither all layers nor a count of layers")
    return value


def _distinct(value: list[Any]) -> list[Any]:
    if len(set(value)) != len(value):
        raise ValueError("a name stands twice")
    return value


def _decoded(value: Any) -> Any:
    """JSON text, as a flag or a form field gives it, as what it says."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("not JSON") from None


#: Arguments of `apply_chat_template` that are not variables of the template.
NO_VARIABLES = (
    *("messages", "conversation", "tools", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "tokenizer_kwargs", "return_assistant_tokens_mask"),
)


def fault_of_variables(values: dict[str, Any]) -> str | None:
    """Why these cannot be variables of a chat template, in words; None if they can."""
    for name in values:
        if not isinstance(name, str) or not name.isidentifier():
            return f"{name!r} is not the name of a variable"
        if name in NO_VARIABLES:
            return f"{name} is not a variable of the template"
    return None


def _variables(values: dict[str, Any]) -> dict[str, Any]:
    if fault := fault_of_variables(values):
        raise ValueError(fault)
    return values


Directory = Annotated[Path, BeforeValidator(_expand)]
#: Of MLX's sizes, which are C++'s int.
MOST = 2**31 - 1
Int = Annotated[int, BeforeValidator(_not_bool), Field(le=MOST)]
Float = Annotated[float, BeforeValidator(_not_bool)]
Name = Annotated[str, Field(min_length=1)]
Variables = Annotated[dict[str, Any], BeforeValidator(_decoded), AfterValidator(_variables)]
LayerCount = Annotated[Int, AfterValidator(_all_or_last)]
SegmentSize = Literal["auto"] | Annotated[Int, Field(ge=0)]
Budget = Literal["auto"] | Annotated[Float, Field(gt=0)]
Resume = bool | Literal["auto"]


#: When an option that is not at its default does something, and when it does not, in words.
EFFECTIVE: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("dpo_beta", "dpo_loss", "reference_free"),
        (lambda c: c.method == "dpo", "outside of method dpo"),
    ),
    "label_smoothing": (
        lambda c: c.method == "dpo" and c.dpo_loss in ("sigmoid", "robust"),
        "outside of method dpo with dpo_loss sigmoid or robust",
    ),
    **dict.fromkeys(
        ("orpo_lambda", "sft_scope"), (lambda c: c.method == "orpo", "outside of method orpo")
    ),
    **dict.fromkeys(
        ("simpo_beta", "simpo_gamma"), (lambda c: c.method == "simpo", "outside of method simpo")
    ),
    "train_on": (lambda c: c.method == "sft", "with preference rows, whose responses are trained"),
    **dict.fromkeys(
        ("rank", "rank_scaling", "target_modules", "num_layers", "scale", "rs_lora", "use_dora"),
        (lambda c: c.warm_start is None, "with warm_start, whose adapter has its own"),
    ),
    "iters": (lambda c: c.epochs is None, "beside epochs"),
    "sample_tokens": (lambda c: bool(c.sample_prompts), "without sample_prompts"),
}


class TrainConfig(BaseModel):
    """One training run; raises pydantic.ValidationError (a ValueError) on a bad value."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model_dir: Directory = Field(description="Directory of the base model, as mlx-lm reads it.")
    data_dir: Directory = Field(
        description="Directory with train.jsonl and, for validation, valid.jsonl."
    )
    adapter_path: Directory = Field(
        description="Directory of the adapter; a run also writes metrics.jsonl and checkpoints."
    )
    method: Literal["sft", "dpo", "orpo", "simpo"] = Field(
        "sft", description="Training objective; all but sft take rows with chosen and rejected."
    )
    rank: Int = Field(8, ge=2, description="LoRA rank of an adapted linear, before rank_scaling.")
    scale: Float = Field(
        1.0, gt=0, description="Factor of the LoRA update, y = W x + scale * B A x."
    )
    rank_scaling: Literal["constant", "by_bits", "by_kl"] = Field(
        "by_bits",
        description="Rank per layer: the same everywhere, rank * bits / 4, or by KL importance.",
    )
    target_modules: Annotated[list[Name], AfterValidator(_distinct)] = Field(
        PROJECTIONS,
        min_length=1,
        description="Linears that get an adapter, by the end of their path; or all-linear. "
        "embed_tokens and lm_head too, if they are named.",
    )
    num_layers: LayerCount = Field(
        -1, description="Layers that get adapters, counted from the last one; -1 is all."
    )
    warm_start: Directory | None = Field(
        None,
        description="Directory of an adapter to go on from: ours, mlx-lm's or PEFT's. Its linears, "
        "ranks and scale are taken.",
    )
    iters: Int = Field(100, ge=1, description="Optimizer steps of the run.")
    epochs: Float | None = Field(
        None, gt=0, description="Passes over the training rows, in the place of iters."
    )
    optimizer: Literal["adamw", "lion", "sgd", "adafactor", "muon"] = Field(
        "adamw", description="Optimizer; sgd has a momentum of 0.9."
    )
    learning_rate: Float = Field(
        2e-4, gt=0, description="Largest learning rate of the run; of all but sft 5e-5 by default."
    )
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "constant",
        description="Learning rate behind the warmup; all but constant end at a tenth of it. "
        "Of all but sft cosine by default.",
    )
    warmup_iters: Int = Field(0, ge=0, description="First steps, with a rising learning rate.")
    lora_plus_ratio: Float = Field(
        1.0, gt=0, description="Learning rate of B over that of the others (LoRA+)."
    )
    rs_lora: bool = Field(
        False, description="Divide scale by the root of the rank (rsLoRA), linear by linear."
    )
    use_dora: bool = Field(
        False, description="Train the lengths of the adapted weights' rows apart (DoRA)."
    )
    lora_dropout: Float = Field(
        0.0, ge=0, lt=1, description="Part of a LoRA branch's inputs that each step leaves out."
    )
    dpo_beta: Float = Field(
        0.1, gt=0, description="Strength with which dpo stays near the model without adapter."
    )
    dpo_loss: Literal["sigmoid", "hinge", "ipo", "robust"] = Field(
        "sigmoid", description="Loss of dpo."
    )
    label_smoothing: Float = Field(
        0.0, ge=0, lt=0.5, description="Part of pairs taken to be mislabelled (sigmoid, robust)."
    )
    reference_free: bool = Field(
        False, description="Leave the model without adapter out of dpo's loss."
    )
    orpo_lambda: Float = Field(0.1, gt=0, description="Weight of orpo's odds-ratio term.")
    sft_scope: Literal["full", "response"] = Field(
        "full", description="Tokens of the chosen sequence that orpo's cross-entropy counts."
    )
    simpo_beta: Float = Field(2.0, gt=0, description="Factor of simpo's rewards.")
    simpo_gamma: Float = Field(
        1.0, ge=0, description="Margin that simpo wants between the rewards of a pair."
    )
    max_seq_length: Int = Field(512, ge=2, description="Tokens kept of a row; the rest is cut off.")
    batch_size: Int = Field(1, ge=1, description="Rows in a forward and backward pass.")
    grad_accumulation_steps: Int = Field(
        1, ge=1, description="Batches whose gradients are summed into an optimizer step."
    )
    seed: Int = Field(0, ge=0, description="Seed of the row order and of the LoRA initialization.")
    deterministic: bool = Field(
        True,
        description="Same seed, same device: same bytes. false lets attention on CUDA be cuDNN's, "
        "which is faster and adds up in any order.",
    )
    steps_per_report: Int = Field(10, ge=1, description="Steps between training metrics.")
    steps_per_eval: Int = Field(50, ge=1, description="Steps between evaluations on valid.jsonl.")
    weight_decay: Float = Field(0.01, ge=0, description="Weight decay, apart from the gradient.")
    grad_clip_norm: Float = Field(
        1.0, ge=0, description="Largest global L2 norm of the gradient; 0 is no clipping."
    )
    grad_checkpoint: bool = Field(
        False, description="Recompute each layer in the backward pass: less memory, more time."
    )
    segment_size: SegmentSize = Field(
        "auto",
        description="Layers per segment of the backward pass; 0 is off, auto chooses what fits.",
    )
    memory_budget_gb: Budget = Field(
        "auto",
        description="Memory that a run may take, in 10⁹ bytes; auto is what the device has free.",
    )
    steps_per_save: Int = Field(
        50,
        ge=0,
        description="Steps between checkpoints, from which a run can be resumed; 0 is none but at "
        "its end. The adapter is written with each.",
    )
    keep_checkpoints: Int = Field(2, ge=1, description="Newest of these checkpoints to keep.")
    resume: Resume = Field(
        False,
        description="Go on from the newest whole checkpoint in adapter_path; auto begins if there "
        "is none.",
    )
    on_spike: Literal["warn", "skip", "stop"] = Field(
        "warn", description="What to do at a loss far above those of the steps before."
    )
    report_to: Annotated[list[Literal["tensorboard", "wandb"]], AfterValidator(_distinct)] = Field(
        [], description="Trackers that get the metrics, besides metrics.jsonl."
    )
    save_checkpoints: bool = Field(
        False, description="Keep a complete adapter directory of every evaluation."
    )
    early_stopping_patience: Int = Field(
        0, ge=0, description="Evaluations without a lower loss that end the run; 0 is never."
    )
    keep_best: bool = Field(
        False, description="Keep the adapter of the lowest validation loss in adapter_path/best."
    )
    sample_prompts: Annotated[list[Name], AfterValidator(_distinct)] = Field(
        [], description="Prompts that every evaluation answers, for the log."
    )
    sample_tokens: Int = Field(64, ge=1, description="Most tokens of such an answer.")
    eval_command: Name | None = Field(
        None,
        description="Command that scores every evaluation's adapter: {adapter} in it is a copy's "
        "directory, and the last line it prints a number or a JSON object of numbers.",
    )
    train_on: Literal["assistant", "last"] = Field(
        "assistant",
        description="Turns of a chat that are trained: every assistant turn or the last one.",
    )
    append_eos: bool = Field(
        True,
        description="End every trained response with a token that stops generation, where the chat "
        "template or the row does not.",
    )
    prompt_format: Literal["auto", "chat", "raw"] = Field(
        "auto",
        description="Whether plain prompts (prompt with completion, chosen or rejected as strings) "
        "go through the chat template; auto: if the tokenizer has one.",
    )
    chat_template_kwargs: Variables = Field(
        {},
        description='Variables of the chat template, such as {"enable_thinking": false}; a row may '
        "have its own. Generation with the adapter uses them too.",
    )
    strict: bool = Field(
        False,
        description="Refuse data of which the chat template loses a part, or leaves a trained turn "
        "without a token that stops generation; otherwise such rows are counted and reported.",
    )
    overwrite: bool = Field(False, description="Replace an adapter that adapter_path holds.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, values: Any) -> Any:
        """What depends on the method: two defaults, and DPO's names of two fields."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name in ("lr_schedule", "warmup_iters"):
            if f"dpo_{name}" not in values:
                continue
            if values.get("method") != "dpo":
                raise ValueError(f"dpo_{name} is for method dpo: give {name}")
            if name in values:
                raise ValueError(f"dpo_{name} and {name} are the same: give one of them")
            values[name] = values.pop(f"dpo_{name}")
        if values.get("method", "sft") != "sft":
            values = {"learning_rate": 5e-5, "lr_schedule": "cosine", **values}
        return values

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> TrainConfig:
        for name, (holds, what) in EFFECTIVE.items():
            if getattr(self, name) != type(self).model_fields[name].default and not holds(self):
                raise ValueError(f"{name} has no effect {what}: leave it out")
        return self

    @model_validator(mode="after")
    def _warmup_within_the_run(self) -> TrainConfig:
        if self.epochs is None and self.warmup_iters >= self.iters:
            raise ValueError(
                f"warmup_iters = {self.warmup_iters} leaves nothing of iters = {self.iters}: "
                "the learning rate would never be reached, so lower it"
            )
        return self

    @model_validator(mode="after")
    def _resume_or_overwrite(self) -> TrainConfig:
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite contradict each other: set only one of the two")
        return self

    @model_validator(mode="after")
    def _one_memory_plan(self) -> TrainConfig:
        if self.grad_checkpoint and isinstance(self.segment_size, int) and self.segment_size > 0:
            raise ValueError(
                f"grad_checkpoint and segment_size = {self.segment_size} contradict each other: "
                "segments already recompute their layers, so set only one of the two"
            )
        return self


def kind(field: FieldInfo) -> Any:
    """The type of the field's value, where it has one."""
    some = [x for x in get_args(field.annotation) if x is not type(None)]
    if get_origin(field.annotation) is dict:
        return dict
    own = some[0] if len(some) < len(get_args(field.annotation)) else field.annotation
    return get_args(own)[0] if get_origin(own) is Annotated else own


def is_list(field: FieldInfo) -> bool:
    """Whether the field takes several values."""
    return get_origin(field.annotation) is list


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words that the field accepts; () for any value."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def allowed(name: str, value: Any = None) -> str:
    """The values of a field in words, e.g. "an integer >= 2"; for errors, --help and the table.

    For a `value` that only the bound of all integers forbids, that bound.
    """
    if isinstance(value, int) and value > MOST:
        return f"an integer <= {MOST}"
    if name in SPECIAL:
        return SPECIAL[name]
    field = TrainConfig.model_fields[name]
    if is_list(field):
        return "one or more names, each once"
    if words := choices(field):
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    kinds = {Path: "a path", bool: "true or false", int: "an integer", float: "a finite number"}
    signs = {"ge": ">=", "gt": ">", "lt": "<"}
    bounds = [
        f"{sign} {getattr(item, key)}"
        for item in field.metadata
        for key, sign in signs.items()
        if hasattr(item, key)
    ]
    return " ".join([kinds[kind(field)], " and ".join(bounds)]).strip()


#: Values that the types do not say.
SPECIAL = {
    "num_layers": "-1 or an integer >= 1",
    "segment_size": "auto or an integer >= 0",
    "memory_budget_gb": "auto or a finite number > 0",
    "sample_prompts": "texts, each once",
    "resume": "true, false or auto",
    "report_to": "tensorboard or wandb, each once",
    "eval_command": "a command line",
    "chat_template_kwargs": "a JSON object whose keys are variables of the template",
}


def nearest(name: str, names: Sequence[str]) -> str:
    """The question whether the closest of names was meant, or an empty string."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def load_config(yaml_path: Path | None, overrides: dict[str, Any]) -> TrainConfig:
    """Read a YAML file (or none), replace the fields in overrides; InputError on any bad value."""
    values, lines = _read_yaml(yaml_path) if yaml_path else ({}, {})
    where = {key: f"{yaml_path}, line {line}: " for key, line in lines.items()}
    for key, value in overrides.items():
        values[key] = value
        where.pop(key, None)
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        raise InputError(_sentence(error, values, where)) from None


def _sentence(error: ValidationError, values: dict[str, Any], where: dict[str, str]) -> str:
    """The first fault of a ValidationError, with its place, the value, and what is allowed."""
    order = {"extra_forbidden": 0, "missing": 2}  # a misspelt field is also a missing one
    fault = min(error.errors(), key=lambda fault: order.get(fault["type"], 1))
    if not fault["loc"]:
        return fault["msg"].removeprefix("Value error, ")
    name = str(fault["loc"][0])
    if fault["type"] == "extra_forbidden":
        hint = nearest(name, list(TrainConfig.model_fields))
        return f"{where.get(name, '')}unknown field {word(name)}.{hint}"
    if fault["type"] == "missing":
        return f"{name} is missing: set it in the YAML file or with {flag(name)}"
    value = values[name]
    return f"{where.get(name, '')}{name} must be {allowed(name, value)}; got {shown(value, 200)}"


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file and the line (from 1) of each key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path}: expected lines of the form `field: value`")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.value in lines:  # PyYAML would keep the last one without a word
            raise InputError(
                f"{path}, line {key.start_mark.line + 1}: {key.value} is set a second time "
                f"(first on line {lines[key.value]})"
            )
        lines[key.value] = key.start_mark.line + 1
    return values, lines


def table() -> str:
    """The Markdown table of every field: flag, values, default, meaning."""
    rows = ["| Field | Values | Default | Meaning |", "|---|---|---|---|"]
    for name, field in TrainConfig.model_fields.items():
        rows.append(f"| `{name}` | {allowed(name)} | {default(name)} | {field.description} |")
    return "\n".join(rows)


def default(name: str) -> str:
    """The default of a field as YAML and the table show it."""
    field = TrainConfig.model_fields[name]
    if field.is_required():
        return "required"
    if field.default in (None, [], {}):
        return "none"
    if isinstance(field.default, list):
        return ", ".join(field.default)
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


if __name__ == "__main__":
    print(table())
