"""Adapter directories as a run writes them; adapters/reading.py reads these and others.

    adapters.safetensors           float32 lora_a [in, R], lora_b [R, out] by module path (mlx-lm);
                                   of DoRA m [out] as well
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

from ..files import atomic, make_folder, write_json, write_tensors
from ..lora import Adapter
from .folder import CONFIG, OPTIQ_CONFIG, UNPADDED, WEIGHTS
from .reading import is_dora, ranks_in, read_adapter

if TYPE_CHECKING:
    from ..config import TrainConfig

__all__ = [
    "WEIGHTS",
    "holds_run",
    "is_dora",
    "ranks_in",
    "read_adapter",
    "step_of",
    "write_adapter",
]

RUN_FILES = (
    *(WEIGHTS, CONFIG, "metrics.jsonl", "metrics.json", "run.json"),
    *("state", "checkpoints", "best"),
)


#: What of adapter_config.json says how the weights are to be read.
MEANING = ("fine_tune_type", "lora_parameters", "use_dora")


def holds_run(path: Path) -> bool:
    """Whether the folder has anything that a run writes."""
    return any((path / name).exists() for name in RUN_FILES)


def write_adapter(
    path: Path, adapter: Adapter, config: "TrainConfig", step: int | None = None
) -> None:
    """Writes a complete adapter directory, every file atomically, the weights last.

    Weights that another configuration is for go before it does, and when the new ones are on the
    disk: at no time do two lie together that do not belong to each other.
    """
    make_folder(path)
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
        return tensors | {f"{module}.m": m for module, m in adapter.magnitudes.items()}

    lora_parameters = {
        **{"rank": largest, "scale": scale, "dropout": config.lora_dropout},
        "keys": sorted(ranks),
    }
    suffixes = sorted({module.rsplit(".", 1)[-1] for module in ranks})
    shared = {
        "rank_scaling": config.rank_scaling,
        "applied_ranks": ranks,
    }
    about = {
        "fine_tune_type": "dora" if adapter.magnitudes else "lora",
        "num_layers": -1,
        "lora_parameters": lora_parameters,
        "model": str(config.model_dir),
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(config.model_dir),
        "r": largest,
        "lora_alpha": largest * scale,
        "lora_dropout": config.lora_dropout,
        "use_dora": bool(adapter.magnitudes),
        "target_modules": suffixes,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "optiq": shared,
        "segtrain": config.model_dump(mode="json") | {"step": step},
    }
    optiq = {
        "rank": config.rank,
        "scale": scale,
        "method": config.method,
        "target_modules": config.target_modules,
        "num_layers": config.num_layers,
        "lora_parameters": {"rank": largest, "scale": scale},
        "source_model": str(config.model_dir),
        **shared,
    }
    with atomic(path / WEIGHTS) as aside:
        write_tensors(aside, flat(largest if padded else None), {"format": "mlx"})
        before = _config_in(path)
        if any(before.get(name) != about[name] for name in MEANING):
            for name in (WEIGHTS, UNPADDED):
                (path / name).unlink(missing_ok=True)
        if padded:
            with atomic(path / UNPADDED) as unpadded:
                write_tensors(unpadded, flat(None), {"format": "mlx"})
        else:
            (path / UNPADDED).unlink(missing_ok=True)
        write_json(path / CONFIG, about)
        write_json(path / OPTIQ_CONFIG, optiq)


def step_of(path: Path) -> int | None:
    """The step that an adapter of ours is of, if its folder says so."""
    own = _config_in(path).get("segtrain")
    return own.get("step") if isinstance(own, dict) else None


def _config_in(path: Path) -> dict[str, Any]:
    """What the folder's configuration holds; nothing if there is none."""
    try:
        return dict(json.loads((path / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
