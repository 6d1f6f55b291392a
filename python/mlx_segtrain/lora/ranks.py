"""Chooses the rank of every adapted linear layer from the layers' names and bits, without importing
MLX."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..errors import InputError
from ..files import read_at_most
from .paths import bare

#: The target that stands for every linear layer of the chosen layers.
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
    """Returns the rank of every linear layer that is to be adapted, keyed by path.

    Candidates are the linear layers in the last `num_layers` layers, the embedding and the head. A
    candidate is adapted if its path is a target or ends with one; the target "all-linear" matches
    all candidates except the embedding and the head. `layers` contains the paths of the linear
    layers in each layer, `outer` the paths of the embedding and the head, and `bits` the number of
    bits of each quantized linear layer.

    With the rank scaling `constant`, the rank is max(2, rank). With `by_bits`, it is max(2,
    ⌈rank·bits / 4⌉), or `rank` if the layer is not quantized. With `by_kl`, it is max(2,
    ⌈rank·factor⌉), where factor is kl / median kl, clipped to [0.5, 2], and kl comes from OptiQ's
    sensitivity file. Layers that the file does not list get the rank of `by_bits`, as do all layers
    if there is no file. Raises InputError if a target matches nothing, or if there are fewer layers
    than num_layers.
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
                f"target_modules: '{target}' matches no linear layer of the model; its linear "
                f"layers are named {', '.join(names)}.",
                field="target_modules",
            )
        ranks |= {path: rank_of(path) for path in found if path in within}
    return dict(sorted(ranks.items()))


def asked(config: TrainConfig) -> dict[str, Any]:
    """Returns the fields of a configuration that choose_ranks takes as arguments."""
    names = ("rank", "rank_scaling", "target_modules", "num_layers", "model_dir")
    return {name: getattr(config, name) for name in names}


def _sensitivities(model_dir: Path) -> dict[str, float]:
    """Reads the KL divergence of each layer from the OptiQ file in the model's folder. Returns the
    values keyed by the layer's path in the text model, or {} if there is no such file."""
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
