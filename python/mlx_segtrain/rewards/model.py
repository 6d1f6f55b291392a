"""Scores conversations with a reward model, a sequence classification model with one label.

The reward model is a Hugging Face `…ForSequenceClassification` model with a weight `score.weight`,
from a family that mlx-lm supports. It may be quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..models import load_headless, load_tokenizer, text_model
from ..models.snapshot import Snapshot
from ..planning.rollouts import PREFILL
from .environments import messages_of

#: The name of the tensor that replaces the head in a reward model.
SCORE = "score.weight"


def check_scores(folder: Path) -> None:
    """Raises InputError if the folder does not contain a reward model. Loads no weights."""
    snapshot = Snapshot(folder)
    found = snapshot.tensors.get(SCORE)
    if found is None or len(found[1]) != 2 or found[1][0] != 1:
        has = f"{found[1][0]} labels" if found else f"no {SCORE}"
        raise InputError(
            f"reward_model {folder} has {has}: use a sequence classification model with one label, "
            "in the safetensors format.",
            field="reward_model",
        )


@dataclass
class RewardModel:
    """Scores completions with the model in a folder. The first call loads the model.

    Conversations are rendered with the reward model's chat template. If the prompts of the run are
    `raw`, prompt and completion are concatenated instead.
    """

    folder: Path
    raw: bool = False

    def check(self, folder: Path, raw: bool) -> None:
        """Sets the folder, and whether the prompts of the run are raw. Raises InputError if the
        model cannot score such prompts."""
        self.folder, self.raw = folder, raw
        check_scores(folder)
        if not raw and not self._tokenizer.has_chat_template:
            raise InputError(
                f"reward_model {folder} has no chat template, but the prompts are chats: use "
                "another model, or set prompt_format to raw.",
                field="reward_model",
            )

    @cached_property
    def _loaded(self) -> tuple[Any, mx.array, int | None]:
        whole, config, weight = load_headless(self.folder, SCORE)
        weight = weight.astype(mx.float32)
        mx.eval(weight)
        text: Mapping[str, Any] = {**config, **(config.get("text_config") or {})}
        return text_model(whole), weight, text.get("pad_token_id")

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        messages: Sequence[list[dict[str, Any]]] | None = None,
        system: Sequence[str | None] | None = None,
    ) -> list[float]:
        """Returns the scores of completions. If `messages` is given, returns the scores of
        conversations in which `messages` follow the prompts."""
        answers = messages or [[{"role": "assistant", "content": x}] for x in completions]
        rows = zip(prompts, system or [None] * len(prompts), answers, strict=True)
        texts = [self._text(*row) for row in rows]
        encoded = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        scores = np.zeros(len(encoded))
        for rows in _passes([len(own) for own in encoded]):
            scores[rows] = self._scores([encoded[i] for i in rows])
        return scores.tolist()

    def _text(self, prompt: Any, system: str | None, answer: list[dict[str, Any]]) -> str:
        if self.raw and isinstance(prompt, str):
            return prompt + "".join(own["content"] for own in answer)
        given = messages_of({"prompt": prompt, "system": system})
        return self._tokenizer.apply_chat_template([*given, *answer], tokenize=False)

    def _scores(self, rows: list[list[int]]) -> np.ndarray:
        """Returns the scores of N rows of tokens, float64 [N]. The score of a row is computed at
        its last token that is not padding."""
        from mlx_lm.models.cache import make_prompt_cache

        model, weight, pad = self._loaded
        lengths = [max((j + 1 for j, x in enumerate(row) if x != pad), default=1) for row in rows]
        width = max(lengths)
        tokens = np.zeros((len(rows), width), np.int32)
        for row, own, n in zip(tokens, rows, lengths, strict=True):
            row[:n] = own[:n]
        # Padding after the last token of a row does not affect the tokens before it.
        cache = make_prompt_cache(model) if width > PREFILL else None
        ends, h = mx.array(lengths) - 1, mx.array(0)
        for begin in range(0, width, PREFILL):
            part = mx.array(tokens[:, begin : begin + PREFILL])
            h = model.model(part, cache=cache)
            if cache is not None:
                mx.eval(h, [layer.state for layer in cache])
        last = h[mx.arange(len(rows)), ends - (width - 1) // PREFILL * PREFILL]
        found = last.astype(mx.float32) @ weight.T
        return np.array(found[:, 0], np.float64)


def _passes(lengths: Sequence[int]) -> list[list[int]]:
    """Returns, for each pass, the indices of the rows that run together. A pass has up to PREFILL
    tokens, including padding, or consists of a single row."""
    passes: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if passes and (len(passes[-1]) + 1) * lengths[i] <= PREFILL:
            passes[-1].append(i)
        else:
            passes.append([i])
    return passes
