"""Environments: user-written Python classes that reply to the model in a conversation or provide
tools for it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..config import TrainConfig
from ..data import Row
from ..data.prompting import Prompting
from ..data.spelling import arguments
from ..data.template import MARK, content, prompt_ids, wants_parts
from ..errors import InputError, RunError, named_reason, reason, shown
from ..generation.parts import Parts, Tags, begins_reasoning, read_calls
from .calling import found_at, with_what_it_takes

#: The arguments of rewards and of `reset` in addition to the columns of the data. Columns must not
#: have these names.
GIVEN = ("environments", "messages", "seed")
#: The public methods of an environment that the model cannot call as tools.
OWN = ("reset", "step", "get_reward")


@dataclass(frozen=True)
class Environments:
    """Creates the environments of a run, one for each completion (docs/grpo.md).

    `tools` contains the public methods of the class as JSON schemas for the chat template; it is
    empty if the class has a `step` method. If the class has a `get_reward` method, this method
    computes a reward.
    """

    name: str
    make: Callable[[], Any]
    tools: Sequence[Mapping[str, Any]]
    has_reward: bool

    @classmethod
    def of(cls, config: TrainConfig, make: Callable[[], Any] | None = None) -> Environments | None:
        """Returns the environments of a configuration, or None if it has none. `make` is the class
        if a Python caller passed one. Raises InputError if the class cannot be used."""
        if config.environment is None:
            return None
        name, found = found_at(config.environment, "environment", "class", make)
        try:
            own = found()
            if not callable(getattr(own, "reset", None)):
                raise TypeError("it has no reset method")
            tools = [] if callable(getattr(own, "step", None)) else _tools_of(own)
            if not tools and not hasattr(own, "step"):
                raise TypeError("it has neither a step method nor a public method to use as a tool")
        except Exception as error:  # the user's code may fail in any way
            raise InputError(
                f"environment: {config.environment} cannot be used ({reason(error, 300)}).",
                field="environment",
            ) from error
        return cls(name, found, tools, callable(getattr(own, "get_reward", None)))

    def check(self, config: TrainConfig, tokenizer: Any, rows: Iterable[Row]) -> None:
        """Raises InputError if the chat template of the model does not support conversations with
        this environment, or if both the environment and a row have tools."""
        if Prompting(config.prompt_format).is_raw(tokenizer):
            raise InputError(
                "environment requires a chat template: use a model that has one, and do not set "
                "prompt_format to raw.",
                field="environment",
            )
        if self.tools and not tokenizer.has_tool_calling:
            raise InputError(
                f"environment {self.name} has tools, but mlx-lm cannot read the tool calls of this "
                "model: use a model with a supported tool-call format, or give the class a step "
                "method instead.",
                field="environment",
            )
        for row in rows:
            if self.tools and (row.given or {}).get("tools"):
                raise InputError(
                    f"{row.source}: the row has tools, but this run uses the tools of environment "
                    f"{self.name}: remove the row's tools, or leave the environment out.",
                    field="environment",
                )


def _tools_of(own: Any) -> list[dict[str, Any]]:
    """Returns the public methods of an environment as JSON schemas. transformers creates the
    schemas, and raises an error if a method lacks type annotations or a docstring."""
    from transformers.utils.chat_template_utils import get_json_schema

    names = [name for name, _ in inspect.getmembers(type(own), inspect.isfunction)]
    names = [name for name in names if not name.startswith("_") and name not in OWN]
    return [get_json_schema(getattr(own, name)) for name in names]


class Conversation:
    """The conversation of a completion with its environment. Implements generation.rollouts.Talk.

    `messages` contains the messages of the prompt and, from index `begun` on, the messages of the
    completion. The environment's reply to a turn is added only when another turn follows. Raises
    RunError if the environment fails.
    """

    def __init__(self, of: Environments, tokenizer: Any, config: TrainConfig, row: Row, seed: int):
        given = row.given or {}
        self._of, self._tokenizer = of, tokenizer
        self._variables = {
            **config.chat_template_kwargs,
            **(given.get("chat_template_kwargs") or {}),
            **({"tools": list(of.tools)} if of.tools else {}),
        }
        self.messages, self._is_text = messages_of(given), isinstance(given["prompt"], str)
        self.calls = self.failed = 0
        self.prompt = row.ids.tolist()
        with _failing(of.name, "reset"):
            self.environment = of.make()
            columns = {**given, "prompt": given.get("prompt"), "seed": seed}
            said = with_what_it_takes(self.environment.reset)(**columns)
        if said is not None:
            if not isinstance(said, str):
                raise _wrong(of.name, "reset", said, "None or a string to append to the prompt")
            *before, last = self.messages
            text = f"{last.get('content') or ''}{said}"
            self.messages = [*before, {**last, "content": text}]
            self.prompt = prompt_ids(tokenizer, self.messages, self._variables)
        self.begun = len(self.messages)
        self._answer: list[dict[str, Any]] = []
        self._accepted = list(self.messages)
        self._reasons = begins_reasoning(tokenizer, self.prompt)

    @property
    def asked(self) -> Any:
        """The prompt with the text that `reset` has added, as a list of messages, or as a string if
        the prompt in the row is a string."""
        if self._is_text:
            return self.messages[self.begun - 1]["content"]
        return self.messages[: self.begun]

    @property
    def said(self) -> list[dict[str, Any]]:
        """The messages after the prompt."""
        return self.messages[self.begun :]

    def reply(self, text: str) -> list[int] | None:
        """Returns the tokens of the environment's reply to a turn, up to the model's next turn, or
        None at the end of the conversation."""
        if self._of.tools:
            answer, new = self._called(text)
        else:
            answer, new = {"role": "assistant", "content": text}, self._stepped(text)
        tokens = self._between(answer, new) if new else None
        self._add(answer, new or [])
        return tokens

    def end(self, text: str) -> None:
        """Adds the text of the last turn if it was truncated, since a truncated turn has no
        reply."""
        self._add({"role": "assistant", "content": text}, [])

    def _add(self, turn: dict[str, Any], answer: list[dict[str, Any]]) -> None:
        self.messages += [*self._answer, turn]
        self._answer = answer

    def _stepped(self, text: str) -> list[dict[str, Any]] | None:
        with _failing(self._of.name, "step"):
            said = self.environment.step(text)
        if said is None:
            return None
        new = [{"role": "user", "content": said}] if isinstance(said, str) else said
        if not isinstance(new, list) or not new or not all(map(_is_message, new)):
            wanted = "a string, a list of messages with role and content, or None at the end"
            raise _wrong(self._of.name, "step", said, wanted)
        return [dict(own) for own in new]

    def _called(self, text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Returns a turn as a message with its tool calls, and the results of these calls as
        messages."""
        parts = Parts(Tags.of(self._tokenizer), reasoning=self._reasons).add(text, last=True)
        said = "".join(own for kind, own in parts if kind == "content")
        answer: dict[str, Any] = {"role": "assistant", "content": said}
        calls, new = [], []
        for own in (own for kind, own in parts if kind == "call"):
            read = read_calls(self._tokenizer, own, list(self._of.tools))
            # An unparsable call counts as failed: the model sees the error and may try again.
            for call in read or [{"name": "", "arguments": own}]:
                id = f"call{self.calls:05d}"  # nine characters, as Mistral's template requires
                self.calls += 1
                given, name = call.get("arguments", {}), call["name"]
                function = {"name": name, "arguments": given}
                calls.append({"id": id, "type": "function", "function": function})
                result = self._result(name, given)
                new.append({"role": "tool", "tool_call_id": id, "name": name, "content": result})
        return {**answer, **({"tool_calls": calls} if calls else {})}, new

    def _result(self, name: str, arguments: Any) -> str:
        """Returns the result of a tool as text. If the tool fails, returns the error, which the
        model will see."""
        known = {own["function"]["name"] for own in self._of.tools}
        try:
            if name not in known:
                raise ValueError(f"there is no tool {shown(name, 60)}" if name else "no valid call")
            if isinstance(arguments, str):
                arguments = json.loads(arguments or "{}")
            found = getattr(self.environment, name)(**arguments)
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
        except RunError:  # another rank was lost in the meantime
            raise
        except Exception as error:
            self.failed += 1
            return f"error: {named_reason(error)}"

    def _between(self, answer: dict[str, Any], new: list[dict[str, Any]]) -> list[int]:
        """Returns the tokens between the token that ended a turn and the start of the next turn."""
        tokenizer = self._tokenizer
        parts = wants_parts(tokenizer, self._variables)
        how: Any = {"tokenize": False, "add_generation_prompt": True, **self._variables}

        def after(turn: dict[str, Any]) -> str | None:
            said = [*self._accepted, {**turn, "content": MARK}, *new]
            text = tokenizer.apply_chat_template([_rendered(x, parts) for x in said], **how)
            _, found, rest = text.partition(MARK)
            return rest if found else None

        rest = None
        bare = {key: x for key, x in answer.items() if key != "tool_calls"}
        if bare != answer:  # some templates write no content if there are calls
            try:
                rest = after(answer)
            except Exception:  # other templates reject several calls, now and in later turns
                answer = bare
        if rest is None:
            with _failing(self._of.name, "rendering its messages with the chat template"):
                rest = after(bare)
        if rest is None:
            raise RunError(
                f"environment {self._of.name}: the model's chat template does not render the text "
                "of assistant messages, so a conversation cannot continue: use another model."
            )
        self._accepted += [answer, *new]
        stops = (tokenizer.decode([token]) for token in tokenizer.eos_token_ids)
        ends = [rest.find(stop) + len(stop) for stop in stops if stop and stop in rest]
        return list(tokenizer.encode(rest[min(ends, default=0) :], add_special_tokens=False))


def messages_of(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the prompt of a row as a list of messages."""
    prompt = given["prompt"]
    if not isinstance(prompt, str):
        return [dict(own) for own in prompt]
    system = [{"role": "system", "content": x}] if (x := given.get("system")) else []
    return [*system, {"role": "user", "content": prompt}]


def _rendered(message: dict[str, Any], parts: bool) -> dict[str, Any]:
    """Returns a message in the form that chat templates need. The content becomes a list of parts
    if `parts` is set. Call arguments that are not mappings become {}, since a model may write
    anything."""
    if isinstance(message.get("content"), str):
        message = {**message, **content(message["content"], parts)}
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        given = arguments(call)
        function = {**function, "arguments": given if isinstance(given, dict) else {}}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def _is_message(own: Any) -> bool:
    return isinstance(own, dict) and all(isinstance(own.get(k), str) for k in ("role", "content"))


@contextmanager
def _failing(name: str, what: str) -> Iterator[None]:
    """Converts an exception raised by the user's class into a RunError that names the
    environment."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raise RunError(
            f"environment {name}: {what} failed ({named_reason(error)}): fix it and resume."
        ) from error


def _wrong(name: str, method: str, said: Any, wanted: str) -> RunError:
    return RunError(
        f"environment {name}: {method} returned {shown(said, 60)}; it must return {wanted}. Fix it "
        "and resume."
    )
