"""/v1: chat, completions, models and adapters, in OpenAI's formats."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from sse_starlette import EventSourceResponse

from ...errors import InputError, RunError, shown
from ..generation.engine import Busy, Engine
from ..generation.mounting import Base, Selected, names_base
from ..service import Service
from . import openai_forms as forms
from .answers import Answers, Delta
from .bodies import Json, JsonRoute
from .dependencies import Used
from .faults import error_answer, openai_error
from .guard import PATIENCE_S
from .openai_forms import ChatRequest, CompletionRequest, Generate


class Unserved(InputError):
    """A model, or the engine, is not available. `code` tells clients the reason."""

    def __init__(self, message: str, status: int, code: str):
        super().__init__(message, status=status)
        self.code = code


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the error responses for the API's schema. The entry 4XX keeps FastAPI from adding
    422."""
    descriptions = {
        400: "a field is invalid or not supported; the message names the field",
        403: "a path is outside the folders that the server may use",
        404: "the model or adapter does not exist",
        413: "the body is too large",
        429: "too many requests are waiting: try again in a moment",
        500: "the generation failed",
        503: "no model is loaded, a job is running (--while-training refuse), or memory is short",
        "4XX": "the request is not allowed, not found or not valid",
    }
    return {x: {"model": forms.Error, "description": descriptions[x]} for x in (*statuses, "4XX")}


router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])
#: The responses to a request that generates text.
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The completion or, if `stream` is true, its chunks as server-sent events, "
        "followed by [DONE].",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    **_errors(400, 404, 413, 429, 500, 503),
}


def _base(service: Service) -> Base:
    if service.engine.base is None:
        how = "start the server as `mlx-segtrain serve MODEL`, or load one on its page"
        raise Unserved(f"no model is loaded: {how}.", 503, "no_model")
    return service.engine.base


async def _selected(service: Service, base: Base, body: Generate) -> Selected:
    engine, named = service.engine, {"adapter": body.adapter}
    for field in ("adapters", "lora_path"):
        text = getattr(body, field)
        named[field] = await _by_path(service, field, text) if text and "/" in text else text
    if not names_base(base, body.model):
        if body.model not in engine.adapters:
            names = ", ".join((base.id, *engine.adapters))
            message = f"model {(body.model or '')[:200]!r} is not served: use one of {names}."
            raise Unserved(message, 404, "model_not_found")
        named = {"model": body.model, **named}
    given = [(field, id) for field, id in named.items() if id is not None]
    for field, id in given[1:]:
        if id != given[0][1]:
            raise InputError(
                f"{given[0][0]} names the adapter {given[0][1][:100]!r}, but {field} is "
                f"{id[:100]!r}: set only one of the two."
            )
    chosen = engine.select(given[0][1] if given else None)
    if chosen.base is not base:
        raise Busy("the model was replaced: try again.")
    return chosen


async def _by_path(service: Service, field: str, text: str) -> str:
    """Returns the id of the adapter that is mounted from a folder."""
    path = await asyncio.to_thread(service.roots.resolve, text)
    for mounted in service.engine.adapters.values():
        if mounted.path == path:
            return mounted.id
    raise InputError(
        f"{field}: {shown(text)} is not mounted: first POST this path and an id to /v1/adapters."
    )


async def begin(service: Service, request: Request, body: Generate) -> tuple[Answers, Selected]:
    """Starts generating the completions of a request. Raises InputError or Busy if the request
    cannot be served."""
    base = _base(service)
    if service.waits:
        raise Unserved(
            "this server is waiting for a training job to end: try again later.", 503, "training"
        )
    id = request.scope.get("mlx_segtrain.request", "-")
    try:
        body.check()
        chosen = await _selected(service, base, body)
        answers = await Answers.begin(service.engine, chosen, body, id)
    except RecursionError:  # some values can be parsed but not serialized
        raise InputError("the request is nested too deeply: flatten it.") from None
    if isinstance(request, Json):  # frees the body: generation may take a while
        request.let_go()
        body.let_go()
    return answers, chosen


def usage(request: Request, answers: Answers) -> dict[str, Any]:
    """Returns the usage. It contains the number of cached tokens only if the server has an access
    token. Without a token, anyone could send requests, and could infer other clients' prompts from
    that number."""
    authority = request.scope.get("mlx_segtrain.authority")
    return {
        "prompt_tokens": answers.prompt_tokens,
        "completion_tokens": answers.tokens,
        "total_tokens": answers.prompt_tokens + answers.tokens,
        "prompt_tokens_details": None if authority is None else {"cached_tokens": answers.cached},
        "completion_tokens_details": {"reasoning_tokens": answers.reasoning_tokens},
    }


async def _answer(service: Service, request: Request, body: Generate) -> Any:
    chat = isinstance(body, ChatRequest)
    answers, chosen = await begin(service, request, body)
    kind = "chat.completion" if chat else "text_completion"
    head = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if chat and body.stream else kind,
        "created": int(time.time()),
        "model": body.model or chosen.base.id,
        "adapter": chosen.id,
    }
    if body.stream:
        events = _events(answers, head, request, body)
        return EventSourceResponse(events, sep="\n", send_timeout=PATIENCE_S)
    found = await answers.whole(request)
    if found is None:
        return error_answer(request, 499, "the client has disconnected.")
    choice = _chat_choice if chat else _text_choice
    choices = [choice(answers, body, whole) for whole in found]
    return {**head, "choices": choices, "usage": usage(request, answers)}


def _chat_choice(answers: Answers, body: Generate, whole: Delta) -> dict[str, Any]:
    calls = [{k: x for k, x in call.items() if k != "index"} for call in whole.calls]
    content = whole.content if whole.content.strip() or not calls else None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if whole.reasoning:
        message["reasoning_content"] = whole.reasoning
    if calls:
        message["tool_calls"] = calls
    logprobs = None if body.top is None else answers.chat_logprobs(whole.told)
    return _choice(whole, {"message": message}, logprobs)


def _text_choice(answers: Answers, body: Generate, whole: Delta) -> dict[str, Any]:
    logprobs = None if body.top is None else answers.text_logprobs(whole.index, whole.told)
    return _choice(whole, {"text": whole.content}, logprobs)


def _choice(delta: Delta, own: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
    return {"index": delta.index, **own, "logprobs": logprobs, "finish_reason": delta.finish}


async def _events(
    answers: Answers, head: Mapping[str, Any], request: Request, body: Generate
) -> AsyncIterator[dict[str, str]]:
    """Yields the chunks of a stream: first the role of each completion (only for chats), then the
    pieces, and finally the usage if it was requested."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    chat = isinstance(body, ChatRequest)

    def event(choices: list[dict[str, Any]], own: dict[str, Any] | None = None) -> dict[str, str]:
        more = {"usage": own} if with_usage else {}
        return {"data": json.dumps({**head, "choices": choices, **more})}

    def chunks(delta: Delta) -> Iterator[dict[str, str]]:
        logprobs, wanted = None, body.top is not None and delta.told
        if not chat:
            if wanted:
                logprobs = answers.text_logprobs(delta.index, delta.told)
            yield event([_choice(delta, {"text": delta.content}, logprobs)])
            return
        more: dict[str, Any] = {}
        if delta.reasoning:
            more["reasoning_content"] = delta.reasoning
        if delta.content:
            more["content"] = delta.content
        if delta.calls:
            more["tool_calls"] = delta.calls
        if more or wanted:
            logprobs = answers.chat_logprobs(delta.told) if wanted else None
            yield event([_choice(replace(delta, finish=None), {"delta": more}, logprobs)])
        if delta.finish:
            yield event([_choice(delta, {"delta": {}})])

    try:
        if chat:
            for i in range(len(answers)):
                yield event([_choice(Delta(i), {"delta": {"role": "assistant", "content": ""}})])
        async with aclosing(answers.deltas()) as deltas:
            async for delta in deltas:
                for found in chunks(delta):
                    yield found
        if with_usage:
            yield event([], usage(request, answers))
        yield {"data": "[DONE]"}
    except (RunError, InputError) as error:  # the status has already been sent
        yield {"data": json.dumps(openai_error(503, str(error)))}
    finally:
        await answers.close()


@router.post("/v1/chat/completions", response_model=forms.ChatCompletion, responses=ANSWERS)
async def chat(body: ChatRequest, request: Request, service: Used) -> Any:
    """Generates the assistant's next message."""
    return await _answer(service, request, body)


@router.post("/v1/completions", response_model=forms.Completion, responses=ANSWERS)
async def complete(body: CompletionRequest, request: Request, service: Used) -> Any:
    """Completes a prompt."""
    return await _answer(service, request, body)


def _models(engine: Engine) -> list[forms.ModelInfo]:
    base = engine.base
    if base is None:
        return []
    named = [(base.id, None), *((id, base.id) for id in engine.adapters)]
    return [forms.ModelInfo(id=id, created=base.created, parent=parent) for id, parent in named]


@router.get("/v1/models")
async def list_models(service: Used) -> forms.ModelList:
    """The served model and all mounted adapters."""
    return forms.ModelList(data=_models(service.engine))


@router.get("/v1/models/{id:path}", responses=_errors(404))
async def get_model(id: str, service: Used) -> forms.ModelInfo:
    """The served model, or one mounted adapter."""
    base = service.engine.base
    name = base.id if base is not None and names_base(base, id) else id
    found = next((model for model in _models(service.engine) if model.id == name), None)
    if found is None:
        raise Unserved(f"model {id[:200]!r} is not served.", 404, "model_not_found")
    return found


@router.get("/v1/adapters", tags=["adapters"])
async def list_adapters(service: Used) -> forms.MountedAdapters:
    """The mounted adapters."""
    own = [{**vars(x), "path": str(x.path)} for x in service.engine.adapters.values()]
    return forms.MountedAdapters(adapters=[forms.MountedAdapter(**values) for values in own])


@router.get("/v1/adapters/available", response_model=forms.AvailableAdapters, tags=["adapters"])
async def list_available(service: Used) -> Any:
    """Adapters on disk that the served model can use."""
    return {"adapters": await service.available()}


@router.post("/v1/adapters", responses=_errors(400, 403, 413, 429, 503), tags=["adapters"])
async def mount(body: forms.MountRequest, service: Used) -> forms.MountAnswer:
    """Mounts an adapter. If an adapter is already mounted under this id, that adapter is kept.
    It is read again if `path` is its folder and its files have changed."""
    _base(service)
    path = await asyncio.to_thread(service.roots.resolve, body.path)
    return forms.MountAnswer(**vars(await service.engine.mount(body.id, path)))


@router.delete("/v1/adapters/{id:path}", responses=_errors(404, 429), tags=["adapters"])
async def unmount(id: str, service: Used) -> forms.UnmountAnswer:
    """Unmounts an adapter. Requests that already use it can still finish."""
    return forms.UnmountAnswer(id=id, removed_layers=await service.engine.unmount(id))
