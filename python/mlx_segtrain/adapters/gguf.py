"""Writes adapters for llama.cpp with the package gguf, which the extra `gguf` installs."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..lora import LORA, Adapter
from ..lora.paths import bare
from .card import About, write_card

NAME = "adapter.gguf"
#: Maps each model_type to llama.cpp's architecture, and to whether the two rows of a rotary pair
#: are adjacent in llama.cpp's files.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma2": ("gemma2", False),
    "gemma3": ("gemma3", False),
    "gemma3_text": ("gemma3", False),
}


def write_gguf(
    folder: Path, adapter: Adapter, about: About, base: dict[str, Any], dtype: mx.Dtype
) -> Adapter:
    """Writes adapter.gguf and README.md. Returns the adapter as it was read back from the file.

    The B factors in the file already include the multiplier. Therefore the file sets alpha to 0,
    which means that there is no further multiplier. Raises InputError if llama.cpp does not support
    the adapter, or if the package gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise InputError('--to gguf needs the package gguf: run pip install "mlx-segtrain[gguf]".')
    if dtype == mx.bfloat16:
        raise InputError("--dtype for GGUF must be float32 or float16.")
    gguf: Any = import_module("gguf")
    if (kind := adapter.kind) is not LORA:
        raise InputError(
            f"llama.cpp does not support {kind.name}: merge the adapter into its base instead."
        )
    text = base.get("text_config") or base
    family = str(base.get("model_type"))
    if family not in ARCHITECTURES:
        raise InputError(
            f"adapters of {family} models cannot be exported to GGUF; the supported model types "
            f"are {', '.join(sorted(ARCHITECTURES))}."
        )
    name, neighbours = ARCHITECTURES[family]
    heads_of = {}
    if neighbours:
        heads = int(text["num_attention_heads"])
        heads_of = {"q_proj": heads, "k_proj": int(text.get("num_key_value_heads") or heads)}
    kinds = {kind: key for key, kind in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[name], int(text["num_hidden_layers"]))
    places = {path: _place(names, path) for path in adapter.tensors}
    turned = {path: heads_of.get(path.rpartition(".")[2]) for path in places}

    writer = gguf.GGUFWriter(folder / NAME, name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for path, place in places.items():
        a, b = adapter.tensors[path]
        b = turn((adapter.scales[path] * b).T, turned[path])
        for letter, x in (("a", a.T), ("b", b)):
            number = np.float16 if dtype == mx.float16 else np.float32
            writer.add_tensor(f"{place}.weight.lora_{letter}", np.array(x).astype(number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_card(folder, adapter, about, "gguf")

    found = {x.name: mx.array(np.array(x.data)) for x in gguf.GGUFReader(folder / NAME).tensors}
    tensors = {}
    for path, place in places.items():
        a, b = (found[f"{place}.weight.lora_{x}"].astype(mx.float32) for x in "ab")
        tensors[path] = a.T, turn(b, turned[path], back=True).T
    return Adapter(tensors, dict.fromkeys(tensors, 1.0))


def _place(names: Any, path: str) -> str:
    found = names.get_name(bare(path))
    if found is None or "switch_mlp" in path or "embed_tokens" in path:
        raise InputError(
            f"'{path}' cannot be exported to GGUF: llama.cpp can adapt only plain linear layers."
        )
    return str(found)


def turn(b: mx.array, heads: int | None, *, back: bool = False) -> mx.array:
    """Reorders the rows of B [out, R] so that the rows of a rotary pair are adjacent: in each head,
    every row of the first half is followed by its partner from the second half. `back` reverses
    this. If `heads` is None, returns B unchanged."""
    if heads is None:
        return b
    half = b.shape[0] // heads // 2
    pairs = (half, 2) if back else (2, half)
    return b.reshape(heads, *pairs, -1).swapaxes(1, 2).reshape(b.shape)
