"""Compares optimizers and schedules with their float64 formulas in NumPy."""

import math

import mlx.core as mx
import numpy as np
import pytest

from lib.oracle import assert_close
from lib.runs import assert_same_in_mlx_lm, config_of
from mlx_segtrain.config import TrainConfig
from mlx_segtrain.models import adapting
from mlx_segtrain.training import train
from mlx_segtrain.training.layout import Layout
from mlx_segtrain.training.optimizer import OPTIMIZERS, Optimizer, learning_rate

PATHS = {"model_dir": "m", "data_dir": "d", "adapter_path": "a"}


def config(**given):
    return TrainConfig(**PATHS, **given)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 1, 19: 1}),
        ("constant", 4, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 19: 1}),
        ("linear", 0, {0: 1, 10: 0.55, 19: 1 - 0.9 * 0.95}),
        ("linear", 4, {3: 1, 4: 1, 12: 0.55}),
        ("cosine", 0, {0: 1, 10: 0.55, 5: 0.1 + 0.45 * (1 + math.sqrt(0.5))}),
        ("cosine", 10, {9: 1, 10: 1, 15: 0.55}),
        ("wsd", 0, {0: 1, 16: 1, 18: 0.55, 19: 1 - 0.9 * 0.75}),
        ("wsd", 10, {0: 0.1, 10: 1, 18: 1, 19: 0.55}),
    ],
)
def test_schedules(schedule, warmup, expected):
    run = config(iters=20, learning_rate=3.0, lr_schedule=schedule, warmup_iters=warmup)
    for step, part in expected.items():
        assert learning_rate(run, step) == pytest.approx(3.0 * part)
    rates = [learning_rate(run, step) for step in range(warmup, 20)]
    assert rates == sorted(rates, reverse=True) and 0.1 * 3 < min(rates) <= max(rates) == 3.0


def test_a_warmup_as_long_as_the_run_is_an_error():
    with pytest.raises(ValueError, match="warmup_iters = 20 must be smaller than iters = 20"):
        config(iters=20, warmup_iters=20)


# ---- closed forms: (state, gradient, parameter, learning rate, step counted from 1) → new
# parameter


def adamw(s, g, p, rate, t):
    m = s["m"] = 0.9 * s.get("m", 0) + 0.1 * g
    v = s["v"] = 0.999 * s.get("v", 0) + 0.001 * g**2
    return p - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


def lion(s, g, p, rate, t):
    m = s.get("m", 0)
    s["m"] = 0.99 * m + 0.01 * g
    return p - rate * np.sign(0.9 * m + 0.1 * g)


def sgd(s, g, p, rate, t):
    s["v"] = 0.9 * s.get("v", 0) + g
    return p - rate * s["v"]


def adafactor(s, g, p, rate, t):
    """Adafactor (Shazeer and Stern 2018, algorithm 4) without relative step sizes."""
    beta = 1 - t**-0.8
    square = g**2 + 1e-30
    row = s["row"] = beta * s.get("row", 0) + (1 - beta) * square.mean(1)
    column = s["column"] = beta * s.get("column", 0) + (1 - beta) * square.mean(0)
    update = g / np.sqrt(row[:, None] / row.mean() * column[None])
    return p - rate * update / max(1.0, np.sqrt((update**2).mean()))


def muon(s, g, p, rate, t):
    """Momentum, orthogonalized by five Newton–Schulz iterations."""
    v = s["v"] = 0.95 * s.get("v", 0) + 0.05 * g
    x = 0.05 * g + 0.95 * v
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x if x.shape == g.shape else x.T
    return p - rate * max(1, g.shape[0] / g.shape[1]) ** 0.5 * x


FORMS = {"adamw": adamw, "lion": lion, "sgd": sgd, "adafactor": adafactor, "muon": muon}


@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps_are_those_of_the_closed_form(name, ratio):
    """Covers two stages with two factors each, a cosine schedule with warmup, decoupled weight
    decay, and LoRA+."""
    rng = np.random.default_rng(0)
    shapes = {"x.lora_a": (6, 3), "x.lora_b": (3, 5), "y.lora_a": (4, 2), "y.lora_b": (2, 7)}
    true = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    params = {
        stage: {key: mx.array(x.astype(np.float32)) for key, x in true.items() if key[0] == stage}
        for stage in "xy"
    }
    layout = Layout.of(params)
    assert [name[-1] for _, name, _ in layout.entries] == ["a", "a", "b", "b"]
    vector = layout.join(params)
    run = config(
        optimizer=name, iters=20, warmup_iters=3, lr_schedule="cosine", learning_rate=0.05,
        weight_decay=0.1, lora_plus_ratio=ratio,
    )  # fmt: skip
    optimizer = Optimizer(run, layout)
    at = optimizer.start(vector)
    states = {key: {} for key in shapes}
    for t in range(1, 21):
        gradients = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
        for key, g in gradients.items():
            rate = learning_rate(run, t - 1) * (ratio if key.endswith("b") else 1)
            decayed = true[key] * (1 - rate * 0.1)
            true[key] = FORMS[name](states[key], g, decayed, rate, t)
        flat = {key: mx.array(g.astype(np.float32)) for key, g in gradients.items()}
        split = {stage: {k: g for k, g in flat.items() if k[0] == stage} for stage in "xy"}
        assert at.step == t - 1
        at = optimizer(layout.join(split), at)
    got = {key: x for own in layout.split(at.vector).values() for key, x in own.items()}
    for key, x in true.items():
        assert_close(f"{name} {key}", got[key], mx.array(x.astype(np.float32)), 2e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_runs_learn_with_each(name, llama4, data, tmp_path):
    rates = {"adamw": 1e-2, "lion": 2e-3, "sgd": 2e-1, "adafactor": 1e-2, "muon": 1e-2}
    seen = []
    options = {"optimizer": name, "learning_rate": rates[name], "lora_plus_ratio": 2.0}
    options |= {"iters": 30, "lr_schedule": "linear", "warmup_iters": 2, "steps_per_report": 1}
    train(config_of(llama4, data, tmp_path / "a", **options), seen.append)
    metrics = [e for e in seen if e.get("kind") == "train"]
    assert metrics[0]["learning_rate"] == pytest.approx(rates[name] / 2)
    assert metrics[-1]["learning_rate"] < 0.15 * rates[name]
    losses = [e["loss"] for e in metrics]
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])


def test_rs_lora_divides_by_the_root_of_each_rank(llama_mixed, data, tmp_path):
    """Ranks 4 and 8 have different multipliers. mlx-lm supports only one multiplier, but must
    compute the same logits with the saved adapter."""
    result = train(config_of(llama_mixed, data, tmp_path / "a", scale=3.0, rs_lora=True))
    assert set(result.applied_ranks.values()) == {4, 8}
    assert_same_in_mlx_lm(llama_mixed, tmp_path / "a", apart=1e-3)
    train(config_of(llama_mixed, data, tmp_path / "b", scale=3.0))
    first, second = ((tmp_path / x / "adapters.safetensors").read_bytes() for x in "ab")
    assert first != second


def test_the_multipliers_of_rs_lora(llama_mixed):
    from mlx_segtrain.models import chain_of, load_base

    chain = chain_of(load_base(llama_mixed)[0])
    ranks = {path: 4 if "q_proj" in path else 9 for path in chain.linears}
    adapter = adapting.init(chain, ranks, 3.0, 0, root=True)
    assert {adapter.scales[p] for p in ranks if "q_proj" in p} == {1.5}
    assert {adapter.scales[p] for p in ranks if "q_proj" not in p} == {1.0}
    assert set(adapting.init(chain, ranks, 3.0, 0).scales.values()) == {3.0}
