"""Merges several adapters into one without loss, by concatenating their factors."""

import math
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from ..data.prompting import Prompting
from ..errors import InputError
from ..files import new_folder
from ..lora import LORA, Adapter
from ..lora.paths import bare
from .card import About
from .conversion import Converted, about_of, compared
from .reading import read_stored
from .tying import common
from .writing import write_adapter


def merged(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Returns the weighted sum of adapters.

    The A factors are concatenated. The B factors are multiplied by the layer's multiplier and the
    adapter's weight, and then concatenated. The rank of a layer is therefore the sum of the
    adapters' ranks. Raises InputError for DoRA, whose magnitudes cannot be added, and for adapters
    of different models.
    """
    tensors: dict[str, list[tuple[mx.array, mx.array]]] = {}
    names: dict[str, str] = {}  # keys are paths without the prefix, which some adapters lack
    for adapter, weight in zip(adapters, weights, strict=True):
        if (kind := adapter.kind) is not LORA:
            raise InputError(f"{kind.name} adapters cannot be merged: {kind.apart}.")
        for path, (a, b) in adapter.tensors.items():
            parts = tensors.setdefault(names.setdefault(bare(path), path), [])
            parts.append((a, weight * adapter.scales[path] * b))
    joined = {}
    for path, parts in tensors.items():
        # All sizes except the rank. For experts, A is [E, R, in] and B is [E, out, R].
        ends = {(a.shape[::2], b.shape[1:] if b.ndim == 2 else b.shape[:2]) for a, b in parts}
        if len(ends) > 1:
            raise InputError(
                f"the adapters belong to different models: the widths of '{path}' differ."
            )
        axis = 2 if parts[0][1].ndim == 3 else 0
        a = mx.concatenate([a for a, _ in parts], axis=1)
        joined[path] = a, mx.concatenate([b for _, b in parts], axis=axis)
    return Adapter(joined, dict.fromkeys(joined, 1.0), tied=common(list(adapters)))


def weighted(
    paths: Sequence[Path], weights: Sequence[float] | None = None, model_dir: Path | None = None
) -> Adapter:
    """Returns the weighted sum of the adapters in these folders. A single adapter with weight 1 is
    returned unchanged, and may be a DoRA adapter.

    `model_dir` is the folder of the base model. By default, the folder named in each adapter's
    configuration is used.
    """
    chosen = [1.0] * len(paths) if weights is None else list(weights)
    if len(chosen) != len(paths):
        raise InputError(
            f"{len(chosen)} weights were given for {len(paths)} adapters: pass one weight for each "
            "adapter."
        )
    if not all(map(math.isfinite, chosen)):
        raise InputError("the weights of the adapters must be finite numbers.")
    if len(paths) == 1 and chosen == [1.0]:
        return read_stored(paths[0], model_dir=model_dir)
    return merged([read_stored(path, model_dir=model_dir) for path in paths], chosen)


def merge(
    paths: Sequence[Path],
    out: Path,
    weights: Sequence[float] | None = None,
    model_dir: Path | None = None,
) -> Converted:
    """Writes the weighted sum of several adapters in our format. By default, all weights are 1.
    `model_dir` is used as in `weighted`."""
    adapter = weighted(paths, weights, model_dir)
    chosen = [1.0] * len(paths) if weights is None else weights
    abouts = [about_of(path) for path in paths]
    if len({Path(about.model).name for about in abouts if about.model}) > 1:
        bases = ", ".join(sorted({about.model for about in abouts}))
        raise InputError(f"the adapters have different base models ({bases}) and cannot be merged.")
    sources = " + ".join(f"{w:g} × {path}" for w, path in zip(chosen, paths, strict=True))
    # If the adapters were trained with different prompt settings, none are recorded, and generation
    # uses the defaults.
    first, *others = (Prompting.of(about.run) for about in abouts)
    run = first.as_run() if all(other == first for other in others) else {}
    about = About(abouts[0].model, run=run, facts={"merged from": sources})
    with new_folder(out) as aside:
        write_adapter(aside, adapter, about)
        return compared(out, adapter, read_stored(aside, tied=adapter.tied))
