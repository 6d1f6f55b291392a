"""LoRA: which linears get an update, of which rank, how it starts, and how it is attached."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops, ranks
from ..models import Chain

__all__ = [
    "Adapter",
    "LoRALinear",
    "LoRASwitchLinear",
    "Tensors",
    "attach",
    "attached",
    "choose_ranks",
    "init",
    "shapes",
    "stage_params",
    "wrap",
]

Tensors = dict[str, tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Adapter:
    """LoRA factors by full path of the linear, float32, and multipliers.

    a [in, R] and b [R, out]; of a linear with E experts a [E, R, in] and b [E, out, R].
    """

    tensors: Tensors
    scales: dict[str, float]

    @property
    def ranks(self) -> dict[str, int]:
        return {path: a.shape[1] for path, (a, _) in self.tensors.items()}


def choose_ranks(chain: Chain, **how: Any) -> dict[str, int]:
    """Rank of every linear to adapt, by path: ranks.choose_ranks of the chain's linears."""
    by_stage: dict[str, list[str]] = {}
    for path in chain.linears:
        by_stage.setdefault(chain.stage_of[path], []).append(path)
    layers = [
        [path for stage in layer for path in by_stage.get(stage, [])] for layer in chain.layers
    ]
    quantized: dict[str, Any] = {p: m for p, m in chain.linears.items() if "scales" in m}
    return ranks.choose_ranks(layers, {path: m.bits for path, m in quantized.items()}, **how)


def _has_experts(module: Any) -> bool:
    return "num_experts" in dir(module)


def shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a and b for this linear, as mlx-lm has them."""
    if _has_experts(module):
        experts, out, width = module.num_experts, module.output_dims, module.input_dims
        return (experts, rank, width), (experts, out, rank)
    base = ops.base_of(module)
    return (base.in_dims, rank), (rank, base.out_dims)


def init(
    chain: Chain, ranks: Mapping[str, int], scale: float, seed: int, *, root: bool = False
) -> Adapter:
    """A ~ U(−1/√in, 1/√in) float32, one key a path in sorted order; B = 0.

    With `root` the multiplier of a linear is scale over the root of its rank (rsLoRA: Kalajdzievski
    2023, arXiv:2312.03732).
    """
    paths = sorted(ranks)
    keys = mx.random.split(mx.random.key(seed), len(paths))
    tensors: Tensors = {}
    for path, key in zip(paths, keys, strict=True):
        a, b = shapes(chain.linears[path], ranks[path])
        bound = 1 / math.sqrt(a[0] if len(a) == 2 else a[2])
        tensors[path] = (mx.random.uniform(-bound, bound, a, key=key), mx.zeros(b))
    mx.eval(tensors)
    return Adapter(tensors, {p: scale / math.sqrt(ranks[p]) if root else scale for p in paths})


def stage_params(chain: Chain, adapter: Adapter) -> dict[str, dict[str, mx.array]]:
    """The factors by stage: `{"model.layers.3.mlp": {"model.layers.3.mlp.up_proj.lora_a": …}}`."""
    params: dict[str, dict[str, mx.array]] = {}
    for path, (a, b) in adapter.tensors.items():
        own = params.setdefault(chain.stage_of[path], {})
        own |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
    return params


class LoRALinear(nn.Module):
    """A linear of an mlx-lm model that runs through our op, with a LoRA update if it has one."""

    def __init__(self, linear: nn.Module, scale: float):
        super().__init__()
        self.linear = linear
        self.scale = scale
        self.dropout = 0.0
        self.freeze()

    def clear(self) -> None:
        """Takes the update away."""
        self.dropout = 0.0
        for name in ("lora_a", "lora_b", "key"):
            self.pop(name, None)

    def __call__(self, x: mx.array) -> mx.array:
        base = ops.base_of(self.linear)
        factors = self.get("lora_a"), self.get("lora_b")
        how: Any = {"dropout": self.dropout, "key": self.get("key")}
        return ops.lora_linear(x, base, *factors, self.scale, **how)


class LoRASwitchLinear(LoRALinear):
    """A linear with experts, of which `indices` names those of each row."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        how: Any = {"rhs_indices": indices, "sorted_indices": sorted_indices}
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        if "lora_a" not in self:
            return y
        a, b = (self[key].astype(x.dtype).swapaxes(-2, -1) for key in ("lora_a", "lora_b"))
        if self.dropout:
            kept = mx.random.bernoulli(1 - self.dropout, x.shape, self["key"])
            x = mx.where(kept, x, 0) / (1 - self.dropout)
        return y + self.scale * mx.gather_mm(mx.gather_mm(x, a, **how), b, **how)


def wrap(parent: nn.Module, path: str, scale: float) -> LoRALinear:
    """Puts one of ours, with no update yet, in the place of the linear at `path` below parent."""
    *parents, name = path.split(".")
    at: Any = parent
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at[part]
    linear = at[int(name)] if isinstance(at, list) else at[name]
    if isinstance(linear, LoRALinear):
        linear.scale = scale
        return linear
    wrapped = (LoRASwitchLinear if _has_experts(linear) else LoRALinear)(linear, scale)
    if isinstance(at, list):
        at[int(name)] = wrapped
    else:
        setattr(at, name, wrapped)
    return wrapped


def attach(model: nn.Module, chain: Chain, adapter: Adapter | None) -> list[LoRALinear]:
    """Puts LoRALinear in the place of every adaptable linear of the model, in place."""
    modules = []
    for path in chain.linears:
        module = wrap(model, path, adapter.scales.get(path, 1.0) if adapter else 1.0)
        if adapter and path in adapter.tensors:
            module.lora_a, module.lora_b = adapter.tensors[path]
        modules.append(module)
    return modules


@contextmanager
def attached(model: nn.Module, chain: Chain, adapter: Adapter) -> Iterator[nn.Module]:
    """The model with the adapter, for as long as the context lasts."""
    modules = attach(model, chain, adapter)
    try:
        model.eval()
        yield model
    finally:
        for module in modules:
            module.clear()
        model.train()
