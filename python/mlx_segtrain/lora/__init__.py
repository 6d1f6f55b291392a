"""LoRA: which linears get an update, of which rank, how it starts, and how it is attached."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..errors import InputError
from ..models import Chain

__all__ = [
    "Adapter",
    "LoRALinear",
    "LoRASwitchLinear",
    "Tensors",
    "attach",
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


def choose_ranks(
    chain: Chain,
    *,
    rank: int,
    rank_scaling: str,
    target_modules: Sequence[str],
    num_layers: int,
    model_dir: Path,
) -> dict[str, int]:
    """Rank of every linear to adapt, by path: those that end with a target, in the last layers.

    `constant`: max(2, rank). `by_bits`: max(2, ⌈rank·bits / 4⌉) with the bits of the linear's own
    quantization; a dense one gets `rank`. `by_kl`: max(2, ⌈rank·factor⌉), factor = kl / median kl
    clipped to [0.5, 2], from OptiQ's sensitivity file; without one, or for a linear that it does
    not name, `by_bits`. InputError if a target matches nothing.
    """
    if num_layers > len(chain.layers):
        raise InputError(
            f"num_layers is {num_layers}, but the model has {len(chain.layers)}: give -1 for all."
        )
    adapted = chain.layers if num_layers < 0 else chain.layers[len(chain.layers) - num_layers :]
    stages = {stage for layer in adapted for stage in layer}
    ranks: dict[str, int] = {}
    kl = _sensitivities(model_dir) if rank_scaling == "by_kl" else {}
    median = sorted(kl.values())[len(kl) // 2] if kl else 0.0
    for target in target_modules:
        found = [p for p in chain.linears if p == target or p.endswith("." + target)]
        if not found:
            names = sorted({path.rsplit(".", 1)[-1] for path in chain.linears})
            raise InputError(
                f"target_modules: '{target}' matches no linear of the model; it has "
                f"{', '.join(names)}."
            )
        for path in found:
            if chain.stage_of[path] not in stages:
                continue
            own = kl.get(path.removeprefix("language_model."))
            if own is not None and median > 0:
                factor = min(max(own / median, 0.5), 2.0)
            elif rank_scaling != "constant" and "scales" in chain.linears[path]:
                quantized: Any = chain.linears[path]
                factor = quantized.bits / 4
            else:
                factor = 1.0
            ranks[path] = max(2, math.ceil(rank * factor))
    return dict(sorted(ranks.items()))


def _sensitivities(model_dir: Path) -> dict[str, float]:
    """KL divergence by path in the text model, from OptiQ's file beside the weights, or nothing."""
    for name in ("optiq/metadata.json", "optiq_metadata.json"):
        file = model_dir / name
        if not file.is_file():
            continue
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            layers = data.get("per_layer") or data.get("optimization", {}).get("per_layer", {})
            return {
                path.removeprefix("language_model."): float(x["kl"])
                for path, x in layers.items()
                if x.get("kl") is not None
            }
        except (ValueError, AttributeError, TypeError) as error:
            raise InputError(f"{file} is not OptiQ's sensitivity file: {error}") from error
    return {}


def _has_experts(module: Any) -> bool:
    return "num_experts" in dir(module)


def shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a and b for this linear, as mlx-lm has them."""
    if _has_experts(module):
        experts, out, width = module.num_experts, module.output_dims, module.input_dims
        return (experts, rank, width), (experts, out, rank)
    base = ops.base_of(module)
    return (base.in_dims, rank), (rank, base.out_dims)


def init(chain: Chain, ranks: Mapping[str, int], scale: float, seed: int) -> Adapter:
    """A ~ U(−1/√in, 1/√in) float32, one key a path in sorted order; B = 0."""
    paths = sorted(ranks)
    keys = mx.random.split(mx.random.key(seed), len(paths))
    tensors: Tensors = {}
    for path, key in zip(paths, keys, strict=True):
        a, b = shapes(chain.linears[path], ranks[path])
        bound = 1 / math.sqrt(a[0] if len(a) == 2 else a[2])
        tensors[path] = (mx.random.uniform(-bound, bound, a, key=key), mx.zeros(b))
    mx.eval(tensors)
    return Adapter(tensors, dict.fromkeys(paths, scale))


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
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        base = ops.base_of(self.linear)
        return ops.lora_linear(x, base, self.get("lora_a"), self.get("lora_b"), self.scale)


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


def attach(model: nn.Module, chain: Chain, adapter: Adapter | None) -> None:
    """Puts LoRALinear in the place of every adaptable linear of the model, in place."""
    for path in chain.linears:
        module = wrap(model, path, adapter.scales.get(path, 1.0) if adapter else 1.0)
        if adapter and path in adapter.tensors:
            module.lora_a, module.lora_b = adapter.tensors[path]
