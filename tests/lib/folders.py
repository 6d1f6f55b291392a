"""Writes tiny random models and data to disk in the formats that mlx-lm and transformers read."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from lib import tiny_models

VOCABULARY = 300


def write_tokenizer(path: Path) -> None:
    """Writes a tokenizer with 256 byte-level tokens, the special tokens <s>, </s>, <|im_start|> and
    <|im_end|>, and a ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(path)


def write_model(path: Path, config: dict, model: nn.Module) -> Path:
    """Writes a model folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    write_tokenizer(path)
    return path


def write_llama(path: Path, *, bits=None, mixed=False, layers=3, tied=True, seed=0, **changes):
    """Writes a random Llama (width 64, 4 query heads of size 16, 2 key/value heads)."""
    from mlx_lm.models.llama import Model, ModelArgs

    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        **changes,
    }
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(config))
    if bits:
        overrides = {}

        def quant(name, module):
            if not hasattr(module, "to_quantized"):
                return False
            eight = mixed and "down_proj" in name
            if eight:
                overrides[name] = {"group_size": 32, "bits": 8}
            return {"group_size": 32, "bits": 8 if eight else bits}

        nn.quantize(model, group_size=32, bits=bits, class_predicate=quant)
        config["quantization"] = {"group_size": 32, "bits": bits, **overrides}
    return write_model(path, config, model)


def write_first_layers(path: Path, model_dir: Path, n: int) -> Path:
    """Copies a Llama model with only its first n layers, so that tests run faster."""
    shutil.copytree(model_dir, path, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": n}))
    weights = {}
    for key, x in mx.load(str(model_dir / "model.safetensors")).items():
        layer = re.search(r"\blayers\.(\d+)\.", key)
        if layer is None or int(layer[1]) < n:
            weights[key] = x
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    return path


def write_tiny(path: Path, family: str, bits_of=lambda name: 4, **changes) -> Path:
    """Writes a tiny random model of any mlx-lm family. Quantizes weights in groups of 32 where the
    width permits."""
    config = tiny_models.config(family, vocab_size=VOCABULARY, **changes)
    model = tiny_models.build(family, vocab_size=VOCABULARY, **changes)
    layers = {}

    def quantization(name, module):
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
            return False
        layers[name] = {"group_size": 32, "bits": bits_of(name)}
        return layers[name]

    nn.quantize(model, 32, 4, class_predicate=quantization)
    config["quantization"] = {"group_size": 32, "bits": 4, **layers}
    return write_model(path, config, model)


def write_rows(path: Path, n=24, name="train.jsonl", first=0):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Count to {i}."},
                {"role": "assistant", "content": " ".join(str(j) for j in range(1, i % 9 + 2))},
            ]
        }
        for i in range(first, first + n)
    ]
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(folder, n=12, valid=6):
    folder.mkdir(exist_ok=True)
    for name, first, count in (("train", 10, n), ("valid", 50, valid)):
        prompt = "Number {}, in a word, or in two or three if it must be so?"
        rows = [
            {
                "prompt": [{"role": "user", "content": prompt.format(i)}],
                "chosen": f"one {i}",
                "rejected": f"zebra crossing {i}",
            }
            for i in range(first, first + count)
        ]
        lines = [json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
