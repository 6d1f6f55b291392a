"""Environments: the user's Python class answers the model in a conversation, or is its tools."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import TrainConfig
from ..data import Row
from ..data.prompting import Prompting
from ..data.template import MARK, content, prompt_ids, wants_parts
from ..errors import InputError, RunError, shown
from ..generation.parts import Parts, Tags, begins_reasoning, read_calls
from .calling import found_at, with_what_it_takes

#: Columns that rewards and `reset` get besides those of the data, which may not have them.
GIVEN = ("environments", "messages", "seed")
#: Methods of an environment that are no tools.
OWN = ("reset", "step", "get_reward")


@dataclass(frozen=True)
class Environments:
    """Creates the environments of a run, one for each completion (docs/grpo.md).

    `tools` are the class's public methods, in the form that chat templates take; none if it has
    `step`. Its reward, if it has one, is returned by its method `get_reward`.
    """

    name: str
    make: Callable[[], Any]
    tools: Sequence[Mapping[str, Any]]
    has_reward: bool

    @classmethod
    def of(cls, config: TrainConfig, make: Callable[[], Any] | None = None) -> Environments | None:
        """Returns the environments of a configuration; `make` is the class, if Python has it.
        Raises InputError if the class cannot be used."""
        if config.environment is None:
            return None
        name, found = found_at(config.environment, "environment", "class", make)
        try:
            own = found()
            if not callable(getattr(own, "reset", None)):
                raise TypeError("it has no method reset")
            tools = [] if callable(getattr(own, "step", None)) else _tools_of(own)
            if not tools and not hasattr(own, "step"):
                raise TypeError("it has neither a method step nor a public method, which is a tool")
        except Exception as error:  # a class of the user's may fail in any way
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(
                f"environment: {config.environment} cannot be used ({said}).", field="environment"
            ) from error
        return cls(name, found, tools, callable(getattr(own, "get_reward", None)))

    def check(self, config: TrainConfig, tokenizer: Any, rows: Iterable[Row]) -> None:
        """Raises InputError if the model's chat template lacks what conversations need, or if a row
        has tools of its own besides the environment's."""
        if Prompting(config.prompt_format).is_raw(tokenizer):
            raise InputError(
                "environment needs prompts that go through a chat template: use a model that has "
                "one, and do not set prompt_format to raw.",
                field="environment",
            )
        if self.tools and not tokenizer.has_tool_calling:
            raise InputError(
                f"environment {self.name} has tools, but mlx-lm does not know how tools are called "
                "in the model's chat template: use a model that calls tools, or write the class "
                "with a method step.",
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
    """Returns the public methods of an environment as JSON schemas. Raises what transformers raises
    for a method without types or a description."""
    from transformers.utils.chat_template_utils import get_json_schema

    names = [name for name, _ in inspect.getmembers(type(own), inspect.isfunction)]
    names = [name for name in names if not name.startswith("_") and name not in OWN]
    return [get_json_schema(getattr(own, name)) for name in names]


class Conversation:
    """The conversation of one completion with its environment: a generation.rollouts.Talk.

    `messages` are the prompt's and, from `begun` on, those of the completion. Raises RunError if
    the environment fails.
    """

    def __init__(self, of: Environments, tokenizer: Any, config: TrainConfig, row: Row, seed: int):
        given = row.given or {}
        self._of, self._tokenizer = of, tokenizer
        self._variables = {
            **config.chat_template_kwargs,
            **(given.get("chat_template_kwargs") or {}),
            **({"tools": list(of.tools)} if of.tools else {}),
        }
        self.messages = messages_of(given)
        self.calls = self.failed = 0
        self.prompt = row.ids.tolist()
        with _failing(of.name, "reset"):
            self.environment = of.make()
            columns = {**given, "prompt": given.get("prompt"), "seed": seed}
            said = with_what_it_takes(self.environment.reset)(**columns)
        if said is not None:
            if not isinstance(said, str):
                raise _wrong(of.name, "reset", said, "a text, which the prompt then ends with")
            *before, last = self.messages
            text = f"{last.get('content') or ''}{said}"
            self.messages = [*before, {**last, "content": text}]
            self.prompt = prompt_ids(tokenizer, self.messages, self._variables)
        self.begun = len(self.messages)
        self._reasons = begins_reasoning(tokenizer, self.prompt)

    def reply(self, text: str) -> list[int] | None:
        """Returns the environment's answer to a turn, as the tokens up to the model's next turn;
        None at the end of the conversation."""
        if self._of.tools:
            answer, new = self._called(text)
        else:
            answer, new = {"role": "assistant", "content": text}, self._stepped(text)
        tokens = self._between(answer, new) if new else None
        self.messages += [answer, *(new or ())]
        return tokens

    def _stepped(self, text: str) -> list[dict[str, Any]] | None:
        with _failing(self._of.name, "step"):
            said = self.environment.step(text)
        if said is None:
            return None
        new = [{"role": "user", "content": said}] if isinstance(said, str) else said
        if not isinstance(new, list) or not new or not all(map(_is_message, new)):
            wanted = "a text, a list of messages with role and content, or None at the end"
            raise _wrong(self._of.name, "step", said, wanted)
        return [dict(own) for own in new]

    def _called(self, text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Returns a turn as a message with its tool calls, and the results as messages."""
        parts = Parts(Tags.of(self._tokenizer), reasoning=self._reasons).add(text, last=True)
        said = "".join(own for kind, own in parts if kind == "content")
        answer: dict[str, Any] = {"role": "assistant", "content": said}
        calls, new = [], []
        for own in (own for kind, own in parts if kind == "call"):
            read = read_calls(self._tokenizer, own, list(self._of.tools))
            # An unreadable call counts as failed: the model sees the error and may try again.
            for call in read or [{"name": "", "arguments": own}]:
                id = f"call{self.calls:05d}"  # nine letters, as Mistral's template wants them
                self.calls += 1
                arguments, name = call.get("arguments", {}), call["name"]
                function = {"name": name, "arguments": arguments}
                calls.append({"id": id, "type": "function", "function": function})
                result = self._result(name, arguments)
                new.append({"role": "tool", "tool_call_id": id, "name": name, "content": result})
        return {**answer, **({"tool_calls": calls} if calls else {})}, new

    def _result(self, name: str, arguments: Any) -> str:
        """Returns the result of a tool as text; if it fails, the error, which the model reads."""
        known = {own["function"]["name"] for own in self._of.tools}
        try:
            if name not in known:
                raise ValueError(f"there is no tool {shown(name, 60)}" if name else "no valid call")
            if isinstance(arguments, str):
                arguments = json.loads(arguments or "{}")
            found = getattr(self.environment, name)(**arguments)
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
        except Exception as error:
            self.failed += 1
            return f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def _between(self, answer: dict[str, Any], new: list[dict[str, Any]]) -> list[int]:
        """Returns the tokens after the one that ended a turn, up to where the next turn starts."""
        tokenizer = self._tokenizer
        parts = wants_parts(tokenizer, self._variables)
        marked = {**answer, **content(MARK, parts)}
        said = [{**own, **content(own["content"], parts)} for own in (*self.messages, *new)]
        at = len(self.messages)
        how: Any = {"tokenize": False, "add_generation_prompt": True, **self._variables}
        # Some templates write nothing beside calls.
        for own in (marked, {key: x for key, x in marked.items() if key != "tool_calls"}):
            with _failing(self._of.name, "the chat template after it"):
                text = tokenizer.apply_chat_template([*said[:at], own, *said[at:]], **how)
            _, found, rest = text.partition(MARK)
            if found:
                break
        else:
            raise RunError(
                f"environment {self._of.name}: the model's chat template does not write what the "
                "assistant says, so a conversation cannot continue: use another model."
            )
        stops = (tokenizer.decode([token]) for token in tokenizer.eos_token_ids)
        ends = [rest.find(stop) + len(stop) for stop in stops if stop and stop in rest]
        return list(tokenizer.encode(rest[min(ends, default=0) :], add_special_tokens=False))


def messages_of(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the prompt of a row as messages."""
    prompt = given["prompt"]
    if not isinstance(prompt, str):
        return [dict(own) for own in prompt]
    system = [{"role": "system", "content": x}] if (x := given.get("system")) else []
    return [*system, {"role": "user", "content": prompt}]


def _is_message(own: Any) -> bool:
    return isinstance(own, dict) and all(isinstance(own.get(k), str) for k in ("role", "content"))


class _failing:
    """Inside this context, whatever the user's class raises becomes a RunError that names it."""

    def __init__(self, name: str, what: str):
        self._said = f"environment {name}: {what} failed"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, RunError):
            said = " ".join(str(error).split())[:300]
            raise RunError(
                f"{self._said} ({type(error).__name__}: {said}): fix it and resume."
            ) from error


def _wrong(name: str, method: str, said: Any, wanted: str) -> RunError:
    return RunError(
        f"environment {name}: {method} returned {shown(said, 60)}; it must return {wanted}. Fix it "
        "and resume."
    )
