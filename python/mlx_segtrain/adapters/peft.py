"""Writes adapters in the format of Hugging Face PEFT: the module names of transformers, transposed
factors, and a multiplier of lora_alpha / r."""

import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from ..errors import InputError
from ..files import write_json, write_tensors
from ..lora import Adapter
from ..lora.folder import CONFIG, PEFT_WEIGHTS
from ..lora.paths import bare, in_transformers
from .card import About, write_card
from .writing import peft_config

Names = Literal["text", "multimodal"]

#: Modules whose names in mlx-lm and in transformers differ only in the prefix.
_KNOWN = re.compile(
    r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj|model\.layers\.\d+\.per_layer_\w+"
    r"|model\.embed_tokens|lm_head"
)
_EMBEDDING, _HEAD = "embed_tokens", "lm_head"


def hf_path(path: str, names: Names) -> str:
    """Returns the transformers path for an mlx-lm module. Raises InputError if there is none."""
    inner = bare(path)
    if not _KNOWN.fullmatch(inner):
        why = (
            "transformers stores all experts in one tensor, which PEFT's LoRA cannot split"
            if "switch_mlp" in inner or "experts" in inner
            else "its name in transformers is unknown"
        )
        raise InputError(f"'{path}' cannot be exported to PEFT: {why}.")
    return in_transformers(inner) if names == "multimodal" else inner


def names_of(base: dict[str, Any]) -> Names:
    """Returns "multimodal" if transformers loads a base model with this config.json as a model for
    text and images. Otherwise returns "text"."""
    architectures = " ".join(base.get("architectures") or [])
    wrapped = "ForConditionalGeneration" in architectures
    return "multimodal" if wrapped or (not architectures and "text_config" in base) else "text"


def write_peft(path: Path, adapter: Adapter, about: About, names: Names, dtype: mx.Dtype) -> None:
    """Writes adapter_model.safetensors, adapter_config.json and README.md into an empty folder.

    If an embedding is also the head, its update is written for both modules, as PEFT does with
    `ensure_weight_tying`. PEFT releases without that option then read two equal updates. Raises
    InputError for a layer that PEFT cannot adapt.
    """
    tensors: dict[str, mx.array] = {}
    targets: dict[str, str] = {}
    twin: str | None = None  # the embedding whose update also applies to the head
    for module, (a, b) in adapter.tensors.items():
        target = hf_path(module, names)
        kind = "embedding_{}" if module.endswith(_EMBEDDING) else "{}.weight"
        for letter, x in (("A", a), ("B", b)):
            name = f"base_model.model.{target}.lora_{kind.format(letter)}"
            tensors[name] = mx.contiguous(x.T).astype(dtype)
        if module in adapter.more:
            name = f"base_model.model.{target}.{adapter.kind.peft}"
            tensors[name] = adapter.more[module].astype(dtype)
        targets[module] = target
        if module.endswith(_EMBEDDING) and adapter.tied:
            twin = module
            tensors[f"base_model.model.{_HEAD}.lora_A.weight"] = b.astype(dtype)
            tensors[f"base_model.model.{_HEAD}.lora_B.weight"] = a.astype(dtype)
    ranks, scales = adapter.ranks, dict(adapter.scales)
    if twin is not None:
        targets[_HEAD], ranks[_HEAD], scales[_HEAD] = _HEAD, ranks[twin], scales[twin]
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alphas = {module: scales[module] * ranks[module] for module in ranks}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    write_json(
        path / CONFIG,
        {
            **peft_config(adapter, about, rank, alpha, sorted(targets.values())),
            "rank_pattern": {targets[m]: r for m, r in ranks.items() if r != rank},
            "alpha_pattern": {targets[m]: x for m, x in alphas.items() if x != alpha},
            "ensure_weight_tying": twin is not None,
            "use_rslora": False,  # the multipliers already include this scaling
            "modules_to_save": None,
        },
    )
    write_card(path, adapter, about, "peft")
    write_tensors(path / PEFT_WEIGHTS, tensors, {"format": "pt"})
