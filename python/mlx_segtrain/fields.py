"""Types and facets of the configuration's fields: what all others want to know of a field."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.fields import FieldInfo

#: Blocks of the page's form, in its order; the first has no title.
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
#: What a field may change besides the run: the memory that is planned, the loss of an adapter, the
#: rows that are read.
Effect = Literal["memory", "loss", "rows"]


@dataclass(frozen=True)
class Facets:
    """What is known of a field besides its type; a field that says nothing of it works everywhere.

    `affects` gives it a flag of `plan`, `eval` or `inspect`. `on_resume` says what becomes of a run
    that is resumed with another value: it is refused, goes on with a warning, or is the same run.
    The field does something with `methods` only (all if there are none), and where `holds`;
    `otherwise` is when it does not, in words.
    """

    title: str = ""  #: on the page, where that is not the name
    _: KW_ONLY
    affects: tuple[Effect, ...] = ()
    on_resume: Literal["refuse", "warn", "free"] = "refuse"
    methods: tuple[str, ...] = ()
    holds: Callable[[Any], bool] = lambda config: True
    otherwise: str = ""
    flag: str = ""  #: of the command line, where that is not the name
    aliases: tuple[str, ...] = ()  #: other flags of the same meaning
    refused: str = ""  #: why clients of the server may not set it, if they may not
    on_card: bool = False  #: the card of a run's adapter names it
    values: str = ""  #: what is allowed, where the type does not say it
    texts: bool = False  #: a list of texts, not of names: the page takes one a line
    group: Group | None = "More"  #: on the page; None: its form does not have it

    def __or__(self, other: Facets) -> Facets:
        """These facets, replaced by those of the other that are not the default."""
        said = {own.name: getattr(other, own.name) for own in fields(self)}
        return replace(self, **{name: x for name, x in said.items() if x != getattr(PLAIN, name)})

    def __call__(self, schema: dict[str, Any]) -> None:
        """Adds nothing to the field's JSON schema, of which pydantic lets it change all."""

    def effective(self, config: Any) -> bool:
        """Whether the field does something in this configuration."""
        return (not self.methods or config.method in self.methods) and self.holds(config)


#: All defaults.
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
    """A field with its default (... is none), pydantic's bounds, and `facets` with `more` of them.

    The docstring below the field is its description.
    """
    facets |= Facets(**more)
    return Field(default, json_schema_extra=facets, ge=ge, gt=gt, lt=lt, min_length=min_length)


def _expand(value: Any) -> Any:
    if value == "":  # Path("") is the working directory: an unset shell variable must not name it
        raise ValueError("empty path")
    return Path(value).expanduser() if isinstance(value, str) else value


def place(value: Any) -> Any:
    """A path as people write it; ./org/name stays one, where org/name may be a name of the hub."""
    path = _expand(value)
    return path.absolute() if isinstance(value, str) and value.startswith("./") else path


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would read `rank: yes` as 1
        raise ValueError("a boolean is not a number")
    return value


def _all_or_last(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("neither all layers nor a count of layers")
    return value


def _share(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("neither a share nor a number of rows")
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


def _mapping(values: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(name, str) and name for name in (*values, *values.values())):
        raise ValueError("a name is not a text")
    _distinct([*values.values()])
    return values


Directory = Annotated[Path, BeforeValidator(_expand)]
#: Or a name of the Hugging Face hub (hub.named).
Place = Annotated[Path, BeforeValidator(place)]
#: Of MLX's sizes, which are C++'s int.
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
