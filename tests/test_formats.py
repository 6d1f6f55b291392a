"""Tests that mlx-lm and PEFT load our adapters, that their adapters can be imported, and that
exported adapters can be imported again."""

import functools
import json
import math
import shutil

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_map

import mlx_segtrain
from lib import tiny_models
from lib.adapter_files import TOKENS, in_transformers, peft_logits
from lib.folders import write_first_layers, write_llama, write_rows, write_tiny
from lib.oracle import assert_close
from lib.runs import config_of
from mlx_segtrain import InputError, lora, train
from mlx_segtrain.adapters import read_adapter, read_stored, write_adapter
from mlx_segtrain.adapters.conversion import compare, export, import_
from mlx_segtrain.adapters.peft import hf_path, names_of
from mlx_segtrain.adapters.writing import About
from mlx_segtrain.commands.demo import snapshot
from mlx_segtrain.files import cache_dir
from mlx_segtrain.lora.folder import PEFT_WEIGHTS
from mlx_segtrain.models import chain_of, load_base, load_model

pytestmark = pytest.mark.acceptance

#: For each run: the model's name and the run's options.
RUNS = {
    "constant": ("llama", {"rank_scaling": "constant"}),
    "by bits": ("mixed", {}),
    "rslora": ("mixed", {"rs_lora": True, "scale": 3.0}),
    "dora": ("llama4", {"use_dora": True}),
    "last layer": ("llama4", {"num_layers": 1, "target_modules": ["q_proj", "down_proj"]}),
    "head": ("untied", {"target_modules": ["v_proj", "lm_head"]}),
    "embedding": ("untied", {"target_modules": ["embed_tokens", "o_proj"]}),
    "gemma 4": ("gemma4_text", {}),
    "gemma 4, by bits": ("gemma4_mixed", {}),
    "gemma 4, dora": ("gemma4_text", {"use_dora": True}),
    "gemma 4, rslora": ("gemma4_mixed", {"rs_lora": True, "scale": 3.0}),
    "gemma 4, last layer": ("gemma4_text", {"num_layers": 1, "target_modules": ["q_proj"]}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, llama, llama4, llama_mixed):
    folder = tmp_path_factory.mktemp("bases")

    def bits(name):
        return 8 if "down_proj" in name else 4

    return {
        "llama": llama,
        "llama4": llama4,
        "mixed": llama_mixed,
        "untied": write_llama(folder / "untied", bits=4, tied=False),
        "gemma4_text": write_tiny(folder / "gemma4_text", "gemma4_text"),
        "gemma4_mixed": write_tiny(folder / "gemma4_mixed", "gemma4_text", bits),
    }


def trained(name, models, data, folder):
    model, how = RUNS[name]
    options = {"iters": 6, "learning_rate": 2e-2, **how}
    train(config_of(models[model], data, folder, **options))
    return models[model], folder


@pytest.fixture(scope="module")
def adapters(models, data, tmp_path_factory):
    """Returns a function that maps a run's name to its model and folder. Each run is trained once
    for all tests, so they must not change the folder."""
    place = tmp_path_factory.mktemp("adapters")
    return functools.cache(lambda name: trained(name, models, data, place / name))


@pytest.mark.parametrize("name", RUNS)
def test_a_trained_adapter_loads_in_mlx_lm(name, adapters, tmp_path):
    """mlx-lm computes the same logits as this package, both from the run's folder and from an
    export. Exports in both formats can be imported again."""
    model_dir, folder = adapters(name)
    tokens = mx.array(TOKENS)
    ours = mlx_segtrain.load(model_dir, folder)[0](tokens)
    plain = mlx_segtrain.load(model_dir)[0](tokens)
    assert mx.abs(ours - plain).max() > 1e-2
    stock, _ = mlx_lm.load(str(model_dir), adapter_path=str(folder))
    assert_close("mlx-lm", stock(tokens).astype(mx.float32), ours, 1e-4)

    done = export(folder, tmp_path / "mlx", "mlx-lm")
    assert done.difference == 0 and done.update > 1e-3
    stock, _ = mlx_lm.load(str(model_dir), adapter_path=str(tmp_path / "mlx"))
    assert_close("mlx-lm, exported", stock(tokens).astype(mx.float32), ours, 1e-4)

    done = export(folder, tmp_path / "peft", "peft", names="text")
    # The difference is a rounding error: PEFT computes the multiplier as alpha divided by the rank.
    assert done.difference <= 1e-6 * done.update
    for form in ("mlx", "peft"):
        import_(tmp_path / form, tmp_path / f"{form} again")
        again = mlx_segtrain.load(model_dir, tmp_path / f"{form} again")[0](tokens)
        # With padded ranks, sums are computed in a different order.
        assert_close(form, again, ours, 1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_trained_adapter_loads_in_peft(name, hf, adapters, tmp_path):
    model_dir, folder = adapters(name)
    ours = mlx_segtrain.load(model_dir, folder)[0](mx.array(TOKENS))
    export(folder, tmp_path / "peft", "peft", names="text")
    assert_close("PEFT", peft_logits(hf, model_dir, tmp_path / "peft"), ours, 1e-4)


#: The options of runs on SmolLM2, and the tokens of a text in its vocabulary.
SMOLLM2 = {
    "dora": {"use_dora": True},
    "rslora of the last layers": {"rs_lora": True, "num_layers": 4, "target_modules": ["q_proj"]},
}
TEXT = [[1, 504, 3575, 282, 4649, 314]]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Returns a function that maps a name in SMOLLM2 to the first layers of the model, the adapter,
    the PEFT export of the adapter, and our logits with the adapter."""
    place = tmp_path_factory.mktemp("smollm2")
    model_dir = write_first_layers(place / "few", snapshot.smollm2_snapshot(cache_dir()), 6)
    rows = write_rows(place / "data", 8)

    def make(name):
        # After one step, neither factor is zero, and magnitudes differ from those of the base.
        options = {"iters": 1, "rank": 4, "learning_rate": 5e-3, "max_seq_length": 48}
        train(config_of(model_dir, rows, place / name, **options, **SMOLLM2[name]))
        done = export(place / name, place / f"{name} peft", "peft")
        assert done.difference <= 1e-6 * done.update
        assert done.linears == (4 if "num_layers" in SMOLLM2[name] else 42)
        ours = mlx_segtrain.load(model_dir, place / name)[0](mx.array(TEXT))
        return model_dir, place / name, place / f"{name} peft", ours

    return functools.cache(make)


@pytest.mark.parametrize("name", SMOLLM2)
def test_an_adapter_of_smollm2_loads_in_mlx_lm(name, smollm2):
    model_dir, folder, _, ours = smollm2(name)
    tokens = mx.array(TEXT)
    assert mx.abs(ours - load_model(model_dir)[0](tokens)).max() > 1e-2
    stock, _ = mlx_lm.load(str(model_dir), adapter_path=str(folder))
    stock.update(tree_map(lambda x: in_float32(x), stock.parameters()))
    assert_close("mlx-lm", stock(tokens), ours, 1e-4)


@pytest.mark.parametrize("name", SMOLLM2)
def test_an_adapter_of_smollm2_loads_in_peft(name, hf, smollm2):
    model_dir, _, exported, ours = smollm2(name)
    assert_close("PEFT", peft_logits(hf, model_dir, exported, TEXT), ours, 1e-4)


def in_float32(x):
    """Converts floating-point arrays to float32, as our model loader does on a CPU."""
    return x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x


# ---- adapters from other tools


@pytest.mark.parametrize(
    "how",
    [
        {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 9},
        {"target_modules": r".*\.(k|v)_proj", "use_rslora": True, "lora_alpha": 5},
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 6},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 24},
        },
        {"target_modules": ["o_proj"], "use_dora": True},
        {"target_modules": ["o_proj"], "layers_to_transform": [1]},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
)
def test_an_adapter_that_peft_made_is_imported(how, hf, models, tmp_path):
    model_dir = models["untied"]
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **how}
    base = in_transformers(hf, model_dir)
    theirs = mx.array(hf.saved_by_peft(tmp_path / "theirs", base, np.array(TOKENS), **options))
    done = import_(tmp_path / "theirs", tmp_path / "ours", model_dir)
    assert done.difference <= 1e-6 * done.update
    ours = mlx_segtrain.load(model_dir, tmp_path / "ours")[0](mx.array(TOKENS))
    assert_close("logits", ours, theirs, 1e-4)
    stock, _ = mlx_lm.load(str(model_dir), adapter_path=str(tmp_path / "ours"))
    assert_close("mlx-lm", stock(mx.array(TOKENS)).astype(mx.float32), theirs, 1e-4)


def test_an_adapter_of_a_model_for_text_and_images(hf, tmp_path):
    """transformers and mlx-lm nest a multimodal model's text model in different ways."""
    text_config = {**tiny_models.config("gemma3_text"), "model_type": "gemma3_text"}
    base = hf.gemma3_with_images({**text_config, "query_pre_attn_scalar": 16})
    names = {name for name, _ in base.named_modules()}
    path = "language_model.model.layers.0.self_attn.q_proj"
    theirs = hf_path(path, "multimodal")
    assert theirs in names
    width, out = base.get_submodule(theirs).weight.shape[::-1]
    factors = mx.random.normal((width, 4)), mx.random.normal((4, out))
    write_adapter(tmp_path / "a", lora.Adapter({path: factors}, {path: 0.5}), About("base"))
    export(tmp_path / "a", tmp_path / "peft", "peft", names="multimodal")
    want = 0.5 * (factors[0] @ factors[1]).T
    assert_close("update", mx.array(hf.update_of(base, tmp_path / "peft", theirs)), want, 1e-5)


def test_names_of_a_model_for_text_and_images():
    path = "language_model.model.layers.0.self_attn.q_proj"
    assert names_of({"architectures": ["Gemma3ForConditionalGeneration"]}) == "multimodal"
    assert names_of({"architectures": ["Gemma3ForCausalLM"], "text_config": {}}) == "text"
    assert names_of({"text_config": {}}) == "multimodal" and names_of({}) == "text"
    assert hf_path(path, "text") == "model.layers.0.self_attn.q_proj"
    assert hf_path("language_model.lm_head", "multimodal") == "lm_head"


def test_what_peft_has_not(models, data, tmp_path):
    factors = mx.ones((2, 4, 8)), mx.ones((2, 8, 4))
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    write_adapter(tmp_path / "experts", lora.Adapter({path: factors}, {path: 1.0}), About("m"))
    with pytest.raises(InputError, match="stores all experts in one tensor"):
        export(tmp_path / "experts", tmp_path / "out", "peft")
    path = "transformer.h.0.attn.c_attn"
    pair = mx.ones((8, 4)), mx.ones((4, 8))
    write_adapter(tmp_path / "gpt2", lora.Adapter({path: pair}, {path: 1.0}), About("m"))
    with pytest.raises(InputError, match="its name in transformers is unknown"):
        export(tmp_path / "gpt2", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="already exists: choose another folder"):
        export(tmp_path / "gpt2", tmp_path / "experts", "mlx-lm")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("to", ["peft", "mlx-lm"])
def test_smaller_numbers_and_what_they_cost(to, dtype, adapters, tmp_path):
    _, folder = adapters("constant")
    done = export(folder, tmp_path / "out", to, dtype=dtype)
    assert 0 < done.difference < 0.02 * done.update
    stored = mx.load(str(next((tmp_path / "out").glob("*.safetensors"))))
    assert {x.dtype for x in stored.values()} == {getattr(mx, dtype)}


# ---- further training


def test_a_padded_adapter_trains_on_in_every_column(adapters, data, tmp_path):
    """Ranks 4 and 8 are both exported as rank 8, and the padding of both factors is trained."""
    model_dir, folder = adapters("by bits")
    export(folder, tmp_path / "mlx", "mlx-lm")
    tensors = mx.load(str(tmp_path / "mlx" / "adapters.safetensors"))
    own = read_stored(folder)
    assert {x.shape[1] for name, x in tensors.items() if name.endswith("a")} == {8}
    path = next(path for path, rank in own.ranks.items() if rank == 4)
    assert (
        not tensors[f"{path}.lora_b"][4:].any()
        and mx.abs(tensors[f"{path}.lora_a"][:, 4:]).min(0).max() > 0
    )
    options = {"warm_start": tmp_path / "mlx", "iters": 3, "optimizer": "sgd", "weight_decay": 0}
    train(config_of(model_dir, data, tmp_path / "b", **options))
    further = mx.load(str(tmp_path / "b" / "adapters.safetensors"))
    for name, x in further.items():
        axis = 0 if name.endswith("lora_a") else 1
        moved = mx.abs(x - tensors[name]).max(axis)
        # B's new rows change in the first step, and A's new columns in the second.
        assert (moved > 0).all(), name


# ---- GGUF


@pytest.mark.parametrize("name", ["by bits", "head", "last layer"])
def test_gguf(name, adapters, tmp_path):
    _, folder = adapters(name)
    done = export(folder, tmp_path / "out", "gguf")
    assert done.difference <= 1e-6 * done.update
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 0
    tensors = {x.name: np.array(x.data) for x in reader.tensors}
    own = read_stored(folder)
    assert len(tensors) == 2 * len(own.tensors)
    kinds = {"q_proj": "attn_q", "k_proj": "attn_k", "down_proj": "ffn_down", "v_proj": "attn_v"}
    for path, (a, b) in own.tensors.items():
        kind = path.rpartition(".")[2]
        if path == "lm_head":
            place = "output"
        elif kind in kinds:
            place = f"blk.{path.split('.')[2]}.{kinds[kind]}"
        else:
            continue
        delta = tensors[f"{place}.weight.lora_b"] @ tensors[f"{place}.weight.lora_a"]
        want = np.array(own.scales[path] * (a @ b).T)
        heads = {"q_proj": 4, "k_proj": 2}.get(kind)
        # In the GGUF file, the two halves of each head's rows are interleaved: row 2i is row i of
        # the first half, and row 2i + 1 is row i of the second half.
        if heads:
            half = want.shape[0] // heads // 2
            rows = [
                h * 2 * half + i + j * half
                for h in range(heads)
                for i in range(half)
                for j in (0, 1)
            ]
            want = want[rows]
        assert np.allclose(delta, want, atol=1e-6), path


def test_the_order_of_rows_is_that_of_the_demo_s_gguf():
    """`turn` produces the row order of SmolLM2's GGUF file, and with `back` it restores the
    original order."""
    from mlx_segtrain.adapters.gguf import turn

    rows = mx.arange(64.0)[:, None]
    assert mx.array_equal(turn(turn(rows, 4), 4, back=True), rows)
    assert turn(rows, 4)[:4, 0].tolist() == [0, 8, 1, 9]


def test_what_gguf_has_not(adapters, tmp_path):
    _, folder = adapters("gemma 4")
    with pytest.raises(
        InputError, match="adapters of gemma4_text models cannot be exported to GGUF"
    ):
        export(folder, tmp_path / "out", "gguf")
    _, folder = adapters("dora")
    with pytest.raises(InputError, match=r"llama.cpp does not support DoRA"):
        export(folder, tmp_path / "out", "gguf")
    (tmp_path / "c").mkdir()
    path = "model.layers.0.self_attn.q_proj"
    pair = mx.ones((8, 4)), mx.ones((4, 8))
    write_adapter(tmp_path / "c", lora.Adapter({path: pair}, {path: 1.0}), About("nowhere"))
    with pytest.raises(InputError, match="--to gguf requires the base"):
        export(tmp_path / "c", tmp_path / "out", "gguf")


# ---- the comparison with the source


def test_a_difference_is_seen():
    path = "model.layers.0.self_attn.q_proj"
    a, b = mx.random.normal((8, 4)), mx.random.normal((4, 6))
    one = lora.Adapter({path: (a, b)}, {path: 1.0})
    assert (
        compare(
            one, lora.Adapter({f"language_model.{path}": (a, b)}, {f"language_model.{path}": 1.0})
        )[1]
        == 0
    )
    update, difference = compare(one, lora.Adapter({path: (a, b)}, {path: 1.5}))
    assert math.isclose(difference, 0.5 * update, rel_tol=1e-5)
    with pytest.raises(InputError, match="does not adapt the same layers"):
        compare(one, lora.Adapter({}, {}))


def test_peft_s_embedding_adapters_are_read(models, tmp_path):
    model, _, _ = load_base(models["untied"])
    chain = chain_of(model)
    a, b = mx.random.normal((300, 4)), mx.random.normal((4, 64))
    tensors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": mx.contiguous(a.T),
        "base_model.model.model.embed_tokens.lora_embedding_B": mx.contiguous(b.T),
    }
    (tmp_path / "a").mkdir()
    mx.save_safetensors(str(tmp_path / "a" / PEFT_WEIGHTS), tensors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    found = read_adapter(tmp_path / "a", chain)
    assert all(map(mx.array_equal, found.tensors["model.embed_tokens"], (a, b)))


# ---- found by a review


def test_whether_the_head_is_the_embedding_must_be_known(models, tmp_path):
    pair = mx.ones((300, 4)), mx.ones((4, 64))
    adapter = lora.Adapter({"model.embed_tokens": pair}, {"model.embed_tokens": 1.0})
    write_adapter(tmp_path / "a", adapter, About("nowhere"))
    with pytest.raises(InputError, match="without the base model it is unknown"):
        export(tmp_path / "a", tmp_path / "out", "peft")
    for model in ("gemma4_text", "untied"):
        out = tmp_path / model
        export(tmp_path / "a", out, "peft", model_dir=models[model], names="text")
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["ensure_weight_tying"] is (model == "gemma4_text")
        assert ("lm_head" in config["target_modules"]) is (model == "gemma4_text")


def test_which_names_must_be_known(tmp_path):
    path = "language_model.model.layers.0.self_attn.q_proj"
    adapter = lora.Adapter({path: (mx.ones((8, 4)), mx.ones((4, 8)))}, {path: 1.0})
    write_adapter(tmp_path / "a", adapter, About(""))
    with pytest.raises(InputError, match="with --names"):
        export(tmp_path / "a", tmp_path / "out", "peft")


def test_unpadded_factors_of_an_earlier_adapter_are_not_read(adapters, tmp_path):
    """If a user continues training with mlx-lm in the same folder, mlx-lm updates only
    adapters.safetensors, so the file with the unpadded factors is outdated."""
    folder = shutil.copytree(adapters("by bits")[1], tmp_path / "a")
    assert set(read_stored(folder).ranks.values()) == {4, 8}
    file = folder / "adapters.safetensors"
    tensors = {name: 2 * x for name, x in mx.load(str(file)).items()}
    mx.save_safetensors(str(file), tensors)
    found = read_stored(folder)
    assert set(found.ranks.values()) == {8}
    path = next(iter(found.tensors))
    assert mx.array_equal(found.tensors[path][0], tensors[f"{path}.lora_a"])


def test_numbers_that_are_none_are_refused(adapters, tmp_path):
    folder = shutil.copytree(adapters("constant")[1], tmp_path / "a")
    file = folder / "adapters.safetensors"
    good = mx.load(str(file))
    name = next(name for name in good if name.endswith("lora_b"))
    mx.save_safetensors(str(file), good | {name: good[name] * math.nan})
    with pytest.raises(InputError, match="has factors with NaN or infinite values"):
        import_(folder, tmp_path / "out")
    mx.save_safetensors(str(file), good | {name: good[name] + 1e6})
    with pytest.raises(InputError, match=r"NaN or infinite|would change the adapter"):
        export(folder, tmp_path / "out", "peft", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_multiplier_of_nothing(tmp_path):
    path = "model.layers.0.self_attn.q_proj"
    adapter = lora.Adapter({path: (mx.ones((8, 4)), mx.ones((4, 8)))}, {path: 0.0})
    write_adapter(tmp_path / "a", adapter, About("m"))
    assert read_stored(tmp_path / "a").scales == {path: 0.0}
    assert export(tmp_path / "a", tmp_path / "out", "peft", names="text").update == 0


@pytest.mark.parametrize("out", ["file/x", "/proc/nowhere/x"])
def test_places_that_cannot_be_written(out, adapters, tmp_path):
    _, folder = adapters("constant")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        export(folder, tmp_path / out, "mlx-lm")


def test_a_readme_of_somebody_else_stays(models, data, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "README.md").write_text("mine")
    trained("constant", models, data, tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_text() == "mine"


def test_names_are_those_of_the_model_that_is_given(models, tmp_path):
    wrapped = write_tiny(tmp_path / "gemma4", "gemma4")
    chain = chain_of(load_base(wrapped)[0])
    path = next(path for path in chain.linears if path.endswith("q_proj"))
    shapes = lora.shapes(chain.linears[path], 4)
    bare = path.removeprefix("language_model.")
    adapter = lora.Adapter({bare: tuple(map(mx.ones, shapes))}, {bare: 0.1})
    write_adapter(tmp_path / "a", adapter, About("m"))
    import_(tmp_path / "a", tmp_path / "b", wrapped)
    assert set(read_stored(tmp_path / "b").tensors) == {path}
    mlx_lm.load(str(wrapped), adapter_path=str(tmp_path / "b"))


def test_dora_that_mlx_lm_cannot_load_is_told(data, tmp_path):
    model = write_llama(tmp_path / "six", bits=6)
    told = []
    train(config_of(model, data, tmp_path / "a", use_dora=True, iters=1), told.append)
    *_, text = [event["message"] for event in told if event["type"] == "warning"]
    assert text.startswith(
        "stock mlx-lm 0.32 cannot load DoRA adapters of layers with 3, 5 or 6 bits"
    )
