"""Tests DoRA: the formula, every way to cut the model into segments, every training method, and the
adapter files of mlx-lm, PEFT and this package."""

import copy
import functools
import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_segtrain
from lib import tiny_models
from lib.adapter_files import PEFT, write
from lib.chains import batch_of
from lib.checks import needs_router_gradient, random_adapter
from lib.folders import write_llama
from lib.oracle import assert_close
from lib.runs import METHODS, setup_of, weights_of
from mlx_segtrain import InputError, TrainConfig, ops, train
from mlx_segtrain.adapters import About, is_dora, ranks_in, read_adapter, write_adapter
from mlx_segtrain.lora.dora import Stretch
from mlx_segtrain.models import adapting, chain_of, load_base
from mlx_segtrain.models.chain import Dropout
from mlx_segtrain.objectives import Functions, value_and_grad
from mlx_segtrain.objectives.sft import Sft
from mlx_segtrain.schedule import Cuts

pytestmark = [pytest.mark.acceptance, pytest.mark.usefixtures("cache")]
SCALE, RANK = 1.5, 4
FAMILIES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "phi3": ("phi3", {}),
    "gemma4-E4B": ("gemma4_text", {}),
    "generic": ("gpt_neox", {}),
}


def stretched(chain, ranks=None):
    """Returns a random adapter whose magnitudes differ from the initial ones by up to 20 %."""
    ranks = ranks or dict.fromkeys(chain.linears, RANK)
    adapter = random_adapter(chain, ranks, SCALE, 0.1)
    fresh = adapting.init(chain, ranks, SCALE, 0, dora=True)
    rng = np.random.default_rng(3)
    moved = {
        path: m * mx.array(rng.uniform(0.8, 1.2, m.shape).astype(np.float32))
        for path, m in sorted(fresh.magnitudes.items())
    }
    return replace(adapter, magnitudes=moved)


def run(chain, adapter, batch, cuts, dropout=None):
    params = adapting.stage_params(chain, adapter)
    what = (Sft(), chain, adapter.scales, params, batch, float(batch.weights[:, 1:].sum()))
    (loss,), grads = value_and_grad(Functions(*what[:3], dropout), *what[3:], cuts=cuts)
    return loss.item(), {k: g for own in grads.values() for k, g in own.items()}


@pytest.mark.parametrize("dtype,bound", [("float32", 2e-6), ("bfloat16", 8e-3)])
@pytest.mark.parametrize("quantized", [False, True])
def test_the_formula(quantized, dtype, bound):
    """Compares the layer with the float64 formula, whose gradient treats the norm as a constant."""
    rng = np.random.default_rng(0)
    linear = nn.Linear(64, 1100, bias=True)
    if quantized:
        linear = linear.to_quantized(32, 4)
    linear.set_dtype(getattr(mx, dtype))
    base = ops.base_of(linear)
    w = ops.dequantize(base) if quantized else base.weight.astype(mx.float32)
    w = np.array(w).astype(np.float64)
    x, a, b, dy = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((2, 7, 64), (64, RANK), (RANK, 1100), (2, 7, 1100))
    )
    m = (np.linalg.norm(w, axis=1) * rng.uniform(0.8, 1.2, 1100)).astype(np.float32)
    stretch = Stretch.of(base)
    assert np.allclose(stretch.norms, np.linalg.norm(w, axis=1), rtol=1e-5)

    def ours(x, a, b, m):
        linear = ops.Linear(stretch.base, a, b, 0.1)
        return stretch(ops.lora_linears(x, [linear])[0], linear, m)

    args = [mx.array(x).astype(getattr(mx, dtype)), *map(mx.array, (a, b, m))]
    cotangent = mx.array(dy).astype(getattr(mx, dtype))
    (y,), grads = mx.vjp(ours, args, [cotangent])
    x, dy = (np.array(t.astype(mx.float32)).astype(np.float64) for t in (args[0], cotangent))
    a, b, m = (t.astype(np.float64) for t in (a, b, m))
    gain = m / np.linalg.norm(w + 0.1 * (a @ b).T, axis=1)
    z = x @ w.T + 0.1 * (x @ a @ b)
    bias = np.array(linear.bias.astype(mx.float32))
    dz = dy * gain
    true = [
        *[dz @ (w + 0.1 * (a @ b).T)],
        *[0.1 * np.einsum("bti,bto,ro->ir", x, dz, b), 0.1 * np.einsum("bti,ir,bto->ro", x, a, dz)],
        *[(dy * z).sum((0, 1)) * gain / m],
    ]
    for name, got, want in zip(["y", *"xabm"], [y, *grads], [gain * z + bias, *true], strict=True):
        got = np.array(got.astype(mx.float32))
        assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want), name


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_mlx_lm(name):
    family, changes = FAMILIES[name]
    model = tiny_models.build(family, **changes)
    stock = copy.deepcopy(model)
    chain = chain_of(model)
    adapter, batch = stretched(chain), batch_of(2)
    loss, grads = run(chain, adapter, batch, functools.partial(chain.cuts, 1))

    stock.freeze()
    how = {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": sorted(adapter.tensors)}
    linear_to_lora_layers(stock, 0, how, use_dora=True)
    flat = {}
    for path, (a, b) in adapter.tensors.items():
        flat |= {f"{path}.lora_a": a, f"{path}.lora_b": b, f"{path}.m": adapter.magnitudes[path]}
    stock.load_weights(list(flat.items()), strict=False)
    shares = mx.array(batch.weights[:, 1:] / batch.weights[:, 1:].sum())
    tokens = mx.array(batch.tokens)

    def theirs(model):
        logits = model(tokens[:, :-1]).astype(mx.float32)
        return (shares * nn.losses.cross_entropy(logits, tokens[:, 1:])).sum()

    expected, their_grads = nn.value_and_grad(stock, theirs)(stock)
    their_grads = dict(tree_flatten(their_grads))
    assert abs(loss - expected.item()) < 1e-5 * abs(loss)
    assert set(flat) == set(grads)
    for path, grad in grads.items():
        assert mx.abs(grad).max() > 0, path
        assert_close(path, grad, their_grads[path], 2e-4)


@pytest.mark.parametrize("dropout", [None, Dropout(0.3, 7, 2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_cut_gives_the_same_bits(name, dropout):
    family, changes = FAMILIES[name]
    chain = chain_of(tiny_models.build(family, **changes))
    adapter, batch = stretched(chain), batch_of(2)
    whole, expected = run(chain, adapter, batch, functools.partial(chain.cuts, 0), dropout)
    n = len(chain.stages(adapter.scales))
    halves = tuple(range(1, n + 1))
    for cuts in (chain.cuts(1), Cuts(halves, halves), Cuts(halves, (n // 2, n))):
        loss, grads = run(chain, adapter, batch, lambda streams, cuts=cuts: cuts, dropout)
        assert loss == whole
        for path, grad in grads.items():
            assert mx.array_equal(grad, expected[path]), path


def test_a_fresh_adapter_changes_nothing(llama4):
    model, _, _ = load_base(llama4)
    chain = chain_of(model)
    tokens = mx.array([[1, 5, 9, 200, 17, 33]])
    plain = model(tokens)
    adapter = adapting.init(chain, dict.fromkeys(chain.linears, RANK), SCALE, 0, dora=True)
    adapting.attach(model, chain, adapter)
    assert_close("logits", model(tokens), plain, 1e-6)


def test_experts_have_none():
    needs_router_gradient()
    chain = chain_of(tiny_models.build("qwen3_moe"))
    with pytest.raises(InputError, match=r"use_dora: '.*' is a linear layer of experts"):
        adapting.init(chain, dict.fromkeys(chain.linears, RANK), SCALE, 0, dora=True)


# ---- files


def written(folder, adapter):
    config = TrainConfig(model_dir="m", data_dir="d", adapter_path=folder, use_dora=True)
    write_adapter(folder, adapter, About.of(config))
    return folder


@pytest.mark.parametrize("padded", [False, True])
def test_stock_mlx_lm_loads_what_we_write(padded, llama4, tmp_path):
    """In the saved files, factors of different ranks are padded to the same rank, and all layers
    have the same multiplier."""
    chain = chain_of(load_base(llama4)[0])
    ranks = {path: 2 + i % 3 if padded else RANK for i, path in enumerate(chain.linears)}
    adapter = stretched(chain, ranks)
    if padded:
        scales = {path: SCALE / ranks[path] ** 0.5 for path in ranks}
        adapter = replace(adapter, scales=scales)
    folder = written(tmp_path / "a", adapter)
    tokens = mx.array([[1, 5, 9, 200, 17, 33]])
    ours = mlx_segtrain.load(llama4, folder)[0](tokens)
    theirs, _ = mlx_lm.load(str(llama4), adapter_path=str(folder))
    theirs.set_dtype(mx.float32)
    assert_close("logits", ours, theirs(tokens), 1e-4)
    assert mx.abs(ours - mlx_segtrain.load(llama4)[0](tokens)).max() > 0.05
    again = read_adapter(folder, chain)
    assert is_dora(folder) and ranks_in(folder) == ranks == again.ranks
    for path, m in adapter.magnitudes.items():
        assert mx.array_equal(again.magnitudes[path], m)


@pytest.mark.parametrize("end", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_those_of_peft_are_read(end, llama, tmp_path):
    chain = chain_of(load_base(llama)[0])
    adapter = stretched(chain)
    tensors = {}
    for path, (a, b) in adapter.tensors.items():
        start = f"base_model.model.{path}"
        tensors[f"{start}.lora_A.weight"] = mx.contiguous(a.T)
        tensors[f"{start}.lora_B.weight"] = mx.contiguous(b.T)
        tensors[f"{start}.{end}"] = adapter.magnitudes[path]
    config = {**PEFT, "use_dora": True, "lora_alpha": RANK * SCALE}
    got = read_adapter(write(tmp_path / "a", tensors, config, "adapter_model.safetensors"), chain)
    assert got.scales == adapter.scales
    for path, m in adapter.magnitudes.items():
        assert mx.array_equal(got.magnitudes[path], m)
        assert all(map(mx.array_equal, got.tensors[path], adapter.tensors[path]))


@pytest.mark.parametrize("how", [{}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}])
def test_those_that_peft_saves_give_its_logits(how, hf, tmp_path):
    model = tiny_models.build("llama")
    chain = chain_of(model)
    weights = {key: np.array(value) for key, value in tree_flatten(model.parameters())}
    tokens = np.array([[1, 5, 9, 100, 17, 33]])
    how = {"target_modules": list(chain.linears), "r": RANK, "lora_alpha": 6, **how}
    base = hf.hf_model("llama", tiny_models.config("llama"), weights)
    theirs = mx.array(hf.saved_by_peft(tmp_path, base, tokens, **how))
    plain = model(mx.array(tokens))
    adapting.attach(model, chain, read_adapter(tmp_path, chain))
    assert_close("logits", model(mx.array(tokens)), theirs, 1e-5)
    assert mx.abs(plain - theirs).max() > 0.1


def test_magnitudes_that_do_not_fit(llama, tmp_path):
    chain = chain_of(load_base(llama)[0])
    path = "model.layers.0.self_attn.q_proj"
    folder = written(tmp_path / "a", stretched(chain, {path: RANK}))
    file = folder / "adapters.safetensors"
    tensors = mx.load(str(file))

    def refused(tensors, message):
        mx.save_safetensors(str(file), tensors)
        with pytest.raises(InputError, match=message):
            read_adapter(folder, chain)

    refused(
        {**tensors, f"{path}.m": mx.ones(3)},
        r"magnitudes of shape \(3,\), which does not match lora_b of shape \(4, 64\)",
    )
    without = {key: x for key, x in tensors.items() if not key.endswith(".m")}
    refused(without, "has lora_a, lora_b but no magnitudes")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"fine_tune_type": "lora", "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused(tensors, "does not describe a DoRA adapter")


# ---- runs


@pytest.mark.parametrize("method", METHODS)
def test_lengths_move_in_every_method(method, llama4, data, pairs, tmp_path):
    def run(name, **changes):
        how = {"use_dora": True, "lora_dropout": 0.1, **changes}
        train(setup_of(method, llama4, data, pairs, tmp_path / name, **how))
        return weights_of(tmp_path / name)

    whole, layers = run("a", segment_size=0), run("b", segment_size=1)
    assert all(mx.array_equal(layers[key], x) for key, x in whole.items())
    start = chain_of(load_base(llama4)[0])
    fresh = adapting.init(start, read_adapter(tmp_path / "a", start).ranks, 1.0, 0, dora=True)
    lengths = {key: x for key, x in whole.items() if key.endswith(".m")}
    assert len(lengths) == len(start.linears)
    assert all(mx.abs(x - fresh.magnitudes[key[:-2]]).max() > 0 for key, x in lengths.items())
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "dora" and config["use_dora"] is True


def test_a_run_goes_on_from_one(llama4, data, tmp_path):
    how = {"rank": 4, "optimizer": "sgd", "learning_rate": 1e-9, "weight_decay": 0}
    train(setup_of("sft", llama4, data, None, tmp_path / "a", use_dora=True, iters=3))
    first = weights_of(tmp_path / "a")
    del how["rank"]
    config = setup_of("sft", llama4, data, None, tmp_path / "b", iters=1, **how)
    train(config.model_copy(update={"warm_start": tmp_path / "a"}))
    second = weights_of(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(mx.allclose(second[key], x, atol=1e-6) for key, x in first.items())


@pytest.mark.parametrize("optimizer", ["lion", "sgd", "adafactor", "muon"])
def test_every_optimizer_takes_lengths(optimizer, llama4, data, tmp_path):
    how = {"use_dora": True, "optimizer": optimizer, "lora_plus_ratio": 4, "iters": 2}
    train(setup_of("sft", llama4, data, None, tmp_path / "a", **how))
    assert all(mx.isfinite(x).all() for x in weights_of(tmp_path / "a").values())


def test_memory_is_planned_with_what_is_kept_beside(tmp_path):
    from mlx_segtrain.planning import named, read_shape
    from mlx_segtrain.planning.costs import CPU
    from mlx_segtrain.streams import BatchShape

    shape = read_shape(write_llama(tmp_path / "m"))
    ranks = dict.fromkeys((p for layer in shape.linears for p in layer), RANK)
    peaks = [
        named(shape, BatchShape.single(1, 256, 256, 256, dora=dora), ranks, CPU, 0).peak
        for dora in (False, True)
    ]
    assert peaks[0] < peaks[1]
