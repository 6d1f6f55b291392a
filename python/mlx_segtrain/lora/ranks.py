"""Chooses the rank of every adapted linear layer from names and bits, without importing MLX."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..errors import InputError
from ..files import read_at_most
from .paths import bare

#: The target that means every linear layer of the chosen layers.
ALL = "all-linear"


def choose_ranks(
    layers: Sequence[Sequence[str]],
    bits: Mapping[str, int],
    *,
    rank: int,
    rank_scaling: str,
    target_modules: Sequence[str],
    num_layers: int,
    model_dir: Path,
    outer: Sequence[str] = (),
) -> dict[str, int]:
    """Returns the rank of every linear layer to adapt, by path.

    These are the linear layers in the last `num_layers` layers, and embedding and head, whose path
    is a target or ends with one; the target "all-linear" means all except embedding and head.
    `layers` are the paths of each layer's linear layers,
    `outer` those of embedding and head, and `bits` the bits of the quantized ones.

    `constant` gives max(2, rank). `by_bits` gives max(2, ⌈rank·bits / 4⌉), or `rank` if the layer
    is not quantized. `by_kl` gives max(2, ⌈rank·factor⌉), where factor = kl / median kl, clipped to
    [0.5, 2], from OptiQ's sensitivity file; without that file, or for a layer that it does not
    list, it is the same as `by_bits`. Raises InputError if a target matches nothing, or if there
    are fewer layers than num_layers.
    """
    if num_layers > len(layers):
        raise InputError(
            f"num_layers = {num_layers}, but the model has {len(layers)} layers: use -1 for all.",
            field="num_layers",
        )
    paths = [path for layer in layers for path in layer]
    known = [*paths, *outer]
    adapted = layers if num_layers < 0 else layers[len(layers) - num_layers :]
    within = {path for layer in adapted for path in layer} | set(outer)
    kl = _sensitivities(model_dir) if rank_scaling == "by_kl" else {}
    median = sorted(kl.values())[len(kl) // 2] if kl else 0.0

    def rank_of(path: str) -> int:
        factor, own = 1.0, kl.get(bare(path))
        if own is not None and median > 0:
            factor = min(max(own / median, 0.5), 2.0)
        elif rank_scaling != "constant" and path in bits:
            factor = bits[path] / 4
        return max(2, math.ceil(rank * factor))

    ranks: dict[str, int] = {}
    for target in target_modules:
        found = [path for path in known if path == target or path.endswith(f".{target}")]
        found = paths if target == ALL else found
        if not found:
            names = sorted({path.rsplit(".", 1)[-1] for path in known})
            raise InputError(
                f"target_modules: '{target}' matches no linear layer of the model; it has "
                f"{', '.join(names)}.",
                field="target_modules",
            )
        ranks |= {path: rank_of(path) for path in found if path in within}
    return dict(sorted(ranks.items()))


def asked(config: TrainConfig) -> dict[str, Any]:
    """Returns the fields of a configuration that are arguments of choose_ranks."""
    names = ("rank", "rank_scaling", "target_modules", "num_layers", "model_dir")
    return {name: getattr(config, name) for name in names}


def _sensitivities(model_dir: Path) -> dict[str, float]:
    """Returns the KL divergence by path in the text model, from OptiQ's file beside the weights;
    empty without one."""
    for name in ("optiq/metadata.json", "optiq_metadata.json"):
        file = model_dir / name
        if not file.is_file():
            continue
        try:
            data = json.loads(read_at_most(file, 64 << 20))
            layers = data.get("per_layer") or data.get("optimization", {}).get("per_layer", {})
            return {
                bare(path): float(x["kl"]) for path, x in layers.items() if x.get("kl") is not None
            }
        except (ValueError, AttributeError, TypeError) as error:
            raise InputError(f"{file} is not an OptiQ sensitivity file: {error}") from error
    return {}
