"""Generates completions of prompts in batches. Which completions share a batch depends only on the
prompts and the completions, and not on timing."""

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Literal, Protocol

import mlx.core as mx
import numpy as np

from ..planning.rollouts import PREFILL
from .batching import Answer, Base, Batch, can_merge
from .decoding import Options, Piece


@dataclass(frozen=True)
class Policy:
    """A model with its adapter attached, and its tokenizer."""

    model: Any
    tokenizer: Any
    max_length: int | None


class Talk(Protocol):
    """The conversation of a completion. It provides the prompt, and replies to the model's
    turns."""

    @property
    def prompt(self) -> list[int]: ...

    def reply(self, text: str) -> list[int] | None:
        """Returns the tokens between the model's turn with this text and its next turn. Returns
        None if there is no next turn."""
        ...

    def end(self, text: str) -> None:
        """Receives the text of the last turn if it was truncated, in which case there is no reply
        to it."""
        ...


@dataclass(frozen=True)
class Monologue:
    """A conversation that consists of a prompt and a single turn of the model."""

    prompt: list[int]

    def reply(self, text: str) -> list[int] | None:
        return None

    def end(self, text: str) -> None:
        pass


@dataclass(frozen=True)
class Completion:
    """A completion of a prompt.

    `drawn` [n] says which tokens were sampled from the model. `log_p`, float32 [n], contains their
    log-probabilities at the sampling temperature, and 0 for other tokens. `text` is the text of the
    last turn. `finish` is "length" if the completion was truncated, "turns" if the model had used
    all of its turns, and "stop" otherwise.
    """

    prompt: list[int]
    tokens: list[int]
    drawn: np.ndarray
    log_p: np.ndarray
    text: str
    finish: Literal["stop", "length", "turns"]
    turns: int

    @property
    def length(self) -> int:
        """The number of sampled tokens."""
        return int(self.drawn.sum())


class Unread:
    """Replaces decoding.Text where no text is needed before a turn is complete. Decoding each token
    takes time on the host, which limits the speed of rollouts."""

    stopped = False

    def add(self, token: int) -> str:
        return ""

    def end(self) -> str:
        return ""


class _Turn(Answer):
    """One turn of the model in a completion."""

    def __init__(self, prompt: list[int], base: Base, options: Options):
        super().__init__(prompt, base, options, text=Unread())
        self.log_p: list[float] = []

    def give(self, piece: Piece) -> None:
        pass

    @property
    def said(self) -> str:
        """The text of the turn, without the token that ended it."""
        made = self.made
        if made and made[-1] in self.base.tokenizer.eos_token_ids:
            made = made[:-1]
        return self.base.tokenizer.decode(made, clean_up_tokenization_spaces=False)

    def take(self, token: int) -> bool:
        if self.told is not None and not self.read:
            self.log_p.append(self.told[0])
        return super().take(token)

    @property
    def told_at(self) -> float:
        return self.options.temperature or 1.0  # 0 means greedy decoding


class _Rollout:
    """A completion that is being generated turn by turn."""

    def __init__(self, base: Base, talk: Talk, options: Options, most_turns: int):
        self.base, self.talk, self.options, self.most_turns = base, talk, options, most_turns
        self.tokens: list[int] = []
        self.drawn: list[bool] = []
        self.log_p: list[float] = []
        self.text = ""
        self.finish: Any = None
        self.turns = 0

    def turn(self) -> _Turn:
        """Returns the next turn, whose prompt consists of all tokens so far."""
        options = self.options
        if self.turns:
            left, seed = options.max_tokens - len(self.tokens), seed_of(options.seed, self.turns)
            options = replace(options, max_tokens=left, seed=seed)
        return _Turn([*self.talk.prompt, *self.tokens], self.base, options)

    def goes_on(self, turn: _Turn) -> bool:
        """Adds a completed turn, and the reply to it if there is one. Returns whether another turn
        follows."""
        self._add(turn.made, True, turn.log_p)
        self.turns += 1
        self.text, self.finish = turn.said, turn.finish or "length"
        if self.finish == "length":
            self.talk.end(self.text)
            return False
        reply = self.talk.reply(self.text)
        if reply is None:
            return False
        if self.turns >= self.most_turns:
            self.finish = "turns"
            return False
        if len(self.tokens) + len(reply) >= self.options.max_tokens:
            self.finish = "length"
            return False
        self._add(reply, False, [0.0] * len(reply))
        return True

    def _add(self, tokens: list[int], drawn: bool, log_p: list[float]) -> None:
        self.tokens += tokens
        self.drawn += [drawn] * len(tokens)
        self.log_p += log_p

    @property
    def completion(self) -> Completion:
        drawn, log_p = np.array(self.drawn, bool), np.array(self.log_p, np.float32)
        own = (self.talk.prompt, self.tokens, drawn, log_p, self.text, self.finish)
        return Completion(*own, self.turns)


def seed_of(*what: int | None) -> int:
    """Returns a seed that is derived from all of these numbers."""
    digest = blake2b(",".join(map(str, what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def complete(
    base: Base,
    talks: Sequence[Sequence[Talk]],
    options: Sequence[Sequence[Options]],
    at_once: int,
    most_turns: int = 1,
) -> list[list[Completion]]:
    """Generates a completion of each talk with the corresponding options. Up to `at_once`
    completions are decoded together; waiting completions join when half of the current ones have
    ended their turn. The model takes at most `most_turns` turns in a talk.

    The options must have a seed, and `logprobs` must be 0. A prompt that consecutive talks share is
    computed once. The tokens before a later turn are recomputed, because keeping their cache would
    use memory while other completions are decoded.
    """
    rollouts = [
        [_Rollout(base, talk, how, most_turns) for talk, how in zip(*own, strict=True)]
        for own in zip(talks, options, strict=True)
    ]
    waiting = deque(rollout for own in rollouts for rollout in own)
    batch, read = Batch[_Turn](base), _Reader(base)
    of_turn: dict[_Turn, _Rollout] = {}
    if not read.merges:
        at_once = 1
    while waiting or batch.answers:
        if waiting and len(batch.answers) <= at_once // 2:
            count = min(at_once - len(batch.answers), len(waiting))
            began = [waiting.popleft() for _ in range(count)]
            new = [rollout.turn() for rollout in began]
            of_turn |= zip(new, began, strict=True)
            alone = len(new) == 1 and not batch.answers
            for turn in new:
                cache = read(turn.prompt)
                # Merging copies the caches. A single cache is not merged, so it is copied here;
                # otherwise, decoding would modify the reader's cache in place.
                turn.cache = copy.deepcopy(cache) if alone else cache
            batch.join(new)
        ended, failed = batch.step()
        for _, error in failed:
            raise error
        batch.leave(ended, keep=False)
        # Continued talks come before new ones, so that fewer talks are open at a time.
        more = [rollout for turn in ended if (rollout := of_turn.pop(turn)).goes_on(turn)]
        waiting.extendleft(reversed(more))
    return [[rollout.completion for rollout in own] for own in rollouts]


class _Reader:
    """Computes the cache of a prompt without its last token. It keeps the cache of the most recent
    prompt."""

    def __init__(self, base: Base):
        from mlx_lm.models.cache import make_prompt_cache

        self._base, self._make = base, make_prompt_cache
        self.merges = can_merge(make_prompt_cache(base.model))
        self._of: list[int] | None = None
        self._cache: list[Any] = []

    def __call__(self, prompt: list[int]) -> list[Any]:
        if self._of != prompt:
            self._cache = self._make(self._base.model)
            for begin in range(0, len(prompt) - 1, PREFILL):
                part = mx.array(prompt[begin : min(begin + PREFILL, len(prompt) - 1)])[None]
                self._base.model(part, cache=self._cache)
                mx.eval([layer.state for layer in self._cache])
            self._of = prompt
        return self._cache
