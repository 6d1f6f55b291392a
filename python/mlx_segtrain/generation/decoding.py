"""Chooses tokens from logits, and decodes them to text as far as the text is final."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import mlx.core as mx

#: Number of the prompt's last tokens with which the text of an answer is decoded.
CONTEXT = 8
#: Decoders return this for bytes that are not a character, or not yet a complete one.
INCOMPLETE = "\ufffd"


class Constraint(Protocol):
    """Restricts which tokens may come next."""

    def fresh(self) -> "Constraint":
        """Returns a copy in its initial state."""
        ...

    def take(self, token: int) -> None:
        """Advances by a token, which was allowed."""
        ...

    def allowed(self, n: int) -> mx.array:
        """Returns which of n tokens are allowed, bool [n]."""
        ...


@dataclass(frozen=True)
class Options:
    """How tokens are chosen, and when a sequence ends.

    The candidates are the tokens that `top_p`, `top_k` and `min_p` all keep, given the model's own
    probabilities; one of them is sampled with the temperature, or, if that is 0, the most likely
    one is taken. The repetition penalty applies to tokens of prompt and answer (Keskar et al. 2019,
    arXiv:1909.05858), the other two penalties to tokens of the answer.
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
    continues: bool = False  #: the text continues the prompt's, so a space between them matters
    logprobs: int | None = (
        None  #: number of most likely tokens whose log p is returned; None: no log p
    )
    deterministic: bool = False  #: bit-identical to the answer of a single request
    constraint: "Constraint | None" = None  #: the format of the text


#: log p of the chosen token, and log p of the most likely ones by token.
Told = tuple[float, dict[int, float]]


@dataclass(frozen=True)
class Piece:
    """A further piece of an answer's text, with the number of `tokens` of the answer so far and of
    `cached` tokens of the prompt. The last piece has `finish`: stop at an end-of-sequence token or
    a stop string, or length at the maximum number of tokens."""

    text: str
    tokens: int
    cached: int
    finish: Literal["stop", "length"] | None = None
    #: Log probabilities of the tokens since the last piece, if they are requested.
    told: tuple[tuple[int, Told], ...] = ()


class Text:
    """Decodes tokens to text as far as it is final: whole characters, before any stop string.

    The preceding tokens are decoded again with each new one, since its text may depend on them.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int], stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens = list(context)
        self._old = len(self._tokens)  # the number of tokens whose text was returned
        self._out = len(self._decoded().rstrip(INCOMPLETE))
        self._held = ""
        self.stopped = False

    def _decoded(self) -> str:
        if not self._tokens:
            return ""
        return self._tokenizer.decode(self._tokens, clean_up_tokenization_spaces=False)

    def add(self, token: int) -> str:
        """Returns the text that one more token adds; sets `stopped` if a stop string is reached."""
        self._tokens.append(token)
        text = self._decoded()
        whole = text.rstrip(INCOMPLETE)
        new, self._out = whole[self._out :], max(self._out, len(whole))
        if whole == text:
            self._tokens = self._tokens[self._old :]
            self._old, self._out = len(self._tokens), len(self._decoded())
        return self._before_stop(new, last=False)

    def end(self) -> str:
        """Returns the text that was held back; incomplete characters become U+FFFD."""
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
    """Returns how many characters at the end of the text may be the start of the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


def first_key(options: Options) -> mx.array:
    """Returns the random key of an answer, uint32 [2], from its seed if it has one."""
    seed = int.from_bytes(os.urandom(8), "big") if options.seed is None else options.seed
    return mx.random.key(seed % 2**64)


@dataclass(eq=False)
class Choice:
    """Chooses tokens for rows of logits [B, V], each with its own options and random key.

    So a row's choice depends only on its seed, not on other rows.
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
        """Returns the next key of each row, for a choice among other rows."""
        keys = list(self.keys)
        for place, i in enumerate(self._drawn):
            keys[i] = self._keys[place]
        return keys


def _draw(key: mx.array, logits: mx.array) -> tuple[mx.array, mx.array]:
    key, now = mx.random.split(key)
    return key, mx.random.categorical(logits, key=now)


class _Limits:
    """Limits the tokens of each row before one is sampled."""

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
        """Returns the smallest log p [B, 1] to keep, from log p [B, V]; None if all are kept."""
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
    """Returns a function that applies an answer's penalties and biases to its logits; None if it
    has none.

    It takes the last token [1] and the logits [1, V] after it. The first call must be for the last
    token of `prompt` and `made`.
    """
    presence, frequency = options.presence_penalty, options.frequency_penalty
    repetition = options.repetition_penalty
    if not (presence or frequency or repetition != 1 or options.logit_bias):
        return None
    counts: mx.array | None = None
    asked: mx.array | None = None  # counts of the prompt's tokens
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
    """Computes log p of chosen tokens, for the rows of a batch that request it.

    It is taken from the model's own logits, before penalties and constraints; they are divided by
    a temperature only for rows that request that.
    """

    def __init__(self, wanted: Mapping[int, int], rows: int, temperatures: Mapping[int, float]):
        """`wanted` maps each row that requests log p to its number of most likely tokens;
        `temperatures` divide the logits of rows, by default 1."""
        self._wanted, self._most = wanted, max(wanted.values())
        self._rows = None if len(wanted) == rows else mx.array(list(wanted), mx.uint32)
        self._temperatures = None
        if any(x != 1 for x in temperatures.values()):
            self._temperatures = mx.array([temperatures.get(row, 1.0) for row in wanted])[:, None]

    def __call__(self, logits: mx.array, taken: mx.array) -> list[mx.array]:
        """Returns the arrays that `read` takes, from logits [B, V] and tokens [B]."""
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
        """Returns the log-probabilities by row."""
        taken, *others = (cast(list[Any], x.tolist()) for x in arrays)
        order, best = others or ([[]] * len(taken), [[]] * len(taken))
        return {
            row: (taken[i], dict(zip(order[i][:n], best[i][:n], strict=True)))
            for i, (row, n) in enumerate(self._wanted.items())
        }
