"""Tests adapters for the embedding and the head: gradients (compared with mlx-lm's), segments,
preference pairs, adapter files, and errors."""

import copy
import functools

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_segtrain
from lib import tiny_models
from lib.chains import batch_of, pair_batch
from lib.checks import needs_router_gradient, random_adapter
from lib.folders import write_llama
from lib.oracle import assert_close
from lib.runs import METHODS, existing_bytes, setup_of, weights_of
from mlx_segtrain import InputError, lora, train
from mlx_segtrain.adapters import ranks_in, read_adapter
from mlx_segtrain.models import adapting, chain_of, load_base
from mlx_segtrain.models.chain import Dropout
from mlx_segtrain.objectives import Functions, value, value_and_grad
from mlx_segtrain.objectives.preference import Dpo
from mlx_segtrain.objectives.sft import Sft
from mlx_segtrain.planning import read_shape
from mlx_segtrain.schedule import Cuts

pytestmark = [pytest.mark.acceptance, pytest.mark.usefixtures("cache")]
SCALE, RANK = 1.5, 4
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
FAMILIES = {
    "llama, tied": ("llama", TIED),
    "llama": ("llama", UNTIED),
    "gemma3": ("gemma3_text", {}),
    "gemma2": ("gemma2", {}),
    "phi3": ("phi3", {}),
    "granite": ("granite", TIED),
    "generic": ("gpt_neox", {}),
    "generic, tied": ("cohere", {}),
    "generic, experts": ("qwen3_moe", TIED),
}


def model_of(name):
    family, changes = FAMILIES[name]
    model = tiny_models.build(family, **changes)
    if name == "llama, tied":
        nn.quantize(model, 32, 4)
    return model


def adapter_of(chain, paths=None):
    paths = paths or [*chain.outer, *list(chain.linears)[:3]]
    return random_adapter(chain, dict.fromkeys(paths, RANK), SCALE, 0.1)


def run(chain, adapter, batch, cuts=None, dropout=None, objective=None):
    chain = chain.adapting(adapter.scales)
    params = adapting.stage_params(chain, adapter)
    objective = objective or Sft()
    what = (objective, chain, adapter.scales, params, batch, objective.total([batch]))
    cuts = cuts or functools.partial(chain.cuts, 1)
    (loss, *_), grads = value_and_grad(Functions(*what[:3], dropout), *what[3:], cuts=cuts)
    (again, *_) = value(*what)
    if dropout is None:
        assert abs(loss.item() - again.item()) <= 1e-5 * abs(loss.item())
    return loss.item(), {k: g for own in grads.values() for k, g in own.items()}


def of_mlx_lm(stock, adapter, batch):
    stock.freeze()
    how = {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": sorted(adapter.tensors)}
    linear_to_lora_layers(stock, 0, how)
    flat = {}
    for path, (a, b) in adapter.tensors.items():
        flat |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
    stock.load_weights(list(flat.items()), strict=False)
    shares = mx.array(batch.weights[:, 1:] / batch.weights[:, 1:].sum())
    tokens = mx.array(batch.tokens)

    def loss(model):
        logits = model(tokens[:, :-1]).astype(mx.float32)
        return (shares * nn.losses.cross_entropy(logits, tokens[:, 1:])).sum()

    value, grads = nn.value_and_grad(stock, loss)(stock)
    return value.item(), dict(tree_flatten(grads))


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_mlx_lm(name, monkeypatch):
    """The first few positions are not in the loss, and the logits are computed in several
    chunks."""
    if "experts" in name:
        needs_router_gradient()
    monkeypatch.setattr("mlx_segtrain.models.chain.HEAD_ROWS", 7)
    model = model_of(name)
    stock = copy.deepcopy(model)
    chain = chain_of(model)
    adapter, batch = adapter_of(chain), batch_of(2, prompt=4)
    loss, grads = run(chain, adapter, batch)
    expected, theirs = of_mlx_lm(stock, adapter, batch)
    assert abs(loss - expected) < 1e-5 * abs(loss)
    assert set(grads) == set(theirs) == {f"{p}.lora_{ab}" for p in adapter.tensors for ab in "ab"}
    for path, grad in grads.items():
        assert mx.abs(grad).max() > 0, path
        assert_close(path, grad, theirs[path], 1e-4)


@pytest.mark.parametrize("dropout", [None, Dropout(0.3, 7, 2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_cut_gives_the_same_bits(name, dropout):
    if "experts" in name:
        needs_router_gradient()
    chain = chain_of(model_of(name))
    adapter, batch = adapter_of(chain), batch_of(2)
    own = chain.adapting(adapter.scales)
    whole, expected = run(chain, adapter, batch, functools.partial(own.cuts, 0), dropout)
    assert dropout is None or whole != run(chain, adapter, batch)[0]
    n = len(own.stages(adapter.scales))
    every = tuple(range(1, n + 1))
    for cuts in (own.cuts(1), Cuts(every, every), Cuts(every, (n // 2, n))):
        loss, grads = run(chain, adapter, batch, lambda streams, cuts=cuts: cuts, dropout)
        assert loss == whole
        for path, grad in grads.items():
            assert mx.array_equal(grad, expected[path]), path


@pytest.mark.parametrize("name", ["llama, tied", "llama", "generic"])
def test_pairs_share_their_beginning(name, monkeypatch):
    """The embedding table's gradient is the same whether a pair is one stream with a branch or two
    streams."""
    monkeypatch.setattr("mlx_segtrain.streams.TRIM_MULTIPLE", 1)
    chain = chain_of(model_of(name))
    adapter, batch = adapter_of(chain), pair_batch(7)
    monkeypatch.setattr("mlx_segtrain.objectives.preference.SHARED_LEAST", 100)
    loss, expected = run(chain, adapter, batch, objective=Dpo())
    monkeypatch.setattr("mlx_segtrain.objectives.preference.SHARED_LEAST", 1)
    got, grads = run(chain, adapter, batch, objective=Dpo())
    assert abs(got - loss) < 1e-5 * abs(loss)
    for path, grad in grads.items():
        assert_close(path, grad, expected[path], 1e-4)


@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_one_of_them_alone(part):
    model = model_of("llama")
    stock = copy.deepcopy(model)
    chain = chain_of(model)
    (path,) = (path for path in chain.outer if path.endswith(part))
    adapter, batch = adapter_of(chain, [path]), batch_of(1)
    loss, grads = run(chain, adapter, batch)
    expected, theirs = of_mlx_lm(stock, adapter, batch)
    assert abs(loss - expected) < 1e-5 * abs(loss) and set(grads) == set(theirs)
    for path, grad in grads.items():
        assert_close(path, grad, theirs[path], 1e-4)


# ---- runs and files


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_loads_in_stock_mlx_lm(method, tied, data, pairs, tmp_path):
    model_dir = write_llama(tmp_path / "m", bits=4, mixed=True, tied=tied)
    targets = ["q_proj", "embed_tokens", *([] if tied else ["lm_head"])]
    config = setup_of(method, model_dir, data, pairs, tmp_path / "a", target_modules=targets)
    others = existing_bytes() / 1e9
    result = train(config)
    assert result.peak_gb - others <= 1.05 * result.planned_gb
    folder = tmp_path / "a"
    outer = ["model.embed_tokens", *([] if tied else ["lm_head"])]
    weights = weights_of(folder)
    for path in outer:
        assert mx.abs(weights[f"{path}.lora_b"]).max() > 0
    assert set(outer) < set(ranks_in(folder)) and ranks_in(folder) == result.applied_ranks
    tokens = mx.array([[1, 5, 9, 200, 17, 33]])
    ours = mlx_segtrain.load(model_dir, folder)[0](tokens)
    theirs, _ = mlx_lm.load(str(model_dir), adapter_path=str(folder))
    theirs.set_dtype(mx.float32)
    assert_close("logits", ours, theirs(tokens), 1e-4)
    assert mx.abs(ours - mlx_segtrain.load(model_dir)[0](tokens)).max() > 1e-3

    how = {"iters": 1, "optimizer": "sgd", "learning_rate": 1e-9, "weight_decay": 0}
    further = setup_of(method, model_dir, data, pairs, tmp_path / "b", **how)
    train(further.model_copy(update={"warm_start": folder}))
    second = weights_of(tmp_path / "b")
    assert weights.keys() == second.keys()
    assert all(mx.allclose(second[key], x, atol=1e-6) for key, x in weights.items())


def test_samples_are_of_the_adapted_head(data, tmp_path):
    """An evaluation attaches the adapter to the model and removes it again."""
    model_dir = write_llama(tmp_path / "m", tied=False)
    how = {"target_modules": ["lm_head", "embed_tokens"], "steps_per_eval": 1, "iters": 2}
    logits = []

    def score(model, tokenizer):
        logits.append(model(mx.array([[1, 5, 9]])))
        return 0.0

    train(setup_of("sft", model_dir, data, None, tmp_path / "a", **how), score=score)
    ours = mlx_segtrain.load(model_dir, tmp_path / "a")[0](mx.array([[1, 5, 9]]))
    assert_close("logits", logits[-1], ours, 1e-5)
    assert mx.abs(logits[0] - logits[-1]).max() > 1e-4


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"tied": False, "bits": 4}])
def test_headers_name_what_the_model_has(changes, tmp_path):
    path = write_llama(tmp_path / "m", **changes)
    assert set(read_shape(path).outer) == set(chain_of(load_base(path)[0]).outer)


def test_what_is_not_adapted_by_name_is_not_adapted(llama4):
    chain = chain_of(load_base(llama4)[0])
    how = {"rank": 4, "rank_scaling": "constant", "num_layers": 1, "model_dir": llama4}
    assert "model.embed_tokens" not in adapting.choose_ranks(
        chain, target_modules=["all-linear"], **how
    )
    both = adapting.choose_ranks(chain, target_modules=["q_proj", "embed_tokens"], **how)
    assert set(both) == {"model.layers.2.self_attn.q_proj", "model.embed_tokens"}


def test_inputs_of_every_layer_are_of_the_table_too():
    chain = chain_of(tiny_models.build("gemma4_text"))
    assert chain.outer == {}
    how = {"rank": 4, "rank_scaling": "constant", "num_layers": -1, "model_dir": None}
    with pytest.raises(InputError, match="'embed_tokens' matches no linear layer of the"):
        adapting.choose_ranks(chain, target_modules=["embed_tokens"], **how)


def test_dora_of_an_embedding_is_refused(llama4):
    chain = chain_of(load_base(llama4)[0])
    with pytest.raises(InputError, match=r"use_dora: 'model\.embed_tokens' is an embedding"):
        adapting.init(chain, {"model.embed_tokens": 4}, 1.0, 0, dora=True)


def test_dora_of_a_head_is_mlx_lms(tmp_path):
    chain = chain_of(model_of("llama"))
    ranks = {"lm_head": RANK}
    adapter = adapting.init(chain, ranks, SCALE, 0, dora=True)
    rng = np.random.default_rng(0)
    (a, b) = adapter.tensors["lm_head"]
    b = mx.array(rng.standard_normal(b.shape).astype(np.float32)) * 0.1
    m = adapter.magnitudes["lm_head"] * 1.1
    adapter = lora.Adapter({"lm_head": (a, b)}, adapter.scales, {"lm_head": m})
    batch = batch_of(1)
    loss, grads = run(chain, adapter, batch)
    stock = model_of("llama")
    stock.freeze()
    how = {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": ["lm_head"]}
    linear_to_lora_layers(stock, 0, how, use_dora=True)
    flat = {"lm_head.lora_a": a, "lm_head.lora_b": b, "lm_head.m": m}
    stock.load_weights(list(flat.items()), strict=False)
    tokens = mx.array(batch.tokens)
    shares = mx.array(batch.weights[:, 1:] / batch.weights[:, 1:].sum())

    def theirs(model):
        logits = model(tokens[:, :-1])
        return (shares * nn.losses.cross_entropy(logits, tokens[:, 1:])).sum()

    expected, expected_grads = nn.value_and_grad(stock, theirs)(stock)
    assert abs(loss - expected.item()) < 1e-5 * abs(loss)
    for path, grad in tree_flatten(expected_grads):
        assert_close(path, grads[path], grad, 1e-4)


def test_an_adapter_read_back_is_the_same(data, tmp_path):
    model_dir = write_llama(tmp_path / "m", tied=False)
    how = {"target_modules": ["lm_head", "embed_tokens"], "iters": 1}
    train(setup_of("sft", model_dir, data, None, tmp_path / "a", **how))
    adapter = read_adapter(tmp_path / "a", chain_of(load_base(model_dir)[0]))
    assert set(adapter.tensors) == {"lm_head", "model.embed_tokens"}
