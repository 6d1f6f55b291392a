"""Tests reading adapters of other tools: every format gives the same factors, unsupported adapters
are refused, and adapters from mlx-lm give the same logits."""

import math
import struct

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import save_config

import mlx_segtrain
from lib.adapter_files import (
    DOWN1,
    MLX_LM,
    Q0,
    RANK,
    SCALE,
    factors_of,
    write,
    write_mlx,
    write_peft,
)
from lib.folders import write_tiny
from lib.oracle import assert_close
from mlx_segtrain import InputError, TrainConfig
from mlx_segtrain.adapters import About, ranks_in, read_adapter, write_adapter
from mlx_segtrain.adapters.conversion import import_
from mlx_segtrain.lora import Adapter
from mlx_segtrain.models import chain_of, load_base

TOKENS = mx.array([[1, 5, 9, 200, 17, 33]])


@pytest.fixture(scope="module")
def chain(llama):
    return chain_of(load_base(llama)[0])


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory):
    """Writes a multimodal model that contains a text model, and returns its folder."""
    return write_tiny(tmp_path_factory.mktemp("models") / "gemma4", "gemma4")


def write_ours(folder, factors):
    config = TrainConfig(model_dir="m", data_dir="d", adapter_path=folder)
    write_adapter(folder, Adapter(factors, dict.fromkeys(factors, SCALE)), About.of(config))
    return folder


def without_scale(**instead):
    return {"fine_tune_type": "lora", "num_layers": -1, **instead}


FORMATS = {
    "mlx-lm": write_mlx,
    "mlx-lm in bfloat16": lambda *to: write_mlx(*to, dtype=mx.bfloat16),
    "scale at the top": lambda *to: write_mlx(*to, without_scale(scale=SCALE)),
    "alpha over r": lambda *to: write_mlx(*to, without_scale(lora_alpha=RANK * SCALE, r=RANK)),
    "PEFT": write_peft,
    "ours": write_ours,
}


@pytest.fixture(scope="module")
def expected_logits(llama, chain, tmp_path_factory):
    """Returns the logits that stock mlx-lm computes with an adapter in its own format."""
    factors = factors_of(chain, dict.fromkeys(chain.linears, RANK))
    folder = write_mlx(tmp_path_factory.mktemp("adapters") / "stock", factors)
    return mlx_lm.load(str(llama), adapter_path=str(folder))[0](TOKENS)


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_factors_in_every_format(form, llama, chain, expected_logits, tmp_path):
    ranks = dict.fromkeys(chain.linears, RANK)
    factors = factors_of(chain, ranks)
    folder = FORMATS[form](tmp_path / "a", factors)
    adapter = read_adapter(folder, chain)
    assert adapter.scales == dict.fromkeys(factors, SCALE)
    assert adapter.tensors.keys() == factors.keys()
    for path, pair in adapter.tensors.items():
        for got, want in zip(pair, factors[path], strict=True):
            assert got.dtype == mx.float32 and mx.array_equal(got, want)
    assert ranks_in(folder) == ranks
    logits = mlx_segtrain.load(llama, folder)[0](TOKENS)
    assert_close("logits", logits, expected_logits, 1e-5)
    assert mx.abs(logits - mlx_segtrain.load(llama)[0](TOKENS)).max() > 0.1


def test_of_ours_every_linear_has_its_own_rank(chain, tmp_path):
    ranks = {Q0: 2, DOWN1: 8}
    folder = write_ours(tmp_path / "a", factors_of(chain, ranks))
    assert mx.load(str(folder / "adapters.safetensors"))[f"{Q0}.lora_a"].shape[1] == 8
    assert read_adapter(folder, chain).ranks == ranks == ranks_in(folder)


# ---- multipliers


@pytest.mark.parametrize(
    "config,scale",
    [
        ({"lora_parameters": {"scale": 3.0}, "scale": 5.0, "lora_alpha": 7, "r": 2}, 3.0),
        ({"lora_parameters": {"rank": 2}, "scale": 5.0, "lora_alpha": 7, "r": 2}, 5.0),
        ({"lora_parameters": None, "scale": None, "lora_alpha": 7, "r": 2}, 3.5),
    ],
)
def test_where_the_scale_stands(config, scale, chain, tmp_path):
    folder = write_mlx(tmp_path, factors_of(chain, {Q0: 2, DOWN1: 8}), config)
    assert read_adapter(folder, chain).scales == {Q0: scale, DOWN1: scale}


@pytest.mark.parametrize(
    "config,optiq",
    [
        ({"scale": SCALE, "rs_lora": True}, None),
        ({"lora_parameters": {"scale": SCALE, "rs_lora": True}}, None),
        (MLX_LM, {"rs_lora": True}),
        (MLX_LM, {"lora_parameters": {"rs_lora": True}}),
    ],
)
def test_rs_lora_is_over_the_root_of_each_rank(config, optiq, chain, tmp_path):
    factors = factors_of(chain, {Q0: 2, DOWN1: 8})
    folder = write_mlx(tmp_path / "a", factors, config, optiq=optiq)
    want = {Q0: SCALE / math.sqrt(2), DOWN1: SCALE / math.sqrt(8)}
    assert read_adapter(folder, chain).scales == pytest.approx(want)
    # In our adapters, the scale or B already includes rsLoRA's factor 1/√rank.
    ours = write_mlx(tmp_path / "b", factors, {**config, "segtrain": {}}, optiq=optiq)
    assert read_adapter(ours, chain).scales == {Q0: SCALE, DOWN1: SCALE}


K0, Q1 = "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "patterns,ranks,alphas",
    [
        ({"rank_pattern": {"q_proj": 2}}, (2, 4, 2), (6, 6, 6)),
        # PEFT uses the first pattern that matches the whole path or the end of the path after a
        # dot. "roj" and "0.self_attn" match neither.
        (
            {"rank_pattern": {"roj": 9, "0.self_attn": 9, r"layers\.1\..*": 8, "q_proj": 2}},
            (2, 4, 8),
            (6, 6, 6),
        ),
        ({"alpha_pattern": {"^model.layers.0.self_attn.(q|k)_proj": 20}}, (4, 4, 4), (20, 20, 6)),
        ({"alpha_pattern": {"^layers.0.self_attn.q_proj": 20}}, (4, 4, 4), (6, 6, 6)),
        (
            {"rank_pattern": {"k_proj": 8}, "alpha_pattern": {"1.self_attn.q_proj": 5}},
            (4, 8, 4),
            (6, 6, 5),
        ),
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_by_pattern(patterns, ranks, alphas, rslora, chain, tmp_path):
    paths = (Q0, K0, Q1)
    factors = factors_of(chain, dict(zip(paths, ranks, strict=True)))
    adapter = read_adapter(write_peft(tmp_path, factors, **patterns, use_rslora=rslora), chain)
    over = [math.sqrt(rank) if rslora else rank for rank in ranks]
    assert [adapter.scales[p] for p in paths] == [a / x for a, x in zip(alphas, over, strict=True)]
    assert tuple(adapter.ranks[p] for p in paths) == ranks


# ---- names


@pytest.mark.parametrize(
    "stored", ["language_model.model.layers", "model.language_model.layers", "model.layers"]
)
def test_a_text_model_stands_alone_or_in_a_larger_one(stored, chain, gemma4, tmp_path):
    larger = chain_of(load_base(gemma4)[0])
    inner = {"language_model.model.layers": larger, "model.layers": chain}
    for prefix, model in inner.items():
        path = f"{prefix}.0.self_attn.q_proj"
        factors = factors_of(model, {path: RANK})
        renamed = {path.replace(prefix, stored): factors[path]}
        pattern = {f"^{stored}.0.self_attn.q_proj": 20}  # the pattern matches the stored path
        for folder, scale in (
            (write_mlx(tmp_path / prefix / "mlx", renamed), SCALE),
            (write_peft(tmp_path / prefix / "peft", renamed, alpha_pattern=pattern), 20 / RANK),
        ):
            adapter = read_adapter(folder, model)
            assert adapter.scales == {path: scale}
            assert mx.array_equal(adapter.tensors[path][1], factors[path][1])
            known = stored.replace("model.language_model", "language_model.model")
            assert ranks_in(folder) == {f"{known}.0.self_attn.q_proj": RANK}


def test_a_file_that_is_cut_is_not_read(chain, tmp_path):
    ranks = {Q0: 2, DOWN1: 8}
    for folder in (
        write_mlx(tmp_path / "mlx", factors_of(chain, ranks)),
        write_peft(tmp_path / "peft", factors_of(chain, ranks)),
    ):
        assert ranks_in(folder) == ranks
        (weights,) = folder.glob("*.safetensors")
        whole = weights.read_bytes()
        weights.write_bytes(whole[: 8 + struct.unpack("<Q", whole[:8])[0]])
        says(folder, chain, "not a readable safetensors file: its header describes")


# ---- refused adapters

REFUSED = {
    "biases": ({"bias": "lora_only"}, r"adapters with biases \(bias lora_only\) are not supported"),
    "modules": (
        {"modules_to_save": ["lm_head"]},
        r"whole modules \(modules_to_save\) are not supported",
    ),
    "dora": ({"use_dora": True}, "has lora_a, lora_b but no magnitudes"),
    "parameters": ({"target_parameters": ["mlp.experts.down_proj"]}, r"\(target_parameters\)"),
    "type": ({"peft_type": "IA3"}, "adapters of peft_type IA3 are not supported"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, r"\(aLoRA\) are not supported"),
    "layers": ({"layer_replication": [[0, 2], [1, 3]]}, r"\(layer_replication\) are not supported"),
    **{
        start: ({"init_lora_weights": start}, rf"modified base \(init_lora_weights {start}\)")
        for start in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")
    },
}


def says(folder, chain, message, ranks_too=True):
    """Checks that reading the adapter raises InputError with one sentence that names the folder."""
    readers = [lambda: read_adapter(folder, chain)] + [lambda: ranks_in(folder)] * ranks_too
    for read in readers:
        with pytest.raises(InputError, match=message) as error:
            read()
        text = str(error.value)
        assert str(folder) in text and "\n" not in text


@pytest.mark.parametrize("changes,message", REFUSED.values(), ids=REFUSED)
def test_what_peft_has_and_we_have_not(changes, message, chain, tmp_path):
    says(write_peft(tmp_path, factors_of(chain, {Q0: RANK}), **changes), chain, message)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica", "eva"])
def test_starts_that_leave_the_base_as_it_is(start, chain, tmp_path):
    folder = write_peft(tmp_path, factors_of(chain, {Q0: RANK}), init_lora_weights=start)
    assert read_adapter(folder, chain).ranks == {Q0: RANK}


@pytest.mark.parametrize(
    "name,message",
    [
        (f"{Q0}.lora_magnitude_vector", "has magnitudes, but adapter_config.json does not"),
        (f"{Q0}.lora_magnitude", "lora_magnitude' is not a LoRA factor"),
        ("model.embed_tokens.lora_embedding_A", "has lora_a but no lora_b"),
        ("lm_head.weight", "tensor 'base_model.model.lm_head.weight' is not a LoRA factor"),
        (f"{Q0}.lora_B.bias", "lora_B.bias' is not a LoRA factor"),
    ],
)
def test_tensors_that_are_no_factors(name, message, chain, tmp_path):
    more = {f"base_model.model.{name}": mx.ones((4, 4))}
    says(write_peft(tmp_path, factors_of(chain, {Q0: RANK}), more), chain, message)


@pytest.mark.parametrize(
    "kind,message",
    [
        ("dora", "has lora_a, lora_b but no magnitudes"),
        ("full", r"fully trained weights \(fine_tune_type full\) are not supported"),
    ],
)
def test_what_mlx_lm_has_and_we_have_not(kind, message, chain, tmp_path):
    config = {**MLX_LM, "fine_tune_type": kind}
    says(write_mlx(tmp_path, factors_of(chain, {Q0: RANK}), config), chain, message)


def test_folders_that_are_no_adapter(chain, tmp_path):
    says(tmp_path / "none", chain, "is not a folder: pass the path of an adapter's folder")
    says(tmp_path, chain, "neither adapters.safetensors nor adapter_model.safetensors")
    folder = write_mlx(tmp_path / "a", factors_of(chain, {Q0: RANK}))
    config = folder / "adapter_config.json"
    config.write_text("{")
    says(folder, chain, "cannot be read as JSON")
    config.write_text("[]")
    says(folder, chain, "JSON object")
    config.unlink()
    says(folder, chain, "contains no adapter_config.json")
    says(write(tmp_path / "b", {}, MLX_LM), chain, "contains no lora_a")


@pytest.mark.parametrize(
    "config,message",
    [
        (without_scale(), r"does not set the LoRA scale \(lora_parameters\.scale"),
        (without_scale(lora_alpha=8), r"lora_alpha and r\)"),
        (without_scale(lora_alpha=8, r=0), r"lora_alpha and r\)"),
        (without_scale(scale="2"), "scale must be a finite number; got '2'"),
        (without_scale(scale=True), "scale must be a finite number; got True"),
        (without_scale(scale=math.nan), "scale must be a finite number; got nan"),
        (without_scale(lora_parameters=[20]), r"lora_parameters must be a JSON object"),
    ],
)
def test_scales_that_are_none(config, message, chain, tmp_path):
    folder = write_mlx(tmp_path, factors_of(chain, {Q0: RANK}), config)
    says(folder, chain, message, ranks_too=False)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"r": None}, "does not set r, which"),
        ({"lora_alpha": None}, "does not set lora_alpha, which"),
        ({"r": 8}, "has rank 4, but r and rank_pattern in adapter_config.json say 8"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern has a pattern that RE2 does not"),
        ({"alpha_pattern": {"q_proj": "a"}}, "q_proj must be a finite number; got 'a'"),
        ({"alpha_pattern": 8}, "alpha_pattern must be a JSON object; got 8"),
    ],
)
def test_configurations_of_peft_that_make_no_sense(changes, message, chain, tmp_path):
    folder = write_peft(tmp_path, factors_of(chain, {Q0: RANK}), **changes)
    says(folder, chain, message, ranks_too=False)


def test_factors_that_make_no_sense(chain, tmp_path):
    factors = factors_of(chain, {Q0: RANK})
    a, b = factors[Q0]
    for name, pair in {"one dimension": (a[0], b), "no rank": (a[:, :0], b[:0])}.items():
        says(write_mlx(tmp_path / name, {Q0: pair}), chain, "which does not determine a rank")
    twice = {**factors, f"language_model.{Q0}": factors[Q0]}
    says(write_mlx(tmp_path / "twice", twice), chain, "contains two updates", ranks_too=False)
    half = {f"base_model.model.{DOWN1}.lora_B.weight": mx.ones((64, 4))}
    says(write_peft(tmp_path / "half", factors, half), chain, f"{DOWN1}' has lora_b but no lora_a")
    other = {f"{Q0}x": factors[Q0]}
    says(
        write_peft(tmp_path / "other", other),
        chain,
        "is not a layer of this model",
        ranks_too=False,
    )
    wide = {Q0: (mx.ones((65, RANK)), b)}
    message = r"shape \(65, 4\) and lora_b of shape \(4, 64\), but the model needs \(64, 4\)"
    says(write_peft(tmp_path / "wide", wide), chain, message, ranks_too=False)


# ---- adapters written by mlx-lm


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("fixture,num_layers", [("llama4", 2), ("gemma4", -1)])
def test_an_adapter_that_mlx_lm_made(fixture, num_layers, dtype, tmp_path, request):
    """Writes an adapter as `mlx_lm.lora` does. Its configuration has no `keys`, so every linear
    layer is adapted."""
    model_dir = request.getfixturevalue(fixture)
    model, _ = mlx_lm.load(str(model_dir))
    model.freeze()
    linear_to_lora_layers(model, num_layers, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    mx.random.seed(3)
    factors = {
        name: (x if name.endswith("lora_a") else 0.02 * mx.random.normal(x.shape)).astype(dtype)
        for name, x in tree_flatten(model.trainable_parameters())
    }
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), factors)
    lora_parameters = {"rank": 8, "dropout": 0.0, "scale": 20.0}
    args = {"model": str(model_dir), "fine_tune_type": "lora", "num_layers": num_layers}
    save_config({**args, "lora_parameters": lora_parameters}, tmp_path / "adapter_config.json")
    own = mlx_segtrain.load(model_dir, tmp_path)[0](TOKENS)
    stock = mlx_lm.load(str(model_dir), adapter_path=str(tmp_path))[0](TOKENS)
    assert_close("logits", own, stock, 1e-5)
    assert mx.abs(own - mlx_segtrain.load(model_dir)[0](TOKENS)).max() > 0.1
    assert ranks_in(tmp_path).keys() == {name.rsplit(".", 1)[0] for name in factors}
    assert import_(tmp_path, tmp_path / "ours").difference == 0
    imported = mlx_segtrain.load(model_dir, tmp_path / "ours")[0](TOKENS)
    assert_close("imported", imported, stock, 1e-5)
