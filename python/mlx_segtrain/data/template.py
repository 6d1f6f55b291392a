"""A tokenizer's chat template: rendering, and what the template itself says about turns."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .messages import REASONING, Message

if TYPE_CHECKING:  # mlx_lm takes a second to load, and only its tokenizer's type is needed
    from mlx_lm.tokenizer_utils import TokenizerWrapper as Tokenizer
else:
    Tokenizer = Any

#: A private-use character: content that no real message has.
MARK = "\ue000"
#: The end of a generation prompt that opens a thinking block.
OPEN = re.compile(r"(<[^<>/]*think[^<>/]*>|\[THINK\])\s*\Z", re.IGNORECASE)


def prompt_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], kwargs: Mapping[str, Any]
) -> list[int]:
    """Ids of the messages with the generation prompt; `kwargs` are variables of the template.

    The messages' content is text. Raises what the template raises.
    """
    if wants_parts(tokenizer, kwargs):
        messages = [{**message, **content(message["content"], True)} for message in messages]
    how: Any = {"tokenize": False, "add_generation_prompt": True, **kwargs}
    text = tokenizer.apply_chat_template(list(messages), **how)
    return list(tokenizer.encode(text, add_special_tokens=False))


def raw_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that is no chat, after what the tokenizer puts before a text, BOS once."""
    bos = tokenizer.bos_token
    bare = bos is not None and text.startswith(bos)
    return list(tokenizer.encode(text, add_special_tokens=not bare))


def wants_parts(tokenizer: Tokenizer, kwargs: Mapping[str, Any]) -> bool:
    """Whether the template renders content as a list of parts, and none as text."""

    def renders(parts: bool) -> bool:
        asked = [{"role": "user", **content(MARK, parts)}]
        try:
            return MARK in tokenizer.apply_chat_template(asked, tokenize=False, **kwargs)
        except Exception:  # a template may fail in any way
            return False

    return not renders(parts=False) and renders(parts=True)


def content(text: str, parts: bool) -> dict[str, Any]:
    """Content of a message, as text or as one part."""
    return {"content": [{"type": "text", "text": text}] if parts else text}


class TemplateError(Exception):
    """Why the template, which is a program, cannot be used for a row: a sentence that goes on after
    the row's place."""


class ChatTemplate:
    """Renders one conversation; `kwargs` are the template's variables, tools among them."""

    def __init__(self, tokenizer: Tokenizer, kwargs: Mapping[str, Any]):
        self._apply = tokenizer.apply_chat_template
        self._kwargs = dict(kwargs)
        self._tags = (tokenizer.think_start, tokenizer.think_end)

    def __call__(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        how: Any = {"tokenize": False, "add_generation_prompt": generation_prompt}
        try:
            return self._apply(list(messages), **how, **self._kwargs)
        except Exception as error:  # a template may fail in any way
            reason = str(error) or type(error).__name__
            raise TemplateError(
                f"the chat template cannot render the row ({reason}); change the row to what the "
                "template takes."
            ) from error

    def header(self, messages: Sequence[Message]) -> str | None:
        """The text before the content of the last message; None if content is not rendered."""
        *before, last = messages
        plain = {key: value for key, value in last.items() if key not in (*REASONING, "tool_calls")}
        before_mark, found, _ = self([*before, plain | _like(last)]).partition(MARK)
        return before_mark if found else None

    def transition(self, messages: Sequence[Message], following: Message) -> str:
        """The text between an answer to `messages` and the content of the message after it."""
        answer = {"role": "assistant", **_like(following)}
        after = {**following, **_like(following)}
        try:
            parts = self([*messages, answer, after]).split(MARK)
        except TemplateError:
            return ""
        return parts[1] if len(parts) == 3 else ""

    def closing(self, messages: Sequence[Message], context: str) -> str | None:
        """What ends the thinking block that `context`, the rendering of `messages` for generation,
        opens; None if it opens none.

        A template that renders reasoning shows it; else it follows from the opening tag.
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
            # The block is open where reasoning would follow the generation prompt immediately.
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


def _like(message: Message) -> dict[str, Any]:
    """The mark as content, in the form that a message's content has."""
    return content(MARK, isinstance(message.get("content"), list))
