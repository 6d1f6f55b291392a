"""All completions of some prompts, so many at a time, in batches that depend on nothing else."""

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..planning.rollouts import PREFILL
from .batching import Answer, Base, Batch, can_merge
from .decoding import Options, Piece


@dataclass(frozen=True)
class Policy:
    """A model with its adapter in place, and its tokenizer."""

    model: Any
    tokenizer: Any
    max_length: int | None


@dataclass(frozen=True)
class Completion:
    """What was generated: tokens with the one that ended it, log-probabilities of each at the
    temperature at which it was drawn, float32 [n], and the text. `finish` is stop, or length if it
    was cut off."""

    tokens: list[int]
    log_p: np.ndarray
    text: str
    finish: str


class _Rollout(Answer):
    def __init__(self, prompt: list[int], base: Base, options: Options):
        super().__init__(prompt, base, options)
        self.pieces: list[str] = []
        self.log_p: list[float] = []

    def give(self, piece: Piece) -> None:
        self.pieces.append(piece.text)

    def take(self, token: int) -> bool:
        if self.told is not None and not self.read:
            self.log_p.append(self.told[0])
        return super().take(token)

    @property
    def told_at(self) -> float:
        return self.options.temperature or 1.0  # 0 is the likeliest token

    @property
    def completion(self) -> Completion:
        log_p = np.array(self.log_p, np.float32)
        return Completion(self.made, log_p, "".join(self.pieces), self.finish or "length")


def complete(
    base: Base, prompts: Sequence[list[int]], options: Sequence[Sequence[Options]], at_once: int
) -> list[list[Completion]]:
    """A completion of each prompt for each of its options, of which `at_once` are decoded together;
    waiting ones join when half of them have ended.

    Options need a seed, and `logprobs` 0. A prompt is computed once for all its completions.
    """
    rollouts = [
        [_Rollout(prompt, base, own) for own in of_prompt]
        for prompt, of_prompt in zip(prompts, options, strict=True)
    ]
    waiting = deque(rollout for own in rollouts for rollout in own)
    batch, read = Batch[_Rollout](base), _Reader(base)
    if not read.merges:
        at_once = 1
    while waiting or batch.answers:
        if waiting and len(batch.answers) <= at_once // 2:
            new = [
                waiting.popleft() for _ in range(min(at_once - len(batch.answers), len(waiting)))
            ]
            alone = len(new) == 1 and not batch.answers
            for rollout in new:
                cache = read(rollout.prompt)
                # Caches that are merged are copied; one alone is written to.
                rollout.cache = copy.deepcopy(cache) if alone else cache
            batch.join(new)
        ended, failed = batch.step()
        for _, error in failed:
            raise error
        batch.leave(ended, keep=False)
    return [[rollout.completion for rollout in own] for own in rollouts]


class _Reader:
    """The cache of a prompt without its last token; that of the last prompt is kept."""

    def __init__(self, base: Base):
        from mlx_lm.models.cache import make_prompt_cache

        self._base, self._make = base, make_prompt_cache
        self.merges = can_merge(make_prompt_cache(base.model))
        self._of: list[int] | None = None
        self._cache: list[Any] = []

    def __call__(self, prompt: list[int]) -> list[Any]:
        if self._of is not prompt:
            self._cache = self._make(self._base.model)
            for begin in range(0, len(prompt) - 1, PREFILL):
                part = mx.array(prompt[begin : min(begin + PREFILL, len(prompt) - 1)])[None]
                self._base.model(part, cache=self._cache)
                mx.eval([layer.state for layer in self._cache])
            self._of = prompt
        return self._cache
