"""A model as the trainer uses it: a chain of stages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..lora import EMBEDDINGS
from ..schedule import Cuts, Params, Stage
from ..streams import SINGLE, Stream
from .form import LayerForm

#: The number of rows of logits that are computed at a time if our ops do not support the head.
HEAD_ROWS = 256


@dataclass(frozen=True)
class Dropout:
    """LoRA dropout. The masks are determined by the seed, the draw and the path of a module."""

    rate: float
    seed: int
    draw: int  #: the number of the batch, counted from the start of the run

    def key(self, path: str) -> mx.array:
        return ops.dropout_key(self.seed, self.draw, path)


@dataclass(frozen=True)
class Updates:
    """The settings of the LoRA updates in one stream: the multipliers of the linear layers, keyed
    by full path, and the dropout."""

    scales: Mapping[str, float]
    dropout: Dropout | None = None
    stream: Stream = SINGLE[0]

    def key(self, path: str) -> mx.array | None:
        """Returns the random key for this module's dropout mask, or None if there is no dropout."""
        return self.dropout and self.dropout.key(self.stream.of(path))


NO_UPDATES = Updates({})


class Head:
    """Maps rows of the final h to logits, and logits to losses.

    The argument `params` of the methods contains the factors of the head's update, keyed by full
    path. It is empty if the head has no update.
    """

    path: str  #: the adaptable module: the head, or the embedding that is the head

    def adapting(self, updates: Updates) -> "Head":
        """Returns the head for an adapter that has these updates."""
        raise NotImplementedError

    def logits(self, h: mx.array) -> mx.array:
        """Maps h [..., H] to logits [..., V], without an update."""
        return self.logits_of({}, h, 0)

    def logits_of(self, params: Mapping[str, mx.array], h: mx.array, begin: int) -> mx.array:
        """Maps h to logits like `logits`, but with an update. The dropout mask depends on `begin`,
        the index of the first row of h."""
        raise NotImplementedError

    def as_product(
        self, params: Mapping[str, mx.array], h: mx.array, temperature: float = 1.0
    ) -> tuple[mx.array, ops.Base, float | None] | None:
        """Returns x, the weight and the softcap from which our ops compute the output of this head.
        The logits are divided by the temperature. If our ops do not support the head, returns
        None."""
        return None

    def cross_entropy(
        self,
        params: Mapping[str, mx.array],
        h: mx.array,
        targets: mx.array,
        weights: mx.array,
        *,
        needs_grad: bool = True,
    ) -> mx.array:
        """Returns Σ weights·CE for h [M, H] and the target tokens [M], as a float32 scalar."""
        if (own := self.as_product(params, h)) is not None:
            x, base, softcap = own
            how: Any = {"softcap": softcap, "needs_grad": needs_grad, "padded": False}
            return ops.linear_cross_entropy(x, base, targets, weights, **how)
        return -(weights * self.log_probs(params, h, targets, needs_grad=needs_grad)).sum()

    def log_probs(
        self,
        params: Mapping[str, mx.array],
        h: mx.array,
        targets: mx.array,
        *,
        temperature: float = 1.0,
        needs_grad: bool = True,
    ) -> mx.array:
        """Returns the log-probabilities of the target tokens [M] given h [M, H], as float32 [M].
        The logits are first divided by the temperature.

        A head that our ops do not support processes HEAD_ROWS rows at a time in the forward and the
        backward pass. The order of these groups of rows is fixed, since MLX might otherwise keep
        the logits of all rows in memory. The backward pass recomputes the logits.
        """
        if (product := self.as_product(params, h, temperature)) is not None:
            x, base, softcap = product
            how: Any = {"softcap": softcap, "needs_grad": needs_grad, "padded": False}
            return ops.linear_log_probs(x, base, targets, **how)
        names, begins = list(params), range(0, h.shape[0], HEAD_ROWS)

        def part(begin: int, h: mx.array, *factors: mx.array) -> mx.array:
            z = self.logits_of(dict(zip(names, factors, strict=True)), h, begin)
            own = targets[begin : begin + HEAD_ROWS]
            return -nn.losses.cross_entropy(z.astype(mx.float32) / temperature, own)

        @mx.custom_function
        def run(h: mx.array, factors: list[mx.array]) -> mx.array:
            parts: list[mx.array] = []
            for begin in begins:
                own = mx.depends([h[begin : begin + HEAD_ROWS]], parts[-1:])[0]
                parts.append(part(begin, own, *factors))
            return mx.concatenate(parts)

        @run.vjp
        def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
            h, factors = primals
            dh: list[mx.array] = []
            totals = [mx.zeros_like(x) for x in factors]
            for begin in begins:
                own, do = (x[begin : begin + HEAD_ROWS] for x in (h, cotangent))
                own = mx.depends([own], [*dh[-1:], *totals])[0]
                d_own, *grads = mx.vjp(partial(part, begin), [own, *factors], [do])[1]
                dh.append(d_own)
                totals = [total + grad for total, grad in zip(totals, grads, strict=True)]
            return mx.concatenate(dh), totals

        return cast(mx.array, run(h, list(params.values())))


@dataclass(frozen=True)
class Chain:
    """A model as a chain of stages, which read and write boundary values.

    `start(tokens [B, T])` returns the values that the first stages read. A layer is one stage
    (`model.layers.3`) or two (`….self_attn` and `….mlp`). Parameters and multipliers are named by
    the full path of their linear layer (`model.layers.3.self_attn.q_proj.lora_a`). The last stage
    of a stream writes the stream's `h`. If the chain `trims`, one stage reads the input `positions`
    [N], which are the last N of the T positions; after this stage, h has only these rows.
    """

    start: Callable[[mx.array], dict[str, mx.array]]
    stages_of: Callable[[Updates], list[Stage]]
    head: Head
    linears: dict[str, nn.Module]  #: adaptable linear layers by full path
    stage_of: dict[str, str]  #: the owner of each path in `linears`
    layers: list[list[str]]  #: the owners of the stages of each layer
    max_length: int | None  #: the model's context length
    trims: bool = False
    branches: bool = False  #: whether streams may have a branch or packed parts
    #: The embedding and the head, if they are adaptable.
    outer: dict[str, nn.Module] = field(default_factory=dict)
    embedded: Callable[[], "Chain"] | None = None  #: the same chain with the embedding as a stage
    forms: tuple[LayerForm, ...] = ()  #: the forms of the layers of a fast family

    def stages(
        self,
        scales: Mapping[str, float],
        streams: Sequence[Stream] = SINGLE,
        dropout: Dropout | None = None,
    ) -> list[Stage]:
        """Returns the stages for a batch, in the order of the streams."""
        of_streams = (Updates(scales, dropout, stream) for stream in streams)
        return [stage for updates in of_streams for stage in self.stages_of(updates)]

    @property
    def adaptable(self) -> dict[str, Any]:
        """All modules that an adapter may update, keyed by full path."""
        return {**self.linears, **self.outer}

    @property
    def tied(self) -> bool:
        """Whether the model lacks a separate head that is adaptable."""
        return all(isinstance(module, EMBEDDINGS) for module in self.outer.values())

    def tied_for(self, paths: Iterable[str]) -> bool | None:
        """Returns `tied` if one of these paths is an embedding. Otherwise, returns None, because
        `tied` is then irrelevant."""
        embeds = any(isinstance(self.outer.get(path), EMBEDDINGS) for path in paths)
        return self.tied if embeds else None

    def adapting(self, scales: Mapping[str, float], dropout: Dropout | None = None) -> "Chain":
        """Returns the chain for an adapter with these multipliers. The adapter may update the
        embedding and the head."""
        chain = self
        if chain.embedded and any(isinstance(self.outer.get(p), EMBEDDINGS) for p in scales):
            chain = chain.embedded()
        return replace(chain, head=chain.head.adapting(Updates(scales, dropout)))

    def of_head(self, params: Params) -> dict[str, mx.array]:
        """Returns the factors of the head's update. If the head is the embedding, these factors may
        also belong to another stage."""
        own = params.get(self.stage_of.get(self.head.path, ""), {})
        return {name: x for name, x in own.items() if name.rpartition(".")[0] == self.head.path}

    def cuts(
        self, size: int, streams: Sequence[Stream] = SINGLE, layers: slice = slice(None)
    ) -> Cuts:
        """Returns the cuts that divide the stages of these layers into segments of `size` layers.
        If `size` is 0, there is a single segment."""
        stages = accumulate(len(layer) for _ in streams for layer in self.layers[layers])
        return Cuts.by_layer(list(stages), size)
