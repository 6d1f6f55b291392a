"""Types and properties (facets) of the configuration's fields. Other modules derive flags, forms
and checks from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.fields import FieldInfo

#: The sections of the form on the page, in order. The first section has no title.
Group = Literal[
    "",
    "Adapter",
    "Optimizer",
    "Memory",
    "Data",
    "Preference",
    "GRPO",
    "Evaluation and checkpoints",
    "More",
]
#: What a field affects besides a run: the memory plan, the loss of an adapter, or the rows that are
#: read.
Effect = Literal["memory", "loss", "rows"]


@dataclass(frozen=True)
class Facets:
    """The properties of a field other than its type. By default a field always has an effect.

    `affects` makes the field a flag of the command `plan` (memory), `eval` (loss) or `inspect`
    (rows). `on_resume` says whether a run can be resumed with another value of the field: the new
    value is refused, accepted with a warning, or accepted. The field has an effect only if
    `methods` is empty or contains the run's method, and if `holds` returns True. `otherwise` is a
    phrase that names the cases in which the field has no effect.
    """

    title: str = ""  #: label on the page; by default, the field's name
    _: KW_ONLY
    affects: tuple[Effect, ...] = ()
    on_resume: Literal["refuse", "warn", "free"] = "refuse"
    methods: tuple[str, ...] = ()
    holds: Callable[[Any], bool] = lambda config: True
    otherwise: str = ""
    flag: str = ""  #: flag on the command line; by default, the field's name
    aliases: tuple[str, ...] = ()  #: additional flags with the same meaning
    refused: str = ""  #: why clients of the server may not set it; "" if they may
    on_card: bool = False  #: whether it is shown on the model card of an adapter
    values: str = ""  #: the allowed values, if the type does not determine them
    other_default: str = ""  #: a second default, with the cases in which it applies
    texts: bool = False  #: whether its values are texts, entered one per line on the page
    group: Group | None = "More"  #: section of the form, or None if it is not in the form

    def __or__(self, other: Facets) -> Facets:
        """Returns these facets, updated with the facets of `other` that differ from their
        defaults."""
        said = {own.name: getattr(other, own.name) for own in fields(self)}
        return replace(self, **{name: x for name, x in said.items() if x != getattr(PLAIN, name)})

    def __call__(self, schema: dict[str, Any]) -> None:
        """Called by pydantic; leaves the JSON schema of the field unchanged."""

    def effective(self, config: Any) -> bool:
        """Returns whether the field has an effect in this configuration."""
        return (not self.methods or config.method in self.methods) and self.holds(config)


#: Facets with only default values.
PLAIN = Facets()


def option(
    default: Any,
    facets: Facets = PLAIN,
    *,
    ge: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
    min_length: int | None = None,
    **more: Any,
) -> Any:
    """Declares a field with its default (`...` if it has none), bounds for pydantic, and `facets`
    updated with `more`.

    The docstring after the field is its description.
    """
    facets |= Facets(**more)
    return Field(default, json_schema_extra=facets, ge=ge, gt=gt, lt=lt, min_length=min_length)


def _expand(value: Any) -> Any:
    if value == "":  # an unset shell variable must not become the working directory
        raise ValueError("empty path")
    return Path(value).expanduser() if isinstance(value, str) else value


def place(value: Any) -> Any:
    """Converts a value to a path. ./org/name is always a path, while org/name may also be a name on
    the hub."""
    path = _expand(value)
    return path.absolute() if isinstance(value, str) and value.startswith("./") else path


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would accept `rank: yes` as 1
        raise ValueError("a boolean is not a number")
    return value


def _all_or_last(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("expected -1 for all layers, or a number of layers")
    return value


def _share(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("expected a fraction, or a whole number of rows")
    return value


def _distinct(value: list[Any]) -> list[Any]:
    if len(set(value)) != len(value):
        raise ValueError("a name is given twice")
    return value


def _decoded(value: Any) -> Any:
    """Decodes a value that a flag or a form field passes as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("not JSON") from None


#: The arguments of `apply_chat_template` that are not template variables.
NO_VARIABLES = (
    *("messages", "conversation", "tools", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "tokenizer_kwargs", "return_assistant_tokens_mask"),
)


def fault_of_variables(values: dict[str, Any]) -> str | None:
    """Returns the reason why these values cannot be variables of a chat template, or None if they
    can."""
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


def _mapping(values: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(name, str) and name for name in (*values, *values.values())):
        raise ValueError("names must be non-empty strings")
    _distinct([*values.values()])
    return values


Directory = Annotated[Path, BeforeValidator(_expand)]
#: A path, or a name on the Hugging Face hub (hub.named).
Place = Annotated[Path, BeforeValidator(place)]
#: The largest size that MLX supports, since its sizes are C++ ints.
MOST = 2**31 - 1
Int = Annotated[int, BeforeValidator(_not_bool), Field(le=MOST)]
Float = Annotated[float, BeforeValidator(_not_bool)]
Name = Annotated[str, Field(min_length=1)]
Distinct = AfterValidator(_distinct)
Variables = Annotated[dict[str, Any], BeforeValidator(_decoded), AfterValidator(_variables)]
Columns = Annotated[dict[str, Any], BeforeValidator(_decoded), AfterValidator(_mapping)]
LayerCount = Annotated[Int, AfterValidator(_all_or_last)]
SegmentSize = Literal["auto"] | Annotated[Int, Field(ge=0)]
Budget = Literal["auto"] | Annotated[Float, Field(gt=0)]
Share = Literal["auto"] | Annotated[Float, Field(ge=0), AfterValidator(_share)]
RolloutBatch = Literal["auto"] | Annotated[Int, Field(ge=1)]
Switch = bool | Literal["auto"]


def kind(field: FieldInfo) -> Any:
    """Returns the type of the field's value, ignoring None."""
    some = [x for x in get_args(field.annotation) if x is not type(None)]
    if get_origin(field.annotation) is dict:
        return dict
    own = some[0] if len(some) < len(get_args(field.annotation)) else field.annotation
    return get_args(own)[0] if get_origin(own) is Annotated else own


def is_list(field: FieldInfo) -> bool:
    """Returns whether the field accepts a list of values."""
    return get_origin(field.annotation) is list


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Returns the words to which the field's value is limited, or () if there is no such limit."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
