"""A model and an adapter: which modules get an update, how it starts, and how it is attached."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..errors import InputError
from ..lora import (
    EMBEDDINGS,
    Adapter,
    LoRALinear,
    Tensors,
    fresh_a,
    has_experts,
    ranks,
    shapes,
    wrap,
)
from ..lora.dora import Stretch
from .chain import Chain


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
        if has_experts(module) or isinstance(module, EMBEDDINGS):
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
