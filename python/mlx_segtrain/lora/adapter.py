"""An adapter: the factors of its updates by path."""

from dataclasses import dataclass, field

import mlx.core as mx

Tensors = dict[str, tuple[mx.array, mx.array]]


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

    @property
    def ranks(self) -> dict[str, int]:
        return {path: a.shape[1] for path, (a, _) in self.tensors.items()}
