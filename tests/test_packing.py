"""Packed rows give the same loss and gradients as single rows, and no row is split or lost."""

import json
import time
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import tiny_models
from lib.chains import FAST, adapter_of
from lib.folders import write_tiny
from lib.oracle import assert_close, errors
from lib.runs import config_of
from mlx_segtrain import InputError, train
from mlx_segtrain.data import Batch, Dataset, Row, batches, batches_in_epoch, eval_batches, padding
from mlx_segtrain.data.packing import Packing
from mlx_segtrain.models import adapting, chain_of
from mlx_segtrain.objectives import Functions, value_and_grad
from mlx_segtrain.objectives.sft import Sft
from mlx_segtrain.planning import run as planning_run
from mlx_segtrain.planning.costs import CUDA
from mlx_segtrain.planning.packing import pays, typical
from mlx_segtrain.training import setup

#: Numbers of tokens per row. They include the minimum of 2, and numbers above the sliding window of
#: 8 tokens and above the size of a tile.
LENGTHS = (21, 2, 9, 70, 33, 3)
BOUND = 1e-5


def examples(lengths=LENGTHS, prompt=2, seed=0):
    """Returns the same rows as batches of a single row each, as one padded batch, and as one packed
    batch."""
    rng = np.random.default_rng(seed)
    count, ends = np.arange(len(lengths)), np.array(lengths)
    weights = rng.uniform(0.5, 1, (len(lengths), max(lengths))).astype(np.float32)
    at = np.arange(max(lengths))
    weights *= (at >= np.minimum(prompt, ends - 1)[:, None]) & (at < ends[:, None])
    tokens = rng.integers(0, 128, weights.shape).astype(np.int32)
    alone = [
        Batch(tokens[i : i + 1, :n], weights[i : i + 1, :n], count[i : i + 1], ends[i : i + 1])
        for i, n in enumerate(lengths)
    ]
    whole = (np.concatenate([getattr(x, name) for x in alone], 1) for name in ("tokens", "weights"))
    packed = Batch(*whole, count, ends, packed=True)
    return alone, Batch(tokens, weights, count, ends), packed


def step(chain, adapter, batch, total, size=1):
    """Returns the loss and the gradients by path."""
    params = adapting.stage_params(chain, adapter)
    what = (Sft(), chain, adapter.scales, params, batch, total)
    (loss,), grads = value_and_grad(
        Functions(*what[:3]), *what[3:], cuts=lambda streams: chain.cuts(size, streams)
    )
    return loss.item(), {k: g for own in grads.values() for k, g in own.items()}


def assert_same_packed(chain, adapter, lengths=LENGTHS, prompt=2, size=1):
    """Compares packed rows with single rows. The errors may exceed BOUND only if those of a padded
    batch exceed it too. Larger errors are possible because the rounding of matrix products depends
    on their shapes, and the gradients partly cancel in the sum."""
    alone, padded, packed = examples(lengths, prompt)
    total = Sft().total(alone)
    assert Sft().total([packed]) == pytest.approx(total)
    steps = [step(chain, adapter, batch, total, size) for batch in alone]
    (same, of_padded), (loss, grads) = (
        step(chain, adapter, batch, total, size) for batch in (padded, packed)
    )
    assert loss == pytest.approx(same, rel=BOUND)
    assert loss == pytest.approx(sum(own for own, _ in steps), rel=BOUND)
    for name, grad in grads.items():
        truth = sum(np.array(own[name], np.float64) for _, own in steps)
        noise, _ = errors(of_padded[name], truth)
        assert noise < 5 * BOUND
        assert_close(name, grad, truth, max(BOUND, 1.5 * noise))


@pytest.mark.parametrize("name", FAST)
def test_packed_is_unpacked(name):
    family, more = FAST[name]
    chain = chain_of(tiny_models.build(family, **more))
    assert_same_packed(chain, adapter_of(chain))


LONG_ROPE = {
    "rope_scaling": {
        "type": "longrope",
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
}


def test_a_rotation_of_mlx_lms_own_is_applied_by_example():
    chain = chain_of(tiny_models.build("phi3", **LONG_ROPE))
    assert_same_packed(chain, adapter_of(chain))
    assert_same_packed(chain, adapter_of(chain), lengths=(90, 5, 7), prompt=80)


@pytest.mark.parametrize("name", ["gemma3", "gemma4-E4B", "ministral3"])
def test_what_comes_before_all_losses_is_trimmed(name):
    family, more = FAST[name]
    chain = chain_of(tiny_models.build(family, **more))
    assert_same_packed(chain, adapter_of(chain), lengths=(90, 5, 7), prompt=80, size=0)


# ---- which samples are packed together


def lengths_like_instructions(n, seed=0):
    rng = np.random.default_rng(seed)
    spread = np.log(360 / 138) / 1.645
    return np.exp(rng.normal(np.log(138), spread, n)).round().astype(int).clip(4, 2048)


def dataset(lengths, capacity):
    rows = [
        Row(np.full(n, i, np.int32), np.full(n, 0.5, np.float32), f"train.jsonl:{i + 1}")
        for i, n in enumerate(lengths)
    ]
    return Dataset.of(rows).in_rows_of(capacity)


@pytest.mark.parametrize("capacity", [2048, 4096])
def test_rows_are_full(capacity):
    lengths = lengths_like_instructions(3000)
    assert lengths.sum() / (len(Packing.of(lengths, capacity)) * capacity) > 0.97


def test_a_million_rows_are_packed_at_once(benchmark_seconds=3.0):
    begin = time.process_time()
    packing = Packing.of(lengths_like_instructions(1_000_000), 2048)
    assert sum(len(row) for row in islice(packing.epoch(0, 3), 1000)) > 10_000
    assert time.process_time() - begin < benchmark_seconds


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    st.integers(3000, 9000),
    st.integers(0, 3),
)
def test_every_epoch_has_every_row_once_and_none_is_over(lengths, capacity, seed):
    lengths = np.array(lengths)
    packing = Packing.of(lengths, capacity)
    for epoch in range(2):
        rows = list(packing.epoch(seed, epoch))
        assert len(rows) == len(packing)
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
        assert max(lengths[row].sum() for row in rows) <= capacity


def test_best_fit_leaves_the_least_room():
    """The expected rows, derived by hand, are 7 + 3, 6 + 4, 5 + 5, and 2 alone."""
    lengths = np.array([5, 3, 2, 7, 5, 6, 4])
    rows = [sorted(lengths[row].tolist()) for row in Packing.of(lengths, 10).epoch(0, 0)]
    assert sorted(rows) == [[2], [3, 7], [4, 6], [5, 5]]


def order(data, batch_size, seed, count, start=0):
    return [b.rows.tolist() for b in islice(batches(data, batch_size, seed, start), count)]


@given(st.integers(0, 60), st.integers(1, 3))
def test_the_order_is_a_function_of_the_seed_and_resumes(start, batch_size):
    data = dataset([4, 9, 2, 7, 5, 5, 3, 2, 2, 5, 9], 10)
    whole = order(data, batch_size, 3, 70)
    assert order(data, batch_size, 3, 70 - start, start=start) == whole[start:]


def test_rows_are_grouped_anew_in_each_epoch():
    data = dataset([5, 5, 4, 4, 6, 6, 3, 3, 7, 7] * 3, 10)
    n = int(batches_in_epoch(data, 1))
    first, second = ({tuple(sorted(x)) for x in order(data, 1, 0, n, at)} for at in (0, n))
    assert first != second and order(data, 1, 1, n) != order(data, 1, 0, n)


def test_a_batch_has_whole_rows_and_no_padding():
    data = dataset(lengths := [5, 3, 2, 7, 5, 6, 4], 10)
    seen = list(islice(batches(data, 3, 0), 2))  # 4 packed rows, in batches of 3 and 1
    assert batches_in_epoch(data, 3) == 2 and padding(data, 3) == pytest.approx(1 - 32 / 40)
    assert sorted(i for batch in seen for i in batch.rows) == list(range(7))
    for batch in [*seen, *eval_batches(data, 2)]:
        assert batch.packed and batch.padding == 0 and batch.tokens.shape == batch.weights.shape
        assert batch.lengths.tolist() == [lengths[i] for i in batch.rows]
        assert batch.tokens.tolist() == [[i for i in batch.rows for _ in range(lengths[i])]]


# ---- whether packing saves time


@pytest.mark.parametrize(("capacity", "batch_size"), [(0, 1), (0, 4), (2048, 1), (2048, 3)])
def test_typical_batches_come_to_the_epoch(capacity, batch_size):
    data = dataset(lengths_like_instructions(600), capacity)
    shapes = typical(data, batch_size)
    assert sum(count for count, _ in shapes) == int(batches_in_epoch(data, batch_size))
    run = sum(count * shape.rows * shape.length for count, shape in shapes)
    loss = sum(count * shape.loss for count, shape in shapes)
    share = 1 - padding(data, batch_size) if not capacity else 1
    assert run * share == pytest.approx((data.columns.length - 1).sum(), rel=0.02)
    assert loss == pytest.approx(data.supervised_tokens, rel=0.01)


def test_packing_pays_where_steps_cost_more_than_their_tokens(llama4, data, tmp_path, monkeypatch):
    short, full = dataset([20, 30, 10, 4] * 8, 0), dataset([64] * 8, 0)

    def asked(rows, **more):
        return pays(config_of(llama4, data, tmp_path, max_seq_length=64, **more), rows)

    assert asked(short) and not asked(full)
    assert asked(dataset([5, 60] * 8, 0), batch_size=4)  # padding the short rows would be wasteful
    monkeypatch.setattr(planning_run, "device", lambda *_: CUDA)
    assert asked(short) and not asked(full)
    assert not asked(short, memory_budget_gb=0.0125)


# ---- runs


def write_data(folder, lengths=(3, 30, 9, 50, 12, 5, 22, 40, 7, 16)):
    folder.mkdir()
    lines = [json.dumps({"text": chr(97 + i) * n}) for i, n in enumerate(lengths)]
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def test_an_epoch_of_packed_rows(llama4, tmp_path):
    """With packing, an epoch needs fewer steps for the same rows, and an evaluation returns the
    same loss."""
    data, told = write_data(tmp_path / "data"), []
    how = {"epochs": 1.0, "max_seq_length": 64, "learning_rate": 1e-6}
    packed = train(config_of(llama4, data, tmp_path / "a", packing=True, **how), told.append)
    alone = train(config_of(llama4, data, tmp_path / "b", **how))
    assert alone.steps == 10 and packed.steps == 4
    assert packed.first_val_loss == pytest.approx(alone.first_val_loss, rel=1e-6)
    said = next(e["message"] for e in told if e.get("stage") == "data")
    assert "4 batches per epoch, packed: on average 2.5 rows fill" in said
    reports = [e for e in told if e.get("kind") == "train"]
    for event in reports:
        assert 0 < event["supervised_tokens_per_sec"] <= event["tokens_per_sec"]
    assert json.loads((tmp_path / "a/run.json").read_text())["config"]["packing"] is True


def test_auto_is_decided_once(llama4, tmp_path, monkeypatch):
    """A resumed run keeps the earlier choice of `packing="auto"`, even if the other choice would
    now be faster."""
    data, out = write_data(tmp_path / "data"), tmp_path / "run"
    how = {"max_seq_length": 64, "packing": "auto"}
    monkeypatch.setattr(setup, "pays", lambda *_: True)
    train(config_of(llama4, data, out, iters=2, **how))
    monkeypatch.setattr(setup, "pays", lambda *_: False)
    train(config_of(llama4, data, out, iters=3, resume=True, **how))
    assert json.loads((out / "run.json").read_text())["config"]["packing"] is True
    with pytest.raises(InputError, match=r"packing = False, but the run in .* began with True"):
        train(config_of(llama4, data, out, iters=4, resume=True, max_seq_length=64))


def test_auto_packs_fewer_rows_than_a_batch(llama4, tmp_path):
    """Without packing, these rows would not fill a batch."""
    data = write_data(tmp_path / "data", (3, 5))
    how = {"max_seq_length": 64, "packing": "auto", "batch_size": 4, "iters": 1}
    train(config_of(llama4, data, out := tmp_path / "run", **how))
    assert json.loads((out / "run.json").read_text())["config"]["packing"] is True


def test_other_methods_and_families_refuse_packing(llama4, pairs, data, tmp_path):
    with pytest.raises(
        ValueError, match="packing has no effect unless method is sft or grpo: leave"
    ):
        config_of(llama4, pairs, tmp_path / "a", method="dpo", packing=True)
    generic = write_tiny(tmp_path / "generic", "stablelm")
    with pytest.raises(
        InputError, match="packing is not supported for stablelm, because this model runs on mlx-lm"
    ):
        train(config_of(generic, data, tmp_path / "a", packing=True))
    train(config_of(generic, data, out := tmp_path / "b", packing="auto", iters=1))
    assert json.loads((out / "run.json").read_text())["config"]["packing"] is False
