"""An adapter: updates of a model's linears by path, and which kinds of them there are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .dora import Stretch

Tensors = dict[str, tuple[mx.array, mx.array]]


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of updates: two factors, and unless it is LoRA one array more for each linear."""

    name: str
    array: str = ""  #: of mlx-lm's files, of modules, of a stage's parameters
    peft: str = ""  #: the same in PEFT's files
    called: str = ""  #: the same in sentences
    apart: str = ""  #: why several such updates have no sum
    runs: Any = None  #: the class that applies the array, with the methods of Stretch

    @property
    def word(self) -> str:
        """As mlx-lm has it in fine_tune_type, and PEFT and our configuration after `use_`."""
        return self.name.lower()

    def on(self, base: Any, made: "dict[Kind, Any]") -> Any:
        """What applies the array to the frozen linear `base`; made once, and kept in `made`."""
        if self not in made:
            made[self] = self.runs.of(base)
        return made[self]

    @property
    def flags(self) -> dict[str, bool]:
        """The keys of adapter_config.json by which PEFT tells the kinds apart."""
        return {f"use_{kind.word}": kind is self for kind in KINDS}


LORA = Kind("LoRA")
DORA = Kind(
    name="DoRA",
    array="m",
    peft="lora_magnitude_vector",
    called="magnitudes",
    apart="the lengths of their rows do not add",
    runs=Stretch,
)
#: Those that have an array more than LoRA.
KINDS = (DORA,)
#: Names of the arrays that an update may have.
FACTORS = ("lora_a", "lora_b")
ARRAYS = (*FACTORS, *(kind.array for kind in KINDS))


@dataclass(frozen=True)
class Adapter:
    """LoRA factors by full path of the linear, float32, and multipliers.

    a [in, R] and b [R, out]; of a linear with E experts a [E, R, in] and b [E, out, R]; of an
    embedding a [V, R] and b [R, H]. Of DoRA `magnitudes` are the lengths of the adapted weight's
    rows, float32 [out]. Where an embedding is adapted, `tied` says whether it is the head of the
    model too, which then computes with the same update; None if that is not known.
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
        """From the arrays of each linear by name."""
        tensors = {path: (own["lora_a"], own["lora_b"]) for path, own in arrays.items()}
        magnitudes = {path: own[DORA.array] for path, own in arrays.items() if DORA.array in own}
        return cls(tensors, dict(scales), magnitudes, tied)

    @property
    def kind(self) -> Kind:
        return DORA if self.magnitudes else LORA

    @property
    def more(self) -> dict[str, mx.array]:
        """What the kind has besides the factors, by path."""
        return self.magnitudes

    def arrays(self, path: str) -> dict[str, mx.array]:
        """The update of a linear by the names that mlx-lm gives its arrays."""
        own: dict[str, mx.array] = dict(zip(FACTORS, self.tensors[path], strict=True))
        if path in self.more:
            own[self.kind.array] = self.more[path]
        return own

    def all_arrays(self) -> list[mx.array]:
        return [x for path in self.tensors for x in self.arrays(path).values()]

    @property
    def ranks(self) -> dict[str, int]:
        return {path: a.shape[1] for path, (a, _) in self.tensors.items()}
