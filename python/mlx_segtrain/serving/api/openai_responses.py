"""/v1/responses: OpenAI's newer format for chats, with text and tools. The server stores no
responses."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from sse_starlette import EventSourceResponse

from ...errors import InputError, RunError
from .answers import Answers, Delta
from .bodies import JsonRoute
from .dependencies import Used
from .faults import error_answer
from .guard import PATIENCE_S
from .openai import ANSWERS, begin, usage
from .openai_fields import ANYTHING, Neutral
from .openai_fields import Request as Fields
from .openai_forms import TOP, TURNS, ChatRequest, JsonSchema

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])
#: The schema of a stream's events. `data` is JSON that also contains the event's type.
EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
RESPONSES: dict[int | str, dict[str, Any]] = {
    **ANSWERS,
    200: {
        "description": "The response or, if `stream` is true, its events.",
        "content": {"text/event-stream": {"schema": EVENT}},
    },
}

#: Unsupported fields, each with the values that are accepted because they have no effect.
IN_RESPONSE: Neutral = {
    **dict.fromkeys(("user", "safety_identifier"), ANYTHING),
    **dict.fromkeys(("prompt_cache_key", "prompt_cache_retention"), ANYTHING),
    "store": (False,),
    "background": (False,),
    "service_tier": ("auto", "default"),
    "truncation": ("disabled",),
    "include": ([],),
    "reasoning": ({},),
    "stream_options": ({},),
}
IN_TEXT: Neutral = {"verbosity": ("medium",)}
IN_ITEM: Neutral = {"id": ANYTHING, "status": ANYTHING, "summary": ANYTHING}


class Item(Fields):
    """A turn, a tool call, the result of a tool call, or reasoning. Reasoning is ignored."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None
    neutral = IN_ITEM


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"]


class TextOptions(Fields):
    format: TextFormat | None = None
    neutral = IN_TEXT


class ResponseRequest(Fields):
    """A request for a response. Fields that also exist in chat requests have the same
    meaning here."""

    input: str | Annotated[list[Item], Field(min_length=1, max_length=TURNS, fail_fast=True)]
    model: str | None = None
    adapter: str | None = None
    instructions: str | None = Field(None, description="a system message to insert before `input`")
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP)
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    deterministic: bool | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = Field(
        None, description="key-value pairs to return unchanged with the response"
    )
    neutral = IN_RESPONSE

    def as_chat(self) -> ChatRequest:
        """Returns the request as a chat. Raises InputError for fields that chats do not support."""
        self.refuse_extra()
        turns: list[dict[str, Any]] = []
        if self.instructions:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            turns.append({"role": "user", "content": self.input})
        else:
            for i, item in enumerate(self.input):
                _add_turn(turns, item, f"input.{i}")
        form: dict[str, Any] | None = None
        if self.text is not None:
            self.text.refuse_extra("text.")
            if (own := self.text.format) is not None:
                own.refuse_extra("text.format.")
                form = {"type": own.type}
                if own.type == "json_schema":
                    form["json_schema"] = {"name": own.name, "schema": own.schema_}
        tools = [_tool(tool, f"tools.{i}") for i, tool in enumerate(self.tools or ())]
        choice = self.tool_choice
        if isinstance(choice, dict):
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        same = ("model", "adapter", "temperature", "top_p", "parallel_tool_calls", "stream")
        same += ("deterministic", "chat_template_kwargs")
        values = {name: getattr(self, name) for name in same}
        values |= {"messages": turns, "tools": tools or None, "tool_choice": choice}
        values |= {"max_tokens": self.max_output_tokens, "response_format": form}
        if self.top_logprobs:
            values |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        try:
            return ChatRequest.model_validate(values)
        except ValueError as error:
            first = error.errors()[0] if hasattr(error, "errors") else {}  # pyright: ignore
            where = ".".join(map(str, first.get("loc", ())))
            raise InputError(f"{where or 'input'}: {first.get('msg', error)}.") from None


def _add_turn(turns: list[dict[str, Any]], item: Item, where: str) -> None:
    item.refuse_extra(f"{where}.")
    if item.type == "reasoning":
        return
    if item.type == "function_call":
        function = {"name": item.name or "", "arguments": item.arguments or "{}"}
        call = {"id": item.call_id or "", "type": "function", "function": function}
        if not (turns and turns[-1].get("tool_calls")):
            turns.append({"role": "assistant", "content": None, "tool_calls": []})
        turns[-1]["tool_calls"].append(call)
        return
    if item.type == "function_call_output":
        own = {"tool_call_id": item.call_id or ""}
        turns.append({"role": "tool", "content": item.output or "", **own})
        return
    if item.role is None or item.content is None:
        raise InputError(f"{where}: a message must have a role and content.")
    content: Any = item.content
    if isinstance(content, list):
        texts = ("input_text", "output_text", "text")
        for part in content:
            if part.get("type") not in texts or not isinstance(part.get("text"), str):
                raise InputError(
                    f"{where}.content: the model accepts only text: send input_text parts."
                )
        content = "".join(part["text"] for part in content)
    turns.append({"role": item.role, "content": content})


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise InputError(f"{where}.type: only tools of type function are supported.")
    function = {key: value for key, value in tool.items() if key != "type" and value is not None}
    return {"type": "function", "function": function}


class ResponseUsage(BaseModel):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int]


class Response(BaseModel):
    id: str
    object: Literal["response"] = "response"
    created_at: float
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    model: str
    adapter: str | None
    output: list[dict[str, Any]]
    usage: ResponseUsage | None
    incomplete_details: dict[str, str] | None
    error: dict[str, str] | None
    instructions: str | None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    temperature: float | None
    top_p: float | None
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


class Made:
    """Builds a response and the events of its stream during generation."""

    def __init__(self, body: ResponseRequest, answers: Answers, model: str, adapter: str | None):
        self.items: list[dict[str, Any]] = []
        self._answers, self._open, self._number = answers, False, 0
        self.head: dict[str, Any] = {
            "id": _id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": model,
            "adapter": adapter,
            "output": [],
            "usage": None,
            "incomplete_details": None,
            "error": None,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
        }

    def event(self, kind: str, **more: Any) -> dict[str, str]:
        data = {"type": kind, "sequence_number": self._number, **more}
        self._number += 1
        return {"event": kind, "data": json.dumps(data)}

    def add(self, delta: Delta) -> Iterator[dict[str, str]]:
        """Adds a part of the completion, and yields the events for it."""
        if delta.reasoning:
            yield from self._begin("reasoning")
            self.items[-1]["content"][0]["text"] += delta.reasoning
            yield self._part("response.reasoning_text.delta", delta=delta.reasoning)
        if delta.content:
            yield from self._begin("message")
            part = self.items[-1]["content"][0]
            part["text"] += delta.content
            logprobs = self._answers.chat_logprobs(delta.told)["content"]
            part["logprobs"] += logprobs
            more = {"delta": delta.content, "logprobs": logprobs}
            yield self._part("response.output_text.delta", **more)
        for call in delta.calls:
            yield from self._end()
            own = {"type": "function_call", "id": _id("fc"), "call_id": call["id"]}
            arguments = call["function"]["arguments"]
            own |= {"name": call["function"]["name"], "arguments": "", "status": "in_progress"}
            self.items.append(own)
            yield self._item("added")
            own |= {"arguments": arguments, "status": "completed"}
            at = {"item_id": own["id"], "output_index": len(self.items) - 1}
            yield self.event("response.function_call_arguments.delta", delta=arguments, **at)
            at |= {"arguments": arguments, "name": own["name"]}
            yield self.event("response.function_call_arguments.done", **at)
            yield self._item("done")
        if delta.finish:
            yield from self._end()

    def _item(self, what: str) -> dict[str, str]:
        kind, index = f"response.output_item.{what}", len(self.items) - 1
        return self.event(kind, output_index=index, item=self.items[-1])

    def _part(self, kind: str, **more: Any) -> dict[str, str]:
        own, index = self.items[-1], len(self.items) - 1
        return self.event(kind, item_id=own["id"], output_index=index, content_index=0, **more)

    def _begin(self, kind: str) -> Iterator[dict[str, str]]:
        if self._open and self.items[-1]["type"] == kind:
            return
        yield from self._end()
        if kind == "message":
            own: dict[str, Any] = {"type": kind, "id": _id("msg"), "role": "assistant"}
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": []}
            part["logprobs"] = []
        else:
            own = {"type": kind, "id": _id("rs"), "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        own |= {"status": "in_progress", "content": []}
        self.items.append(own)
        yield self._item("added")
        own["content"] = [part]
        self._open = True
        yield self._part("response.content_part.added", part=part)

    def _end(self) -> Iterator[dict[str, str]]:
        if not self._open:
            return
        self._open, own = False, self.items[-1]
        part = own["content"][0]
        if own["type"] == "message":
            more = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._part("response.output_text.done", **more)
        else:
            yield self._part("response.reasoning_text.done", text=part["text"])
        yield self._part("response.content_part.done", part=part)
        own["status"] = "completed"
        yield self._item("done")

    def whole(self, request: Request, finish: str | None) -> dict[str, Any]:
        used = usage(request, self._answers)
        cached = (used["prompt_tokens_details"] or {}).get("cached_tokens", 0)
        short = finish == "length"
        return {
            **self.head,
            "status": "incomplete" if short else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if short else None,
            "output": self.items,
            "usage": {
                "input_tokens": used["prompt_tokens"],
                "output_tokens": used["completion_tokens"],
                "total_tokens": used["total_tokens"],
                "input_tokens_details": {"cached_tokens": cached},
                "output_tokens_details": used["completion_tokens_details"],
            },
        }


@router.post("/v1/responses", response_model=Response, responses=RESPONSES)
async def respond(body: ResponseRequest, request: Request, service: Used) -> Any:
    """Generates a response with text and tool calls."""
    chat = body.as_chat()
    body.input = ""  # frees the input before generation, which may take a while
    answers, chosen = await begin(service, request, chat)
    made = Made(body, answers, body.model or chosen.base.id, chosen.id)
    if body.stream:
        events = _events(made, answers, request)
        return EventSourceResponse(events, sep="\n", send_timeout=PATIENCE_S)
    found = await answers.whole(request)
    if found is None:
        return error_answer(request, 499, "the client has disconnected.")
    for _ in made.add(found[0]):
        pass
    return made.whole(request, found[0].finish)


async def _events(made: Made, answers: Answers, request: Request) -> AsyncIterator[dict[str, str]]:
    finish = None
    try:
        yield made.event("response.created", response=made.head)
        yield made.event("response.in_progress", response=made.head)
        async with aclosing(answers.deltas()) as deltas:
            async for delta in deltas:
                finish = delta.finish or finish
                for event in made.add(delta):
                    yield event
        whole = made.whole(request, finish)
        yield made.event(f"response.{whole['status']}", response=whole)
    except (RunError, InputError) as error:  # the status has already been sent
        failed = {"status": "failed", "error": {"code": "server_error", "message": str(error)}}
        yield made.event("response.failed", response={**made.head, **failed})
    finally:
        await answers.close()
