"""Adapters: updates of a model's linear layers by path, and the kinds of updates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .dora import Stretch

Tensors = dict[str, tuple[mx.array, mx.array]]


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of update: two factors for each linear layer and, unless it is LoRA, another array."""

    name: str
    array: str = ""  #: the array's name in mlx-lm's files, in modules, and in a stage's parameters
    peft: str = ""  #: its name in PEFT's files
    called: str = ""  #: its name in messages
    apart: str = ""  #: why several such updates cannot be added
    runs: Any = None  #: the class that applies the array, with the methods of Stretch

    @property
    def word(self) -> str:
        """mlx-lm's fine_tune_type, and what follows `use_` in PEFT's and our configuration."""
        return self.name.lower()

    def on(self, base: Any, made: "dict[Kind, Any]") -> Any:
        """Returns the `runs` object of the frozen linear layer `base`, created once and cached in
        `made`."""
        if self not in made:
            made[self] = self.runs.of(base)
        return made[self]

    @property
    def flags(self) -> dict[str, bool]:
        """The keys of adapter_config.json by which PEFT distinguishes the kinds."""
        return {f"use_{kind.word}": kind is self for kind in KINDS}


LORA = Kind("LoRA")
DORA = Kind(
    name="DoRA",
    array="m",
    peft="lora_magnitude_vector",
    called="magnitudes",
    apart="the lengths of their rows cannot be added",
    runs=Stretch,
)
#: Kinds with another array besides the factors.
KINDS = (DORA,)
#: Names of the arrays that an update may have.
FACTORS = ("lora_a", "lora_b")
ARRAYS = (*FACTORS, *(kind.array for kind in KINDS))


@dataclass(frozen=True)
class Adapter:
    """LoRA factors, float32, and multipliers, both by the full path of the linear layer.

    a [in, R] and b [R, out]; for a layer with E experts a [E, R, in] and b [E, out, R]; for an
    embedding a [V, R] and b [R, H]. For DoRA, `magnitudes` are the norms of the adapted weight's
    rows, float32 [out]. If an embedding is adapted, `tied` says whether it is also the model's
    head, which then computes with the same update; None if unknown.
    """

    tensors: Tensors
    scales: dict[str, float]
    magnitudes: dict[str, mx.array] = field(default_factory=dict)
    tied: bool | None = None

    @classmethod
    def of(
        cls,
        arrays: Mapping[str, Mapping[str, mx.array]],
        scales: Mapping[str, float],
        tied: bool | None = None,
    ) -> "Adapter":
        """Creates an adapter from the arrays of each linear layer by name."""
        tensors = {path: (own["lora_a"], own["lora_b"]) for path, own in arrays.items()}
        magnitudes = {path: own[DORA.array] for path, own in arrays.items() if DORA.array in own}
        return cls(tensors, dict(scales), magnitudes, tied)

    @property
    def kind(self) -> Kind:
        return DORA if self.magnitudes else LORA

    @property
    def more(self) -> dict[str, mx.array]:
        """The arrays that the kind has besides the factors, by path."""
        return self.magnitudes

    def arrays(self, path: str) -> dict[str, mx.array]:
        """Returns the arrays of a linear layer's update, by their names in mlx-lm."""
        own: dict[str, mx.array] = dict(zip(FACTORS, self.tensors[path], strict=True))
        if path in self.more:
            own[self.kind.array] = self.more[path]
        return own

    def all_arrays(self) -> list[mx.array]:
        return [x for path in self.tensors for x in self.arrays(path).values()]

    @property
    def ranks(self) -> dict[str, int]:
        return {path: a.shape[1] for path, (a, _) in self.tensors.items()}
