"""Tests `matmul_precision: bfloat16`: products with frozen weights whose factors are rounded to
bfloat16."""

import mlx.core as mx
import numpy as np
import pytest

from lib import tiny_models
from lib.chains import FAST, adapter_of, batch_of, run
from lib.checks import ON_GPU, f64, grads, rand
from lib.folders import write_first_layers
from lib.runs import config_of
from mlx_segtrain import InputError, _core, ops, train
from mlx_segtrain.commands.demo import snapshot
from mlx_segtrain.files import cache_dir
from mlx_segtrain.models import chain_of, load_base
from mlx_segtrain.training import evaluate, evaluation, policy, step

supported = pytest.mark.skipif(
    ON_GPU or not _core.has_bfloat16_products(), reason="only for CPUs with AVX512-BF16"
)


def linear_of(rng, n, k, bits, bias=False):
    """Returns a linear layer and its weight."""
    weight, _ = rand(rng, n, k)
    extra = {"bias": rand(rng, n)[0]} if bias else {}
    if not bits:
        return _core.Linear(_core.Base(weight, **extra)), weight
    how = {"group_size": 32, "bits": bits}
    packed = mx.quantize(weight, **how)
    return _core.Linear(_core.Base(*packed, **extra, **how)), mx.dequantize(*packed, **how)


def rounded(x):
    return f64(x.astype(mx.bfloat16))


def error(x, truth):
    return np.linalg.norm(x - truth) / np.linalg.norm(truth)


@supported
@pytest.mark.parametrize(
    "m, n, k, bits",
    [(16, 7, 5, 0), (33, 100, 96, 4), (200, 40, 64, 8), (197, 31, 33, 0), (513, 576, 1536, 4)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_rounded_factors(m, n, k, bits, bias):
    rng = np.random.default_rng(0)
    linear, weight = linear_of(rng, n, k, bits, bias)
    x, dy = rand(rng, m, k)[0], rand(rng, m, n)[0]

    def f(x):
        return ops.lora_linears(x, [linear])[0]

    with ops.bfloat16_products(True):
        y, (dx,) = f(x), grads(f, [x], dy)
        few = f(x[:16])
        mx.eval(y, dx, few)
    true = rounded(x) @ rounded(weight).T + (f64(linear.base.bias) if bias else 0)
    assert error(f64(y), true) < 1e-6
    assert error(f64(dx), rounded(dy) @ rounded(weight)) < 1e-6
    # A sum depends neither on the number of rows nor on the threads that compute them.
    assert mx.array_equal(few, y[:16])


@supported
def test_few_rows_are_not_rounded():
    """Rounding a weight would take longer than a product with a few rows, as in generation."""
    rng = np.random.default_rng(0)
    linear, _ = linear_of(rng, 64, 64, 4)
    x, _ = rand(rng, 15, 64)
    plain = ops.lora_linears(x, [linear])[0]
    with ops.bfloat16_products(True):
        assert mx.array_equal(ops.lora_linears(x, [linear])[0], plain)


def gradient(chain, adapter, batch, size=1):
    """Returns the loss, and all gradients as one vector."""
    loss, found = run(chain, adapter, batch, size)
    return loss, np.concatenate([f64(g).ravel() for path in sorted(found) for g in found[path]])


@supported
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4-E4B"])
def test_all_plans_give_the_same_bits(family):
    name, options = FAST[family]
    chain = chain_of(tiny_models.build(name, **options))
    adapter, batch = adapter_of(chain), batch_of(2, length=40)
    plain = gradient(chain, adapter, batch)
    with ops.bfloat16_products(True):
        loss, first = gradient(chain, adapter, batch, 0)
        assert all(np.array_equal(first, gradient(chain, adapter, batch, n)[1]) for n in (1, 2))
    assert 0 < abs(loss - plain[0]) < 0.01 * plain[0]
    assert 0 < error(first, plain[1]) < 0.15


@supported
@pytest.mark.acceptance
def test_gradients_are_better_than_on_a_gpu(tmp_path):
    """On a GPU, activations are bfloat16 too. Here they are float32, and only the factors of
    products are rounded."""
    found = {}
    folder = write_first_layers(tmp_path / "few", snapshot.smollm2_snapshot(cache_dir()), 8)
    for dtype in (mx.float32, mx.bfloat16):
        model, _, _ = load_base(folder)
        model.set_dtype(dtype)
        chain = chain_of(model)
        what = chain, adapter_of(chain), batch_of(1, length=48)
        found[dtype] = gradient(*what)[1]
        if dtype == mx.float32:
            with ops.bfloat16_products(True):
                found["products"] = gradient(*what)[1]
    products, gpu = (error(found[own], found[mx.float32]) for own in ("products", mx.bfloat16))
    assert 0 < products < 0.8 * gpu, (products, gpu)


@supported
def test_a_run_and_its_evaluations(llama4, data, tmp_path, monkeypatch):
    seen = []

    def watched(module, name):
        own = getattr(module, name)

        def call(*args, **how):
            seen.append((name, _core.is_bfloat16_products()))
            return own(*args, **how)

        monkeypatch.setattr(module, name, call)

    watched(step, "value_and_grad")
    watched(evaluation, "eval_batches")
    config = config_of(llama4, data, tmp_path / "a", iters=2, matmul_precision="bfloat16")
    result = train(config)
    evaluate(config)
    assert set(seen) == {("value_and_grad", True), ("eval_batches", True)}
    assert not _core.is_bfloat16_products()
    plain = train(config_of(llama4, data, tmp_path / "b", iters=2))
    assert 0 < abs(result.final_train_loss - plain.final_train_loss) < 0.01
    again = train(config.model_copy(update={"adapter_path": tmp_path / "c"}))
    assert again.final_train_loss == result.final_train_loss


@pytest.mark.parametrize(
    "device, has, words",
    [(mx.gpu, True, "is only for CPUs"), (mx.cpu, False, "requires AVX512-BF16")],
)
def test_elsewhere_it_is_refused(device, has, words, llama4, data, tmp_path, monkeypatch):
    monkeypatch.setattr(policy.mx, "default_device", lambda: mx.Device(device))
    monkeypatch.setattr(policy._core, "has_bfloat16_products", lambda: has)
    with pytest.raises(InputError, match=words) as error:
        train(config_of(llama4, data, tmp_path / "a", matmul_precision="bfloat16"))
    assert error.value.field == "matmul_precision"
