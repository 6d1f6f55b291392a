"""Writes adapter folders in the formats of mlx-lm and PEFT, and loads the models in
transformers."""

import json

import mlx.core as mx
import numpy as np

from mlx_segtrain.lora import shapes
from mlx_segtrain.models import load_model

RANK, SCALE = 4, 1.5


Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


MLX_LM = {
    "fine_tune_type": "lora",
    "num_layers": -1,
    "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": None},
}


PEFT = {
    **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base"},
    **{"r": RANK, "lora_alpha": RANK * SCALE, "lora_dropout": 0.05, "bias": "none"},
    **{"use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}},
    **{"init_lora_weights": True, "modules_to_save": None, "target_parameters": None},
    "target_modules": ["q_proj", "down_proj"],
}


def factors_of(chain, ranks):
    """Returns random LoRA factors (a, b) for each path, with values that bfloat16 can represent."""
    mx.random.seed(7)
    return {
        path: tuple(
            (0.3 * mx.random.normal(shape)).astype(mx.bfloat16).astype(mx.float32)
            for shape in shapes(chain.linears[path], rank)
        )
        for path, rank in ranks.items()
    }


def write(folder, tensors, config, weights="adapters.safetensors", optiq=None):
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / weights), tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if optiq:
        (folder / "optiq_lora_config.json").write_text(json.dumps(optiq))
    return folder


def write_mlx(folder, factors, config=MLX_LM, *, dtype=mx.float32, optiq=None):
    tensors = {}
    for path, (a, b) in factors.items():
        tensors |= {f"{path}.lora_a": a.astype(dtype), f"{path}.lora_b": b.astype(dtype)}
    return write(folder, tensors, config, optiq=optiq)


def write_peft(folder, factors, more=None, **config):
    tensors = dict(more or {})
    for path, (a, b) in factors.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = mx.contiguous(a.T)
        tensors[f"base_model.model.{path}.lora_B.weight"] = mx.contiguous(b.T)
    return write(folder, tensors, {**PEFT, **config}, "adapter_model.safetensors")


TOKENS = [[1, 5, 9, 200, 17, 33, 80, 81]]


def dense_weights(model_dir):
    """Returns the weights that mlx-lm uses, dequantized to float32, by name."""
    model, _ = load_model(model_dir)
    found = {}
    for path, module in model.named_modules():
        for name, x in module.items():
            if not isinstance(x, mx.array) or name in ("scales", "biases") or name[0] == "_":
                continue
            if name == "weight" and "scales" in module:
                how = (module.group_size, module.bits, module.mode)
                x = mx.dequantize(x, module["scales"], module.get("biases"), *how)
            found[f"{path}.{name}" if path else name] = np.array(x.astype(mx.float32))
    return found


def in_transformers(hf, model_dir):
    """Loads the model in transformers with the weights that mlx-lm uses."""
    config = json.loads((model_dir / "config.json").read_text())
    config.pop("quantization", None)
    if config["model_type"] == "llama":
        return hf.llama(config, dense_weights(model_dir))
    return hf.hf_model(config["model_type"], config, dense_weights(model_dir)).eval()


def peft_logits(hf, model_dir, folder, tokens=TOKENS):
    """Returns the logits that transformers computes with the adapter in `folder`, loaded by
    PEFT."""
    return mx.array(hf.logits_with_adapter(in_transformers(hf, model_dir), folder, tokens))
