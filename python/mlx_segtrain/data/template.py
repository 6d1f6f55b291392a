"""Renders messages with a tokenizer's chat template, and finds the text that the template writes
around them."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .messages import REASONING, Message

if TYPE_CHECKING:  # importing mlx_lm takes a second, and only the type of its tokenizer is needed
    from mlx_lm.tokenizer_utils import TokenizerWrapper as Tokenizer
else:
    Tokenizer = Any

#: A private-use character, which does not occur in real messages.
MARK = "\ue000"
#: The end of a generation prompt that opens a thinking block.
OPEN = re.compile(r"(<[^<>/]*think[^<>/]*>|\[THINK\])\s*\Z", re.IGNORECASE)


def prompt_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], kwargs: Mapping[str, Any]
) -> list[int]:
    """Returns the token ids of messages, including the generation prompt. The content of each
    message must be text or missing. `kwargs` are variables of the template. Exceptions that the
    template raises are not caught."""
    if wants_parts(tokenizer, kwargs):
        messages = [
            {**own, **content(own["content"], True)} if isinstance(own.get("content"), str) else own
            for own in messages
        ]
    how: Any = {"tokenize": False, "add_generation_prompt": True, **kwargs}
    text = tokenizer.apply_chat_template(list(messages), **how)
    return list(tokenizer.encode(text, add_special_tokens=False))


def raw_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the token ids of plain text, without a chat template. If the text already begins with
    BOS, BOS is not added again."""
    bos = tokenizer.bos_token
    bare = bos is not None and text.startswith(bos)
    return list(tokenizer.encode(text, add_special_tokens=not bare))


def wants_parts(tokenizer: Tokenizer, kwargs: Mapping[str, Any]) -> bool:
    """Returns whether the template renders content that is a list of parts, but not content that is
    text."""

    def renders(parts: bool) -> bool:
        asked = [{"role": "user", **content(MARK, parts)}]
        try:
            return MARK in tokenizer.apply_chat_template(asked, tokenize=False, **kwargs)
        except Exception:  # a template may raise any exception
            return False

    return not renders(parts=False) and renders(parts=True)


def content(text: str, parts: bool) -> dict[str, Any]:
    """Returns the content of a message, as text or as a list with a single part."""
    return {"content": [{"type": "text", "text": text}] if parts else text}


#: A function that renders messages whose values are all strings, with or without the generation
#: prompt.
Direct = Callable[[Sequence[Message], bool], str]
#: A typical conversation, for comparing two methods of rendering.
PROBE = [
    {"role": "system", "content": "Be\ue000"},
    *[{"role": role, "content": f"{role} <{i}>"} for i in "ab" for role in ("user", "assistant")],
]


def direct(tokenizer: Tokenizer, kwargs: Mapping[str, Any]) -> Direct | None:
    """Returns a function that renders with the template compiled by transformers, but skips the
    preparation of the messages, which takes as long as the rendering itself. Returns None if the
    function renders PROBE differently from ChatTemplate."""
    own = tokenizer._tokenizer
    variables = dict(kwargs)
    try:
        if tokenizer._chat_template is not None:  # it is a Python function
            return None
        if tokenizer._thinking_kwarg != "enable_thinking" and "enable_thinking" in variables:
            variables[tokenizer._thinking_kwarg] = variables.pop("enable_thinking")
        variables.setdefault(tokenizer._thinking_kwarg, tokenizer.has_thinking)
        from transformers.utils.chat_template_utils import _compile_jinja_template

        render = _compile_jinja_template(own.get_chat_template()).render
        variables = {"tools": None, "documents": None, **own.special_tokens_map, **variables}
    except Exception:  # other versions of the packages may differ
        return None

    def rendered(messages: Sequence[Message], generation_prompt: bool) -> str:
        return render(messages=messages, add_generation_prompt=generation_prompt, **variables)

    slow = ChatTemplate(tokenizer, kwargs)
    same = 0
    for n in range(1, len(PROBE) + 1):
        for messages in (PROBE[:n], PROBE[1:n]):
            for prompt in (False, True) if messages else ():
                with suppress(TemplateError):  # some templates accept no system message
                    if slow(messages, prompt) != rendered(messages, prompt):
                        return None
                    same += 1
    return rendered if same else None


class TemplateError(Exception):
    """Raised if the template cannot be used for a row. The message is a sentence that does not name
    the row."""


class ChatTemplate:
    """Renders conversations. `kwargs` are the variables of the template, including tools. If
    `direct` is given, it renders messages whose values are all strings; it must use the same
    variables."""

    def __init__(
        self, tokenizer: Tokenizer, kwargs: Mapping[str, Any], direct: Direct | None = None
    ):
        self._direct = direct
        self._apply = tokenizer.apply_chat_template
        self._kwargs = dict(kwargs)
        self._tags = (tokenizer.think_start, tokenizer.think_end)

    def __call__(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        if self._direct is not None and messages and _plain(messages):
            with suppress(Exception):  # a template may raise any exception; it is reported below
                return self._direct(messages, generation_prompt)
        how: Any = {"tokenize": False, "add_generation_prompt": generation_prompt}
        try:
            return self._apply(list(messages), **how, **self._kwargs)
        except Exception as error:  # a template may raise any exception
            reason = str(error) or type(error).__name__
            raise TemplateError(
                f"the chat template cannot render the row ({reason}); change the row so that the "
                "template accepts it."
            ) from error

    def header(self, messages: Sequence[Message]) -> str | None:
        """Returns the rendering up to the content of the last message, or None if the rendering
        lacks that content."""
        *before, last = messages
        plain = {key: value for key, value in last.items() if key not in (*REASONING, "tool_calls")}
        before_mark, found, _ = self([*before, plain | _like(last)]).partition(MARK)
        return before_mark if found else None

    def transition(self, messages: Sequence[Message], following: Message) -> str:
        """Returns the text between a response to `messages` and the content of the message that
        follows it."""
        answer = {"role": "assistant", **_like(following)}
        after = {**following, **_like(following)}
        try:
            parts = self([*messages, answer, after]).split(MARK)
        except TemplateError:
            return ""
        return parts[1] if len(parts) == 3 else ""

    def closing(self, messages: Sequence[Message], context: str) -> str | None:
        """Returns the text that ends the thinking block that `context` opens, or None if `context`
        does not open one. `context` is the rendering of `messages`, including the generation
        prompt.

        The text is found in the rendering of a response with reasoning, or else derived from the
        opening tag.
        """
        reasoned = {"role": "assistant", "content": MARK * 2, **dict.fromkeys(REASONING, MARK)}
        pattern = f"([^{MARK}]*){MARK}([^{MARK}]+){MARK}{MARK}"
        try:
            found = re.search(pattern, self([*messages, reasoned]))
        except TemplateError:
            found = None
        opening = context.rstrip()
        if found:
            shown = found[1].rstrip()
            # The block is open if reasoning would directly follow the generation prompt.
            return found[2] if shown.endswith(opening[-len(shown) :]) and shown else None
        if (tag := self._closing_tag(opening)) is None:
            return None
        return f"\n{tag}\n\n" if context != opening else tag

    def _closing_tag(self, opening: str) -> str | None:
        start, end = self._tags
        if start and opening.endswith(start):
            return end
        if not (found := OPEN.search(opening)):
            return None
        tag = found[1]
        if "START" in tag:
            return tag.replace("START", "END")
        return f"{tag[0]}/{tag[1:]}"


def _plain(messages: Sequence[Message]) -> bool:
    """Returns whether all values are strings and no message has a key that mlx-lm handles
    specially."""
    return all(
        type(value) is str and key not in REASONING
        for message in messages
        for key, value in message.items()
    )


def _like(message: Message) -> dict[str, Any]:
    """Returns MARK as content, in the same form as the content of the message."""
    return content(MARK, isinstance(message.get("content"), list))
