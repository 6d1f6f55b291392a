"""Splits conversations into samples whose contexts are exactly the prompts that the model would see
during generation.

A turn in the loss consists of a context and a response. The context is the rendering of the earlier
messages, including the generation prompt; the response ends with the first stop token (a token that
ends generation). Before rendering, messages are converted to a spelling (an equivalent form, see
spelling.py) from which the template drops nothing. Text that the template drops in every spelling,
or a turn without a stop token, is reported as a finding (notes.py).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import InputError
from .losses import missing, missing_tools
from .messages import Message
from .spelling import Spelling, reasoning, spell, spellings, traits
from .template import OPEN, ChatTemplate, TemplateError, Tokenizer, direct, wants_parts

# Consecutive pieces of a text, each with its loss weight; the weight of context is 0.
Pieces = list[tuple[str, float]]

#: A generation prompt is located in another rendering by its last n characters. These values of n
#: are tried in order.
ANCHORS = range(40, 3, -1)
#: If no spelling is lossless, all spellings are tried for at most this many rows with the same
#: traits.
MOST_SEARCHES = 20


@dataclass(frozen=True)
class Sample:
    """A sequence from the row `source`. `turns` counts its turns in the loss, `findings` contains
    keys of notes.FINDINGS, and `rendered` is true if a chat template rendered it."""

    source: str
    pieces: Pieces
    turns: int = 1
    findings: tuple[str, ...] = ()
    rendered: bool = False

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


@dataclass(frozen=True)
class _Turn:
    context: str
    response: str
    rest: str  #: the template's text after the response
    weight: float
    findings: tuple[str, ...]


class Conversations:
    """Splits the conversations of a data set into samples, and remembers the spellings that
    work."""

    def __init__(
        self, tokenizer: Tokenizer, train_on: str, kwargs: Mapping[str, Any], append_eos: bool
    ):
        self._tokenizer, self._train_on, self._kwargs = tokenizer, train_on, kwargs
        self._stops = _Stops(tokenizer, append_eos)
        # Maps the traits of rows to a spelling, the findings that remain with it, and the number of
        # rows for which all spellings were tried.
        self._learned: dict[frozenset[str], tuple[Spelling, set[str], int]] = {}

    def samples(self, source: str, given: Mapping[str, Any]) -> list[Sample]:
        """Returns the samples of a row with "messages"; `source` is "file:line".

        A row yields several samples if the context of a later turn does not repeat an earlier turn
        exactly as it was generated; for example, some templates drop earlier reasoning. Raises
        InputError.
        """
        messages = given["messages"]
        weights = _weights(messages, self._train_on)
        if not any(weights):
            return [Sample(source, [], 0, rendered=True)]
        if not self._tokenizer.has_chat_template:
            raise InputError(
                f"{source}: the tokenizer has no chat template to render messages with; "
                'use "prompt" and "completion", or "text".'
            )
        tools = {"tools": given["tools"]} if given.get("tools") else {}
        more = given.get("chat_template_kwargs") or {}
        render = self._usual_template
        if more or tools:
            render = ChatTemplate(self._tokenizer, {**self._kwargs, **more, **tools})
        own = [{k: v for k, v in m.items() if k not in ("train", "weight")} for m in messages]
        row = _Row(own, weights, tools.get("tools"), render, self._stops)
        return _joined(source, self._turns(source, row))

    @cached_property
    def _usual_template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer, self._kwargs, direct(self._tokenizer, self._kwargs))

    @cached_property
    def _usual(self) -> Spelling:
        parts = wants_parts(self._tokenizer, self._kwargs)
        return Spelling(content="parts" if parts else "text")

    def _turns(self, source: str, row: "_Row") -> list[_Turn]:
        """Returns the turns in the first lossless spelling or, if there is none, in the spelling in
        which the fewest parts are lost."""
        of = traits(row.messages)
        known, accepted, searches = self._learned.get(of, (self._usual, set(), 0))
        best, refusal = None, None
        for spelling in (known, *spellings(of)):
            try:
                turns = row.turns(spelling)
            except TemplateError as error:
                refusal = refusal or f"{source}: {error}"
                continue
            lost = [x for turn in turns for x in turn.findings if x not in ("special", "stop")]
            if best is None or len(lost) < len(best[0]):
                best = lost, turns, spelling
            if not lost or set(lost) <= accepted or searches >= MOST_SEARCHES:
                break
        if best is None:
            raise InputError(str(refusal))
        lost, turns, spelling = best
        if lost:
            self._learned[of] = spelling, accepted | set(lost), searches + 1
        elif spelling != known:
            self._learned[of] = spelling, accepted, searches
        return turns


def _weights(messages: Sequence[Message], train_on: str) -> list[float]:
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = set(assistant[-1:] if train_on == "last" else assistant)
    return [
        float(message.get("weight", 1)) if i in trained and message.get("train", True) else 0.0
        for i, message in enumerate(messages)
    ]


def _joined(source: str, turns: list[_Turn]) -> list[Sample]:
    """Joins turns into samples: one sample consists of the last turn and all turns that its context
    contains; the remaining turns are then joined in the same way."""
    samples = []
    while turns:
        last = turns[-1]
        whole = last.context + last.response
        inside = [turn for turn in turns if whole.startswith(turn.context + turn.response)]
        pieces, position = [], 0
        for turn in inside:
            start, end = len(turn.context), len(turn.context) + len(turn.response)
            start = max(start, position)
            pieces += [(whole[position:start], 0.0), (whole[start:end], turn.weight)]
            position = end
        pieces = [piece for piece in (*pieces, (last.rest, 0.0)) if piece[0]]
        findings = tuple(dict.fromkeys(x for turn in inside for x in turn.findings))
        samples.append(Sample(source, pieces, len(inside), findings, rendered=True))
        turns = [turn for turn in turns if turn not in inside]
    return samples[::-1]


def _unplaced(i: int) -> TemplateError:
    return TemplateError(
        f"the output of the chat template does not show where messages[{i}] starts, so this turn "
        'cannot be in the loss; set "train": false on this message or remove the row.'
    )


@dataclass(frozen=True)
class _Row:
    """A conversation with the loss weights of its messages, and everything needed to render it."""

    messages: list[dict[str, Any]]
    weights: list[float]
    tools: Any
    render: ChatTemplate
    stops: "_Stops"

    @cached_property
    def special(self) -> list[re.Match[str] | None]:
        """For each message, the first special token in its content, or None."""
        texts = [str(message.get("content") or "") for message in self.messages]
        return [self.stops.control.search(text) for text in texts]

    def turns(self, spelling: Spelling) -> list[_Turn]:
        messages = spell(self.messages, spelling)
        return [self._turn(i, messages) for i, weight in enumerate(self.weights) if weight > 0]

    def _turn(self, i: int, messages: list[dict[str, Any]]) -> _Turn:
        full = self.render(messages[: i + 1])
        context = self.render(messages[:i], True) if i else ""
        follows = i > 0 and full.startswith(context)
        if follows:
            response = full[len(context) :]
        else:
            context, response = self._aligned(i, messages, full, context)
        given, findings = self.messages[i], []
        thoughts, answer = reasoning(given)
        if i and not (follows and OPEN.search(context) is None):
            response, findings = self._thought(messages[:i], context, response, thoughts)
        for message in self.messages[:i]:
            findings += missing(context, message, earlier=True)
        findings += [*missing_tools(context, self.tools), *missing(response, given)]
        if any(self.special[: i + 1]):
            findings.append("special")
        response, rest, ended = self._ended(i, messages, response, thoughts, answer)
        findings += [] if ended else ["stop"]
        return _Turn(context, response, rest, self.weights[i], tuple(dict.fromkeys(findings)))

    def _thought(
        self, before: list[dict[str, Any]], context: str, response: str, thoughts: str
    ) -> tuple[str, list[str]]:
        """Returns the response and its findings. If the generation prompt opens a thinking block
        that the response does not close, the closing tag is added before the response."""
        closing = self.render.closing(before, context)
        if closing is None:
            return response, []
        closed = response.lstrip().startswith(closing.strip())
        if not thoughts:
            return (response if closed else closing + response), []
        if thoughts in response:
            # If `closed`, the reasoning follows an empty thinking block.
            return response, ["reasoning"] if closed else []
        return thoughts + (response if closed else closing + response.lstrip("\n")), []

    def _aligned(
        self, i: int, messages: list[dict[str, Any]], full: str, context: str
    ) -> tuple[str, str]:
        """Returns the context and the response of a turn whose rendering does not begin with the
        turn's context.

        There are two possible reasons. The generation prompt may open a block that the finished
        turn lacks, or the template may render earlier messages differently once a response follows.
        For example, Mistral's template writes the system message before the last user message,
        unless a response follows that message.
        """
        header = self.render.header(messages[: i + 1])
        if header is None or not full.startswith(header):
            if not i:
                raise _unplaced(i)
            header = full  # an empty turn, or one with only tool calls, may be rendered differently
        answer = full[len(header) :]
        if not i:  # the turn is the first message
            return header, answer
        shared = _common(context, header)
        said = [reasoning(message)[1].strip() for message in self.messages[:i]]
        if not any(text and text in context[shared:] for text in said):
            return context, header[shared:] + answer
        prompt = OPEN.sub("", context)
        anchor = next((prompt[-n:] for n in ANCHORS if prompt[-n:] in header), None)
        if not anchor:
            raise _unplaced(i)
        return context, header[header.rindex(anchor) + len(anchor) :] + answer

    def _ended(
        self, i: int, messages: list[dict[str, Any]], response: str, *texts: str
    ) -> tuple[str, str, bool]:
        """Returns a response up to and including its stop token, the rest of the text, and whether
        the response has a stop token. A missing stop token is added if possible."""
        if stop := self.stops.first(response, texts):
            return response[: stop.end()], response[stop.end() :], True
        # Some templates mark the end of a turn only by the header of the next turn. In that case,
        # the first token of that header is the stop token.
        following = messages[i + 1] if i + 1 < len(messages) else {"role": "user", "content": ""}
        if stop := self.stops.stop.match(self.render.transition(messages[:i], following).lstrip()):
            return response.rstrip("\n") + stop[0], "", True
        if self.stops.append is None:
            return response, "", False
        blanks = texts[-1][len(texts[-1].rstrip()) :]  # whitespace that belongs to the answer
        body = response.rstrip()
        body += blanks if response[len(body) :].startswith(blanks) else ""
        return body + self.stops.append, "", True


def _common(a: str, b: str) -> int:
    """Returns the length of the common prefix. If a tag begins in the prefix but does not end in
    it, the prefix ends before the tag."""
    n = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if n in (len(a), len(b)):
        return n
    for opens, closes in ("<>", "[]"):
        start = a.rfind(opens, 0, n)
        if start >= 0 and closes not in a[start:n]:
            return start
    return n


class _Stops:
    """Patterns that match stop tokens (`stop`) and all special tokens (`control`). `append` is the
    text that is appended to a response without a stop token; if it is None, nothing is appended."""

    def __init__(self, tokenizer: Tokenizer, append_eos: bool):
        added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        stops = {added.get(i) or tokenizer.decode([i]) for i in set(tokenizer.eos_token_ids)}
        self.stop, self.control = _any_of(stops), _any_of(stops | special)
        self.tail = re.compile(rf"(?:\s|{self.control.pattern})*\Z")
        self.append = tokenizer.eos_token if append_eos else None

    def first(self, response: str, texts: Sequence[str]) -> re.Match[str] | None:
        """Returns the first stop token in a response, ignoring stop tokens in the message's own
        `texts`."""
        start = 0
        if any(map(self.stop.search, texts)):  # stops in the texts do not end the turn
            tail = self.tail.search(response)
            start = tail.start() if tail else len(response)
        return self.stop.search(response, start)


def _any_of(words: set[str]) -> re.Pattern[str]:
    known = sorted((word for word in words if word.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, known)) or r"(?!)")
