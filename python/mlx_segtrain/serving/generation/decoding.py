"""From logits to text: which token is taken, and what of the text is final."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

#: Tokens at the end of a prompt after which the text of its answer is decoded.
CONTEXT = 8
#: What decoders give for bytes that are no character, or not yet.
INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Options:
    """How tokens are chosen, and when a sequence ends.

    `top_p`, `top_k` and `min_p` keep what all of them keep, of the model's own probabilities; then
    comes the temperature, 0 for the likeliest token. The repetition penalty is for tokens of prompt
    and answer (Keskar et al. 2019, arXiv:1909.05858), the other two are for the answer's.
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
    continues: bool = False  #: the text goes on from the prompt's, so a space between them counts


class Text:
    """Text of tokens as far as it is final: whole characters, and nothing of a stop string.

    The tokens before are decoded again with each one, since what a token means may depend on them.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int], stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens = list(context)
        self._old = len(self._tokens)  # those whose text is out
        self._out = len(self._decoded().rstrip(INCOMPLETE))
        self._held = ""
        self.stopped = False

    def _decoded(self) -> str:
        if not self._tokens:
            return ""
        return self._tokenizer.decode(self._tokens, clean_up_tokenization_spaces=False)

    def add(self, token: int) -> str:
        """What one more token adds; `stopped` if a stop string is reached."""
        self._tokens.append(token)
        text = self._decoded()
        whole = text.rstrip(INCOMPLETE)
        new, self._out = whole[self._out :], max(self._out, len(whole))
        if whole == text:
            self._tokens = self._tokens[self._old :]
            self._old, self._out = len(self._tokens), len(self._decoded())
        return self._before_stop(new, last=False)

    def end(self) -> str:
        """What was held back; bytes that are no character show as U+FFFD."""
        new, self._tokens, self._out = self._decoded()[self._out :], [], 0
        return self._before_stop(new, last=True)

    def _before_stop(self, new: str, *, last: bool) -> str:
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begun = max((_overlap(text, stop) for stop in self._stop), default=0)
        keep = len(text) - (0 if last else begun)
        self._held = text[keep:]
        return text[:keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text with which the stop string begins."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


def sampler(options: Options) -> Callable[[mx.array], mx.array]:
    """log p [1, V] → tokens [1], by a random key of its own."""
    if options.temperature == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    seed = int.from_bytes(os.urandom(8), "big") if options.seed is None else options.seed
    key = mx.random.key(seed % 2**64)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        logprobs = logprobs.astype(mx.float32)
        best = logprobs.max(axis=-1, keepdims=True)
        least = _least(logprobs, options)
        kept = logprobs if least is None else mx.where(logprobs >= least, logprobs, -mx.inf)
        return mx.random.categorical((kept - best) / options.temperature, key=now)

    return sample


def _least(logprobs: mx.array, options: Options) -> mx.array | None:
    """The smallest log p [1, 1] that is kept of log p [1, V]; None if all are."""
    least = []
    if options.min_p > 0:
        least.append(logprobs.max(axis=-1, keepdims=True) + mx.log(mx.array(options.min_p)))
    if options.top_k or options.top_p < 1:
        falling = -mx.sort(-logprobs, axis=-1)
        if options.top_k:
            k = min(options.top_k, logprobs.shape[-1])
            least.append(falling[..., k - 1 : k])
        if options.top_p < 1:
            p = mx.exp(falling)
            before = mx.cumsum(p, axis=-1, inclusive=False)
            n = mx.maximum((before < options.top_p).sum(axis=-1, keepdims=True), 1)
            least.append(mx.take_along_axis(falling, n - 1, axis=-1))
    return mx.concatenate(least, axis=-1).max(axis=-1, keepdims=True) if least else None


def processors(options: Options, prompt: list[int]) -> list[Any] | None:
    """Penalties and biases of the logits [1, V], as one of generate_step's processors.

    It counts for itself: of the prompt generate_step knows only what no cache held.
    """
    presence, frequency = options.presence_penalty, options.frequency_penalty
    repetition = options.repetition_penalty
    if not (presence or frequency or repetition != 1 or options.logit_bias):
        return None
    counts: mx.array | None = None
    asked: mx.array | None = None  # of the prompt
    bias: mx.array | None = None

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal counts, asked, bias
        logits = logits.astype(mx.float32)
        if counts is None or asked is None:
            counts = zeros = mx.zeros(logits.shape[-1])
            asked = zeros.at[mx.array(prompt)].add(1)
            if options.logit_bias:
                at, values = map(mx.array, zip(*options.logit_bias.items(), strict=True))
                bias = zeros.at[at].add(values)
        else:
            counts = counts.at[tokens[-1:]].add(1)
        if repetition != 1:
            weaker = mx.where(logits < 0, logits * repetition, logits / repetition)
            logits = mx.where(counts + asked > 0, weaker, logits)
        logits = logits - presence * (counts > 0) - frequency * counts
        return logits if bias is None else logits + bias

    return [process]
