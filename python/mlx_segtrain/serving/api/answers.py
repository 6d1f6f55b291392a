"""Generates and collects the completions of a request, for all OpenAI routes."""

import asyncio
import codecs
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fastapi import Request

from ...errors import InputError
from ...generation.decoding import Options, Piece, Told
from ...generation.parts import Kind, Parts, Tags, begins_reasoning
from ..confined.parent import Limits, prompts
from ..generation.engine import Engine
from ..generation.mounting import Base, Selected
from ..generation.pieces import Generation
from ..generation.words import shown, token_bytes
from ..pools import Busy, Pool
from .openai_forms import ChatRequest, Generate
from .openai_tools import called, for_template

logger = logging.getLogger("mlx_segtrain.serving")

#: How often, in seconds, to check whether a client that is waiting for a whole completion has
#: disconnected.
LOOK_S = 0.25
_GRAMMARS = Pool("grammars", 1, 16)
#: Maximum number of log-probabilities in the response to a request, including those of
#: alternatives.
MOST_TOLD = 1_000_000
#: How long, in seconds, to keep retrying while all processes that parse tool calls are busy.
CALLS_S = 10.0

Finish = Literal["stop", "length", "tool_calls"]


@dataclass
class Delta:
    """The next part of the completion with this `index`. `finish` is set in the last part."""

    index: int
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)  #: tool calls in OpenAI's format
    told: list[tuple[int, Told]] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def empty(self) -> bool:
        return not (self.content or self.reasoning or self.calls or self.told or self.finish)


class Answers:
    """The completions of a request: first the `n` completions of its first prompt, then those of
    the next prompt, and so on."""

    def __init__(self, base: Base, asked: list[list[int]], body: Generate):
        self.base, self.prompt_tokens = base, sum(map(len, asked))
        self.tokens = self.cached = self.reasoning_tokens = 0
        self._n = body.n or 1
        self._chat = body if isinstance(body, ChatRequest) else None
        self._tools = for_template(self._chat.tools or []) if self._chat else []
        self._calls = self._chat.calls if self._chat else "none"
        self._one = self._chat is not None and self._chat.parallel_tool_calls is False
        self._tags = self._tags_of(body)
        opened = [self._opened(prompt) for prompt in asked for _ in range(self._n)]
        self._parts = [Parts(self._tags, reasoning=opens) for opens in opened]
        # For each completion:
        self._called = [0] * len(opened)  # number of tool calls
        self._forced = [""] * len(opened)  # the text of the tool calls, if they are forced
        self._made = [0] * len(opened)  # number of tokens
        # The number of characters already sent, and a decoder that stores the bytes of an
        # incomplete character.
        self._characters = [0] * len(opened)
        self._begun_characters = [codecs.getincrementaldecoder("utf-8")("replace") for _ in opened]
        self._generations: list[Generation] = []
        self._begun, self._first = time.monotonic(), 0.0
        self._ends: list[str] = []
        self._words: dict[int, tuple[str, list[int]]] = {}
        self._line = ""  # the request and its adapter, for the log

    @classmethod
    async def begin(cls, engine: Engine, chosen: Selected, body: Generate, id: str) -> "Answers":
        """Starts generating the completions. `id` identifies the request in the log. Raises
        InputError or Busy."""
        base = chosen.base
        asked = await prompts(body.size).run(body.encode, chosen)
        grammar = None
        if body.is_guided:
            grammar = await _GRAMMARS.run(body.grammar, base.grammars)
        options = body.options(grammar)
        _check_told(options, len(asked) * (body.n or 1), base.max_length)
        own = cls(base, asked, body)
        try:
            for prompt in asked:
                for i in range(body.n or 1):  # with a seed, completions differ but are reproducible
                    seed = None if options.seed is None else options.seed + i
                    run = engine.generate(prompt, chosen, replace(options, seed=seed))
                    own._generations.append(run)
            own._line = f"{id} {chosen.id or 'none'}"
        except BaseException:
            await own.close()
            raise
        return own

    def __len__(self) -> int:
        return len(self._generations)

    def _tags_of(self, body: Generate) -> Tags:
        """Returns the model's tags for reasoning and tool calls, or no tags if the request sets a
        format for the completion or forces tool calls."""
        if self._chat is None or body.is_formed or self._calls == "forced":
            return Tags()
        return Tags.of(self.base.tokenizer, calls=self._calls == "auto")

    def _opened(self, prompt: list[int]) -> bool:
        """Returns whether a prompt ends inside a reasoning block. Some chat templates open such a
        block at the end of the prompt."""
        if self._tags.think is None:
            return False
        return begins_reasoning(self.base.tokenizer, prompt)

    async def close(self) -> None:
        """Ends running generations, and logs the request. This method may be called more than
        once."""
        for generation in self._generations:
            await generation.aclose()
        if self._line:
            ends = [*self._ends, *["gone"] * (len(self) - len(self._ends))]
            logger.info(
                "answered %s: %d + %d tokens, first after %.3f s, all after %.3f s, %s",
                *(self._line, self.prompt_tokens, self.tokens, self._first),
                *(time.monotonic() - self._begun, ", ".join(ends)),
            )
            self._line = ""

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yields the parts of all completions. Raises RunError if a completion fails. Closing the
        generator ends all completions."""
        try:
            async with aclosing(_merged(self._generations)) as pieces:
                async for index, piece in pieces:
                    delta = await self._delta(index, piece)
                    if not delta.empty:
                        yield delta
        finally:
            await self.close()

    async def _delta(self, index: int, piece: Piece) -> Delta:
        delta = Delta(index, told=list(piece.told), finish=piece.finish)
        if self._chat is None:
            delta.content = piece.text
        else:
            found = self._add(index, piece)
            texts = []
            for kind, text in found:
                if kind == "call":
                    texts.append(text)
                elif kind == "reasoning":
                    delta.reasoning += text
                elif self._calls == "forced":
                    self._forced[index] += text
                else:
                    delta.content += text
            if texts:
                await self._add_calls(delta, texts)
            if piece.finish and self._calls == "forced":
                self._add_forced(delta, self._forced[index])
        self._first = self._first or time.monotonic() - self._begun
        if piece.finish:
            self._ends.append(piece.finish)
            self.tokens += piece.tokens
            if index % self._n == 0:  # the other completions have the same prompt
                self.cached += piece.cached
            if self._called[index] and piece.finish == "stop":
                delta.finish = "tool_calls"
        return delta

    def _add(self, index: int, piece: Piece) -> list[tuple[Kind, str]]:
        """Splits a piece into parts by kind, and counts reasoning tokens, including the tags around
        them."""
        parts = self._parts[index]
        before = parts.reasons
        found = parts.add(piece.text, last=piece.finish is not None)
        if before or parts.reasons:
            self.reasoning_tokens += piece.tokens - self._made[index]
        self._made[index] = piece.tokens
        return found

    async def _add_calls(self, delta: Delta, texts: list[str]) -> None:
        """Parses `texts` (the texts between the model's tags for tool calls) with mlx-lm, and adds
        the calls to `delta`."""
        size = sum(map(len, texts)) + len(json.dumps(self._tools))
        ask = self.base.confined.ask
        limits = Limits.of_prompt(size)

        def read() -> Any:
            return ask("calls", limits, "parsing tool calls", texts=texts, tools=self._tools)

        found, end = None, time.monotonic() + CALLS_S
        while found is None:
            try:
                found = await prompts(size).run(read)
            except InputError:  # parsing has failed, or it has exceeded its limits
                found = [None] * len(texts)
            except Busy:  # wait, because the completion must not be lost
                if time.monotonic() > end:
                    found = [None] * len(texts)
                else:
                    await asyncio.sleep(LOOK_S)
        for text, calls in zip(texts, found, strict=True):
            if calls is None:  # not a tool call: clients receive the text
                start, end = self._tags.call or ("", "")
                delta.content += f"{start}{text}{end}"
            for call in calls or ():
                self._add_call(delta, call)

    def _add_forced(self, delta: Delta, text: str) -> None:
        try:
            calls = json.loads(text)
        except (ValueError, RecursionError):  # the completion reached its maximum length
            delta.content += text
            return
        for call in calls:
            self._add_call(delta, call)

    def _add_call(self, delta: Delta, call: dict[str, Any]) -> None:
        n = self._called[delta.index]
        if not (self._one and n):
            delta.calls.append({"index": n, **called(call, f"call_{uuid.uuid4().hex[:24]}")})
            self._called[delta.index] += 1

    async def whole(self, request: Request) -> list[Delta] | None:
        """Waits for all completions, and returns them. If the client disconnects, ends them and
        returns None."""

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(LOOK_S)
            await self.close()

        found = [Delta(i) for i in range(len(self))]
        watcher = asyncio.create_task(watch())
        try:
            async for more in self.deltas():
                own = found[more.index]
                own.content += more.content
                own.reasoning += more.reasoning
                own.calls += more.calls
                own.told += more.told
                own.finish = more.finish or own.finish
        finally:
            watcher.cancel()
            await self.close()
        return found if all(own.finish for own in found) else None

    # Log-probabilities, in OpenAI's two formats

    def _word(self, token: int) -> tuple[str, list[int]]:
        if token not in self._words:
            found = token_bytes(self.base.tokenizer, token)
            self._words[token] = shown(found), list(found)
        return self._words[token]

    def chat_logprobs(self, told: Sequence[tuple[int, Told]]) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            text, own = self._word(token)
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": own}

        content = [
            {**one(token, taken), "top_logprobs": [one(*pair) for pair in best.items()]}
            for token, (taken, best) in told
        ]
        return {"content": content, "refusal": None}

    def text_logprobs(self, index: int, told: Sequence[tuple[int, Told]]) -> dict[str, Any]:
        """Returns the log-probabilities of a completion's next tokens. Offsets count complete
        characters, so all tokens of a character that spans several tokens have the same offset."""
        tokens = [self._word(token)[0] for token, _ in told]
        places, tops = [], []
        for token, (_, best) in told:
            places.append(self._characters[index])
            text = self._begun_characters[index].decode(bytes(self._word(token)[1]))
            self._characters[index] += len(text)
            top: dict[str, float] = {}
            # If several tokens have the same text, the most likely one comes first and is kept.
            for other, value in best.items():
                top.setdefault(self._word(other)[0], value)
            tops.append(top)
        taken = [max(own, -9999.0) for _, (own, _) in told]
        return {
            "tokens": tokens,
            "token_logprobs": taken,
            "top_logprobs": tops,
            "text_offset": places,
        }


def _check_told(options: Options, answers: int, most: int | None) -> None:
    """Raises InputError if the request asks for the log-probabilities of too many tokens."""
    if options.logprobs is None:
        return
    each = options.max_tokens if most is None else min(options.max_tokens, most)
    if answers * each * (options.logprobs + 1) > MOST_TOLD:
        raise InputError(
            f"logprobs: {answers} x {each} tokens with {options.logprobs} alternatives per token "
            f"exceed the limit of {MOST_TOLD:,} log-probabilities: reduce max_tokens, n or the "
            "number of alternatives."
        )


async def _merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yields the pieces of several completions in order of arrival, each with the index of its
    completion."""
    if len(generations) == 1:
        async for piece in generations[0]:
            yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

    async def pump(index: int, generation: Generation) -> None:
        try:
            async for piece in generation:
                queue.put_nowait((index, piece))
        except Exception as error:
            queue.put_nowait(error)
        queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(i, own)) for i, own in enumerate(generations)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
