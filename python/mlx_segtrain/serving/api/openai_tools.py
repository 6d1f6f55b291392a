"""The tools in requests, and the tool calls in responses."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ...errors import InputError
from .openai_fields import Request

#: Maximum number of tools in a request, and of tool calls in a message.
TOOLS, CALLS = 128, 128


class Function(Request):
    """A function that the model may call. `parameters` is a JSON schema for its arguments."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        None,
        description="whether the arguments must match the schema. If `tool_choice` is `required` "
        "or names a tool, they always match. Otherwise, `strict` works only with models that write "
        "tool calls as JSON between tags",
    )


class Tool(Request):
    type: Literal["function"]
    function: Function


class ChosenName(BaseModel, strict=True, extra="forbid"):
    name: str


class ChosenTool(BaseModel, strict=True, extra="forbid"):
    """The tool that the model must call."""

    type: Literal["function"]
    function: ChosenName


class CalledFunction(BaseModel, strict=True):
    name: str
    arguments: str = Field(description="JSON")


class Call(BaseModel, strict=True):
    """A tool call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


Tools = Annotated[list[Tool], Field(max_length=TOOLS, fail_fast=True)]
Calls = Annotated[list[Call], Field(max_length=CALLS, fail_fast=True)]
Choice = Literal["none", "auto", "required"] | ChosenTool
#: JSON Schema keywords whose value maps names to schemas.
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


def for_template(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Returns tools in the form that a chat template expects. Raises InputError for fields that
    would have no effect."""
    for i, tool in enumerate(tools):
        tool.refuse_extra(f"tools.{i}.")
        tool.function.refuse_extra(f"tools.{i}.function.")
    return [tool.model_dump(exclude_none=True) for tool in tools]


def turn_calls(calls: Sequence[Call], where: str) -> list[dict[str, Any]]:
    """Returns tool calls in the form that a chat template expects, with parsed arguments."""
    found = []
    for i, call in enumerate(calls):
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            raise InputError(
                f"{where}.{i}.function.arguments is not valid JSON: send the arguments as a JSON "
                "object."
            ) from None
        function = {"name": call.function.name, "arguments": arguments}
        found.append({"id": call.id, "type": "function", "function": function})
    return found


def forced(tools: Sequence[Tool], choice: ChosenTool | None, parallel: bool) -> dict[str, Any]:
    """Returns the schema of a completion that calls the chosen tool or, if none is chosen, at least
    one of the tools."""
    named = {tool.function.name: tool.function.parameters for tool in tools}
    if choice is not None and choice.function.name not in named:
        raise InputError(
            f"tool_choice: {choice.function.name[:64]!r} is not one of the request's tools "
            f"({', '.join(named) or 'there are none'})."
        )
    wanted = named if choice is None else {choice.function.name: named[choice.function.name]}
    most = {} if parallel and choice is None else {"maxItems": 1}
    call, schemas = _call_of(wanted)
    return {"type": "array", "items": call, "minItems": 1, **most, "$defs": schemas}


def by_choice(tools: Sequence[Tool]) -> dict[str, Any]:
    """Returns the schema of a call to any of the tools. Tools that are not strict accept any
    arguments."""
    own = {x.function.name: x.function.parameters if x.function.strict else None for x in tools}
    call, schemas = _call_of(own)
    return {**call, "$defs": schemas}


def _call_of(wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the schema of a call to any of these tools, and the `$defs` that it needs."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name in wanted
    ]
    try:
        schemas = {
            name: _moved(schema or {"type": "object"}, f"#/$defs/{name}")
            for name, schema in wanted.items()
        }
    except RecursionError:
        raise InputError("tools are nested too deeply: use flatter parameters.") from None
    return {"anyOf": calls}, schemas


def _moved(schema: Any, root: str, named: bool = False) -> Any:
    """Returns a schema whose references are relative to `root`, the schema's new location. If
    `named` is set, the keys are names of schemas, not keywords."""
    if isinstance(schema, list):
        return [_moved(own, root) for own in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for key, value in schema.items():
        if not named and key in ("const", "enum"):  # values, not schemas
            found[key] = value
        elif not named and key == "$ref" and (value == "#" or str(value).startswith("#/")):
            found[key] = root + value[1:]
        else:
            found[key] = _moved(value, root, not named and key in _NAMED)
    return found


def called(call: Mapping[str, Any], id: str) -> dict[str, Any]:
    """Returns a tool call in OpenAI's format."""
    arguments = call.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": id, "type": "function", "function": {"name": call["name"], "arguments": text}}
