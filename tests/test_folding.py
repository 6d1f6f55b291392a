"""Tests merging adapters with each other and into their base model: exact results, and rounding
losses."""

import json
import shutil
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest

import mlx_segtrain
from lib.checks import needs_router_gradient
from lib.folders import write_first_layers, write_llama, write_rows, write_tiny
from lib.oracle import assert_close
from lib.runs import config_of
from mlx_segtrain import InputError, lora, train
from mlx_segtrain.adapters import folding, read_stored, write_adapter
from mlx_segtrain.adapters.folding import fold
from mlx_segtrain.adapters.merging import merge, weighted
from mlx_segtrain.adapters.writing import About
from mlx_segtrain.commands.demo import snapshot
from mlx_segtrain.files import cache_dir
from mlx_segtrain.models import adapting, chain_of, load_model

pytestmark = pytest.mark.acceptance

TOKENS = mx.array([[1, 5, 9, 200, 17, 33, 80, 81]])


def random_adapter(model_dir, ranks, size=0.05, seed=0, dora=False, scales=(0.5, 2.0)):
    """Returns a random adapter with the given ranks. The multipliers in `scales` are assigned to
    the layers in turn."""
    chain = chain_of(load_model(model_dir)[0])
    mx.random.seed(seed)
    fresh = adapting.init(chain, ranks, 1.0, seed, dora=dora)
    tensors = {
        path: (a, size * mx.random.normal(b.shape)) for path, (a, b) in fresh.tensors.items()
    }
    own = {path: scales[i % len(scales)] for i, path in enumerate(tensors)}
    lengths = {
        path: m * (1 + 0.1 * mx.random.uniform(shape=m.shape))
        for path, m in fresh.magnitudes.items()
    }
    return lora.Adapter(tensors, own, lengths)


def ranks_of(model_dir, *ends, ranks=(4, 6)):
    chain = chain_of(load_model(model_dir)[0])
    paths = sorted(p for p in chain.adaptable if not ends or p.endswith(ends))
    return {path: ranks[i % len(ranks)] for i, path in enumerate(paths)}


def written(folder, adapter, model=""):
    write_adapter(folder, adapter, About(str(model)))
    return folder


def logits(model_dir, adapter=None):
    return mlx_segtrain.load(model_dir, adapter)[0](TOKENS)


# ---- merging


def test_a_merged_adapter_is_the_weighted_sum(llama4, tmp_path):
    """The sum of adapters with different layers, ranks and multipliers is exact and gives the same
    logits in mlx-lm."""
    one = random_adapter(llama4, ranks_of(llama4, "q_proj", "down_proj"))
    two = random_adapter(llama4, ranks_of(llama4, "q_proj", "v_proj", ranks=(8, 2)), seed=1)
    a, b = written(tmp_path / "a", one), written(tmp_path / "b", two)
    done = merge([a, b], tmp_path / "sum", [0.5, -2.0])
    assert done.difference == 0
    both = read_stored(tmp_path / "sum")
    for path in {*one.tensors, *two.tensors}:
        want = 0.0
        for adapter, weight in ((one, 0.5), (two, -2.0)):
            if path in adapter.tensors:
                x, y = (np.array(f, np.float64) for f in adapter.tensors[path])
                want = want + weight * adapter.scales[path] * x @ y
        x, y = (np.array(f, np.float64) for f in both.tensors[path])
        assert np.allclose(both.scales[path] * x @ y, want, atol=1e-6)
        ranks = [x.tensors[path][0].shape[1] for x in (one, two) if path in x.tensors]
        assert both.ranks[path] == sum(ranks)
    stock, _ = mlx_lm.load(str(llama4), adapter_path=str(tmp_path / "sum"))
    assert_close("logits", stock(TOKENS), logits(llama4, tmp_path / "sum"), 1e-5)
    assert "0.5 ×" in (tmp_path / "sum" / "README.md").read_text()


def test_experts_are_merged(tmp_path):
    needs_router_gradient()
    model = write_tiny(tmp_path / "m", "qwen3_moe")
    parts = [random_adapter(model, ranks_of(model, "up_proj"), seed=i) for i in range(2)]
    folders = [written(tmp_path / str(i), part) for i, part in enumerate(parts)]
    merge(folders, tmp_path / "sum")
    both = read_stored(tmp_path / "sum")
    for path, (a, b) in both.tensors.items():
        if a.ndim == 3:
            want = sum(p.scales[path] * p.tensors[path][1] @ p.tensors[path][0] for p in parts)
            assert_close(path, both.scales[path] * (b @ a), want, 1e-5)
    assert {a.ndim for a, _ in both.tensors.values()} == {2, 3} or a.ndim == 3
    logits(model, tmp_path / "sum")


def test_what_cannot_be_merged(llama4, tmp_path):
    a = written(tmp_path / "a", random_adapter(llama4, ranks_of(llama4, "q_proj")), "x/one")
    b = written(tmp_path / "b", random_adapter(llama4, ranks_of(llama4, "q_proj")), "x/two")
    with pytest.raises(InputError, match=r"different base models \(x/one, x/two\)"):
        merge([a, b], tmp_path / "c")
    with pytest.raises(InputError, match="3 weights were given for 2 adapters"):
        merge([a, b], tmp_path / "c", [1, 2, 3])
    dora = random_adapter(llama4, ranks_of(llama4, "q_proj"), dora=True)
    with pytest.raises(InputError, match="DoRA adapters cannot be merged"):
        merge([a, written(tmp_path / "d", dora, "x/one")], tmp_path / "c")
    wide = lora.Adapter({"model.layers.0.self_attn.q_proj": (mx.ones((9, 4)), mx.ones((4, 64)))},
                        {"model.layers.0.self_attn.q_proj": 1.0})  # fmt: skip
    with pytest.raises(InputError, match=r"the widths of .* differ"):
        merge([a, written(tmp_path / "w", wide, "x/one")], tmp_path / "c")
    assert not (tmp_path / "c").exists()


# ---- merging into the base


@pytest.mark.parametrize("kind", ["lora", "dora", "embedding and head", "experts", "dense"])
def test_a_dense_fold_has_the_logits_of_base_and_adapter(kind, llama, llama4, tmp_path):
    model, ends = llama4, ("q_proj", "down_proj", "o_proj")
    if kind == "embedding and head":
        model = write_llama(tmp_path / "untied", bits=4, tied=False)
        ends = ("embed_tokens", "lm_head", "v_proj")
    if kind == "experts":
        needs_router_gradient()
        model, ends = write_tiny(tmp_path / "moe", "qwen3_moe"), ("up_proj", "down_proj")
    if kind == "dense":
        model = llama
    adapter = random_adapter(model, ranks_of(model, *ends), dora=kind == "dora")
    folder = written(tmp_path / "a", adapter)
    report = fold(weighted([folder]), model, tmp_path / "out", dequantize=True)
    ours = logits(model, folder)
    assert_close("ours", logits(tmp_path / "out"), ours, 1e-4)
    stock, _ = mlx_lm.load(str(tmp_path / "out"))
    assert_close("mlx-lm", stock(TOKENS).astype(mx.float32), ours, 1e-4)
    assert mx.abs(ours - logits(model)).max() > 1e-2
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(report.linears) == len(adapter.tensors)
    assert all(own.bits is None and abs(own.lost) < 1e-2 for own in report.linears)
    assert not report.swallowed


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_fold_loads_in_transformers(tied, hf, tmp_path):
    """transformers and other readers of this format can load the merged model without changes."""
    model = write_llama(tmp_path / "model", bits=4, tied=tied)
    folder = written(tmp_path / "a", random_adapter(model, ranks_of(model, "q_proj", "down_proj")))
    fold(weighted([folder]), model, tmp_path / "out", dequantize=True, dtype=mx.float32)
    theirs = hf.logits_of(tmp_path / "out", TOKENS.tolist())
    assert_close("transformers", theirs, logits(model, folder), 1e-4)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_dtype_is_that_of_all_tensors(bits, tmp_path):
    """Other programs load the model in the dtype that its config.json names."""
    model = write_llama(tmp_path / "model", bits=bits)
    for file in model.glob("*.safetensors"):
        half = {
            k: x.astype(mx.bfloat16) if x.dtype == mx.float32 else x
            for k, x in mx.load(str(file)).items()
        }
        mx.save_safetensors(str(file), half, {"format": "mlx"})
    folder = written(tmp_path / "a", random_adapter(model, ranks_of(model, "q_proj")))
    fold(weighted([folder]), model, tmp_path / "out", dequantize=True, dtype=mx.float16)
    assert {x.dtype for x in tensors_of(tmp_path / "out").values()} == {mx.float16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float16"


def test_a_tied_embedding_is_folded_for_both(llama4, tmp_path):
    adapter = random_adapter(llama4, {"model.embed_tokens": 4})
    folder = written(tmp_path / "a", adapter)
    fold(weighted([folder]), llama4, tmp_path / "out", dequantize=True)
    assert_close("logits", logits(tmp_path / "out"), logits(llama4, folder), 1e-4)


def tensors_of(folder):
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= mx.load(str(file))
    return found


def same_bits(x, y):
    return (
        x.dtype == y.dtype and x.shape == y.shape and bytes(memoryview(x)) == bytes(memoryview(y))
    )


@pytest.mark.parametrize("bits", [None, 8])
def test_a_quantized_fold(bits, llama_mixed, tmp_path):
    """Adapted layers keep their number of bits or are requantized to a given one. Other layers stay
    bit-identical."""
    ends = ("q_proj", "down_proj")
    adapter = random_adapter(llama_mixed, ranks_of(llama_mixed, *ends), size=0.3)
    folder = written(tmp_path / "a", adapter)
    told = []
    report = fold(
        weighted([folder]), llama_mixed, tmp_path / "out", bits=bits, on_linear=told.append
    )
    assert told == report.linears and report.path == tmp_path / "out"
    before, after = tensors_of(llama_mixed), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    untouched = [name for name in before if name.rpartition(".")[0] not in adapter.tensors]
    assert report.untouched == len(untouched)
    assert all(same_bits(before[name], after[name]) for name in untouched)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    for own in report.linears:
        was = 8 if "down_proj" in own.path else 4
        assert own.bits == (bits or was)
        assert (config.get(own.path) or config)["bits"] == own.bits
        # Compare with an independent sum in float64.
        a, b = (np.array(x, np.float64) for x in adapter.tensors[own.path])
        delta = adapter.scales[own.path] * (a @ b).T
        how = dict(group_size=32, bits=was)
        base = np.array(mx.dequantize(*parts(before, own.path), **how), np.float64)
        how = dict(group_size=32, bits=own.bits)
        new = np.array(mx.dequantize(*parts(after, own.path), **how), np.float64)
        size = np.linalg.norm(delta)
        assert np.isclose(own.update, size, rtol=1e-4)
        assert np.isclose(own.error, np.linalg.norm(new - base - delta) / size, rtol=1e-3)
        lost = 1 - ((new - base) * delta).sum() / size**2
        assert np.isclose(own.lost, lost, atol=1e-3)
    total = sum(own.update**2 for own in report.linears)
    part = sum(own.lost * own.update**2 for own in report.linears)
    assert np.isclose(report.lost, part / total)
    if bits:
        assert_close("logits", logits(tmp_path / "out"), logits(llama_mixed, folder), 0.05)
    stock, _ = mlx_lm.load(str(tmp_path / "out"))
    assert_close("mlx-lm", stock(TOKENS), logits(tmp_path / "out"), 1e-4)


def parts(tensors, path):
    return [tensors[f"{path}.{name}"] for name in ("weight", "scales", "biases")]


def test_a_small_update_is_swallowed_by_a_coarse_grid_and_it_is_said(tmp_path):
    """If the quantization stays the same, updates of less than half a quantization step are
    lost."""
    llama4 = quantized(tmp_path, "mxfp4")
    adapter = random_adapter(llama4, ranks_of(llama4, "q_proj"), size=1e-3)
    folder = written(tmp_path / "a", adapter)
    report = fold(weighted([folder]), llama4, tmp_path / "out")
    assert {own.path for own in report.swallowed} == set(adapter.tensors)
    assert not fold(weighted([folder]), llama4, tmp_path / "dense", dequantize=True).swallowed
    command = [
        sys.executable,
        "-m",
        "mlx_segtrain.commands.main",
        "merge",
        folder,
        "--into",
        llama4,
    ]
    done = subprocess.run(
        [*command, "--out", tmp_path / "again"], capture_output=True, text=True, check=True
    )
    assert "more than a tenth of the update to rounding" in done.stdout
    assert "Merge with --bits 8" in done.stdout and f"lost     {report.lost:.1%}" in done.stdout
    names = [line.split(" ")[0] for line in done.stdout.splitlines() if line[:1].isalpha()]
    before, after = ["adapter", "into", "weights", "writes"], ["model", "merged", "copied", "lost"]
    assert names[:8] == before + after  # the summary precedes the layers
    assert "layers.0.self_attn.q_proj" in done.stdout


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_other_quantizations(mode, tmp_path):
    model_dir = quantized(tmp_path, mode)
    bits = 8 if mode == "mxfp8" else 4
    adapter = random_adapter(model_dir, ranks_of(model_dir, "down_proj"), size=0.3)
    folder = written(tmp_path / "a", adapter)
    fold(weighted([folder]), model_dir, tmp_path / "dense", dequantize=True)
    # Dense weights have the dtype given in the configuration.
    assert_close("logits", logits(tmp_path / "dense"), logits(model_dir, folder), 1e-3)
    report = fold(weighted([folder]), model_dir, tmp_path / "out")
    assert all(own.bits == bits for own in report.linears)
    stock, _ = mlx_lm.load(str(tmp_path / "out"))
    assert mx.isfinite(stock(TOKENS)).all()


def test_shards_are_written_one_at_a_time(llama4, tmp_path, monkeypatch):
    """If the base model is stored in several files, so is the merged model, with the same tensors.
    Files are written one at a time to save memory."""
    model = shutil.copytree(llama4, tmp_path / "m")
    tensors = tensors_of(llama4)
    names = sorted(tensors)
    (model / "model.safetensors").unlink()
    for i in range(3):  # a module's tensors may be in two files
        own = {name: tensors[name] for name in names[i::3]}
        mx.save_safetensors(str(model / f"model-0000{i + 1}-of-00003.safetensors"), own)
    adapter = random_adapter(llama4, ranks_of(llama4, "q_proj", "up_proj"))
    folder = written(tmp_path / "a", adapter)
    monkeypatch.setattr(folding, "SHARD", 30_000)
    fold(weighted([folder]), model, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("model*.safetensors"))
    assert len(files) > 2 and files[-1].name.endswith(f"-of-{len(files):05d}.safetensors")
    assert all(file.stat().st_size < 60_000 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(names)
    monkeypatch.undo()
    fold(weighted([folder]), llama4, tmp_path / "one")
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "out")
    assert all(same_bits(one[name], many[name]) for name in names)
    mlx_lm.load(str(tmp_path / "out"))


def test_memory_is_that_of_a_file(tmp_path, monkeypatch):
    model = write_llama(tmp_path / "m", layers=24, hidden_size=256, intermediate_size=1024)
    size = (model / "model.safetensors").stat().st_size
    adapter = random_adapter(model, ranks_of(model, "q_proj"))
    folder = written(tmp_path / "a", adapter)
    monkeypatch.setattr(folding, "SHARD", 4 << 20)
    adapter = weighted([folder])
    mx.clear_cache()
    mx.reset_peak_memory()
    begin = mx.get_active_memory()
    fold(adapter, model, tmp_path / "out")
    assert size > 80e6 and mx.get_peak_memory() - begin < 16e6


def test_what_cannot_be_folded(llama, llama4, tmp_path):
    adapter = random_adapter(llama4, ranks_of(llama4, "q_proj"))
    other = lora.Adapter({"model.layers.9.self_attn.q_proj": (mx.ones((64, 4)), mx.ones((4, 64)))},
                         {"model.layers.9.self_attn.q_proj": 1.0})  # fmt: skip
    with pytest.raises(InputError, match="is not a layer in the files of"):
        fold(other, llama4, tmp_path / "out")
    path = "model.layers.0.self_attn.q_proj"
    wide = lora.Adapter({path: (mx.ones((65, 4)), mx.ones((4, 64)))}, {path: 1.0})
    with pytest.raises(InputError, match=r"update of shape \(64, 65\), but the model's weight has"):
        fold(wide, llama, tmp_path / "out")
    for how, message in (
        ({"dequantize": True, "bits": 4}, "contradict each other"),
        ({"bits": 7}, "--bits must be"),
    ):
        with pytest.raises(InputError, match=message):
            fold(adapter, llama4, tmp_path / "out", **how)
    with pytest.raises(InputError, match="no model"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_text("{}")
        fold(adapter, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(InputError, match="already exists"):
        fold(adapter, llama4, llama)
    torn = shutil.copytree(llama4, tmp_path / "torn")
    content = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(content[:-9])
    with pytest.raises(InputError, match="but the file has"):
        fold(adapter, torn, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_demo_s_model_is_folded(tmp_path):
    """For six layers of SmolLM2, a dense merge equals base plus adapter, and the report of a 4-bit
    merge states the loss."""
    model = write_first_layers(tmp_path / "few", snapshot.smollm2_snapshot(cache_dir()), 6)
    data = write_rows(tmp_path / "data", 8)
    options = {"iters": 1, "rank": 4, "learning_rate": 2e-3, "max_seq_length": 48}
    train(config_of(model, data, tmp_path / "a", **options))
    adapter = weighted([tmp_path / "a"])
    fold(adapter, model, tmp_path / "dense", dequantize=True, dtype=mx.float32)
    fold(adapter, model, tmp_path / "half", dequantize=True)  # float16, the dtype of the base
    tokens = mx.array([[1, 504, 3575]])
    both = mlx_segtrain.load(model, tmp_path / "a")[0](tokens)
    # Only weights are loaded here. Loading a tokenizer takes as long as loading the weights, so a
    # tokenizer is loaded only once, below.
    alone = load_model(model)[0](tokens)
    dense = load_model(tmp_path / "dense")[0](tokens)
    half = load_model(tmp_path / "half")[0](tokens)
    assert_close("dense", dense, both, 1e-4)
    assert mx.abs(half - both).max() < 0.01 * mx.abs(both).max()
    assert mx.abs(both - alone).max() > 1e-2
    report = fold(adapter, model, tmp_path / "four")
    assert len(report.linears) == 42 and all(own.lost > 0 for own in report.linears[:1])
    for folder, own in (("dense", dense), ("half", half), ("four", None)):
        answer, tokenizer = mlx_lm.load(str(tmp_path / folder))
        logits = answer(tokens[:, :1])  # one token, because half precision is slow on a CPU
        assert tokenizer.encode("Once") and mx.isfinite(logits).all()
        if own is not None:
            assert_close(folder, logits, own[:, :1], 1e-3 if folder == "dense" else 2e-2)


# ---- found by a review


def test_an_update_that_is_rounded_away_is_swallowed(tmp_path):
    """The merged weight equals the original weight, so the entire update is lost."""
    model = quantized(tmp_path, "mxfp4")
    folder = written(tmp_path / "a", random_adapter(model, ranks_of(model, "q_proj"), size=1e-5))
    report = fold(weighted([folder]), model, tmp_path / "out")
    assert len(report.swallowed) == len(report.linears) == 3
    assert all(own.lost > 0.9 for own in report.linears)


def quantized(tmp_path, mode, name="m"):
    from mlx.utils import tree_flatten

    model_dir = write_llama(tmp_path / name)
    model, config = load_model(model_dir)
    group, bits = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}[mode]
    nn.quantize(model, group, bits, mode=mode)
    config["quantization"] = {"group_size": group, "bits": bits, "mode": mode}
    (model_dir / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(model_dir / "model.safetensors"), weights, {"format": "mlx"})
    return model_dir


def test_a_linear_without_an_update_stays_as_it_is(llama4, tmp_path):
    adapter = random_adapter(llama4, ranks_of(llama4, "q_proj"), size=0.0)
    report = fold(adapter, llama4, tmp_path / "out")
    before, after = tensors_of(llama4), tensors_of(tmp_path / "out")
    assert all(same_bits(before[name], after[name]) for name in before) and not report.swallowed


def test_other_bits_of_a_linear_without_an_update(llama4, tmp_path):
    """A layer is requantized even if its update is zero, so that its weights match the number of
    bits in config.json."""
    adapter = random_adapter(llama4, ranks_of(llama4, "q_proj"), size=0.0)
    fold(adapter, llama4, tmp_path / "out", bits=8)
    stock, _ = mlx_lm.load(str(tmp_path / "out"))
    assert_close("logits", stock(TOKENS), logits(llama4, written(tmp_path / "a", adapter)), 0.1)


def test_a_configuration_that_contradicts_the_weights(llama4, tmp_path):
    adapter = random_adapter(llama4, ranks_of(llama4, "q_proj"))
    model = shutil.copytree(llama4, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    for wrong in (5, {"group_size": "a"}):
        (model / "config.json").write_text(json.dumps({**config, "quantization": wrong}))
        with pytest.raises(InputError, match=r"config\.json does not match the weights"):
            fold(adapter, model, tmp_path / "out")


@pytest.mark.skipif(
    mlx_lm.__version__ < "0.32", reason="this mlx-lm reads the bits from the configuration"
)
@pytest.mark.parametrize("dequantize", [False, True])
def test_bits_that_the_configuration_does_not_name(dequantize, llama_mixed, tmp_path):
    """If the configuration gives a wrong number of bits for a layer, the shapes of the weights
    determine the number, as in mlx-lm."""
    model = shutil.copytree(llama_mixed, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    adapter = random_adapter(model, ranks_of(model, "down_proj"), size=0.3)
    folder = written(tmp_path / "a", adapter)
    report = fold(weighted([folder]), model, tmp_path / "out", dequantize=dequantize)
    assert {own.bits for own in report.linears} == {None if dequantize else 8}
    stock, _ = mlx_lm.load(str(tmp_path / "out"))
    assert_close("logits", stock(TOKENS), logits(model, folder), 1e-4 if dequantize else 0.1)


def test_more_than_a_weight_is_refused_and_not_dropped(llama, llama4, tmp_path):
    adapter = random_adapter(llama4, ranks_of(llama4, "q_proj"))
    for name, x, message in (
        ("global_scale", mx.ones(1), r"unsupported tensors \(global_scale\)"),
        ("weight_scale_inv", mx.ones((1, 1)), r"unsupported tensors \(weight_scale_inv\)"),
    ):
        model = shutil.copytree(llama4, tmp_path / name)
        path = "model.layers.0.self_attn.q_proj"
        mx.save_safetensors(
            str(model / "model.safetensors"), tensors_of(llama4) | {f"{path}.{name}": x}
        )
        with pytest.raises(InputError, match=message):
            fold(adapter, model, tmp_path / "out")
    model = shutil.copytree(llama, tmp_path / "integers")
    found = tensors_of(llama)
    found = {k: x.astype(mx.uint8) if "q_proj" in k else x for k, x in found.items()}
    mx.save_safetensors(str(model / "model.safetensors"), found)
    with pytest.raises(InputError, match=r"cannot be merged into .*uint8"):
        fold(adapter, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_with_and_without_the_wrapper_are_one_linear(llama4, tmp_path):
    adapter = random_adapter(llama4, ranks_of(llama4, "q_proj"))
    wrapped = lora.Adapter(
        {f"language_model.{path}": pair for path, pair in adapter.tensors.items()},
        {f"language_model.{path}": scale for path, scale in adapter.scales.items()},
    )
    a, b = written(tmp_path / "a", adapter), written(tmp_path / "b", wrapped)
    merge([a, b], tmp_path / "sum")
    assert read_stored(tmp_path / "sum").tensors.keys() == adapter.tensors.keys()
    fold(weighted([a, b]), llama4, tmp_path / "both", dequantize=True)
    fold(weighted([a], [2.0]), llama4, tmp_path / "twice", dequantize=True)
    assert_close("logits", logits(tmp_path / "both"), logits(tmp_path / "twice"), 1e-5)
    both = lora.Adapter(adapter.tensors | wrapped.tensors, adapter.scales | wrapped.scales)
    with pytest.raises(InputError, match="two updates of"):
        fold(both, llama4, tmp_path / "out")


def test_few_files_are_open_at_a_time(tmp_path):
    """A model with many tensors can be merged with at most 64 open files."""
    model = write_llama(tmp_path / "m", layers=24)
    folder = written(tmp_path / "a", random_adapter(model, ranks_of(model, "q_proj")))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from mlx_segtrain.adapters.folding import fold\n"
        "from mlx_segtrain.adapters import read_stored\n"
        "adapter = read_stored(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "fold(adapter, Path(sys.argv[2]), Path(sys.argv[3]))\n"
    )
    subprocess.run([sys.executable, "-c", code, folder, model, tmp_path / "out"], check=True)
    assert len(tensors_of(tmp_path / "out")) == len(tensors_of(model)) > 200


def test_other_bits_of_what_has_no_choice_of_them(tmp_path, llama):
    model = quantized(tmp_path, "mxfp4")
    folder = written(tmp_path / "a", random_adapter(model, ranks_of(model, "down_proj"), size=0.3))
    report = fold(weighted([folder]), model, tmp_path / "out", bits=8)
    assert {own.bits for own in report.linears} == {8} and not report.swallowed
    stock, _ = mlx_lm.load(str(tmp_path / "out"))
    assert_close("logits", stock(TOKENS), logits(model, folder), 0.05)
    with pytest.raises(
        InputError, match=r"the layers that the adapter changes in .* are not quantized"
    ):
        fold(random_adapter(llama, ranks_of(llama, "q_proj")), llama, tmp_path / "x", bits=8)
