"""Turns a prompt into tokens, for generation in the same way as in the adapter's training."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..fields import fault_of_variables
from .template import Tokenizer, prompt_ids, raw_ids


@dataclass(frozen=True)
class Prompting:
    """`format` is that of plain prompts (config.prompt_format); `variables` are the chat template's
    (config.chat_template_kwargs)."""

    format: str = "auto"
    variables: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> "Prompting":
        """Reads it from the configuration of a run, as in its adapter's folder; unusable values,
        which an untrusted folder may hold, are ignored."""
        format, variables = run.get("prompt_format"), run.get("chat_template_kwargs")
        return cls(
            format if format in ("chat", "raw") else "auto",
            variables if isinstance(variables, dict) and not fault_of_variables(variables) else {},
        )

    def as_run(self) -> dict[str, Any]:
        """Returns the fields of a configuration that `of` reads."""
        return {"prompt_format": self.format, "chat_template_kwargs": dict(self.variables)}

    def is_raw(self, tokenizer: Tokenizer) -> bool:
        """Returns whether plain prompts go to the model as they are. Raises InputError for
        prompt_format chat without a template."""
        if self.format == "chat" and not tokenizer.has_chat_template:
            raise InputError(
                "prompt_format is chat, but the tokenizer has no chat template; use prompt_format "
                "raw."
            )
        return self.format == "raw" or not tokenizer.has_chat_template

    def ids(self, tokenizer: Tokenizer, prompt: str, system: str | None = None) -> list[int]:
        """Returns the token ids of a prompt, with what precedes the answer. Raises InputError for a
        system message without a chat template."""
        if self.is_raw(tokenizer):
            if system is not None:
                raise InputError(
                    "a system message needs a chat template: the model has none, or the adapter "
                    "was trained without it."
                )
            return raw_ids(tokenizer, prompt)
        turns = [{"role": "user", "content": prompt}]
        if system is not None:
            turns.insert(0, {"role": "system", "content": system})
        return self.chat_ids(tokenizer, turns)

    def chat_ids(self, tokenizer: Tokenizer, turns: Sequence[Mapping[str, Any]]) -> list[int]:
        """Returns the token ids of a conversation for the model to answer; needs a chat
        template."""
        return prompt_ids(tokenizer, turns, self.variables)

    @property
    def flags(self) -> list[str]:
        """Returns the options of `mlx_lm.generate` that render prompts in the same way."""
        if self.format == "raw":
            return ["--ignore-chat-template"]
        if self.variables:
            return ["--chat-template-config", json.dumps(dict(self.variables))]
        return []
