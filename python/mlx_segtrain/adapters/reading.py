"""Reads adapter folders in our format, and in the formats of mlx-lm, similar packages and Hugging
Face PEFT.

    adapters.safetensors       <path>.lora_a [in, R], <path>.lora_b [R, out]; one multiplier for
                               all layers
    adapter_model.safetensors  base_model.model.<path>.lora_A.weight [R, in], ….lora_B.weight
                               [out, R], for an embedding ….lora_embedding_A and B; the multiplier
                               of each layer is alpha divided by the rank
    DoRA                       also <path>.m [out], ….lora_magnitude_vector [out]

Each folder has an adapter_config.json. Tensors that do not belong to low-rank updates are refused
with an error that names them.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import InputError
from ..lora import EMBEDDINGS, Adapter, shapes
from ..lora.adapter import ARRAYS, DORA, FACTORS, KINDS, LORA
from ..lora.folder import CONFIG, Folder, open_folder
from ..lora.paths import in_mlx_lm, spellings
from ..models import Chain
from ..safetensors import FLOATS, read_header
from .multipliers import multiplier_of
from .tying import check_twins, joined, tied_by_files

#: The names of an update's arrays in mlx-lm's files (_OURS) and in PEFT's files (_PEFTS).
_OURS = dict(zip(ARRAYS, ARRAYS, strict=True))
_PEFTS = {
    **{"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"},
    **{"lora_embedding_A": "lora_a", "lora_embedding_B": "lora_b"},
    **{kind.peft + end: kind.array for kind in KINDS for end in ("", ".weight")},
}
_OUR_ENDS, _PEFT_ENDS = (
    re.compile(rf"{before}(.+)\.({'|'.join(map(re.escape, names))})")
    for before, names in (("", _OURS), (r"base_model\.model\.", _PEFTS))
)


def read_adapter(path: str | Path | Folder, chain: Chain) -> Adapter:
    """Reads an adapter in the format of this package, mlx-lm, OptiQ, mlx-bun or PEFT, and checks
    that it fits the model.

    Raises InputError if files are missing or unreadable, if names or shapes do not fit the model,
    or if the adapter changes anything besides linear layers, the embedding and the head.
    """
    folder = open_folder(path)
    stored, weights = read_stored(folder, tied=chain.tied), folder.weights
    arrays, scales, adaptable = {}, {}, chain.adaptable
    for name, (a, b) in stored.tensors.items():
        # The paths have different prefixes if only one of the two models (this model and the
        # adapter's base model) is multimodal.
        linear = next((path for path in spellings(name) if path in adaptable), None)
        if linear is None:
            raise InputError(
                f"{weights}: '{name}' is not a layer of this model that mlx_segtrain can adapt: "
                "the adapter was trained on another model, or on layers that are not supported "
                "here."
            )
        if linear in arrays:
            raise InputError(f"{weights} contains two updates of '{linear}': remove one.")
        wanted = shapes(adaptable[linear], a.shape[1])
        if (a.shape, b.shape) != wanted:
            raise InputError(
                f"{weights}: '{linear}' has lora_a of shape {a.shape} and lora_b of shape "
                f"{b.shape}, but the model needs {wanted[0]} and {wanted[1]}: the adapter was "
                "trained on another model."
            )
        kind = stored.kind
        if kind is not LORA and isinstance(adaptable[linear], EMBEDDINGS):
            raise InputError(
                f"{weights}: '{linear}' is an embedding, which {kind.name} does not support."
            )
        arrays[linear], scales[linear] = stored.arrays(name), stored.scales[name]
    return Adapter.of(arrays, scales, chain.tied_for(arrays))


def read_stored(
    path: str | Path | Folder, *, model_dir: Path | None = None, tied: bool | None = None
) -> Adapter:
    """Reads an adapter folder without loading the model. The layers are named as in mlx-lm.

    `tied` says whether the base model lacks a separate head. If `tied` is None and its value
    matters, it is looked up in `model_dir` or in the base model that the adapter names. Raises
    InputError in the same cases as `read_adapter`, except for errors that only the model reveals.
    Also raises InputError if `tied` matters but cannot be determined.
    """
    folder = open_folder(path)
    multiplier, header = multiplier_of(folder), read_header(folder.weights)
    everything = _by_linear(folder, header)
    if tied is None:
        tied = tied_by_files(folder, everything, model_dir)
    found, twins = joined(folder, everything, tied)
    for name, (dtype, _) in header.items():
        if dtype not in FLOATS:
            raise InputError(
                f"{folder.weights}: '{name}' has dtype {dtype}, but factors must be floating-point."
            )
    try:
        loaded: Any = mx.load(str(folder.weights))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{folder.weights} is not a readable safetensors file: {error}") from error
    arrays, scales, updates = {}, {}, {}
    for stored, names in everything.items():
        path = in_mlx_lm(stored)
        a, b, *more = (loaded[name].astype(mx.float32) for name in names)
        rank = _rank(folder, stored, a.shape)
        if folder.peft and a.ndim == b.ndim == 2:
            a, b = a.T, b.T
        if path in arrays:
            raise InputError(f"{folder.weights} contains two updates of '{path}': remove one.")
        if not _fit(a.shape, b.shape):
            raise InputError(
                f"{folder.weights}: '{stored}' has lora_a of shape {a.shape} and lora_b of shape "
                f"{b.shape}, which do not match."
            )
        if more and (b.ndim != 2 or more[0].shape != b.shape[1:]):
            raise InputError(
                f"{folder.weights}: '{stored}' has {folder.kind.called} of shape {more[0].shape}, "
                f"which does not match lora_b of shape {b.shape}."
            )
        if not all(mx.isfinite(x).all() for x in (a, b, *more)):
            raise InputError(
                f"{folder.weights}: '{stored}' has factors with NaN or infinite values."
            )
        updates[stored] = a, b, multiplier(stored, rank)
        if stored in found:
            arrays[path] = dict(zip(folder.arrays, (a, b, *more), strict=True))
            scales[path] = updates[stored][2]
    check_twins(folder, twins, updates)
    embeds = folder.tied is not None or any(".lora_embedding_" in name for name in header)
    return Adapter.of(arrays, scales, tied if embeds else None)


def _fit(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Returns whether factors of these shapes can be multiplied, for a linear layer or for a layer
    with experts."""
    if len(a) != len(b) or len(a) not in (2, 3) or 0 in (*a, *b):
        return False
    return a[1] == b[0] if len(a) == 2 else (a[0], a[1]) == (b[0], b[2])


def is_dora(path: str | Path) -> bool:
    """Returns whether the adapter in this folder has magnitudes. Raises InputError if the folder
    cannot be read."""
    return open_folder(path).kind is DORA


def ranks_in(path: str | Path | Folder, tied: bool | None = None) -> dict[str, int]:
    """Returns the rank of each adapted layer, keyed by the layer's path in mlx-lm. Reads only the
    header.

    `tied` says whether the base model lacks a separate head; None means that this is unknown.
    Raises InputError in the same cases as `read_adapter`, except for errors that only the model or
    the factors reveal.
    """
    return {path: rank for path, (_, rank, _) in stored_shapes(path, tied).items()}


def stored_shapes(
    path: str | Path | Folder, tied: bool | None = None
) -> dict[str, tuple[int, int, int]]:
    """Returns (in, rank, out) for each adapted layer; for a layer with experts, these are the sizes
    of each expert. `tied` and the errors raised are the same as for `ranks_in`."""
    folder = open_folder(path)
    header = read_header(folder.weights)
    found = {}
    for stored, names in joined(folder, _by_linear(folder, header), tied)[0].items():
        a, b = (header[name][1] for name in names[:2])
        rank = _rank(folder, stored, a)
        if folder.peft:
            a, b = a[::-1], b[::-1]
        width, out = (a[2], b[1]) if len(a) == 3 == len(b) else (a[0], b[-1]) if b else (0, 0)
        found[in_mlx_lm(stored)] = width, rank, out
    return found


def stored_bytes(path: str | Path | Folder) -> int:
    """Returns the number of bytes of the factors in float32. Reads only the header. Raises
    InputError if the header cannot be read."""
    header = read_header(open_folder(path).weights)
    return 4 * sum(math.prod(shape) for _, shape in header.values())


def _by_linear(folder: Folder, names: Iterable[str]) -> dict[str, list[str]]:
    """Returns the tensor names of each layer, in the order of folder.arrays, keyed by the layer's
    stored path.

    Raises InputError if a tensor is missing or unexpected.
    """
    known, ends = (_PEFTS, _PEFT_ENDS) if folder.peft else (_OURS, _OUR_ENDS)
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        if folder.peft and name.endswith(".base_layer.weight"):
            continue  # PEFT also saves the unchanged base of an adapted embedding
        match = ends.fullmatch(name)
        if match is None:
            raise InputError(f"{folder.weights}: tensor '{name}' is not a LoRA factor.")
        found.setdefault(match[1], {})[known[match[2]]] = name
    if not found:
        raise InputError(f"{folder.weights} contains no lora_a.")
    called = {name: name for name in FACTORS} | {kind.array: kind.called for kind in KINDS}
    for stored, own in found.items():
        for key in folder.arrays:
            if key not in own:
                has = ", ".join(called[name] for name in own)
                raise InputError(f"{folder.weights}: '{stored}' has {has} but no {called[key]}.")
        for kind in KINDS:
            if kind.array in own and kind is not folder.kind:
                raise InputError(
                    f"{folder.weights}: '{stored}' has {kind.called}, but {CONFIG} does not "
                    f"describe a {kind.name} adapter: the two files belong to different adapters."
                )
    return {stored: [own[key] for key in folder.arrays] for stored, own in found.items()}


def _rank(folder: Folder, stored: str, shape: tuple[int, ...]) -> int:
    """Returns the rank according to the shape of the stored A factor."""
    rank = shape[0 if folder.peft else 1] if len(shape) > 1 else 0
    if rank == 0:
        raise InputError(
            f"{folder.weights}: '{stored}' has lora_a of shape {shape}, which does not "
            "determine a rank."
        )
    return rank
