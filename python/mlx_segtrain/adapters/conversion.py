"""Converts adapters between formats. Each converted adapter is read back and compared with the
original."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from ..errors import InputError
from ..files import new_folder, write_json, write_tensors
from ..lora import Adapter
from ..lora.folder import CONFIG, WEIGHTS, Folder, open_folder, ours
from ..lora.paths import bare, is_wrapped
from ..models.headers import read_shape
from ..models.snapshot import Snapshot
from .card import About, write_card
from .folding import linears_of
from .gguf import write_gguf
from .peft import Names, names_of, write_peft
from .reading import read_stored
from .writing import common_scale, mlx_lm_config, padded, write_adapter

Format = Literal["peft", "mlx-lm", "gguf"]
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
#: The number of random inputs with which two adapters are compared.
PROBES = 8


@dataclass(frozen=True)
class Converted:
    """A converted adapter, and the size of the change caused by the conversion.

    For normally distributed x, `update` is the largest |ΔW·x| over all layers, and `difference` is
    the largest |ΔW·x − ΔW'·x|, where ΔW is the original update and ΔW' is the converted one.
    """

    path: Path
    linears: int
    ranks: list[int]
    update: float
    difference: float


def export(
    adapter_path: Path,
    out: Path,
    to: Format,
    *,
    model_dir: Path | None = None,
    names: Names | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Converted:
    """Writes an adapter in the format of HF PEFT, stock mlx-lm, or llama.cpp (GGUF).

    `model_dir` is the folder of the base model. By default, the folder named in the adapter's
    configuration is used, if it exists. GGUF requires a base model. For PEFT, `names`
    selects the module names of a text model or of a multimodal model; by default, the base model
    determines the choice. Raises InputError if the adapter contains anything that the format does
    not support.
    """
    folder = open_folder(adapter_path)
    adapter, about = read_stored(folder, model_dir=model_dir), about_of(folder)
    base_dir = folder.base_folder if model_dir is None else model_dir
    base = None if base_dir is None else Snapshot(base_dir)
    if to == "gguf" and base is None:
        raise InputError("--to gguf requires the base model: pass its folder with --model.")
    numbers = DTYPES[dtype]
    with new_folder(out) as aside:
        if to == "gguf" and base:
            again = write_gguf(aside, adapter, about, base.config, numbers)
            return compared(out, adapter, again, dtype)
        if to == "peft":
            if names is None and base is None and any(map(is_wrapped, adapter.tensors)):
                raise InputError(
                    "the adapter belongs to a multimodal model, for which transformers has two "
                    "sets of module names: choose one with --names, or pass the folder of the "
                    "model with --model."
                )
            adapter = _with_tied(adapter, base)
            names = names or names_of(base.config if base else {})
            write_peft(aside, adapter, about, names, numbers)
        else:
            scale = common_scale(adapter)
            whole = padded(adapter, max(adapter.ranks.values()), scale)
            keys = mlx_lm_config(adapter, scale, about.dropout)
            write_json(aside / CONFIG, {**keys, "model": about.model})
            write_card(aside, adapter, about, "mlx-lm")
            tensors = {name: x.astype(numbers) for name, x in whole.items()}
            write_tensors(aside / WEIGHTS, tensors, {"format": "mlx"})
        return compared(out, adapter, read_stored(aside, tied=adapter.tied), dtype)


def import_(adapter_path: Path, out: Path, model_dir: Path | None = None) -> Converted:
    """Converts an adapter from the format of mlx-lm, PEFT, OptiQ or mlx-bun to ours.

    If `model_dir` is given, the layers are named as in this model's files.
    """
    folder = open_folder(adapter_path)
    adapter = read_stored(folder, model_dir=model_dir)
    if model_dir is not None:
        base = Snapshot(model_dir, whole=True)
        names = {name: path for path, name in linears_of(adapter, base).items()}
        adapter = Adapter.of(
            {names[name]: adapter.arrays(name) for name in adapter.tensors},
            {names[name]: scale for name, scale in adapter.scales.items()},
            _with_tied(adapter, base).tied,
        )
    with new_folder(out) as aside:
        write_adapter(aside, adapter, about_of(folder))
        return compared(out, adapter, read_stored(aside, tied=adapter.tied))


def _with_tied(adapter: Adapter, base: Snapshot | None) -> Adapter:
    """Returns the adapter, with `tied` set if it adapts an embedding. Raises InputError if the base
    model is needed to determine `tied` but is unknown."""
    if adapter.tied is not None or not any(p.endswith("embed_tokens") for p in adapter.tensors):
        return adapter
    tied = None if base is None else read_shape(base).tied
    if tied is None:
        raise InputError(
            "the adapter changes an embedding, and without the base model it is unknown whether "
            "the output head shares this embedding: pass the base model with --model."
        )
    return replace(adapter, tied=tied)


def about_of(adapter_path: Path | Folder) -> About:
    """Returns the metadata in an adapter's folder. Missing values are empty."""
    folder = open_folder(adapter_path)
    config = folder.config
    run = dict(ours(config))
    step = run.pop("step", None)
    inner = config.get("lora_parameters")
    dropout: Any = inner.get("dropout") if isinstance(inner, dict) else config.get("lora_dropout")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        dropout = 0.0
    model = folder.base.encode("utf-8", "replace").decode()
    return About(" ".join(model.split())[:1000], float(dropout), run, step)


#: Maximum difference that rounding to a dtype may cause, relative to the largest update.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}


def compared(out: Path, adapter: Adapter, again: Adapter, dtype: str = "float32") -> Converted:
    """Compares an adapter with its written copy. Raises InputError if they differ by more than
    rounding can cause."""
    update, difference = compare(adapter, again)
    if not difference <= BOUNDS[dtype] * update + 1e-30:
        raise InputError(
            f"conversion to {dtype} would change the adapter's updates by up to {difference:.2g} "
            f"(the largest update is {update:.2g}), so nothing was written"
            + (": use --dtype float32." if dtype != "float32" else ".")
        )
    ranks = sorted(set(adapter.ranks.values()))
    return Converted(out, len(adapter.tensors), ranks, update, difference)


def compare(one: Adapter, other: Adapter) -> tuple[float, float]:
    """Returns the largest |ΔW·x| of the first adapter, and the largest difference between the
    updates of the two adapters.

    x is normally distributed, and is the same for both adapters. Raises InputError if the adapters
    adapt different layers, or if only one of them has magnitudes.
    """
    names = {bare(path): path for path in other.tensors}
    if not {bare(path) for path in one.tensors} == set(names) or len(names) != len(one.tensors):
        raise InputError("the written adapter does not adapt the same layers as the original.")
    update = difference = 0.0
    for i, path in enumerate(sorted(one.tensors)):
        twin = names[bare(path)]
        a = one.tensors[path][0]
        x = mx.random.normal((PROBES, a.shape[-1 if a.ndim == 3 else 0]), key=mx.random.key(i))
        y, z = _updated(one, path, x), _updated(other, twin, x)
        update = max(update, float(mx.abs(y).max()))
        apart = float(mx.abs(y - z).max())
        difference = max(difference, math.inf if math.isnan(apart) else apart)
        m, n = one.more.get(path), other.more.get(twin)
        if (m is None) != (n is None):
            kind = one.kind if n is None else other.kind
            raise InputError(
                f"'{path}' has {kind.called} in the original or the written adapter, but not both."
            )
        if m is not None and n is not None:
            difference = max(difference, float(mx.abs(m - n).max()))
    return update, difference


def _updated(adapter: Adapter, path: str, x: mx.array) -> mx.array:
    a, b = adapter.tensors[path]
    if a.ndim == 3:  # experts have transposed factors
        a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)
    return adapter.scales[path] * ((x @ a) @ b)
