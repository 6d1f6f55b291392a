"""Adapter folders as they stand on disk: ours, those of mlx-lm and its relatives, HF PEFT's.

    adapters.safetensors       <path>.lora_a [in, R], <path>.lora_b [R, out]; one multiplier
    adapter_model.safetensors  base_model.model.<path>.lora_A.weight [R, in], ….lora_B.weight
                               [out, R]; alpha over the rank, by linear
    DoRA                       besides <path>.m [out], ….lora_magnitude_vector [out]

adapter_config.json is beside either. What is more than an update of low rank is refused by name.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import InputError
from ..lora import Adapter, shapes
from ..models import Chain
from ..planning.shapes import read_header
from .folder import CONFIG, Folder, open_folder, refuse
from .multipliers import multiplier_of

_FACTOR = re.compile(r"(.+)\.(lora_[ab]|m)")
_PEFT_FACTOR = re.compile(
    r"base_model\.model\.(.+)\.(lora_[AB]\.weight|lora_magnitude_vector(?:\.weight)?)"
)


def read_adapter(path: str | Path, chain: Chain) -> Adapter:
    """Reads an adapter folder of ours, mlx-lm's, OptiQ's, mlx-bun's or PEFT's, for this model.

    InputError if files are missing or unreadable, names or shapes do not fit the model, or the
    adapter is more than a LoRA of linears.
    """
    folder = open_folder(path)
    multiplier = multiplier_of(folder)
    try:
        arrays: Any = mx.load(str(folder.weights))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{folder.weights} is not a readable safetensors file: {error}") from error
    tensors, scales, magnitudes = {}, {}, {}
    for stored, names in _by_linear(folder, arrays).items():
        linear = _in_model(stored, chain.adaptable)
        if linear is None:
            raise InputError(
                f"{folder.weights}: tensor '{min(names.values())}' belongs to no linear of this "
                "model that can be adapted: it was trained on another model, or on more."
            )
        if linear in tensors:
            raise InputError(f"{folder.weights} holds two updates of '{linear}': remove one.")
        a, b, *m = (arrays[name].astype(mx.float32) for name in _all(folder, stored, names))
        rank = _rank(folder, stored, a.shape)
        if folder.peft:
            a, b = a.T, b.T
        wanted = shapes(chain.adaptable[linear], rank)
        if (a.shape, b.shape) != wanted:
            raise InputError(
                f"{folder.weights}: '{linear}' has lora_a {a.shape} and lora_b {b.shape}, but the "
                f"model wants {wanted[0]} and {wanted[1]}: it was trained on another model."
            )
        tensors[linear], scales[linear] = (a, b), multiplier(stored, rank)
        if m:
            if m[0].shape != b.shape[-1:]:
                raise InputError(
                    f"{folder.weights}: '{linear}' has magnitudes {m[0].shape}, but the model "
                    f"wants {b.shape[-1:]}: it was trained on another model."
                )
            magnitudes[linear] = m[0]
    return Adapter(tensors, scales, magnitudes)


def is_dora(path: str | Path) -> bool:
    """Whether the adapter in this folder has magnitudes; InputError as from read_adapter."""
    return open_folder(path).dora


def ranks_in(path: str | Path) -> dict[str, int]:
    """Rank of each adapted linear by its stored path, in mlx-lm's terms; reads the header alone.

    InputError as from read_adapter, as far as it takes no model.
    """
    folder = open_folder(path)
    header = read_header(folder.weights)
    return {
        _in_mlx_lm(stored): _rank(folder, stored, header[_all(folder, stored, names)[0]][1])
        for stored, names in _by_linear(folder, header).items()
    }


def _by_linear(folder: Folder, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Names of the tensors a, b and m by the stored path of their linear."""
    factor = _PEFT_FACTOR if folder.peft else _FACTOR
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        match = factor.fullmatch(name)
        if match is None:
            if "lora_embedding_" in name:
                refuse(folder, "adapters of an embedding (lora_embedding_A)")
            raise InputError(f"{folder.weights}: tensor '{name}' is no factor of a linear's LoRA.")
        kind = match[2].removesuffix(".weight").lower()
        found.setdefault(match[1], {})["m" if "magnitude" in kind else kind[-1]] = name
    if not found:
        raise InputError(f"{folder.weights} holds no lora_a for any linear.")
    return found


def _all(folder: Folder, stored: str, names: Mapping[str, str]) -> list[str]:
    """Names of a and b, and of m if it is a DoRA adapter; InputError if one is missing or over."""
    wanted = {"a": "lora_a", "b": "lora_b", **({"m": "magnitudes"} if folder.dora else {})}
    has = ", ".join(wanted.get(key, "magnitudes") for key in names)
    for key, what in wanted.items():
        if key not in names:
            raise InputError(f"{folder.weights}: '{stored}' has {has} but no {what}.")
    if "m" in names and not folder.dora:
        raise InputError(
            f"{folder.weights}: '{stored}' has magnitudes, but {CONFIG} does not say that it is a "
            "DoRA adapter: the two files are not of the same adapter."
        )
    return [names[key] for key in wanted]


def _rank(folder: Folder, stored: str, shape: tuple[int, ...]) -> int:
    """From the shape of a as it is stored."""
    rank = shape[0 if folder.peft else 1] if len(shape) > 1 else 0
    if rank == 0:
        raise InputError(f"{folder.weights}: '{stored}' has lora_a {shape}, which has no rank.")
    return rank


def _in_mlx_lm(stored: str) -> str:
    """transformers has the text model within the model for text and images, mlx-lm around it."""
    prefix = "model.language_model."
    if stored.startswith(prefix):
        return f"language_model.model.{stored.removeprefix(prefix)}"
    return stored


def _in_model(stored: str, linears: Mapping[str, Any]) -> str | None:
    """The linear that a stored path means; a text model may stand alone here, and not there."""
    path = _in_mlx_lm(stored)
    bare = path.removeprefix("language_model.")
    return next((p for p in (stored, path, f"language_model.{bare}", bare) if p in linears), None)
