"""For each model family, the loss and all LoRA gradients equal those of mlx-lm and transformers."""

import itertools
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from lib import tiny_models
from lib.chains import FAST, SCALE, adapter_of, batch_of, run
from lib.checks import needs_router_gradient
from lib.oracle import assert_close
from mlx_segtrain import _core, ops
from mlx_segtrain.lora import Adapter
from mlx_segtrain.models import adapting, chain_of, family_of
from mlx_segtrain.objectives import Functions, value_and_grad
from mlx_segtrain.objectives.sft import Sft
from mlx_segtrain.schedule import Cuts, forward
from mlx_segtrain.training.setup import with_params

#: Families whose gradients are also compared with those of transformers.
WITH_HF = [
    *("llama", "qwen3", "gemma3", "gemma4-E4B", "gemma4-K=V", "gemma4-experts"),
    *("qwen2", "phi3", "olmo2", "smollm3", "granite", "gemma2"),
]


def of_mlx_lm(model, chain, adapter, batch):
    """Attaches LoRA to the model's linear layers, and differentiates mlx-lm's own forward pass."""
    adapting.attach(model, chain, adapter)
    model.freeze()
    names = [f"{path}.lora_{ab}" for path in adapter.tensors for ab in "ab"]
    modules = dict(model.named_modules())
    for path in adapter.tensors:
        modules[path].unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    shares = mx.array(batch.weights[:, 1:] / batch.weights[:, 1:].sum())
    tokens = mx.array(batch.tokens)

    def loss(model):
        logits = model(tokens[:, :-1]).astype(mx.float32)
        return (shares * nn.losses.cross_entropy(logits, tokens[:, 1:])).sum()

    value, grads = nn.value_and_grad(model, loss)(model)
    grads = dict(tree_flatten(grads))
    return value.item(), {name: grads[name] for name in names}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", FAST)
def test_loss_and_gradients_are_those_of_mlx_lm(name, rows):
    if name == "gemma4-experts":
        needs_router_gradient()
    family, overrides = FAST[name]
    model = tiny_models.build(family, **overrides)
    assert family_of(model) is not None
    chain = chain_of(model)
    adapter, batch = adapter_of(chain), batch_of(rows)
    results = [run(chain, adapter, batch, size) for size in (1, 2, 0)]
    loss, grads = of_mlx_lm(model, chain, adapter, batch)
    for got, got_grads in results:
        assert abs(got - loss) < 1e-5 * abs(loss)
        assert set(got_grads) == set(grads)
        for path, grad in grads.items():
            assert mx.abs(grad).max() > 0, path
            assert_close(path, got_grads[path], grad, 1e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", WITH_HF)
def test_loss_and_gradients_are_those_of_transformers_and_peft(name, rows, hf):
    family, overrides = FAST[name]
    model = tiny_models.build(family, **overrides)
    weights = {key: np.array(value) for key, value in tree_flatten(model.parameters())}
    chain = chain_of(model)
    adapter, batch = adapter_of(chain), batch_of(rows)
    loss, grads = run(chain, adapter, batch)
    config = tiny_models.config(family, **overrides)
    pairs = {path: (np.array(a), np.array(b)) for path, (a, b) in adapter.tensors.items()}
    expected, of_hf = hf.hf_loss_and_grads(
        family, config, weights, batch.tokens, batch.weights, pairs, SCALE
    )
    assert abs(loss - expected) < 1e-5 * abs(expected)
    for path, pair in of_hf.items():
        for ab, grad in zip("ab", pair, strict=True):
            assert_close(path, grads[f"{path}.lora_{ab}"], mx.array(grad), 1e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4-E4B", "gemma4-experts", "phi3"])
def test_rows_before_the_loss_change_nothing(name, rows, monkeypatch):
    """Trimming changes neither the loss nor the gradients, and trimmed rows are not computed at
    all."""
    family, overrides = FAST[name]
    chain = chain_of(tiny_models.build(family, **overrides))
    adapter, batch = adapter_of(chain), batch_of(rows, prompt=8)
    monkeypatch.setattr("mlx_segtrain.streams.TRIM_MULTIPLE", 64)
    loss, grads = run(chain, adapter, batch)
    for multiple, left in (1, 12), (3, 14):
        monkeypatch.setattr("mlx_segtrain.streams.TRIM_MULTIPLE", multiple)
        for size in (1, 2, 0):
            got, got_grads = run(chain, adapter, batch, size)
            assert abs(got - loss) < 1e-6 * abs(loss)
            for path, grad in grads.items():
                assert_close(path, got_grads[path], grad, 2e-5)
        stages = chain.stages(adapter.scales)
        params = adapting.stage_params(chain, adapter)
        keep = ["h", *(name for stage in stages for name in stage.writes if "keys of" in name)]
        scope = forward(stages, params, Sft().values(chain, batch, 1.0), keep)
        assert scope["h"].shape[1] == left
        donors = [x for name, x in scope.items() if name.startswith("keys of")]
        assert all(keys.shape[2] == 20 for keys in donors)


def test_layers_behind_the_last_keys_run_on_the_rows_of_the_loss(monkeypatch):
    """The last 3 of the 6 layers compute no keys: they use the keys of earlier layers. Layer 2
    computes keys for all rows, but its output and all later layers cover only rows in the loss."""
    monkeypatch.setattr("mlx_segtrain.streams.TRIM_MULTIPLE", 1)
    family, overrides = FAST["gemma4-E4B"]
    model = tiny_models.build(family, **overrides)
    chain = chain_of(model)
    stages = chain.stages({})
    scope = Sft().values(chain, batch_of(1, prompt=8), 1.0)
    rows = []
    for stage in stages:
        scope |= forward([stage], {}, scope, stage.writes)
        rows.append(scope["h"].shape[1])
    assert rows == [20, 20] * 2 + [12, 12] * 4


def test_an_adapter_of_the_last_layers_runs_the_first_ones_forward_only():
    chain = chain_of(tiny_models.build("llama", num_hidden_layers=4))
    adapter, batch = adapter_of(chain), batch_of(1)
    last = {p: f for p, f in adapter.tensors.items() if chain.stage_of[p].split(".")[2] in "23"}
    zeroed = {p: (a, b if p in last else mx.zeros_like(b)) for p, (a, b) in adapter.tensors.items()}
    _, expected = run(chain, Adapter(zeroed, adapter.scales), batch)
    _, got = run(chain, Adapter(last, adapter.scales), batch)
    assert sorted(got) == sorted(f"{p}.lora_{ab}" for p in last for ab in "ab")
    for path, grad in got.items():
        assert_close(path, grad, expected[path], 1e-5)
    specs = [
        _core.StageSpec(stage.name, list(stage.reads), list(stage.writes), i >= 4)
        for i, stage in enumerate(chain.stages(adapter.scales))
    ]
    plan = _core.make_plan(specs, ["h", "positions"], ["h"], [2, 4, 6, 8], [1, 2, 3, 4]).describe()
    assert [" ".join(line.split()[:2]) for line in plan] == [
        *("forward 0:2", "forward 2:4", "forward 4:6", "head 6:8", "backward 4:6"),
    ]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4-E4B"])
def test_half_precision_is_no_further_from_float32_than_mlx_lm(name):
    """The weights are bfloat16, and the reference is the same model in float32. Donor layers and
    the layers that read their keys are in different segments.

    A tensor's errors are averaged over several models and batches, because a single measurement
    varies randomly by up to 50 %.
    """
    family, overrides = FAST[name]
    errors = {}

    def model_of(dtype, seed):
        sizes = {"vocab_size": 512, "num_attention_heads": 8}
        model = tiny_models.build(family, seed=seed, **overrides, **sizes)
        model.set_dtype(mx.bfloat16)
        model.set_dtype(dtype)
        return model

    def add(who, grads, truth):
        for path, true in truth.items():
            error = mx.square(grads[path] - true).sum() / mx.square(true).sum()
            errors[who, path] = errors.get((who, path), 0.0) + error.item()

    for seed in range(6):
        batch = batch_of(3, length=61)
        tokens = np.random.default_rng(seed).integers(0, 512, batch.tokens.shape)
        batch = replace(batch, tokens=tokens.astype(np.int32))
        chain = chain_of(model_of(mx.float32, seed))
        adapter = adapter_of(chain)
        _, truth = run(chain, adapter, batch)
        half = model_of(mx.bfloat16, seed)
        chain = chain_of(half)
        for size in (0, 1, 4):
            add(size, run(chain, adapter, batch, size)[1], truth)
        add("mlx-lm", of_mlx_lm(half, chain, adapter, batch)[1], truth)
    for path in truth:
        for size in (0, 1, 4):
            assert errors[size, path] ** 0.5 <= 1.2 * errors["mlx-lm", path] ** 0.5, path


@pytest.mark.parametrize("name", ["gemma4-E4B", "gemma4-experts"])
def test_trained_forward_is_the_cached_decode_of_mlx_lm(name):
    """Trains for 20 steps, then decodes with mlx-lm, using sliding-window caches and shared
    keys."""
    family, overrides = FAST[name]
    model = tiny_models.build(family, **overrides)
    chain = chain_of(model)
    adapter, batch = adapter_of(chain), batch_of(3)
    params = adapting.stage_params(chain, adapter)
    optimizer = optim.Adam(3e-3)
    functions = Functions(Sft(), chain, adapter.scales)
    losses = []
    for _ in range(20):
        what = (functions, params, batch, float(batch.weights[:, 1:].sum()))
        (loss,), grads = value_and_grad(*what, cuts=lambda streams: chain.cuts(2))
        params = optimizer.apply_gradients(grads, params)
        mx.eval(params, optimizer.state)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

    tokens = mx.array(batch.tokens)
    values = {**chain.start(tokens), "positions": mx.arange(tokens.shape[1])}
    trained = chain.head.logits(forward(chain.stages(adapter.scales), params, values)["h"])
    adapting.attach(model, chain, with_params(chain, adapter.scales, params))
    cache = model.make_cache()
    decoded = [model(tokens[:, t : t + 1], cache=cache) for t in range(tokens.shape[1])]
    assert_close("logits", mx.concatenate(decoded, 1), trained, 1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma4-E4B", "phi3"])
def test_every_linear_may_be_quantized_its_own_way(name):
    """Layers, including embeddings and tied heads, are dense or use 3, 4 or 8 bits with various
    group sizes and modes."""
    kinds = itertools.cycle(
        [
            {"group_size": 32, "bits": 4, "mode": "affine"},
            {"group_size": 64, "bits": 8, "mode": "affine"},
            False,
            {"group_size": 32, "bits": 4, "mode": "mxfp4"},
            {"group_size": 32, "bits": 3, "mode": "affine"},
            {"group_size": 32, "bits": 8, "mode": "mxfp8"},
            {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        ]
    )

    def kind(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        chosen = next(kinds)
        return chosen if chosen and module.weight.shape[-1] % chosen["group_size"] == 0 else False

    family, overrides = FAST[name]
    model = tiny_models.build(family, **overrides)
    nn.quantize(model, class_predicate=kind)
    second = model.model.get("embed_tokens_per_layer")
    if second is not None and "scales" not in second:
        model.model.embed_tokens_per_layer = second.to_quantized(32, 4)
    chain = chain_of(model)
    adapter, batch = adapter_of(chain), batch_of(2)
    got, got_grads = run(chain, adapter, batch)
    loss, grads = of_mlx_lm(model, chain, adapter, batch)
    assert abs(got - loss) < 1e-5 * abs(loss)
    for path, grad in grads.items():
        assert_close(path, got_grads[path], grad, 1e-4)


def test_what_is_saved_is_not_computed_again(monkeypatch):
    chain = chain_of(tiny_models.build("llama", num_hidden_layers=4))
    adapter, batch = adapter_of(chain), batch_of(1)
    calls = []
    for name in ("attention", "attention_forward"):
        original = getattr(ops, name)

        def counted(*x, original=original, name=name, **options):
            calls.append((name, bool(options.get("saved"))))
            return original(*x, **options)

        monkeypatch.setattr(ops, name, counted)
    run(chain, adapter, batch, cuts=replace(chain.cuts(1), saves=(0, 2, 4, 6)))
    # Three layers save arrays and are recomputed, and the last layer runs together with the head.
    saving, again, with_head = (calls.count(x) for x in SAVED_CALLS)
    assert (saving, again, with_head, len(calls)) == (3, 3, 1, 7)


SAVED_CALLS = [("attention_forward", False), ("attention", True), ("attention", False)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma4-E4B"])
def test_every_cut_gives_the_same_bits(name, dtype, monkeypatch):
    """Tests cuts within layers, recomputed groups, and cuts between a donor layer and its four
    readers."""
    monkeypatch.setattr("mlx_segtrain.streams.TRIM_MULTIPLE", 1)
    types = ["full_attention", *["sliding_attention"] * 5]
    shared = {"num_kv_shared_layers": 4, "layer_types": types}
    family, overrides = FAST[name]
    overrides = {**overrides, **(shared if family == "gemma4_text" else {}), "num_hidden_layers": 6}
    model = tiny_models.build(family, **overrides)
    model.set_dtype(dtype)
    chain = chain_of(model)
    adapter, batch = adapter_of(chain), batch_of(2, prompt=8)
    loss, grads = run(chain, adapter, batch)
    halves = tuple(range(1, 13))
    for cuts in [
        Cuts(halves, halves),
        Cuts(halves, (4, 8, 12)),
        Cuts(halves, (12,)),
        Cuts((3, 4, 9, 12), (1, 3, 4)),
        Cuts((2, 4, 6, 8, 12), (4, 5)),
        Cuts((12,), (1,)),
        replace(chain.cuts(2), saves=(0, 2, 4, 6, 8, 10)),
        Cuts(halves, tuple(range(2, 13, 2))),
        Cuts((*halves, 12), (8, 12, 13)),
        Cuts(halves, (4, 8, 12), saves=(0, 4, 6, 10)),
        Cuts(halves, halves, saves=(0, 2, 4, 6, 8), offloaded=10),
    ]:
        got, got_grads = run(chain, adapter, batch, cuts=cuts)
        assert got == loss, cuts
        for path, grad in grads.items():
            assert mx.array_equal(got_grads[path], grad), (cuts, path)
