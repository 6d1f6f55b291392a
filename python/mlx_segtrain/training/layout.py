"""Stores all factors of an adapter in one vector, so that an optimizer step needs only a few
kernels."""

import math
from collections.abc import Container
from dataclasses import dataclass

import mlx.core as mx

from .. import ops
from ..schedule import Grads, Params


@dataclass(frozen=True)
class Layout:
    """The stage, name and shape of each factor, in the order of the vector: every A, then every
    B."""

    entries: tuple[tuple[str, str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, params: Params) -> "Layout":
        entries = [
            (stage, name, tuple(own[name].shape))
            for stage, own in params.items()
            for name in sorted(own)
        ]
        return cls(tuple(sorted(entries, key=lambda entry: entry[1].endswith("lora_b"))))

    @property
    def size(self) -> int:
        """The number of elements in the vector."""
        return sum(math.prod(shape) for _, _, shape in self.entries)

    def parts(self, count: int) -> list["Layout"]:
        """Returns a list of `count` layouts that cover all factors: this layout if `count` is 1, or
        the layouts of the factors A and of the factors B if it is 2."""
        if count == 1:
            return [self]
        return [
            Layout(tuple(own for own in self.entries if own[1].endswith("lora_b") is b))
            for b in (False, True)
        ]

    def of_owners(self, owners: Container[str]) -> "Layout":
        """Returns the layout of the factors of these stages."""
        return Layout(tuple(own for own in self.entries if own[0] in owners))

    def join(self, params: Params) -> mx.array:
        """Concatenates the factors, or their gradients, into a float32 vector."""
        if not self.entries:  # a rank of a pipeline without adapted layers
            return mx.zeros((0,))
        return ops.join([params[stage][name] for stage, name, _ in self.entries])

    def split(self, vector: mx.array) -> Grads:
        """Returns views of the vector with the shapes of the factors, keyed by stage and name."""
        params: Grads = {}
        begin = 0
        for stage, name, shape in self.entries:
            end = begin + math.prod(shape)
            params.setdefault(stage, {})[name] = vector[begin:end].reshape(shape)
            begin = end
        return params

    def names(self, marked: mx.array) -> list[str]:
        """Returns the names of the factors that have at least one element marked true in the
        boolean vector `marked`."""
        return [
            name
            for own in self.split(marked).values()
            for name, part in own.items()
            if part.any().item()
        ]
