"""Tokenizes prompts for generation exactly as they were tokenized when the adapter was trained."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..fields import fault_of_variables
from .template import Tokenizer, prompt_ids, raw_ids


@dataclass(frozen=True)
class Prompting:
    """The format of plain prompts (config.prompt_format), and the variables of the chat template
    (config.chat_template_kwargs)."""

    format: str = "auto"
    variables: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> "Prompting":
        """Reads the fields from a run's configuration. Invalid values are ignored, since the folder
        of an adapter may be untrusted."""
        format, variables = run.get("prompt_format"), run.get("chat_template_kwargs")
        return cls(
            format if format in ("chat", "raw") else "auto",
            variables if isinstance(variables, dict) and not fault_of_variables(variables) else {},
        )

    def as_run(self) -> dict[str, Any]:
        """Returns the fields of a configuration, in the form that `of` expects."""
        return {"prompt_format": self.format, "chat_template_kwargs": dict(self.variables)}

    def is_raw(self, tokenizer: Tokenizer) -> bool:
        """Returns whether plain prompts bypass the chat template. Raises InputError if the format
        is chat, but the tokenizer has no template."""
        if self.format == "chat" and not tokenizer.has_chat_template:
            raise InputError(
                "prompt_format is chat, but the tokenizer has no chat template; set prompt_format "
                "to raw."
            )
        return self.format == "raw" or not tokenizer.has_chat_template

    def ids(self, tokenizer: Tokenizer, prompt: str, system: str | None = None) -> list[int]:
        """Returns the token ids of a prompt, including the generation prompt. Raises InputError if
        there is a system message but no chat template."""
        if self.is_raw(tokenizer):
            if system is not None:
                raise InputError(
                    "a system message requires a chat template, but the model has none, or "
                    "prompt_format is raw, here or in the adapter: leave the system message out."
                )
            return raw_ids(tokenizer, prompt)
        turns = [{"role": "user", "content": prompt}]
        if system is not None:
            turns.insert(0, {"role": "system", "content": system})
        return self.chat_ids(tokenizer, turns)

    def chat_ids(self, tokenizer: Tokenizer, turns: Sequence[Mapping[str, Any]]) -> list[int]:
        """Returns the token ids of a conversation, including the generation prompt."""
        return prompt_ids(tokenizer, turns, self.variables)

    @property
    def flags(self) -> list[str]:
        """Returns the options that make `mlx_lm.generate` render prompts in the same way."""
        if self.format == "raw":
            return ["--ignore-chat-template"]
        if self.variables:
            return ["--chat-template-config", json.dumps(dict(self.variables))]
        return []
