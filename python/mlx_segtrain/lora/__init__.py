"""LoRA: which linears get an update, of which rank, how it starts, and how it is attached."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops, ranks
from ..errors import InputError
from ..models import Chain
from ..models.chain import EMBEDDINGS
from ..models.dora import Stretch

__all__ = [
    "Adapter",
    "LoRALinear",
    "LoRASwitchLinear",
    "Tensors",
    "attach",
    "attached",
    "choose_ranks",
    "fresh_a",
    "init",
    "shapes",
    "stage_params",
    "wrap",
]

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


def choose_ranks(chain: Chain, **how: Any) -> dict[str, int]:
    """Rank of every linear to adapt, by path: ranks.choose_ranks of the chain's linears."""
    by_stage: dict[str, list[str]] = {}
    for path in chain.linears:
        by_stage.setdefault(chain.stage_of[path], []).append(path)
    layers = [
        [path for stage in layer for path in by_stage.get(stage, [])] for layer in chain.layers
    ]
    quantized: dict[str, Any] = {p: m for p, m in chain.adaptable.items() if "scales" in m}
    bits = {path: m.bits for path, m in quantized.items()}
    return ranks.choose_ranks(layers, bits, outer=list(chain.outer), **how)


def _has_experts(module: Any) -> bool:
    return "num_experts" in dir(module)


def shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a and b for this linear, as mlx-lm has them."""
    if _has_experts(module):
        experts, out, width = module.num_experts, module.output_dims, module.input_dims
        return (experts, rank, width), (experts, out, rank)
    base = ops.base_of(module)
    ends = base.in_dims, base.out_dims
    if isinstance(module, EMBEDDINGS):  # from a token to its vector
        ends = ends[::-1]
    return (ends[0], rank), (rank, ends[1])


def fresh_a(shape: tuple[int, ...], key: mx.array) -> mx.array:
    """A ~ U(−1/√in, 1/√in) float32, of a linear [in, R], of one with experts [E, R, in]."""
    bound = 1 / math.sqrt(shape[0] if len(shape) == 2 else shape[2])
    return mx.random.uniform(-bound, bound, shape, key=key)


def init(
    chain: Chain,
    ranks: Mapping[str, int],
    scale: float,
    seed: int,
    *,
    root: bool = False,
    dora: bool = False,
) -> Adapter:
    """A ~ U(−1/√in, 1/√in) float32, one key a path in sorted order; B = 0.

    With `root` the multiplier of a linear is scale over the root of its rank (rsLoRA: Kalajdzievski
    2023, arXiv:2312.03732). With `dora` magnitudes are the lengths that the weights' rows have;
    InputError if one is of experts or an embedding.
    """
    paths = sorted(ranks)
    keys = mx.random.split(mx.random.key(seed), len(paths))
    tensors: Tensors = {}
    for path, key in zip(paths, keys, strict=True):
        a, b = shapes(chain.adaptable[path], ranks[path])
        tensors[path] = (fresh_a(a, key), mx.zeros(b))
    magnitudes: dict[str, mx.array] = {}
    for path in paths if dora else ():
        module = chain.adaptable[path]
        if _has_experts(module) or isinstance(module, EMBEDDINGS):
            what = "an embedding" if isinstance(module, EMBEDDINGS) else "a linear of experts"
            raise InputError(
                f"use_dora: '{path}' is {what}, of which there is no DoRA: leave it out of "
                "target_modules, or train without use_dora."
            )
        magnitudes[path] = Stretch.of(ops.base_of(module)).norms
    mx.eval(tensors, magnitudes)
    scales = {p: scale / math.sqrt(ranks[p]) if root else scale for p in paths}
    return Adapter(tensors, scales, magnitudes, chain.tied_for(tensors))


def stage_params(chain: Chain, adapter: Adapter) -> dict[str, dict[str, mx.array]]:
    """The factors by stage: `{"model.layers.3.mlp": {"model.layers.3.mlp.up_proj.lora_a": …}}`."""
    params: dict[str, dict[str, mx.array]] = {}
    for path, (a, b) in adapter.tensors.items():
        own = params.setdefault(chain.stage_of[path], {})
        own |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
        if path in adapter.magnitudes:
            own[f"{path}.m"] = adapter.magnitudes[path]
    return params


#: Rows up to which a GPU is better served by MLX's own products than by our op: so few of them
#: are computed sooner than anything is launched (bench/LOG.md, 2026-11-27).
FEW = 16
#: Adapters whose factors a linear keeps in the dtype of such rows.
MOST_CASTS = 8


def are_few(x: mx.array) -> bool:
    """Whether these are rows of a generation on a GPU, and not of a batch."""
    return x.size <= FEW * x.shape[-1] and mx.default_device().type == mx.DeviceType.gpu


class LoRALinear(nn.Module):
    """A linear of an mlx-lm model that runs through our op, with an update if it has one."""

    def __init__(self, linear: nn.Module, scale: float):
        super().__init__()
        self.linear = linear
        self.scale = scale
        self.dropout = 0.0
        self._casts: dict[tuple[int, int, float], tuple[mx.array, ...]] = {}
        self.freeze()

    def take_out(self) -> None:
        """Takes the update away, which may come again."""
        self.dropout = 0.0
        for name in ("lora_a", "lora_b", "m", "key"):
            self.pop(name, None)

    def clear(self) -> None:
        """Takes the update away for good."""
        self.take_out()
        self.forget_casts()

    def forget_casts(self) -> None:
        """Frees what is kept of updates that may come again."""
        self._casts.clear()

    def _of_few(self, x: mx.array) -> mx.array:
        """Without a gradient that is ours, and with factors in x's dtype."""
        y = self.linear(x)
        if "lora_a" not in self:
            return y
        a, b = self["lora_a"], self["lora_b"]
        key = id(a), id(b), self.scale  # they are kept with it: no other arrays get these ids
        if key not in self._casts:
            if len(self._casts) == MOST_CASTS:
                self._casts.pop(next(iter(self._casts)))
            self._casts[key] = a.astype(x.dtype), (self.scale * b).astype(x.dtype), a, b
        a, b = self._casts[key][:2]
        return mx.addmm(y, x @ a, b)

    @cached_property
    def stretch(self) -> Stretch:
        return Stretch.of(ops.base_of(self.linear))

    def __call__(self, x: mx.array) -> mx.array:
        m = self.get("m")
        if m is None and not self.training and are_few(x):
            return self._of_few(x)
        base = ops.base_of(self.linear) if m is None else self.stretch.base
        linear = ops.Linear(base, self.get("lora_a"), self.get("lora_b"), self.scale)
        keys = [self["key"]] if self.dropout else []
        (y,) = ops.lora_linears(x, [linear], dropout=self.dropout, keys=keys)
        return y if m is None else self.stretch(y, linear, m)


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


class LoRAEmbedding(LoRALinear):
    """An embedding, with an update of its rows; as a linear it is the head of tied models."""

    def __call__(self, x: mx.array) -> mx.array:
        """Tokens [...] → [..., H]"""
        y = self.linear(x)
        if "lora_a" not in self:
            return y
        z = self["lora_a"][x] @ self["lora_b"]
        if self.dropout:
            kept = mx.random.bernoulli(1 - self.dropout, z.shape, self["key"])
            z = mx.where(kept, z, 0) / (1 - self.dropout)
        return y + (self.scale * z).astype(y.dtype)

    def as_linear(self, h: mx.array) -> mx.array:
        """h [..., H] → logits [..., V]"""
        factors = (self["lora_b"].T, self["lora_a"].T) if "lora_a" in self else (None, None)
        linear = ops.Linear(ops.base_of(self.linear), *factors, self.scale)
        keys = [self["key"]] if self.dropout else []
        return ops.lora_linears(h, [linear], dropout=self.dropout, keys=keys)[0]


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
    kind = LoRASwitchLinear if _has_experts(linear) else LoRALinear
    wrapped = (LoRAEmbedding if isinstance(linear, EMBEDDINGS) else kind)(linear, scale)
    if isinstance(at, list):
        at[int(name)] = wrapped
    else:
        setattr(at, name, wrapped)
    return wrapped


def attach(model: nn.Module, chain: Chain, adapter: Adapter | None) -> list[LoRALinear]:
    """Puts ours in the place of all that can be adapted in the layers, and of what is besides."""
    modules = []
    outer = [path for path in chain.outer if adapter and path in adapter.tensors]
    for path in (*chain.linears, *outer):
        module = wrap(model, path, adapter.scales.get(path, 1.0) if adapter else 1.0)
        if adapter and path in adapter.tensors:
            module.lora_a, module.lora_b = adapter.tensors[path]
            if path in adapter.magnitudes:
                module.m = adapter.magnitudes[path]
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
