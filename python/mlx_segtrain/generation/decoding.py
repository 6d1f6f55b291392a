"""Chooses tokens from logits, and decodes them to text, which is returned once it is final."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import mlx.core as mx

#: The number of tokens at the end of the prompt that are decoded together with an answer.
CONTEXT = 8
#: Decoders return this for bytes that are invalid or do not form a complete character yet.
INCOMPLETE = "\ufffd"


class Constraint(Protocol):
    """Restricts which tokens may come next in an answer."""

    def fresh(self) -> "Constraint":
        """Returns a copy in its initial state."""
        ...

    def take(self, token: int) -> None:
        """Advances by a token, which must have been allowed."""
        ...

    def allowed(self, n: int) -> mx.array:
        """Returns a boolean array [n] that says which of the n tokens in the vocabulary are allowed
        next."""
        ...


@dataclass(frozen=True)
class Options:
    """Options that determine how tokens are chosen and when an answer ends.

    The candidates are the tokens that `top_p`, `top_k` and `min_p` all keep, based on probabilities
    at temperature 1. One of them is sampled at `temperature` or, if that is 0, the most likely one
    is chosen. The repetition penalty (Keskar et al. 2019, arXiv:1909.05858) applies to tokens of
    the prompt and the answer, the other two penalties only to tokens of the answer.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    continues: bool = False  #: whether the text continues the text of the prompt
    logprobs: int | None = None  #: number of most likely tokens to report; None reports nothing
    deterministic: bool = False  #: whether the answer is bit-identical regardless of other requests
    constraint: "Constraint | None" = None  #: restricts the format of the text


#: The log-probability of the chosen token, and the log-probabilities of the most likely tokens,
#: keyed by token.
Told = tuple[float, dict[int, float]]


@dataclass(frozen=True)
class Piece:
    """The next piece of an answer's text. `tokens` is the number of tokens of the answer so far,
    and `cached` is how many tokens of the prompt came from a cache. Only the last piece has
    `finish`, which is "stop" after an end-of-sequence token or a stop string, and "length" after
    the maximum number of tokens."""

    text: str
    tokens: int
    cached: int
    finish: Literal["stop", "length"] | None = None
    #: The log-probabilities of the tokens since the last piece, if they are requested.
    told: tuple[tuple[int, Told], ...] = ()


class Text:
    """Decodes tokens to text. Text is final, and is returned, once its characters are complete and
    it cannot be part of a stop string.

    Each new token is decoded together with the preceding tokens, since its text may depend on them.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int], stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens = list(context)
        self._old = len(self._tokens)  # number of tokens whose text was returned
        self._out = len(self._decoded().rstrip(INCOMPLETE))
        self._held = ""
        self.stopped = False

    def _decoded(self) -> str:
        if not self._tokens:
            return ""
        return self._tokenizer.decode(self._tokens, clean_up_tokenization_spaces=False)

    def add(self, token: int) -> str:
        """Adds a token, and returns the text that has become final. Sets `stopped` if the text
        contains a stop string."""
        self._tokens.append(token)
        text = self._decoded()
        whole = text.rstrip(INCOMPLETE)
        new, self._out = whole[self._out :], max(self._out, len(whole))
        # Dropping old tokens requires another call to the decoder, so it is not done for each
        # token.
        if whole == text and len(self._tokens) >= self._old + CONTEXT:
            self._tokens = self._tokens[self._old :]
            self._old, self._out = len(self._tokens), len(self._decoded())
        return self._before_stop(new, last=False)

    def end(self) -> str:
        """Returns the rest of the text, after the last token. Incomplete characters become
        U+FFFD."""
        new, self._tokens, self._out = self._decoded()[self._out :], [], 0
        return self._before_stop(new, last=True)

    def _before_stop(self, new: str, *, last: bool) -> str:
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begun = max((overlap(text, stop) for stop in self._stop), default=0)
        keep = len(text) - (0 if last else begun)
        self._held = text[keep:]
        return text[:keep]


def overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of the text may be the beginning of the stop
    string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


def first_key(options: Options) -> mx.array:
    """Returns the initial random key of an answer, uint32 [2]. It is derived from the seed if the
    options contain one."""
    seed = int.from_bytes(os.urandom(8), "big") if options.seed is None else options.seed
    return mx.random.key(seed % 2**64)


@dataclass(eq=False)
class Choice:
    """Chooses a token for each row of logits [B, V]. Each row has its own options and random key.

    Therefore, the choice for a row does not depend on the other rows.
    """

    options: Sequence[Options]
    keys: Sequence[mx.array]  #: the next key of each row

    def __post_init__(self) -> None:
        self._drawn = [i for i, own in enumerate(self.options) if own.temperature > 0]
        if not self._drawn:
            return
        own = [self.options[i] for i in self._drawn]
        self._all = len(own) == len(self.options)
        self._rows = mx.array(self._drawn, mx.uint32)
        self._keys = mx.stack([self.keys[i] for i in self._drawn])
        self._temperatures = mx.array([x.temperature for x in own])[:, None]
        self._limits = _Limits(own)

    def __call__(self, logits: mx.array) -> mx.array:
        """Chooses a token for each row of logits: [B, V] → uint32 [B]."""
        best = mx.argmax(logits, axis=-1)
        if not self._drawn:
            return best
        own = (logits if self._all else logits[self._rows]).astype(mx.float32)
        logprobs = own - mx.logsumexp(own, axis=-1, keepdims=True)
        least = self._limits(logprobs)
        kept = logprobs if least is None else mx.where(logprobs >= least, logprobs, -mx.inf)
        scaled = (kept - kept.max(axis=-1, keepdims=True)) / self._temperatures
        self._keys, drawn = mx.vmap(_draw)(self._keys, scaled)
        if self._all:
            return drawn
        best[self._rows] = drawn
        return best

    def next_keys(self) -> list[mx.array]:
        """Returns the next key of each row, which is needed when rows join or leave."""
        keys = list(self.keys)
        for place, i in enumerate(self._drawn):
            keys[i] = self._keys[place]
        return keys


def _draw(key: mx.array, logits: mx.array) -> tuple[mx.array, mx.array]:
    key, now = mx.random.split(key)
    return key, mx.random.categorical(logits, key=now)


class _Limits:
    """Restricts the candidates of each row before a token is sampled."""

    def __init__(self, options: Sequence[Options]):
        def column(values: Sequence[float]) -> mx.array:
            return mx.array(list(values))[:, None]

        self._k = self._p = self._min = None
        if any(x.top_k for x in options):
            self._k = [x.top_k or None for x in options]
        if any(x.top_p < 1 for x in options):
            self._p = column([x.top_p if x.top_p < 1 else math.inf for x in options])
        if any(x.min_p > 0 for x in options):
            self._min = column([math.log(x.min_p) if x.min_p else -math.inf for x in options])

    def __call__(self, logprobs: mx.array) -> mx.array | None:
        """Returns the smallest log-probability [B, 1] that a candidate must have, given the
        log-probabilities [B, V], or None if all tokens are candidates."""
        least, n = [], logprobs.shape[-1]
        if self._min is not None:
            least.append(logprobs.max(axis=-1, keepdims=True) + self._min)
        if self._k is not None or self._p is not None:
            falling = -mx.sort(-logprobs, axis=-1)
            if self._k is not None:
                last = mx.array([[min(k or n, n) - 1] for k in self._k])
                least.append(mx.take_along_axis(falling, last, axis=-1))
            if self._p is not None:
                before = mx.cumsum(mx.exp(falling), axis=-1, inclusive=False)
                kept = mx.maximum((before < self._p).sum(axis=-1, keepdims=True), 1)
                least.append(mx.take_along_axis(falling, kept - 1, axis=-1))
        return mx.concatenate(least, axis=-1).max(axis=-1, keepdims=True) if least else None


def processor(
    options: Options, prompt: Sequence[int], made: Sequence[int] = ()
) -> Callable[[mx.array, mx.array], mx.array] | None:
    """Returns a function that applies an answer's penalties and biases to its logits, or None if
    the answer has neither.

    The function takes the last token [1] and the logits [1, V] that follow it. In the first call,
    the token must be the last one of `prompt` + `made`.
    """
    presence, frequency = options.presence_penalty, options.frequency_penalty
    repetition = options.repetition_penalty
    if not (presence or frequency or repetition != 1 or options.logit_bias):
        return None
    counts: mx.array | None = None
    asked: mx.array | None = None  # how often each token occurs in the prompt
    bias: mx.array | None = None

    def process(token: mx.array, logits: mx.array) -> mx.array:
        nonlocal counts, asked, bias
        logits = logits.astype(mx.float32)
        if counts is None or asked is None:
            zeros = mx.zeros(logits.shape[-1])
            asked = zeros.at[mx.array(list(prompt))].add(1)
            counts = zeros.at[mx.array(list(made))].add(1) if made else zeros
            if options.logit_bias:
                at, values = map(mx.array, zip(*options.logit_bias.items(), strict=True))
                bias = zeros.at[at].add(values)
        else:
            counts = counts.at[token].add(1)
        if repetition != 1:
            weaker = mx.where(logits < 0, logits * repetition, logits / repetition)
            logits = mx.where(counts + asked > 0, weaker, logits)
        logits = logits - presence * (counts > 0) - frequency * counts
        return logits if bias is None else logits + bias

    return process


class Telling:
    """Computes the log-probabilities of chosen tokens for the rows of a batch that request them.

    They are computed from the logits of the model, before penalties and constraints. The logits are
    divided by a temperature only for rows that request this.
    """

    def __init__(self, wanted: Mapping[int, int], rows: int, temperatures: Mapping[int, float]):
        """`wanted` contains the rows that request log-probabilities: it maps each row's index to
        the number of most likely tokens to report. `temperatures` maps rows to the temperature by
        which their logits are divided; the default is 1."""
        self._wanted, self._most = wanted, max(wanted.values())
        self._rows = None if len(wanted) == rows else mx.array(list(wanted), mx.uint32)
        self._temperatures = None
        if any(x != 1 for x in temperatures.values()):
            self._temperatures = mx.array([temperatures.get(row, 1.0) for row in wanted])[:, None]

    def __call__(self, logits: mx.array, taken: mx.array) -> list[mx.array]:
        """Returns the arrays for `read`, given the logits [B, V] and the chosen tokens [B]."""
        if self._rows is not None:
            logits, taken = logits[self._rows], taken[self._rows]
        own = logits.astype(mx.float32)
        if self._temperatures is not None:
            own = own / self._temperatures
        own = own - mx.logsumexp(own, axis=-1, keepdims=True)
        found = [mx.take_along_axis(own, taken[:, None], axis=-1)[:, 0]]
        if most := min(self._most, own.shape[-1]):
            order = mx.argsort(-own, axis=-1)[:, :most]
            found += [order, mx.take_along_axis(own, order, axis=-1)]
        return found

    def read(self, arrays: Sequence[mx.array]) -> dict[int, Told]:
        """Returns the log-probabilities, keyed by row."""
        taken, *others = (cast(list[Any], x.tolist()) for x in arrays)
        order, best = others or ([[]] * len(taken), [[]] * len(taken))
        return {
            row: (taken[i], dict(zip(order[i][:n], best[i][:n], strict=True)))
            for i, (row, n) in enumerate(self._wanted.items())
        }
