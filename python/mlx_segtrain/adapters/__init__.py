"""Adapter directories: what a run writes, and what `load` reads back.

    adapters.safetensors           float32 lora_a [in, R], lora_b [R, out] by module path (mlx-lm)
    adapters_unpadded.safetensors  only where ranks differ: the tensors at their own ranks
    adapter_config.json            mlx-lm's keys and PEFT's keys together
    optiq_lora_config.json         ranks by layer

mlx-lm gives all linears one rank, so differing ranks are padded with zeros to the largest: exact,
but a padded column has no gradient, hence the second file for training on.
"""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..errors import InputError
from ..files import atomic, write_json
from ..lora import Adapter, shapes
from ..models import Chain

if TYPE_CHECKING:
    from ..config import TrainConfig

__all__ = ["WEIGHTS", "holds_run", "read_adapter", "write_adapter"]

WEIGHTS = "adapters.safetensors"
UNPADDED = "adapters_unpadded.safetensors"
RUN_FILES = (
    *(WEIGHTS, "adapter_config.json", "metrics.jsonl", "metrics.json"),
    *("checkpoints", "best"),
)


def holds_run(path: Path) -> bool:
    """Whether the folder has anything that a run writes."""
    return any((path / name).exists() for name in RUN_FILES)


def write_adapter(path: Path, adapter: Adapter, config: "TrainConfig") -> None:
    """Writes a complete adapter directory, every file atomically, the weights last."""
    path.mkdir(parents=True, exist_ok=True)
    ranks = adapter.ranks
    largest = max(ranks.values())
    padded = len(set(ranks.values())) > 1
    # One multiplier for all is what mlx-lm knows: differences go into B.
    scale = Counter(adapter.scales.values()).most_common(1)[0][0]

    def flat(rank: int | None) -> dict[str, mx.array]:
        tensors = {}
        for module, (a, b) in adapter.tensors.items():
            extra = rank - a.shape[1] if rank else 0
            more_b = [(0, extra), (0, 0)] if b.ndim == 2 else [(0, 0), (0, 0), (0, extra)]
            more_a = [(0, 0), (0, extra), (0, 0)][: a.ndim]
            ratio = adapter.scales[module] / scale
            tensors[f"{module}.lora_a"] = mx.pad(a, more_a).astype(mx.float32)
            b = b if ratio == 1 else b * ratio
            tensors[f"{module}.lora_b"] = mx.pad(b, more_b).astype(mx.float32)
        return tensors

    lora_parameters = {"rank": largest, "scale": scale, "dropout": 0.0, "keys": sorted(ranks)}
    suffixes = sorted({module.rsplit(".", 1)[-1] for module in ranks})
    shared = {
        "rank_scaling": config.rank_scaling,
        "applied_ranks": ranks,
    }
    write_json(
        path / "adapter_config.json",
        {
            "fine_tune_type": "lora",
            "num_layers": -1,
            "lora_parameters": lora_parameters,
            "model": str(config.model_dir),
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(config.model_dir),
            "r": largest,
            "lora_alpha": largest * scale,
            "lora_dropout": 0.0,
            "target_modules": suffixes,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "optiq": shared,
            "segtrain": json.loads(config.model_dump_json()),
        },
    )
    write_json(
        path / "optiq_lora_config.json",
        {
            "rank": config.rank,
            "scale": scale,
            "method": config.method,
            "target_modules": config.target_modules,
            "num_layers": config.num_layers,
            "lora_parameters": {"rank": largest, "scale": scale},
            "source_model": str(config.model_dir),
            **shared,
        },
    )
    if padded:
        with atomic(path / UNPADDED) as aside:
            mx.save_safetensors(str(aside), flat(None), {"format": "mlx"})
    else:
        (path / UNPADDED).unlink(missing_ok=True)
    with atomic(path / WEIGHTS) as aside:
        mx.save_safetensors(str(aside), flat(largest if padded else None), {"format": "mlx"})


def read_adapter(path: str | Path, chain: Chain) -> Adapter:
    """Reads an adapter directory of ours or mlx-lm's for the model of `chain`.

    InputError if files are missing or unreadable, or names and shapes do not fit the model.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise InputError(f"adapter_path {path} is not a folder: give the path of an adapter.")
    weights = path / UNPADDED if (path / UNPADDED).is_file() else path / WEIGHTS
    for file in (weights, path / "adapter_config.json"):
        if not file.is_file():
            raise InputError(f"adapter_path {path} holds no {file.name}: not an adapter folder.")
    try:
        scale = float(_json(path / "adapter_config.json")["lora_parameters"]["scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path / 'adapter_config.json'} has no number at lora_parameters.scale: {error}"
        ) from error
    try:
        arrays = mx.load(str(weights))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{weights} is not a readable safetensors file: {error}") from error
    assert isinstance(arrays, dict)
    tensors = {}
    for name in sorted(arrays):
        module, leaf = name.rsplit(".", 1) if "." in name else (name, "")
        if leaf not in ("lora_a", "lora_b") or module not in chain.linears:
            raise InputError(f"{weights}: tensor '{name}' belongs to no linear of this model.")
        if leaf == "lora_b":
            continue
        tensors[module] = _pair(weights, arrays, module, chain)
    unpaired = {n.rsplit(".", 1)[0] for n in arrays} - set(tensors)
    if unpaired or not tensors:
        raise InputError(f"{weights}: no lora_a for {sorted(unpaired) or 'any linear'}.")
    return Adapter(tensors, dict.fromkeys(tensors, scale))


def _pair(weights: Path, arrays: Any, module: str, chain: Chain) -> tuple[mx.array, mx.array]:
    a, b = arrays[f"{module}.lora_a"], arrays.get(f"{module}.lora_b")
    if b is None:
        raise InputError(f"{weights}: '{module}' has lora_a but no lora_b.")
    wanted = shapes(chain.linears[module], a.shape[1] if a.ndim > 1 else 0)
    if (a.shape, b.shape) != wanted:
        raise InputError(
            f"{weights}: '{module}' has lora_a {a.shape} and lora_b {b.shape}, but the model wants "
            f"{wanted[0]} and {wanted[1]}: it was trained on another model."
        )
    return a.astype(mx.float32), b.astype(mx.float32)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
