"""Compares KTO on tiny models with TRL's formula, computed in float64 with mlx-lm's models. Also
tests cuts, micro-batches and rows."""

import functools
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from lib import tiny_models
from lib.checks import random_adapter
from lib.oracle import assert_close
from mlx_segtrain.data import Dataset, PairBatch, Row, batches, eval_batches
from mlx_segtrain.data.mismatching import mismatched
from mlx_segtrain.errors import InputError
from mlx_segtrain.models import adapting, chain_of
from mlx_segtrain.models.chain import Dropout
from mlx_segtrain.objectives import Functions, named, total_of, value, value_and_grad
from mlx_segtrain.objectives.kto import Kto
from mlx_segtrain.schedule import Cuts

SCALE, RANK, BETA = 1.5, 4, 0.1
FAMILIES = {
    "llama": ("llama", {"num_hidden_layers": 3}),
    "gemma3": ("gemma3_text", {}),
    "generic": ("gpt_neox", {}),
}
#: For each row: the number of tokens in the prompt, the number in the response, and the label.
ROWS = [(9, 12, 1), (7, 8, -1), (5, 11, -1), (12, 9, 1), (6, 13, -1)]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Sets small multiples for the trimming and padding of streams."""
    monkeypatch.setattr("mlx_segtrain.streams.TRIM_MULTIPLE", 1)
    monkeypatch.setattr("mlx_segtrain.streams.PAD_MULTIPLE", 4)


def row(prompt: int, response: int, label: int, seed: int) -> Row:
    ids = np.random.default_rng(seed).integers(0, 128, prompt + response).astype(np.int32)
    weights = np.where(np.arange(len(ids)) < prompt, 0, label).astype(np.float32)
    return Row(ids, weights, f"train.jsonl:{seed + 1}")


def rows_of(*shapes) -> Dataset:
    return Dataset.of([row(*own, seed=i) for i, own in enumerate(shapes)])


def data_of(kind: str = "kto") -> Dataset:
    """Returns rows whose reference log-probabilities are close to those of the models."""
    data = rows_of(*ROWS)
    data = mismatched(data, 30) if kind == "kto" else data
    sides = 2 if kind == "kto" else 1
    found = np.random.default_rng(4).uniform(-60, -45, (len(data), sides))
    return data.map(lambda i, own: replace(own, reference=tuple(found[i])))


def batch_of(kind: str = "kto"):
    (batch,) = eval_batches(data_of(kind), len(ROWS))
    return batch


def model_of(name: str):
    family, changes = FAMILIES[name]
    return tiny_models.build(family, **changes)


@functools.cache
def setup(name: str):
    chain = chain_of(model_of(name))
    adapter = random_adapter(chain, dict.fromkeys(chain.linears, RANK), SCALE, 0.1)
    return chain, adapter, adapting.stage_params(chain, adapter)


def run(name, objective, batch, size=1, total=None, cuts=None, dropout=None):
    chain, adapter, params = setup(name)
    total = total or total_of(objective, chain, adapter.scales, params, [batch])
    outputs, grads = value_and_grad(
        Functions(objective, chain, adapter.scales, dropout),
        params,
        batch,
        total,
        cuts=cuts or functools.partial(chain.cuts, size),
    )
    return [float(x) for x in outputs], {k: g for own in grads.values() for k, g in own.items()}


def plain(name, objective, batch):
    """Computes TRL's loss, metrics and gradients in float64 with mlx-lm's model and LoRA layers,
    row by row."""
    _, adapter, _ = setup(name)
    model = model_of(name)
    model.set_dtype(mx.float64)
    model.freeze()
    keys = sorted(adapter.tensors)
    linear_to_lora_layers(model, -1, {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": keys})
    flat = [
        (f"{path}.lora_{ab}", x.astype(mx.float64))
        for path, pair in adapter.tensors.items()
        for ab, x in zip("ab", pair, strict=True)
    ]
    model.load_weights(flat, strict=False)
    kto = objective.kind == "kto"
    sides = (batch.chosen, batch.rejected) if kto else (batch,)
    reference = np.split(batch.reference.astype(np.float64), len(sides))
    label = np.array([own for _, _, own in ROWS])

    def sums(model, side):
        found = []
        for tokens, weights, n in zip(side.tokens, side.weights, side.lengths, strict=True):
            z = model(mx.array(tokens[None, : n - 1]))
            z = z - mx.logsumexp(z, axis=-1, keepdims=True)
            log_p = mx.take_along_axis(z, mx.array(tokens[None, 1:n, None]), axis=-1)
            found.append((log_p[0, :, 0] * mx.array(weights[1:n] != 0)).sum())
        return mx.stack(found)

    def loss(model):
        ratios = [sums(model, own) - mx.array(r) for own, r in zip(sides, reference, strict=True)]
        kl = mx.maximum(mx.stop_gradient(ratios[1].mean()), 0) if kto else mx.array(0.0)
        high, low = (ratios[0][mx.array(np.flatnonzero(label == own))] for own in (1, -1))
        losses = mx.concatenate(
            [
                objective.desirable * (1 - mx.sigmoid(objective.beta * (high - kl))),
                objective.undesirable * (1 - mx.sigmoid(objective.beta * (kl - low))),
            ]
        )
        rewards = [(objective.beta * own).mean() for own in (high, low)]
        right = mx.concatenate([high > kl, low < kl]).astype(mx.float32).mean()
        return losses.mean(), (right, rewards[0] - rewards[1], *rewards, kl)

    (found, metrics), grads = nn.value_and_grad(model, loss)(model)
    flat = {key: g.astype(mx.float32) for key, g in tree_flatten(grads)}
    mx.eval(flat)
    return [float(x) for x in (found, *metrics)], flat


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["kto", "below 0", "apo_zero_unpaired"])
def test_loss_and_gradients_are_trls_in_float64(name, kind):
    """The divergence is above 0, below 0 (and therefore clipped), or absent."""
    own = "apo_zero_unpaired" if kind == "apo_zero_unpaired" else "kto"
    objective, batch = Kto(BETA, own, 1.3, 0.7), batch_of(own)
    if own == "kto":
        batch.reference[len(ROWS) :] -= -40 if kind == "below 0" else 20
    with mx.stream(mx.cpu):  # GPUs do not support float64
        truth, true_grads = plain(name, objective, batch)
    assert (truth[-1] > 1) == (kind == "kto")
    outputs, grads = run(name, objective, batch)
    # If there is no divergence, the metric "kl" is absent.
    count = len(truth) if own == "kto" else len(truth) - 1
    np.testing.assert_allclose(outputs[:count], truth[:count], rtol=1e-4)
    if own != "kto":
        assert "kl" not in named(objective, outputs[1:])
    assert all(np.abs(np.array(g)).max() > 0 for g in true_grads.values())
    for path, grad in true_grads.items():
        assert_close(path, grads[path], grad, 2e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dropout", [None, Dropout(0.3, 7, 2)])
def test_every_cut_gives_the_same_bits(name, dropout):
    objective, batch = Kto(BETA), batch_of()
    chain, adapter, params = setup(name)
    total = total_of(objective, chain, adapter.scales, params, [batch])
    expected, expected_grads = run(name, objective, batch, 0, total, dropout=dropout)

    def halves(streams):
        n = chain.cuts(1, streams).segments[-1]
        return Cuts(tuple(range(1, n + 1)), (*range(3, n, 3), n), tuple(range(0, n, 2)))

    for cuts in (None, halves):
        outputs, grads = run(name, objective, batch, 1, total, cuts, dropout)
        if name == "generic" and mx.default_device() != mx.Device(mx.cpu):
            np.testing.assert_allclose(outputs, expected, rtol=1e-5)  # this case uses mlx-lm's ops
            continue
        assert outputs == expected
        for path, grad in expected_grads.items():
            assert mx.array_equal(grads[path], grad), path


def test_micro_batches_add_up_to_one_batch():
    """The divergence is computed over all micro-batches, regardless of their size."""
    objective, data = Kto(BETA), data_of()
    chain, adapter, params = setup("llama")
    measure = functools.partial(total_of, objective, chain, adapter.scales, params)
    expected, expected_grads = run("llama", objective, batch_of())
    for size in (1, 2):
        parts = list(eval_batches(data, size))
        total = measure(parts)
        assert total.baseline == pytest.approx(measure([batch_of()]).baseline, rel=1e-4)
        found = [run("llama", objective, own, total=total) for own in parts]
        np.testing.assert_allclose(sum(np.array(o) for o, _ in found), expected, rtol=1e-4)
        for path, grad in expected_grads.items():
            assert_close(path, sum(g[path] for _, g in found), grad, 5e-5)


def test_a_step_without_a_row_of_one_kind_tells_nothing_of_it():
    (batch,) = eval_batches(data_of().take(np.array([0, 3])), 2)
    outputs, grads = run("llama", Kto(BETA), batch)
    assert named(Kto(BETA), outputs[1:]).keys() == {"accuracy", "desirable_reward", "kl"}
    assert all(mx.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_with_its_own_reference_nothing_has_been_learned(kind):
    """The model has no adapter, so it equals its reference."""
    objective, batch = Kto(BETA, kind), batch_of(kind)
    chain = setup("llama")[0]
    reference = objective.reference
    (sums,) = value(reference, chain, {}, {}, batch, reference.total([batch]))
    batch = replace(batch, reference=np.array(sums))
    total = total_of(objective, chain, {}, {}, [batch])
    loss, _, *rewards = value(objective, chain, {}, {}, batch, total)
    assert float(loss) == pytest.approx(0.5, abs=1e-4) and abs(total.baseline) < 1e-3
    assert all(abs(float(x)) < 1e-3 for x in rewards[:3])


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_a_missing_reference_is_an_error(kind):
    objective, batch = Kto(BETA, kind), replace(batch_of(kind), reference=None)
    for own in filter(None, (objective, objective.baseline)):
        with pytest.raises(ValueError, match="have not been computed"):
            own.values(setup("llama")[0], batch, objective.total([batch]))


def test_each_row_gets_the_response_of_another_prompt():
    """Rows 2i and 2i + 1 have the same prompt, and all responses have about the same length."""
    plain = rows_of(*((9, 12 + i // 2, 1 - 2 * (i % 2)) for i in range(8)))
    own = [plain.rows[i] for i in range(8)]
    for i in range(1, 8, 2):
        own[i].ids[:9] = own[i - 1].ids[:9]
    data = mismatched(Dataset.of(own), 100)
    responses = {row.ids[9:].tobytes(): i for i, row in enumerate(own)}
    for i, pair in enumerate(data.rows):
        assert pair.chosen is own[i]
        assert (pair.rejected.ids[:9] == own[i].ids[:9]).all() and pair.shared >= 9
        assert responses[pair.rejected.ids[9:].tobytes()] // 2 != i // 2
        assert (pair.rejected.weights == (np.arange(len(pair.rejected)) >= 9)).all()
    assert data.supervised_tokens == plain.supervised_tokens
    with pytest.raises(InputError, match=r"all rows have the same prompt.*apo_zero_unpaired"):
        mismatched(Dataset.of(own[:2]), 100)


@pytest.mark.parametrize("tokens", [18, 30])
def test_columns_and_shapes_are_those_of_the_rows(tokens):
    """A response that does not fit after another row's prompt is truncated."""
    data = mismatched(rows_of(*((p, min(r, 18 - p), s) for p, r, s in ROWS)), tokens)
    for i, pair in enumerate(data.rows):
        assert [len(pair.chosen), len(pair.rejected)] == data.columns.length[i].tolist()
        for side in (pair.chosen, pair.rejected):
            first = int(np.flatnonzero(side.weights)[0])
            assert first == data.columns.first[i, 0] and side.ids.max() <= data.columns.top[i, 1]
    assert data.columns.length.max() <= tokens
    (shape,) = Kto().batch_shapes(data, 2)
    for batch in eval_batches(data, 2):
        assert isinstance(batch, PairBatch)
        for side in (batch.chosen, batch.rejected):
            assert side.tokens.shape[1] - 1 <= shape.length
            assert (batch.chosen.weights != 0).sum() <= shape.loss


def test_a_full_batch_is_planned_as_rows_of_that_shape():
    """Each row of a full batch has 300 tokens, of which the last 100 are in the loss."""
    data = rows_of((201, 100, 1), (201, 100, -1))
    for own in (data, mismatched(data, 301)):
        assert Kto().batch_shapes(own, 1) == [Kto().full_shape(1, 300, 100, 0)]


def test_batches_have_both_kinds_though_one_is_longer():
    shapes = [(5, 60 + i, 1) for i in range(8)] + [(5, 10 + i, -1) for i in range(24)]
    data = rows_of(*shapes)
    source = batches(data, 4, seed=0)
    for _ in range(16):
        signs = data.columns.sign[next(source).rows]
        assert sorted(signs) == [-1, -1, -1, 1]


def test_what_the_weights_should_be_is_said():
    data = rows_of(*[(5, 6, 1)] * 2, *[(5, 6, -1)] * 6)
    (said,) = Kto().remarks(data)
    assert "2 rows are desirable and 6 are not" in said and "a value from 3 to 4" in said
    assert Kto(desirable=3.5).remarks(data) == [] and Kto(desirable=0).remarks(data) == []
    (said,) = Kto().remarks(data.take(np.arange(2)))
    assert said.endswith("the label of every row is true")
