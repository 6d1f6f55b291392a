"""/v1: chat, completions, models and adapters, in the forms that OpenAI's clients know."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from sse_starlette import EventSourceResponse

from ...errors import InputError, RunError, shown
from ..confined.parent import prompts
from ..generation.engine import Busy, Engine
from ..generation.mounting import Base, Mounted, Selected
from ..generation.pieces import Generation, Piece
from ..service import Service
from .bodies import Json, JsonRoute
from .dependencies import Used
from .faults import error_answer, openai_error
from .guard import PATIENCE_S
from .openai_forms import (
    AvailableAdapters,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Error,
    Generate,
    ModelInfo,
    ModelList,
    MountAnswer,
    MountedAdapter,
    MountedAdapters,
    MountRequest,
    UnmountAnswer,
    chat_turns,
    names_base,
    prompt_tokens,
)

#: Seconds between two looks whether a client that waits for a whole answer is still there.
LOOK_S = 0.25


class Unserved(InputError):
    """What is asked for is not there (yet); `code` tells clients what lacks."""

    def __init__(self, message: str, status: int, code: str):
        super().__init__(message, status=status)
        self.code = code


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the document says of them. With 4XX FastAPI adds no 422, which there is not."""
    said = {
        400: "a field that cannot be used, named in the message",
        403: "a path outside of the folders that the server may use",
        404: "there is no such model or adapter",
        413: "the body is too large",
        429: "too many requests wait: try again in a moment",
        500: "the generation failed",
        503: "no model is loaded, a job trains and the server is set to wait for it, or memory is "
        "short",
        "4XX": "a request that is refused: not allowed, not found, or not of the schema",
    }
    return {s: {"model": Error, "description": said[s]} for s in (*statuses, "4XX")}


def _usage(prompt: Sequence[int], last: Piece, authority: str | None) -> dict[str, Any]:
    """Which tokens were cached tells of others' prompts: it is for those who have all the token."""
    return {
        "prompt_tokens": len(prompt),
        "completion_tokens": last.tokens,
        "total_tokens": len(prompt) + last.tokens,
        "prompt_tokens_details": None if authority is None else {"cached_tokens": last.cached},
    }


async def _whole(generation: Generation, request: Request) -> list[Piece]:
    """All pieces. If the client goes, the generation ends, and the last has no `finish`."""

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(LOOK_S)
        await generation.aclose()

    watcher = asyncio.create_task(watch())
    try:
        return [piece async for piece in generation]
    finally:
        watcher.cancel()
        await generation.aclose()


async def _events(
    generation: Generation,
    prompt: Sequence[int],
    head: Mapping[str, Any],
    choice: Callable[[str | None, str | None], dict[str, Any]],
    with_usage: bool,
    authority: str | None,
) -> AsyncIterator[dict[str, str]]:
    """A chunk for the role if there is one, one for each piece, one for the usage if wanted."""

    def event(choices: list[dict[str, Any]], **more: Any) -> dict[str, str]:
        usage = {"usage": None} if with_usage else {}
        return {"data": json.dumps({**head, "choices": choices, **usage, **more})}

    try:
        if head["object"] == "chat.completion.chunk":
            yield event([choice(None, None)])
        async for piece in generation:
            if piece.text:
                yield event([choice(piece.text, None)])
            if piece.finish:
                yield event([choice("", piece.finish)])
                if with_usage:
                    yield event([], usage=_usage(prompt, piece, authority))
                yield {"data": "[DONE]"}
    except RunError as error:  # the status is sent already
        yield {"data": json.dumps(openai_error(503, str(error)))}
    finally:
        await generation.aclose()


def _chat_choice(text: str | None, finish: str | None) -> dict[str, Any]:
    delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
    return {
        "index": 0,
        "delta": {} if finish else delta,
        "logprobs": None,
        "finish_reason": finish,
    }


def _text_choice(text: str | None, finish: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text or "", "logprobs": None, "finish_reason": finish}


router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream, chunks as server-sent events up to [DONE].",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def _base(service: Service) -> Base:
    if service.engine.base is None:
        message = (
            "no model is loaded: start the server as `mlx-segtrain serve MODEL`, or load one "
            "on its page."
        )
        raise Unserved(message, 503, "no_model")
    return service.engine.base


def _ready(service: Service) -> Base:
    base = _base(service)
    if service.waits:
        message = "a job trains, and this server waits for it: try later."
        raise Unserved(message, 503, "training")
    return base


async def _selected(service: Service, base: Base, body: Generate) -> Selected:
    engine, named = service.engine, {"adapter": body.adapter}
    for field in ("adapters", "lora_path"):
        text = getattr(body, field)
        named[field] = await _by_path(service, field, text) if text and "/" in text else text
    if not names_base(base, body.model):
        if body.model not in engine.adapters:
            names = ", ".join((base.id, *engine.adapters))
            message = f"model {(body.model or '')[:200]!r} is not served: {names}."
            raise Unserved(message, 404, "model_not_found")
        named = {"model": body.model, **named}
    given = [(field, id) for field, id in named.items() if id is not None]
    for field, id in given[1:]:
        if id != given[0][1]:
            raise InputError(
                f"{given[0][0]} names the adapter {given[0][1][:100]!r}, and {field} is "
                f"{id[:100]!r}: give one of the two."
            )
    chosen = engine.select(given[0][1] if given else None)
    if chosen.base is not base:
        raise Busy("the model was replaced: try again.")
    return chosen


async def _by_path(service: Service, field: str, text: str) -> str:
    """The id of an adapter that is mounted, by its folder."""
    path = await asyncio.to_thread(service.roots.resolve, text)
    for mounted in service.engine.adapters.values():
        if mounted.path == path:
            return mounted.id
    raise InputError(
        f"{field}: {shown(text)} is not mounted: POST its id and path to /v1/adapters first."
    )


async def _answer(
    service: Service,
    request: Request,
    body: Generate,
    encode: Callable[[Selected], list[int]],
    most: int,
) -> Any:
    chat = isinstance(body, ChatRequest)
    authority = request.scope.get("mlx_segtrain.authority")
    base = _ready(service)
    body.refuse_extra()
    chosen = await _selected(service, base, body)
    prompt = await prompts(body.size).run(encode, chosen)
    if isinstance(request, Json):  # it may wait for long, and then the answer takes long
        request.let_go()
        body.let_go()
    generation = service.engine.generate(prompt, chosen, body.options(most, continues=not chat))
    head = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": body.model or base.id,
        "adapter": chosen.id,
    }
    if body.stream:
        if chat:
            head["object"] = "chat.completion.chunk"
        options = body.stream_options
        choice = _chat_choice if chat else _text_choice
        with_usage = bool(options and options.include_usage)
        events = _events(generation, prompt, head, choice, with_usage, authority)
        return EventSourceResponse(events, sep="\n", send_timeout=PATIENCE_S)
    pieces = await _whole(generation, request)
    if not pieces or pieces[-1].finish is None:
        return error_answer(request, 499, "the client has gone.")
    text, last = "".join(piece.text for piece in pieces), pieces[-1]
    whole = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    choice = {"index": 0, **whole, "logprobs": None, "finish_reason": last.finish}
    return {**head, "choices": [choice], "usage": _usage(prompt, last, authority)}


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={**STREAM, **_errors(400, 404, 413, 429, 500, 503)},
)
async def chat(body: ChatRequest, request: Request, service: Used) -> Any:
    """The next turn of a chat."""
    most = body.max_completion_tokens or body.max_tokens or 512

    def encode(chosen: Selected) -> list[int]:
        return chosen.encode_chat(chat_turns(body.messages), body.chat_template_kwargs)

    return await _answer(service, request, body, encode, most)


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses={**STREAM, **_errors(400, 404, 413, 429, 500, 503)},
)
async def complete(body: CompletionRequest, request: Request, service: Used) -> Any:
    """How a text goes on."""

    def encode(chosen: Selected) -> list[int]:
        return prompt_tokens(chosen.base, body.prompt)

    most = body.max_completion_tokens or body.max_tokens or 16
    return await _answer(service, request, body, encode, most)


def _models(engine: Engine) -> list[ModelInfo]:
    base = engine.base
    if base is None:
        return []
    own = ModelInfo(id=base.id, created=base.created)
    return [
        own,
        *(ModelInfo(id=id, created=base.created, parent=base.id) for id in engine.adapters),
    ]


@router.get("/v1/models", response_model=ModelList)
async def list_models(service: Used) -> Any:
    """The served model, and each mounted adapter."""
    return ModelList(data=_models(service.engine))


@router.get("/v1/models/{id:path}", response_model=ModelInfo, responses=_errors(404))
async def get_model(id: str, service: Used) -> Any:
    """One of them."""
    base = service.engine.base
    name = base.id if base is not None and names_base(base, id) else id
    found = next((model for model in _models(service.engine) if model.id == name), None)
    if found is None:
        raise Unserved(f"model {id[:200]!r} is not served.", 404, "model_not_found")
    return found


@router.get("/v1/adapters", response_model=MountedAdapters, tags=["adapters"])
async def list_adapters(service: Used) -> Any:
    """The mounted adapters."""
    names = MountedAdapter.model_fields
    return {
        "adapters": [
            {name: getattr(x, name) for name in names} | {"path": str(x.path)}
            for x in service.engine.adapters.values()
        ]
    }


@router.get("/v1/adapters/available", response_model=AvailableAdapters, tags=["adapters"])
async def list_available(service: Used) -> Any:
    """Adapters on disk that the served model can take."""
    return {"adapters": await service.available()}


@router.post(
    "/v1/adapters",
    response_model=MountAnswer,
    responses=_errors(400, 403, 413, 429, 503),
    tags=["adapters"],
)
async def mount(body: MountRequest, service: Used) -> Any:
    """Mounts an adapter; one that is mounted under this id stays as it is."""
    engine = service.engine
    _base(service)
    mounted: Mounted | None = engine.adapters.get(body.id)
    if mounted is None:
        path = await asyncio.to_thread(service.roots.resolve, body.path)
        mounted = await engine.mount(body.id, path)
    names = MountAnswer.model_fields
    return {name: getattr(mounted, name) for name in names}


@router.delete(
    "/v1/adapters/{id:path}",
    response_model=UnmountAnswer,
    responses=_errors(404, 429),
    tags=["adapters"],
)
async def unmount(id: str, service: Used) -> Any:
    """Unmounts an adapter; requests that run on it end on it."""
    return {"id": id, "removed_layers": await service.engine.unmount(id)}
