"""Connects a model and an adapter: chooses ranks, initializes adapters, and attaches them to the
model."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..errors import InputError
from ..lora import (
    EMBEDDINGS,
    KINDS,
    LORA,
    Adapter,
    LoRALinear,
    fresh_a,
    has_experts,
    ranks,
    shapes,
    wrap,
)
from .chain import Chain


def choose_ranks(chain: Chain, **how: Any) -> dict[str, int]:
    """Returns the rank of every linear layer of the chain that is to be adapted, keyed by path (see
    ranks.choose_ranks)."""
    layers = [
        [path for path in chain.linears if chain.stage_of[path] in layer] for layer in chain.layers
    ]
    bits = {path: module.bits for path, module in chain.adaptable.items() if "scales" in module}
    return ranks.choose_ranks(layers, bits, outer=list(chain.outer), **how)


def init(
    chain: Chain,
    ranks: Mapping[str, int],
    scale: float,
    seed: int,
    *,
    root: bool = False,
    here: Callable[[str], bool] = lambda path: True,
    **kinds: bool,
) -> Adapter:
    """Returns a new adapter. A is float32, drawn from U(−1/√in, 1/√in) with one random key per path
    (in sorted order); B is 0.

    With `root`, the multiplier of a layer is `scale` divided by the square root of its rank
    (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732). `kinds` maps values of Kind.word to booleans, of
    which at most one is true. The additional array of that kind is initialized so that the model's
    outputs do not change; if `here` returns False for a path, the array for that path is 0. Raises
    InputError if an embedding or a layer with experts would need such an array.
    """
    paths, modules = sorted(ranks), chain.adaptable
    keys = mx.random.split(mx.random.key(seed), len(paths))
    kind = next((kind for kind in KINDS if kinds.get(kind.word)), LORA)
    arrays: dict[str, dict[str, mx.array]] = {}
    for path, key in zip(paths, keys, strict=True):
        a, b = shapes(modules[path], ranks[path])
        arrays[path] = {"lora_a": fresh_a(a, key), "lora_b": mx.zeros(b)}
        if kind is LORA:
            continue
        embeds = isinstance(modules[path], EMBEDDINGS)
        if embeds or has_experts(modules[path]):
            what = "an embedding" if embeds else "a linear layer of experts"
            raise InputError(
                f"use_{kind.word}: '{path}' is {what}, which {kind.name} does not support: leave "
                f"it out of target_modules, or train without use_{kind.word}."
            )
        start = kind.runs.of(ops.base_of(modules[path])).start if here(path) else mx.zeros(b[-1:])
        arrays[path][kind.array] = start
    mx.eval(arrays)
    scales = {p: scale / math.sqrt(ranks[p]) if root else scale for p in paths}
    return Adapter.of(arrays, scales, chain.tied_for(arrays))


def stage_params(chain: Chain, adapter: Adapter) -> dict[str, dict[str, mx.array]]:
    """Returns the factors grouped by stage, as
    `{"model.layers.3.mlp": {"model.layers.3.mlp.up_proj.lora_a": …}}`."""
    params: dict[str, dict[str, mx.array]] = {}
    for path in adapter.tensors:
        own = params.setdefault(chain.stage_of[path], {})
        own |= {f"{path}.{name}": x for name, x in adapter.arrays(path).items()}
    return params


def attach(
    model: nn.Module, chain: Chain, adapter: Adapter | None, *, whole: bool = False
) -> list[LoRALinear]:
    """Replaces every adaptable module of the layers with a LoRALinear. The embedding and the head
    are replaced only if they are adapted or, with `whole`, if they are adaptable. Returns the new
    modules."""
    modules = []
    outer = [path for path in chain.outer if whole or (adapter and path in adapter.tensors)]
    for path in (*chain.linears, *outer):
        module = wrap(model, path, 1.0)
        if adapter and path in adapter.tensors:
            module.put_in(adapter.arrays(path), adapter.scales[path])
        modules.append(module)
    return modules


@contextmanager
def attached(
    model: nn.Module, chain: Chain, adapter: Adapter, *, whole: bool = False
) -> Iterator[nn.Module]:
    """Attaches the adapter to the model while the context is active. `whole` has the same meaning
    as in attach."""
    modules = attach(model, chain, adapter, whole=whole)
    try:
        model.eval()
        yield model
    finally:
        for module in modules:
            module.clear()
        model.train()
