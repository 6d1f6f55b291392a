"""Writes our adapter folders, which stock mlx-lm and OptiQ load directly.

    adapters.safetensors           float32 lora_a [in, R], lora_b [R, out] by module path (mlx-lm);
                                   for DoRA also m [out]
    adapters_unpadded.safetensors  only if ranks differ: the tensors without padding
    adapter_config.json            mlx-lm's keys and PEFT's keys together
    optiq_lora_config.json         the rank of each layer
    README.md                      the model card

In mlx-lm, all layers have the same rank. If ranks differ, the factors are therefore padded to the
largest rank: B with zeros, which does not change the update, and A with the random values of a new
adapter, which lets further training use every column.
"""

import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..data.prompting import Prompting
from ..errors import InputError
from ..files import atomic, make_folder, read_json, sha256, write_json, write_tensors
from ..lora import LORA, Adapter, fresh_a
from ..lora.folder import CONFIG, OPTIQ_CONFIG, UNPADDED, WEIGHTS, ours
from .card import About, write_card

#: The keys of adapter_config.json that determine how the weights are read.
MEANING = ("fine_tune_type", "lora_parameters", *LORA.flags)


def common_scale(adapter: Adapter) -> float:
    """Returns the most frequent nonzero multiplier, or 0 if all multipliers are 0."""
    some = [scale for scale in adapter.scales.values() if scale]
    return Counter(some).most_common(1)[0][0] if some else 0.0


def padded(adapter: Adapter, rank: int | None, scale: float) -> dict[str, mx.array]:
    """Returns the factors under mlx-lm's names, rescaled so that all have the multiplier `scale`.
    If `rank` is not None, they are padded to this rank."""
    tensors = {}
    for module, (a, b) in adapter.tensors.items():
        # If scale is 0, all multipliers are 0, so B needs no rescaling.
        ratio = adapter.scales[module] / scale if scale else 1.0
        b = b if ratio == 1 else b * ratio
        extra = rank - a.shape[1] if rank else 0
        if extra:
            shape = (a.shape[0], extra, *a.shape[2:])
            fresh = fresh_a(shape, mx.random.key(zlib.crc32(module.encode())))
            a = mx.concatenate([a, fresh.astype(a.dtype)], axis=1)
            more = [(0, extra), (0, 0)] if b.ndim == 2 else [(0, 0), (0, 0), (0, extra)]
            b = mx.pad(b, more)
        tensors[f"{module}.lora_a"] = a.astype(mx.float32)
        tensors[f"{module}.lora_b"] = b.astype(mx.float32)
    return tensors | {f"{path}.{adapter.kind.array}": x for path, x in adapter.more.items()}


def mlx_lm_config(adapter: Adapter, scale: float, dropout: float) -> dict[str, Any]:
    """Returns the keys of adapter_config.json that mlx-lm reads."""
    return {
        "fine_tune_type": adapter.kind.word,
        "num_layers": -1,
        "lora_parameters": {
            **{"rank": max(adapter.ranks.values()), "scale": scale, "dropout": dropout},
            "keys": sorted(adapter.ranks),
        },
    }


def peft_config(
    adapter: Adapter, about: About, rank: int, alpha: float, targets: list[str]
) -> dict[str, Any]:
    """Returns the keys of adapter_config.json that PEFT reads, for layers with this rank and
    alpha."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": about.model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": about.dropout,
        **adapter.kind.flags,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def write_adapter(path: Path, adapter: Adapter, about: About) -> None:
    """Writes a complete adapter directory. Every file is written atomically, and the weights are
    written last.

    If the configuration changes, the old weights are removed before the new configuration is
    written, and the new weights are written after it. Therefore weights and configuration never
    contradict each other.
    """
    make_folder(path)
    ranks, run = adapter.ranks, about.run
    largest = max(ranks.values())
    # mlx-lm uses one multiplier for all layers, so B is rescaled where a layer's multiplier
    # differs.
    scale = common_scale(adapter)
    suffixes = sorted({module.rsplit(".", 1)[-1] for module in ranks})
    shared = {"rank_scaling": run.get("rank_scaling", "constant"), "applied_ranks": ranks}
    config = {
        **mlx_lm_config(adapter, scale, about.dropout),
        "model": about.model,
        **peft_config(adapter, about, largest, largest * scale, suffixes),
        "optiq": shared,
        "segtrain": run | {"step": about.step, "padded": None, "tied": adapter.tied},
    }
    optiq = {
        "rank": run.get("rank", largest),
        "scale": scale,
        "method": run.get("method", "sft"),
        "target_modules": run.get("target_modules", suffixes),
        "num_layers": run.get("num_layers", -1),
        "lora_parameters": {"rank": largest, "scale": scale},
        "source_model": about.model,
        **shared,
    }
    differ = len(set(ranks.values())) > 1
    with atomic(path / WEIGHTS) as aside:
        write_tensors(aside, padded(adapter, largest, scale), {"format": "mlx"})
        if differ:  # readers use this hash to check that both files have the same factors
            config["segtrain"]["padded"] = sha256(aside)
        before = _config_in(path)
        if any(before.get(name) != config[name] for name in MEANING):
            for name in (WEIGHTS, UNPADDED):
                (path / name).unlink(missing_ok=True)
        if differ:
            with atomic(path / UNPADDED) as unpadded:
                write_tensors(unpadded, padded(adapter, None, scale), {"format": "mlx"})
        else:
            (path / UNPADDED).unlink(missing_ok=True)
        write_json(path / CONFIG, config)
        write_json(path / OPTIQ_CONFIG, optiq)
        write_card(path, adapter, about)


def step_of(path: Path) -> int | None:
    """Returns the step at which one of our adapters was saved, or None if it is not recorded."""
    return ours(_config_in(path)).get("step")


def prompting_of(path: Path | None) -> Prompting:
    """Returns how prompts are rendered for the adapter in a folder, or the default if this is not
    recorded."""
    return Prompting.of(ours(_config_in(path)) if path else {})


def _config_in(path: Path) -> dict[str, Any]:
    """Returns the configuration in the folder, or an empty dict if none can be read."""
    try:
        return read_json(path / CONFIG)
    except InputError:
        return {}
