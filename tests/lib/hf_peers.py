"""Computes reference logits, losses and LoRA gradients with transformers and PEFT, in float32 on
the CPU.

Only this file imports torch and PEFT; tests get this module through the fixture `hf`.
"""

import importlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    PretrainedConfig,
)

#: For each family, a function that converts mlx-lm's arguments to fields of a transformers config.
CONFIG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "gemma2": lambda args: {
        "layer_types": ["full_attention"] * args["num_hidden_layers"],  # mlx-lm has no window
        "query_pre_attn_scalar": int(args["query_pre_attn_scalar"]),
    },
    "gemma3_text": lambda args: {"query_pre_attn_scalar": int(args["query_pre_attn_scalar"])},
    "gemma4_text": lambda args: {
        "layer_types": [*args["layer_types"]],  # a copy, because transformers modifies the list
        "global_head_dim": args["global_head_dim"] or args["head_dim"],
    },
}

#: Tensors of transformers that concatenate tensors of mlx-lm along the second-to-last axis. Maps
#: the end of a tensor's name in transformers to the ends of the parts' names in mlx-lm.
JOINED: dict[str, tuple[str, ...]] = {
    "experts.gate_up_proj": (
        "experts.switch_glu.gate_proj.weight",
        "experts.switch_glu.up_proj.weight",
    ),
    "experts.down_proj": ("experts.switch_glu.down_proj.weight",),
}


def hf_config(family: str, config: dict[str, Any], tied: bool) -> PretrainedConfig:
    """Returns the transformers config. Fields missing from `config` get mlx-lm's defaults."""
    args = asdict(importlib.import_module(f"mlx_lm.models.{family}").ModelArgs.from_dict(config))
    given = {key: value for key, value in args.items() if value is not None}
    given |= CONFIG[family](args) if family in CONFIG else {}
    given |= {"model_type": family, "tie_word_embeddings": tied}
    given |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    result = AutoConfig.for_model(**given, use_cache=False)
    windows = "sliding_attention" in (args.get("layer_types") or [])
    if args.get("rope_traditional") or (windows and not family.startswith("gemma")):
        raise ValueError(f"transformers has no {family} with rope_traditional or sliding layers")
    if windows and args["layer_types"] != result.layer_types:
        raise ValueError(f"transformers computes different layer_types: {result.layer_types}")
    return result


def hf_weights(weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Returns the parameters of an mlx-lm model under their names in transformers."""
    left = dict(weights)
    for name, (first, *rest) in JOINED.items():
        for key in [key for key in left if key.endswith(first)]:
            prefix = key.removesuffix(first)
            parts = [left.pop(prefix + part) for part in (first, *rest)]
            left[prefix + name] = np.concatenate(parts, axis=-2)
    left.setdefault("lm_head.weight", left["model.embed_tokens.weight"])
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in left.items()}


def hf_model(family: str, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Any:
    """Returns the transformers model with the weights of an mlx-lm model."""
    model = AutoModelForCausalLM.from_config(
        hf_config(family, config, tied="lm_head.weight" not in weights),
        attn_implementation="eager",
        dtype=torch.float32,
    )
    model.load_state_dict(hf_weights(weights), strict=True)
    return model


def llama(config: dict[str, Any], weights: dict[str, np.ndarray]) -> Any:
    """Returns a Llama configured with the fields of config.json that transformers supports."""
    known = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    known += ("num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size", "rope_theta")
    known += ("max_position_embeddings", "tie_word_embeddings")
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**{key: config[key] for key in known}),
        attn_implementation="eager",
        dtype=torch.float32,
    )
    model.load_state_dict(hf_weights(weights), strict=True)
    return model.eval()


def gemma3_with_images(text_config: dict[str, Any]) -> Any:
    """Returns a random multimodal Gemma 3 whose text model has this config."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(1)
    config = Gemma3Config(text_config=text_config, vision_config=vision)
    return Gemma3ForConditionalGeneration(config).eval()


def logits_of(folder: Path, tokens: list[list[int]]) -> np.ndarray:
    """Returns the float32 logits [B, T, V] of the model in a folder, loaded by transformers."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


def logits_with_adapter(base: Any, folder: Path, tokens: list[list[int]]) -> np.ndarray:
    """Returns the logits [B, T, V] of a model with the folder's adapter, loaded by PEFT."""
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def update_of(base: Any, folder: Path, path: str) -> np.ndarray:
    """Returns the update [out, in] that the folder's adapter adds to a linear layer's weight in
    PEFT."""
    linear = PeftModel.from_pretrained(base, folder).base_model.model.get_submodule(path)
    weight = linear.lora_B["default"].weight @ linear.lora_A["default"].weight
    return (linear.scaling["default"] * weight).detach().numpy()


def saved_by_peft(folder: Path, base: Any, tokens: np.ndarray, **how: Any) -> np.ndarray:
    """Saves a PEFT adapter with non-zero B and returns the logits [B, T, V] of the adapted
    model."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**how)).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                x.normal_(0, 0.1, generator=draw)
            if "magnitude" in name:
                x.mul_(torch.empty_like(x).uniform_(0.8, 1.2, generator=draw))
        logits = model(torch.tensor(tokens)).logits.numpy()
    model.save_pretrained(folder)
    return logits


def hf_loss_and_grads(
    family: str,
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    loss_weights: np.ndarray,
    lora: dict[str, tuple[np.ndarray, np.ndarray]],
    scale: float,
) -> tuple[float, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Returns the weighted mean cross-entropy, and (dA, dB) for each layer in `lora`."""
    model = hf_model(family, config, weights)
    ranks = {path: a.shape[1] for path, (a, _) in lora.items()}
    peft_config = LoraConfig(
        target_modules=list(lora),
        rank_pattern=ranks,
        alpha_pattern={path: scale * rank for path, rank in ranks.items()},
        lora_dropout=0.0,
    )
    peers = get_peft_model(model, peft_config).eval()
    factors = {}
    for path, pair in lora.items():
        linear = model.get_submodule(path)
        factors[path] = [linear.lora_A["default"].weight, linear.lora_B["default"].weight]
        with torch.no_grad():
            for parameter, value in zip(factors[path], pair, strict=True):
                parameter.copy_(torch.tensor(value.T))

    ids = torch.tensor(tokens, dtype=torch.long)
    logits = peers(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    shares = torch.tensor(loss_weights[:, 1:], dtype=torch.float32).flatten()
    loss = (losses * shares).sum() / shares.sum()
    loss.backward()
    grads = {path: (a.grad.T.numpy(), b.grad.T.numpy()) for path, (a, b) in factors.items()}
    return loss.item(), grads


def write_scorer(folder: Path, seed: int = 0, labels: int = 1, **changes: Any) -> Any:
    """Writes a random Llama for sequence classification to a folder, and returns the model."""
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(seed)
    own = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 160, "vocab_size": 300}
    own |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_labels": labels,
    }
    own |= {"max_position_embeddings": 4096, "pad_token_id": 259, "eos_token_id": 259, **changes}
    model = LlamaForSequenceClassification(LlamaConfig(**own)).eval()
    model.save_pretrained(folder)
    return model


def scores_of(model: Any, rows: list[list[int]]) -> np.ndarray:
    """Returns the scores of rows of tokens, computing each row separately."""
    with torch.no_grad():
        found = [model(torch.tensor([row])).logits[0, 0].item() for row in rows]
    return np.array(found)
