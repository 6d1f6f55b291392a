"""From one format to another; what was written is read again and compared."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from ..errors import InputError
from ..files import atomic_folder, write_json, write_tensors, write_text
from ..lora import Adapter
from .card import card
from .folder import CONFIG, README, WEIGHTS, open_folder
from .gguf import write_gguf
from .peft import Names, names_of, write_peft
from .reading import read_stored
from .writing import About, common_scale, mlx_lm_config, padded, write_adapter

Format = Literal["peft", "mlx-lm", "gguf"]
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
#: Random inputs that two adapters are compared with.
PROBES = 8


def dtype_of(name: str | None) -> mx.Dtype | None:
    """MLX's dtype of this name."""
    return None if name is None else DTYPES[name]


@dataclass(frozen=True)
class Converted:
    """What was written, and how far it is from what was read.

    `difference` is the largest |ΔW·x − ΔW'·x| over all linears, x of normal numbers, `update` the
    largest |ΔW·x|.
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
    """Writes an adapter folder as others read it: HF PEFT, stock mlx-lm, or llama.cpp's GGUF.

    `model_dir` is the base, by default the one that the adapter names, if it is there; from it
    follow the `names` that transformers has. GGUF needs it. InputError for what a format has not.
    """
    adapter, about = read_stored(adapter_path), about_of(adapter_path)
    check_new(out)
    base = _base_config(model_dir, about)
    if to == "gguf":
        if base is None:
            raise InputError(
                "--to gguf needs the base: give --model-dir, a folder with config.json."
            )
        with atomic_folder(out) as aside:
            read_back = write_gguf(aside, adapter, about, base, DTYPES[dtype])
        return compared(out, adapter, read_back)
    with atomic_folder(out) as aside:
        if to == "peft":
            tied = bool((base or {}).get("tie_word_embeddings", False))
            chosen = names or names_of(base or {})
            write_peft(aside, adapter, about, chosen, DTYPES[dtype], tied)
        else:
            scale = common_scale(adapter)
            rank = max(adapter.ranks.values())
            tensors = {k: x.astype(DTYPES[dtype]) for k, x in padded(adapter, rank, scale).items()}
            keys = mlx_lm_config(adapter, scale, about.dropout)
            write_json(aside / CONFIG, {**keys, "model": about.model})
            text = card(adapter, about.model, about.step, about.run, about.facts)
            write_text(aside / README, text)
            write_tensors(aside / WEIGHTS, tensors, {"format": "mlx"})
        read_back = read_stored(aside)
    return compared(out, adapter, read_back)


def import_(adapter_path: Path, out: Path) -> Converted:
    """Writes an adapter folder of mlx-lm's, PEFT's, OptiQ's or mlx-bun's as one of ours."""
    adapter = read_stored(adapter_path)
    check_new(out)
    with atomic_folder(out) as aside:
        write_adapter(aside, adapter, about_of(adapter_path))
        read_back = read_stored(aside)
    return compared(out, adapter, read_back)


def check_new(out: Path) -> None:
    """InputError if there is something that would be replaced."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already: give a new folder.")


def about_of(adapter_path: Path) -> About:
    """What an adapter's folder says of itself; empty where it says nothing."""
    config = open_folder(adapter_path).config
    own = config.get("segtrain")
    run = dict(own) if isinstance(own, dict) else {}
    step = run.pop("step", None)
    inner = config.get("lora_parameters")
    dropout: Any = inner.get("dropout") if isinstance(inner, dict) else config.get("lora_dropout")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        dropout = 0.0
    model = config.get("base_model_name_or_path") or config.get("model") or ""
    return About(" ".join(str(model).split()), float(dropout), run, step)


def _base_config(model_dir: Path | None, about: About) -> dict[str, Any] | None:
    """config.json of the base; None if it is not there and none was given."""
    folder = Path(about.model).expanduser() if model_dir is None else model_dir
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    except (OSError, ValueError) as error:
        if model_dir is None:
            return None
        raise InputError(f"model_dir {model_dir} has no config.json to read: {error}.") from None


def compared(out: Path, adapter: Adapter, again: Adapter) -> Converted:
    """Of an adapter that was written, and what was read of it."""
    update, difference = compare(adapter, again)
    ranks = sorted(set(adapter.ranks.values()))
    return Converted(out, len(adapter.tensors), ranks, update, difference)


def compare(one: Adapter, other: Adapter) -> tuple[float, float]:
    """The largest |ΔW·x| of the first, and the largest difference between both.

    x is normal, the same for both. InputError if they adapt other linears, or lengths differ.
    """
    names = {_bare(path): path for path in other.tensors}
    if {_bare(path) for path in one.tensors} != set(names):
        raise InputError("what was written adapts other linears than what was read.")
    update = difference = 0.0
    for i, path in enumerate(sorted(one.tensors)):
        twin = names[_bare(path)]
        a = one.tensors[path][0]
        x = mx.random.normal((PROBES, a.shape[-1 if a.ndim == 3 else 0]), key=mx.random.key(i))
        y, z = _updated(one, path, x), _updated(other, twin, x)
        update = max(update, float(mx.abs(y).max()))
        difference = max(difference, float(mx.abs(y - z).max()))
        m, n = one.magnitudes.get(path), other.magnitudes.get(twin)
        if (m is None) != (n is None):
            raise InputError(f"'{path}' has magnitudes in one of the two only.")
        if m is not None and n is not None:
            difference = max(difference, float(mx.abs(m - n).max()))
    return update, difference


def _bare(path: str) -> str:
    return path.removeprefix("language_model.")


def _updated(adapter: Adapter, path: str, x: mx.array) -> mx.array:
    a, b = adapter.tensors[path]
    if a.ndim == 3:  # experts have them transposed
        a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)
    return adapter.scales[path] * ((x @ a) @ b)
