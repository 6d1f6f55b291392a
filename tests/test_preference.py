"""Compares preference losses with TRL's formulas, computed in float64 with mlx-lm's models. Also
tests streams, cuts and dropout."""

import functools
import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from lib import tiny_models
from lib.chains import pair_batch
from lib.checks import random_adapter
from lib.oracle import assert_close
from mlx_segtrain.data import Batch, Dataset, Pair, PairBatch, Row
from mlx_segtrain.models import adapting, chain_of
from mlx_segtrain.models.chain import Dropout
from mlx_segtrain.objectives import Functions, value, value_and_grad
from mlx_segtrain.objectives.preference import Dpo, Orpo, Reference, Simpo
from mlx_segtrain.objectives.sft import Sft
from mlx_segtrain.schedule import Cuts

SCALE, RANK = 1.5, 4
FAMILIES = {
    "llama": ("llama", {"num_hidden_layers": 3}),
    "gemma3": ("gemma3_text", {}),
    "gemma4-E4B": ("gemma4_text", {}),
    "generic": ("gpt_neox", {}),
}
OBJECTIVES = {
    "sigmoid": Dpo(beta=0.3),
    "conservative": Dpo(beta=0.3, label_smoothing=0.2),
    "robust": Dpo(beta=0.3, kind="robust", label_smoothing=0.2),
    "hinge": Dpo(beta=0.3, kind="hinge"),
    "ipo": Dpo(beta=0.3, kind="ipo"),
    "exo_pair": Dpo(beta=0.3, kind="exo_pair", label_smoothing=0.2),
    "nca_pair": Dpo(beta=0.3, kind="nca_pair"),
    "bco_pair": Dpo(beta=0.3, kind="bco_pair"),
    "sppo_hard": Dpo(beta=0.3, kind="sppo_hard"),
    "apo_zero": Dpo(beta=0.3, kind="apo_zero"),
    "apo_down": Dpo(beta=0.3, kind="apo_down"),
    "discopop": Dpo(beta=0.3, kind="discopop"),
    "sigmoid_norm": Dpo(beta=0.3, kind="sigmoid_norm"),
    "orpo": Orpo(weight=0.4),
    "orpo, response": Orpo(weight=0.4, scope="response"),
    "simpo": Simpo(beta=2.0, gamma=0.7),
}


@pytest.fixture(autouse=True)
def small_shares(monkeypatch):
    """Allows streams to be split and trimmed at any token."""
    monkeypatch.setattr("mlx_segtrain.streams.TRIM_MULTIPLE", 1)
    monkeypatch.setattr("mlx_segtrain.objectives.preference.SHARED_LEAST", 1)


def model_of(name: str):
    family, changes = FAMILIES[name]
    return tiny_models.build(family, **changes)


def alone(batch: PairBatch, i: int) -> PairBatch:
    """Returns a batch that contains only pair i."""

    def one(branch: Batch) -> Batch:
        n = branch.lengths[i]
        return Batch(
            branch.tokens[i : i + 1, :n],
            branch.weights[i : i + 1, :n],
            np.arange(1),
            branch.lengths[i : i + 1],
        )

    of = len(batch.rows)
    reference = batch.reference[[i, of + i]]
    return PairBatch(one(batch.chosen), one(batch.rejected), batch.shared, np.arange(1), reference)


def setup(name: str):
    chain = chain_of(model_of(name))
    adapter = random_adapter(chain, dict.fromkeys(chain.linears, RANK), SCALE, 0.1)
    return chain, adapter, adapting.stage_params(chain, adapter)


def run(name, objective, batch, size=1, cuts=None, dropout=None, total=None):
    chain, adapter, params = setup(name)
    total = total or objective.total([batch])
    outputs, grads = value_and_grad(
        Functions(objective, chain, adapter.scales, dropout),
        params,
        batch,
        total,
        cuts=cuts or functools.partial(chain.cuts, size),
    )
    return [float(x) for x in outputs], {k: g for own in grads.values() for k, g in own.items()}


def trl(objective, log_p: list, batch: PairBatch):
    """Returns TRL's loss for pairs, computed from the log-probabilities [B, T] of both sides'
    tokens."""
    inside = [mx.array(side.weights[:, 1:]) for side in (batch.chosen, batch.rejected)]
    sums = [(p * m).sum(1) for p, m in zip(log_p, inside, strict=True)]
    means = [s / m.sum(1) for s, m in zip(sums, inside, strict=True)]
    if isinstance(objective, Orpo):
        rest = [mx.log1p(-mx.exp(p)) for p in means]
        odds = (means[0] - means[1]) - (rest[0] - rest[1])
        ratio = mx.log(mx.sigmoid(odds))
        if objective.scope == "response":
            likelihood = -means[0].mean()
        else:
            real = mx.arange(log_p[0].shape[1]) < mx.array(batch.chosen.lengths - 1)[:, None]
            likelihood = -(log_p[0] * real).sum() / real.sum()
        rewards = [objective.weight * p for p in means]
        return likelihood - objective.weight * ratio.mean(), rewards, odds
    if isinstance(objective, Simpo):
        apart = means[0] - means[1]
        good = mx.log(mx.sigmoid(objective.beta * (apart - objective.gamma / objective.beta)))
        return -good.mean(), [objective.beta * p for p in means], objective.beta * apart
    reference = mx.split(mx.array(batch.reference), 2)
    ratios = [s - r for s, r in zip(sums, reference, strict=True)]
    if objective.kind in ("ipo", "sigmoid_norm"):
        ratios = [x / m.sum(1) for x, m in zip(ratios, inside, strict=True)]
    z, eps, beta = ratios[0] - ratios[1], objective.label_smoothing, objective.beta
    good, bad = mx.log(mx.sigmoid(beta * z)), mx.log(mx.sigmoid(-beta * z))
    p, q = mx.sigmoid(beta * z), mx.sigmoid(-beta * z)
    c, r = (beta * x for x in ratios)
    share = mx.sigmoid(beta * z / 0.05)
    losses = {
        "sigmoid": lambda: -good * (1 - eps) - bad * eps,
        "robust": lambda: (-good * (1 - eps) + bad * eps) / (1 - 2 * eps),
        "hinge": lambda: mx.maximum(1 - beta * z, 0),
        "ipo": lambda: (z - 1 / (2 * beta)) ** 2,
        "exo_pair": lambda: p * (good - math.log(1 - eps)) + q * (bad - math.log(eps)),
        "nca_pair": lambda: (
            -mx.log(mx.sigmoid(c)) - mx.log(mx.sigmoid(-c)) / 2 - mx.log(mx.sigmoid(-r)) / 2
        ),
        "bco_pair": lambda: -mx.log(mx.sigmoid(c)) - mx.log(mx.sigmoid(-r)),
        "sppo_hard": lambda: (ratios[0] - 0.5 / beta) ** 2 + (ratios[1] + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - mx.sigmoid(c) + mx.sigmoid(r),
        "apo_down": lambda: mx.sigmoid(c) + 1 - mx.sigmoid(c - r),
        "discopop": lambda: -good * (1 - share) + mx.exp(-beta * z) * share,
        "sigmoid_norm": lambda: -good,
    }[objective.kind]()
    return losses.mean(), [c, r], beta * z


def oracle(name, objective, batch, dtype):
    """Returns the loss, metrics and gradients of mlx-lm's model with LoRA layers. Chosen and
    rejected sequences are run separately, with all of their logits in memory."""
    _, adapter, _ = setup(name)
    # GPUs do not support float64.
    with mx.stream(mx.cpu if dtype == mx.float64 else mx.default_device()):
        return plain(name, adapter, objective, batch, dtype)


def plain(name, adapter, objective, batch, dtype):
    model = model_of(name)
    model.set_dtype(dtype)
    model.freeze()
    keys = sorted(adapter.tensors)
    linear_to_lora_layers(model, -1, {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": keys})
    flat = [
        (f"{path}.lora_{ab}", x.astype(dtype))
        for path, pair in adapter.tensors.items()
        for ab, x in zip("ab", pair, strict=True)
    ]
    model.load_weights(flat, strict=False)

    def loss(model):
        log_p = []
        for side in (batch.chosen, batch.rejected):
            tokens = mx.array(side.tokens)
            z = model(tokens[:, :-1])
            z = z - mx.logsumexp(z, axis=-1, keepdims=True)
            log_p.append(mx.take_along_axis(z, tokens[:, 1:, None], axis=-1)[..., 0])
        found, rewards, margins = trl(objective, log_p, batch)
        return found, ((margins > 0).mean(), margins.mean(), *(x.mean() for x in rewards))

    (found, metrics), grads = nn.value_and_grad(model, loss)(model)
    flat = {key: g.astype(mx.float32) for key, g in tree_flatten(grads)}
    mx.eval(flat)
    return [float(x) for x in (found, *metrics)], flat


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_losses_and_gradients_are_trls_in_float64(kind):
    objective, batch = OBJECTIVES[kind], pair_batch(9, lengths=((21, 17), (15, 20)))
    if kind not in ("hinge", "sigmoid", "conservative", "robust", "ipo"):
        batch.reference[:] = [-58, -60, -57, -61]  # with these values, no sigmoid saturates
    if kind == "hinge":  # pairs on both sides of the kink
        batch.reference[:] = [-60, -40, -40, -40]
    truth, true_grads = oracle("llama", objective, batch, mx.float64)
    assert all(np.abs(g).max() > 0 for g in map(np.array, true_grads.values()))
    for shared in (9, 0):
        batch = PairBatch(batch.chosen, batch.rejected, shared, batch.rows, batch.reference)
        outputs, grads = run("llama", objective, batch)
        np.testing.assert_allclose(outputs, truth, rtol=2e-5)
        assert grads.keys() == true_grads.keys()
        for path, grad in grads.items():
            assert_close(f"{path}, {shared} shared", grad, true_grads[path], 2e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["sigmoid", "orpo"])
def test_every_family_is_as_mlx_lms(name, kind):
    """Some models have windows of 8 tokens, which extend from responses into the prompt. Others
    have layers that share keys."""
    objective, batch = OBJECTIVES[kind], pair_batch(9)
    truth, true_grads = oracle(name, objective, batch, mx.float32)
    outputs, grads = run(name, objective, batch)
    np.testing.assert_allclose(outputs, truth, rtol=2e-5)
    for path, grad in true_grads.items():
        if path in grads:  # mlx-lm also adapts projections that are never used
            assert_close(path, grads[path], grad, 2e-4)
        else:
            assert mx.abs(grad).max() == 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4-E4B"])
@pytest.mark.parametrize("shared", [1, 5, 9, 12, 15])
def test_a_shared_prefix_is_two_forwards(name, shared):
    """The shared prefix may end within the prompt of 9 tokens, or extend into the responses. The
    result is always the same."""
    for objective in (OBJECTIVES["sigmoid"], OBJECTIVES["orpo"]):
        batch = pair_batch(shared)
        apart = PairBatch(batch.chosen, batch.rejected, 0, batch.rows, batch.reference)
        outputs, grads = run(name, objective, batch)
        expected, expected_grads = run(name, objective, apart)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5)
        for path, grad in expected_grads.items():
            assert_close(path, grads[path], grad, 5e-5)


def test_a_shared_prefix_runs_once(monkeypatch):
    """Checks how many rows h has, and how many of them pass through the head."""
    chain = chain_of(model_of("llama"))
    objective, batch = Dpo(), pair_batch(9)
    (stream,) = objective.streams(chain, batch)
    assert (stream.shared, stream.branch) == (9, 7)
    values = objective.values(chain, batch, objective.total([batch]))
    assert values["h of pair"].shape[1] == 20 + 7
    assert values["targets"].size == (21 - 9) + (17 - 9)
    # After trimming, h starts at row 8, which predicts both responses' first tokens.
    assert values["positions of pair"].tolist() == list(range(8, 27))
    assert values["rows of pair"].tolist() == [*range(12), 0, *range(12, 19)]
    monkeypatch.setattr("mlx_segtrain.objectives.preference.SHARED_LEAST", 10)
    assert [s.name for s in objective.streams(chain, batch)] == ["chosen", "rejected"]


@pytest.mark.parametrize("same", [0, 150])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_full_batch_is_planned_as_pairs_of_that_shape(kind, same):
    """Each row of a full batch has 300 tokens, of which the last 100 are in the loss."""
    weights = np.r_[np.zeros(201), np.ones(100)].astype(np.float32)
    chosen = np.arange(301, dtype=np.int32)
    rejected = np.r_[chosen[:same], chosen[same:] + 1000]
    rows = [Row(ids, weights, "train.jsonl:1") for ids in (chosen, rejected)]
    data = Dataset.of([Pair.of(*rows, "train.jsonl:1")])
    objective = OBJECTIVES[kind]
    assert objective.batch_shapes(data, 1) == [objective.full_shape(1, 300, 100, same)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dropout", [None, Dropout(0.3, 7, 2)])
@pytest.mark.parametrize("kind", ["sft", "sigmoid", "orpo"])
def test_every_cut_gives_the_same_bits(name, dropout, kind):
    """With dropout, recomputation uses the same masks as the first forward pass."""
    objective = Sft() if kind == "sft" else OBJECTIVES[kind]
    batch = pair_batch(9)
    batch = batch.chosen if kind == "sft" else batch
    expected, expected_grads = run(name, objective, batch, 0, dropout=dropout)

    def halves(streams):
        n = chain_of(model_of(name)).cuts(1, streams).segments[-1]
        groups = (*range(3, n, 3), n)
        return Cuts(tuple(range(1, n + 1)), groups, tuple(range(0, n, 2)))

    for cuts in (None, halves):
        outputs, grads = run(name, objective, batch, 1, cuts, dropout)
        if name == "generic" and mx.default_device() != mx.Device(mx.cpu):
            np.testing.assert_allclose(outputs, expected, rtol=1e-5)  # this case uses mlx-lm's ops
            continue
        assert outputs == expected
        for path, grad in expected_grads.items():
            assert mx.array_equal(grads[path], grad), path


@pytest.mark.parametrize("name", ["llama", "generic"])
def test_dropout_acts_and_follows_seed_step_and_stream(name):
    objective, batch = OBJECTIVES["sigmoid"], pair_batch(9)
    losses = [
        run(name, objective, batch, dropout=dropout)[0][0]
        for dropout in (
            *(None, Dropout(0.3, 7, 2), Dropout(0.3, 7, 2)),
            *(Dropout(0.3, 8, 2), Dropout(0.3, 7, 3), Dropout(1e-5, 7, 2)),
        )
    ]
    assert losses[1] == losses[2]
    assert len({*losses[:5]}) == 4
    assert abs(losses[5] - losses[0]) < 1e-3  # the dropout probability is almost 0


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "orpo", "orpo, response", "simpo"])
def test_a_batch_is_the_sum_of_its_pairs(kind):
    objective = OBJECTIVES[kind]
    batch = pair_batch(9, lengths=((21, 17), (15, 20), (18, 18)))
    outputs, grads = run("llama", objective, batch)
    singles = [alone(batch, i) for i in range(3)]
    total = objective.total(singles)
    parts = [run("llama", objective, single, total=total) for single in singles]
    np.testing.assert_allclose(outputs, np.sum([out for out, _ in parts], 0), rtol=2e-5)
    for path, grad in grads.items():
        assert_close(path, sum(own[path] for _, own in parts), grad, 5e-5)


def test_a_missing_reference_is_an_error():
    chain, batch = setup("llama")[0], replace(pair_batch(9), reference=None)
    with pytest.raises(ValueError, match="have not been computed"):
        Dpo().values(chain, batch, Dpo().total([batch]))
    assert (
        not Dpo(reference_free=True).values(chain, batch, Dpo().total([batch]))["reference"].any()
    )


def test_references_are_the_log_probabilities_without_an_adapter():
    batch = pair_batch(9, lengths=((21, 17), (15, 20)))
    chain = chain_of(model_of("llama"))
    objective = Reference()
    (sums,) = value(objective, chain, {}, {}, batch, objective.total([batch]))
    model = model_of("llama")
    expected = []
    for side in (batch.chosen, batch.rejected):
        tokens = mx.array(side.tokens)
        log_p = -nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        expected += (log_p * mx.array(side.weights[:, 1:])).sum(1).tolist()
    np.testing.assert_allclose(np.array(sums), expected, rtol=1e-5)
    # With these sums as the reference, the loss is that of a model that has learned nothing yet.
    batch = PairBatch(batch.chosen, batch.rejected, 9, batch.rows, np.array(sums))
    (loss, _, margin, *_) = value(Dpo(), chain, {}, {}, batch, Dpo().total([batch]))
    assert abs(float(loss) - np.log(2)) < 1e-5 and abs(float(margin)) < 1e-4
