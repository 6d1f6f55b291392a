"""Tiny models with random weights, on disk as mlx-lm and transformers read them."""

import importlib
import importlib.util
import json
import os
import re
import resource
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import settings
from mlx.utils import tree_flatten

import tiny_models

# What a terminal or an account on this machine has set is not what the tests are about, nor their
# children: widths, colours, settings of a hub or a tracker.
OURS = (
    r"COLUMNS|LINES|TERM|COLORTERM|FORCE_COLOR|NO_COLOR|HF_.*|WANDB_.*"
    r"|MLX_SEGTRAIN_(TOKEN|MEM_LOG)"
)
for name in [name for name in os.environ if re.fullmatch(OURS, name)]:
    del os.environ[name]

# The CPU is what every machine has; DEVICE=gpu runs the same tests there.
mx.set_default_device(mx.Device(getattr(mx, os.environ.get("DEVICE", "cpu"))))

# How long an example takes depends on what else the machine does.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

VOCABULARY = 300
#: Bytes of address space of tests that attack, and of their servers.
MOST_OF_ATTACKS = 24 << 30


def write_tokenizer(path: Path) -> None:
    """Byte-level tokens (256 of them), <s> </s> <|im_start|> <|im_end|>, and a ChatML template."""
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
    """A model folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    write_tokenizer(path)
    return path


def write_llama(path: Path, *, bits=None, mixed=False, layers=3, tied=True, seed=0, **changes):
    """A random Llama of 3 layers, width 64, 4 heads of 16 and 2 for keys."""
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


def write_tiny(path: Path, family: str, bits_of=lambda name: 4) -> Path:
    """A tiny random model of any family of mlx-lm, quantized in groups of 32 where that fits."""
    config = tiny_models.config(family, vocab_size=VOCABULARY)
    model = tiny_models.build(family, vocab_size=VOCABULARY)
    layers = {}

    def quantization(name, module):
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
            return False
        layers[name] = {"group_size": 32, "bits": bits_of(name)}
        return layers[name]

    nn.quantize(model, 32, 4, class_predicate=quantization)
    config["quantization"] = {"group_size": 32, "bits": 4, **layers}
    return write_model(path, config, model)


def write_rows(path: Path, n=24, name="train.jsonl"):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Count to {i}."},
                {"role": "assistant", "content": " ".join(str(j) for j in range(1, i % 9 + 2))},
            ]
        }
        for i in range(n)
    ]
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load_peers():
    """hf_peers.py, where torch and PEFT are installed; with PEERS=1 they have to be."""
    missing = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("PEERS", "0") in ("", "0"):
        pytest.skip(
            f"{' and '.join(missing)} not installed: `make test PEERS=1` installs what we compare "
            "with, and runs this too"
        )
    return importlib.import_module("hf_peers")


@pytest.fixture(scope="session")
def hf():
    return load_peers()


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def llama4(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / "llama4", bits=4)


@pytest.fixture(scope="session")
def llama_mixed(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / "mixed", bits=4, mixed=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_rows(path)
    return write_rows(path, 6, "valid.jsonl")


@pytest.fixture(scope="module", autouse=True)
def bounded(request):
    """An attack that succeeds takes memory without end: not this machine's."""
    if "hostile" not in request.path.parts:
        yield
        return
    from mlx_segtrain.serving.confined.child import set_limit

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    set_limit(resource.RLIMIT_AS, MOST_OF_ATTACKS)
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
