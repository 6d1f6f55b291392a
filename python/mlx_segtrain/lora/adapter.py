"""Adapters: low-rank updates of a model's linear layers, keyed by path, and the kinds of
updates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .dora import Stretch

Tensors = dict[str, tuple[mx.array, mx.array]]


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of update. An update has two factors for each linear layer and, unless the kind is
    LoRA, a third array."""

    name: str
    #: name of the third array in mlx-lm's files, in modules, and in a stage's parameters
    array: str = ""
    peft: str = ""  #: name of the array in PEFT's files
    called: str = ""  #: name of the array in messages
    apart: str = ""  #: why several updates of this kind cannot be added
    runs: Any = None  #: class that applies the array, with the methods of Stretch

    @property
    def word(self) -> str:
        """The value of fine_tune_type in mlx-lm's configuration. In PEFT's configuration and in
        ours, it is the part of the option's name after `use_`."""
        return self.name.lower()

    def on(self, base: Any, made: "dict[Kind, Any]") -> Any:
        """Returns an object of the class `runs` for the frozen linear layer `base`. The object is
        created once and cached in `made`."""
        if self not in made:
            made[self] = self.runs.of(base)
        return made[self]

    @property
    def flags(self) -> dict[str, bool]:
        """The options in adapter_config.json by which PEFT distinguishes the kinds."""
        return {f"use_{kind.word}": kind is self for kind in KINDS}


LORA = Kind("LoRA")
DORA = Kind(
    name="DoRA",
    array="m",
    peft="lora_magnitude_vector",
    called="magnitudes",
    apart="their magnitudes cannot be added",
    runs=Stretch,
)
#: The kinds that have a third array in addition to the factors.
KINDS = (DORA,)
#: FACTORS contains the names of an update's two factors, and ARRAYS the names of all its arrays.
FACTORS = ("lora_a", "lora_b")
ARRAYS = (*FACTORS, *(kind.array for kind in KINDS))


@dataclass(frozen=True)
class Adapter:
    """LoRA factors in float32, and their multipliers, both keyed by the full path of the linear
    layer.

    The shapes of the factors a and b are [in, R] and [R, out] for a linear layer, [E, R, in] and
    [E, out, R] for a layer with E experts, and [V, R] and [R, H] for an embedding. With DoRA,
    `magnitudes` contains the norms of the adapted weight's rows, float32 [out]. `tied` matters only
    if an embedding is adapted. It is True if the embedding is also the model's head, so that the
    update applies to the head as well, and None if this is unknown.
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
        """Creates an adapter from the arrays of each linear layer, keyed by path and by the array's
        name in mlx-lm."""
        tensors = {path: (own["lora_a"], own["lora_b"]) for path, own in arrays.items()}
        magnitudes = {path: own[DORA.array] for path, own in arrays.items() if DORA.array in own}
        return cls(tensors, dict(scales), magnitudes, tied)

    @property
    def kind(self) -> Kind:
        return DORA if self.magnitudes else LORA

    @property
    def more(self) -> dict[str, mx.array]:
        """The third array of each linear layer, keyed by path. It is empty for LoRA."""
        return self.magnitudes

    def arrays(self, path: str) -> dict[str, mx.array]:
        """Returns the arrays of a linear layer's update, keyed by their names in mlx-lm."""
        own: dict[str, mx.array] = dict(zip(FACTORS, self.tensors[path], strict=True))
        if path in self.more:
            own[self.kind.array] = self.more[path]
        return own

    def all_arrays(self) -> list[mx.array]:
        return [x for path in self.tensors for x in self.arrays(path).values()]

    @property
    def ranks(self) -> dict[str, int]:
        return {path: a.shape[1] for path, (a, _) in self.tensors.items()}
