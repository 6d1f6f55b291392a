"""Decodes several sequences together. Each forward pass computes the next token of every sequence.

Everything runs on one thread. A batch starts the next step before it reads the tokens of the
previous step, so that the device computes while the host decodes text.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar
from weakref import ref

import mlx.core as mx

from ..lora import few, twin_of
from .decoding import (
    CONTEXT,
    Choice,
    Constraint,
    Options,
    Piece,
    Telling,
    Text,
    Told,
    first_key,
    processor,
)

#: Padding takes memory and time, so sequences share a batch only if the longest has at most
#: MOST_PADDING times as many tokens as the shortest, plus LEAST_PADDING.
MOST_PADDING, LEAST_PADDING = 2, 512


class Base(Protocol):
    """An mlx-lm model and its tokenizer, with which answers are generated."""

    @property
    def model(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def max_length(self) -> int | None:
        """The context length of the model, or None if it is unknown."""
        ...


@dataclass(eq=False)
class Answer:
    """An answer that is being generated. Its cache contains the first `done` tokens."""

    prompt: list[int]
    base: Base
    options: Options
    made: list[int] = field(default_factory=list)
    cached: int = 0  #: number of prompt tokens that came from a cache
    done: int = 0
    cache: list[Any] | None = None
    first: float | None = None  #: time of its first token
    finish: str | None = None
    alone: bool = False  #: must not be batched, since its update is attached to the layers
    batch: "Batch[Any] | None" = None

    # The decoding state, which `begin` initializes:
    next: mx.array | None = None  #: last token, uint32 [1], which is not in the cache yet
    key: mx.array | None = None
    text: Any = None  #: a decoding.Text, or an object with its methods
    process: Any = None
    constraint: Constraint | None = None
    read: bool = True  #: whether `next` is already in `prompt` or `made`
    told: Told | None = None  #: log-probabilities for `next`

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.made]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.made)

    @property
    def told_at(self) -> float:
        """The temperature by which logits are divided before log-probabilities are computed."""
        return 1.0

    @property
    def most(self) -> int:
        """The maximum number of tokens of the answer, which is limited by the model's context
        length."""
        limit = self.base.max_length
        room = self.options.max_tokens if limit is None else max(1, limit - len(self.prompt))
        return min(self.options.max_tokens, room)

    def give(self, piece: Piece) -> None:
        """Receives the next piece of the text."""
        raise NotImplementedError

    def begin(self) -> None:
        """Prepares everything that decoding needs except the cache. Can be called again after
        start_over()."""
        if self.next is not None:
            return
        options, prompt = self.options, self.prompt
        self.next, self.read = mx.array(self.tokens[-1:], mx.uint32), True
        self.process = processor(options, prompt, self.made)
        if self.key is None:
            self.key = first_key(options)
        self.constraint = options.constraint and options.constraint.fresh()
        if self.constraint is not None:
            for token in self.made:
                self.constraint.take(token)
        if self.text is None:
            context = prompt[-CONTEXT:] if options.continues else []
            self.text = Text(self.base.tokenizer, context, options.stop)

    def start_over(self) -> None:
        """Frees the cache and the decoding state, which can be recomputed from the tokens."""
        self.cache, self.batch, self.next, self.done, self.told = None, None, None, 0, None
        if self.key is not None:  # so that no random number is used twice
            self.key = mx.random.split(self.key, 3)[2]

    def take(self, token: int) -> bool:
        """Appends a token and passes its text to `give`. Returns whether the answer has ended."""
        told, self.told = self.told, None
        if self.read:
            self.read, self.done = False, self.length
            return False
        assert self.text is not None
        self.made.append(token)
        self.done = self.length
        self.first = self.first or time.monotonic()
        ended = token in self.base.tokenizer.eos_token_ids
        full = len(self.made) >= self.most
        piece = self.text.end() if ended else self.text.add(token)
        if full and not (ended or self.text.stopped):
            piece += self.text.end()
        finish = "stop" if ended or self.text.stopped else "length" if full else None
        self.finish = finish
        about = ((token, told),) if told is not None and not ended else ()
        if piece or finish or about:
            self.give(Piece(piece, len(self.made), self.cached, finish, about))
        return finish is not None


#: The class of the answers in a batch.
A = TypeVar("A", bound=Answer)


def can_merge(cache: Sequence[Any]) -> bool:
    """Returns whether a cache with layers of these types can be merged with other sequences'
    caches."""
    return all(hasattr(layer, "merge") for layer in cache)


class Batch(Generic[A]):
    """Answers that are decoded together. If there are several answers, their caches are merged into
    one."""

    def __init__(self, base: Base):
        self.base = base
        self.answers: list[A] = []
        self._cache: list[Any] = []
        self._merged = False
        self._twin: Any = None
        self._next: Any = None
        self._choice: Any = None
        self._telling: Telling | None = None
        self._told: tuple[list[A], list[mx.array]] | None = None

    @property
    def alone(self) -> bool:
        """Whether no other answers may join the batch."""
        return any(answer.alone for answer in self.answers)

    def takes(self, answer: A, others: Sequence[A] = ()) -> bool:
        """Returns whether the answer can join the batch, together with `others`, without too much
        padding."""
        together = (answer, *self.answers, *others)
        if any(own.alone for own in together):
            return False
        lengths = [own.length for own in together]
        return max(lengths) <= MOST_PADDING * min(lengths) + LEAST_PADDING

    def join(self, new: Sequence[A]) -> None:
        """Adds answers, whose caches must contain all of their tokens except the last one."""
        for answer in new:
            answer.begin()
            answer.batch = self
        self._give_out()
        caches: list[list[Any]] = [answer.cache or [] for answer in new]
        if len(new) > 1 or self.answers:
            merged = [type(layers[0]).merge(list(layers)) for layers in zip(*caches, strict=True)]
            if self.answers:
                if not self._merged:
                    self._cache = [type(layer).merge([layer]) for layer in self._cache]
                for own, more in zip(self._cache, merged, strict=True):
                    own.extend(more)
            else:
                self._cache = merged
            self._merged = True
        else:
            self._cache = caches[0]
        for answer in new:
            answer.cache = None
        self.answers.extend(new)
        self._take_in()

    def leave(self, gone: Sequence[A], *, keep: bool = True) -> None:
        """Removes answers. With `keep`, each removed answer keeps its cache."""
        if not gone:
            return
        self._give_out()
        for i, answer in enumerate(self.answers):
            if answer in gone:
                answer.batch = None
                if keep:
                    answer.cache = self._extracted(i)
        left = [i for i, answer in enumerate(self.answers) if answer not in gone]
        self.answers = [self.answers[i] for i in left]
        if not left:
            self._cache, self._merged = [], False
        elif len(left) == 1:
            self._cache, self._merged = self._extracted(left[0]), False
        else:
            for layer in self._cache:
                layer.filter(left)
        self._take_in()

    def _extracted(self, i: int) -> list[Any]:
        return [layer.extract(i) for layer in self._cache] if self._merged else self._cache

    def _give_out(self) -> None:
        """Stores the next token and random key in each answer, and gives each row of the caches its
        own offset."""
        self._read_telling()
        for layer in self._padded():
            if isinstance(layer.offset, int):
                layer.offset = mx.full(len(self.answers), layer.offset, mx.int32)
        if self.answers:
            keys = self._choice.next_keys()
            for i, answer in enumerate(self.answers):
                answer.next, answer.key = self._next[i : i + 1], keys[i]

    def _take_in(self) -> None:
        answers: list[Any] = self.answers
        if not answers:
            self._next = self._choice = self._telling = None
            return
        self._next = mx.concatenate([answer.next for answer in answers])
        options = [answer.options for answer in answers]
        self._choice = Choice(options, [answer.key for answer in answers])
        wanted = {i: own.logprobs for i, own in enumerate(options) if own.logprobs is not None}
        told_at = {i: answers[i].told_at for i in wanted}
        self._telling = Telling(wanted, len(answers), told_at) if wanted else None
        self._leave_masks_out()

    def _padded(self) -> list[Any]:
        """Returns the layer caches that pad shorter rows at the beginning."""
        from mlx_lm.models.cache import BatchKVCache

        return [x for x in self._cache if type(x) is BatchKVCache]

    def _leave_masks_out(self) -> None:
        """If all rows have the same length, makes the caches return no mask for single tokens, and
        replaces the offsets of their rows with a single offset. Without padding, single tokens need
        no mask, and a mask would rule out MLX's attention kernels for GPUs. With an offset per row,
        MLX would need one launch per layer to increase the offsets."""
        layers = self._padded()
        even = bool(layers) and not layers[0].left_padding.any().item()
        for layer in layers:
            vars(layer).pop("make_mask", None)
            if even:
                layer.make_mask = _no_mask(ref(layer))
                layer.offset = layer.size()

    def step(self) -> tuple[list[A], list[tuple[A, BaseException]]]:
        """Decodes one token of each answer. Returns the answers that have ended, and the errors
        that affect only one answer each. Errors that affect the whole step are raised."""
        inputs, failed = self._next, []
        model = self.base.model
        if few(len(self.answers)):
            model = self._twin = self._twin or twin_of(model)
        logits = model(inputs[:, None], cache=self._cache)[:, -1]
        chosen, known = logits, None
        if any(answer.constraint for answer in self.answers):
            mx.async_eval(logits)
            known = inputs.tolist()
        if known or any(answer.process for answer in self.answers):
            rows = [logits[i : i + 1] for i in range(len(self.answers))]
            for i, answer in enumerate(self.answers):
                try:
                    rows[i] = self._changed(answer, inputs[i : i + 1], rows[i], known and known[i])
                except BaseException as error:
                    failed.append((answer, error))
            chosen = mx.concatenate([row.astype(mx.float32) for row in rows])
        self._next = self._choice(chosen)
        self._read_telling()
        told = self._telling(logits, self._next) if self._telling else []
        if told:
            self._told = [*self.answers], told
        mx.async_eval(self._next, *told)
        ended = []
        for answer, token in zip(self.answers, inputs.tolist(), strict=True):
            try:
                if answer.take(token):
                    ended.append(answer)
            except BaseException as error:
                failed.append((answer, error))
        return ended, failed

    def _read_telling(self) -> None:
        """Sets the log-probabilities of the last token in the answers that request them."""
        if self._told is not None and self._telling is not None:
            (answers, arrays), self._told = self._told, None
            for i, told in self._telling.read(arrays).items():
                answers[i].told = told

    def _changed(self, answer: A, token: mx.array, row: mx.array, known: Any) -> mx.array:
        """Returns the logits [1, V] after the answer's penalties and its constraint have been
        applied."""
        if answer.process is not None:
            row = answer.process(token, row)
        if answer.constraint is not None:
            if not answer.read:
                answer.constraint.take(known)
            allowed = answer.constraint.allowed(row.shape[-1])
            row = mx.where(allowed, row, -mx.inf)
        return row


def _no_mask(layer: ref[Any]) -> Any:
    """Returns a `make_mask` method for a cache layer. The method returns no mask for single tokens.
    It keeps only a weak reference to the layer, so that the layer's arrays are freed with the
    layer."""

    def make_mask(n: int, **how: Any) -> Any:
        if n == 1 and not how.get("window_size"):
            return None
        own: Any = layer()
        return type(own).make_mask(own, n, **how)

    return make_mask
