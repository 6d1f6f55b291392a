"""Modules that replace linear layers and embeddings of an mlx-lm model, and add a LoRA update to
their output."""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .. import ops
from ..errors import InputError
from ..ops.reference import dropped
from .adapter import ARRAYS, KINDS, Kind

EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
#: For up to this many rows, MLX's matrix multiplications are faster on a GPU than our op, because
#: launching our op takes longer than these multiplications (bench/LOG.md, 2026-11-27).
FEW = 16
#: The maximum number of adapters whose factors a linear layer caches, cast to the input's dtype.
MOST_CASTS = 8


def few(rows: int) -> bool:
    """Returns whether the device is a GPU that computes this many rows faster with MLX's matrix
    multiplications than with our op, as in a decoding step."""
    return rows <= FEW and mx.default_device().type == mx.DeviceType.gpu


def has_experts(module: Any) -> bool:
    return "num_experts" in dir(module)


def shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of the factors a and b for this module, as in mlx-lm."""
    if has_experts(module):
        experts, out, width = module.num_experts, module.output_dims, module.input_dims
        return (experts, rank, width), (experts, out, rank)
    base = ops.base_of(module)
    if isinstance(module, EMBEDDINGS):  # an embedding maps a token to a vector
        return (base.out_dims, rank), (rank, base.in_dims)
    return (base.in_dims, rank), (rank, base.out_dims)


def fresh_a(shape: tuple[int, ...], key: mx.array) -> mx.array:
    """Returns an initial factor A, drawn from U(−1/√in, 1/√in) in float32, of shape [in, R] for a
    linear layer and [E, R, in] for experts."""
    bound = 1 / math.sqrt(shape[0] if len(shape) == 2 else shape[2])
    return mx.random.uniform(-bound, bound, shape, key=key)


class LoRALinear(nn.Module):
    """A linear layer of an mlx-lm model that runs through our op and may have an update."""

    def __init__(self, linear: nn.Module, scale: float):
        super().__init__()
        self.linear = linear
        self.scale = scale
        self.dropout = 0.0
        self._made: dict[Kind, Any] = {}  #: the cache of Kind.on, which contains no parameters
        self.rows: Any = None  #: updates for the rows of a batch (see rows.py)
        self.together: Any = None  #: layers that read the same x (see together.py)
        self.place = 0  #: index of this layer in `together`
        self.grouped = False  #: whether `together` and `place` have been determined
        self._casts: dict[tuple[int, int, float], tuple[mx.array, ...]] = {}
        self.freeze()

    def put_in(self, arrays: Mapping[str, mx.array], scale: float) -> None:
        """Replaces the current update with the update that consists of these arrays and this
        multiplier."""
        self.take_out()
        self.scale = scale
        for name, x in arrays.items():
            setattr(self, name, x)

    def take_out(self) -> None:
        """Removes the update. Keeps the caches, because the update may be put back later."""
        self.dropout = 0.0
        for name in (*ARRAYS, "key"):
            self.pop(name, None)

    def clear(self) -> None:
        """Removes the update and its caches."""
        self.take_out()
        self.forget_casts()

    def forget_casts(self) -> None:
        """Frees the cached factors of all updates, including updates that may be put back later."""
        self._casts.clear()
        if self.together is not None:
            self.together.forget()

    def factors(self, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        """Returns the factors in this dtype. The multiplier is included in b."""
        a, b = self["lora_a"], self["lora_b"]
        key = id(a), id(b), self.scale  # the cache keeps a and b, so their ids are not reused
        if key not in self._casts:
            if len(self._casts) == MOST_CASTS:
                self._casts.pop(next(iter(self._casts)))
            self._casts[key] = a.astype(dtype), (self.scale * b).astype(dtype), a, b
        return self._casts[key][:2]

    def updated(self, x: mx.array, y: mx.array) -> mx.array:
        """Adds the update for x to y, the output of the frozen linear layer, and returns the sum.
        The factors are cast to x's dtype, and gradients come from MLX's automatic
        differentiation."""
        a, b = self.factors(x.dtype)
        return mx.addmm(y, x @ a, b)

    def applies(self, kind: Kind) -> Any:
        """Returns the object that applies the third array of this kind to the frozen linear
        layer."""
        return kind.on(ops.base_of(self.linear), self._made)

    def gain(
        self,
        kind: Kind,
        dtype: mx.Dtype,
        factors: tuple[mx.array, mx.array],
        scale: float,
        array: Any,
    ) -> mx.array:
        """Returns the multipliers, float32 [out], by which an update of this kind, with these
        factors and this third array, scales the layer's outputs."""
        applied = self.applies(kind)
        return applied.gain(dtype, ops.Linear(applied.base, *factors, scale), array)

    def _is_step(self, x: mx.array) -> bool:
        """Returns whether x has only a few rows, as in a decoding step, unlike a training batch or
        a prompt."""
        return not self.training and few(x.size // x.shape[-1])

    def _frozen(self, x: mx.array) -> mx.array:
        if self._is_step(x):
            return self.linear(x)
        return ops.lora_linears(x, [ops.Linear(ops.base_of(self.linear), None, None, 1.0)])[0]

    def __call__(self, x: mx.array) -> mx.array:
        if self.rows is not None and self.rows.on:
            return self.rows(self, x, self._frozen(x))
        kind = next((kind for kind in KINDS if kind.array in self), None)
        if kind is None and self._is_step(x):
            y = self.linear(x)
            return self.updated(x, y) if "lora_a" in self else y
        more = kind and self.applies(kind)
        base = more.base if more else ops.base_of(self.linear)
        linear = ops.Linear(base, self.get("lora_a"), self.get("lora_b"), self.scale)
        y = self._product(x, linear)
        return more(y, linear, self[kind.array]) if kind and more else y

    def _product(self, x: mx.array, linear: ops.Linear) -> mx.array:
        keys = [self["key"]] if self.dropout else []
        return ops.lora_linears(x, [linear], dropout=self.dropout, keys=keys)[0]


class LoRASwitchLinear(LoRALinear):
    """A linear layer with experts. `indices` says which experts each row uses."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        how: Any = {"rhs_indices": indices, "sorted_indices": sorted_indices}
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        if "lora_a" not in self:
            return y
        a, b = (self[key].astype(x.dtype).swapaxes(-2, -1) for key in ("lora_a", "lora_b"))
        if self.dropout:
            x = dropped(x, self.dropout, self["key"])
        return y + self.scale * mx.gather_mm(mx.gather_mm(x, a, **how), b, **how)


class LoRAEmbedding(LoRALinear):
    """An embedding that may have an update. In a model with tied embeddings, `as_linear` is the
    head."""

    def __call__(self, x: mx.array) -> mx.array:
        """Maps tokens [...] to vectors [..., H]."""
        y = self.linear(x)
        if "lora_a" not in self:
            return y
        z = self["lora_a"][x] @ self["lora_b"]
        if self.dropout:
            z = dropped(z, self.dropout, self["key"])
        return y + (self.scale * z).astype(y.dtype)

    def as_linear(self, h: mx.array) -> mx.array:
        """Maps h [..., H] to logits [..., V]."""
        factors = (self["lora_b"].T, self["lora_a"].T) if "lora_a" in self else (None, None)
        return self._product(h, ops.Linear(ops.base_of(self.linear), *factors, self.scale))


def wrap(parent: nn.Module, path: str, scale: float) -> LoRALinear:
    """Replaces the linear layer or embedding at `path` below `parent` with one of our modules,
    which has no update yet. Keeps the existing module if it is already one of ours. Returns our
    module."""
    *parents, last = path.split(".")
    at: Any = parent
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at[part]
    name: Any = int(last) if isinstance(at, list) else last
    linear = at[name]
    if isinstance(linear, LoRALinear):
        linear.scale = scale
        return linear
    kind = LoRASwitchLinear if has_experts(linear) else LoRALinear
    wrapped = (LoRAEmbedding if isinstance(linear, EMBEDDINGS) else kind)(linear, scale)
    at[name] = wrapped
    return wrapped


def unwrap(model: nn.Module) -> None:
    """Restores the linear layers and embeddings of the model that `wrap` has replaced.

    Raises InputError if the model has an adapter that is not ours.
    """
    from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
    from mlx_lm.tuner.lora import LoRAEmbedding as StockEmbedding
    from mlx_lm.tuner.lora import LoRALinear as StockLinear
    from mlx_lm.tuner.lora import LoRASwitchLinear as StockSwitchLinear

    theirs = (DoRAEmbedding, DoRALinear, StockEmbedding, StockLinear, StockSwitchLinear)
    own = {}
    for path, module in model.named_modules():
        if isinstance(module, theirs):
            raise InputError(
                f"the model already has an mlx-lm adapter ({path}): load the model without it, and "
                "pass the adapter as warm_start to continue training it."
            )
        if isinstance(module, LoRALinear):
            own[path] = module.linear
    model.update_modules(tree_unflatten([*own.items()]))
