"""Tests complete KTO runs on tiny models."""

import json

import mlx.core as mx
import pytest

from lib.runs import config_of, counted_references, existing_bytes, setup_of, weights_of
from mlx_segtrain import InputError, train
from mlx_segtrain.planning.run import full_batch, plan_run
from mlx_segtrain.training import evaluate

pytestmark = [pytest.mark.acceptance, pytest.mark.usefixtures("cache")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Writes rows and returns their folder. Three quarters of the responses are desirable. The
    desirable responses are similar for all prompts."""
    folder = tmp_path_factory.mktemp("labelled")
    for name, first, count in (("train", 10, 12), ("valid", 50, 5)):
        own = [
            {
                "prompt": [{"role": "user", "content": f"Number {i}, in a word?"}],
                "completion": f"one {i}" if i % 4 != 2 else f"zebra crossing {i}",
                "label": i % 4 != 2,
            }
            for i in range(first, first + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return folder


def config(model, rows, out, **changes):
    return setup_of("kto", model, None, rows, out, **changes)


def test_what_is_told_of_a_run(llama4, rows, tmp_path):
    """A step without desirable (or undesirable) rows reports no reward for them. A warning gives
    the range of weights that the KTO paper recommends."""
    seen = []
    how = {"iters": 12, "steps_per_eval": 12, "batch_size": 1}
    train(config(llama4, rows, tmp_path / "a", **how), seen.append)
    warnings = [event["message"] for event in seen if event["type"] == "warning"]
    said = "9 rows are desirable and 3 are not; with these weights the ratio is 3.00 to 1"
    assert any(
        said in w and "set desirable_weight to a value from 0.333 to 0.444" in w for w in warnings
    )
    steps = [event for event in seen if event.get("kind") == "train"]
    kinds = [("desirable_reward" in s, "undesirable_reward" in s) for s in steps]
    assert sorted(kinds) == [(False, True)] * 3 + [(True, False)] * 9
    assert all("margin" not in s and s["kl"] >= 0 for s in steps)
    assert any(s["kl"] > 0 for s in steps)
    json.dumps(seen, allow_nan=False)
    seen = []
    train(config(llama4, rows, tmp_path / "b", **how, steps_per_report=12), seen.append)
    (_, whole) = [event for event in seen if event.get("kind") == "train"]
    # Each mean is computed only over the steps that have the metric.
    for name in ("desirable_reward", "undesirable_reward", "kl"):
        own = [s[name] for s in steps if name in s]
        assert whole[name] == pytest.approx(sum(own) / len(own), rel=1e-5)


def test_an_evaluation_does_not_depend_on_its_batches(llama4, rows, tmp_path):
    """The divergence is computed over all rows, not per batch."""
    how = {"iters": 8, "steps_per_eval": 8}
    result = train(config(llama4, rows, tmp_path / "a", **how))
    found = [
        evaluate(config(llama4, rows, tmp_path / "a", batch_size=size), tmp_path / "a")
        for size in (1, 2, 5)
    ]
    for own in found:
        assert own.loss == pytest.approx(result.final_val_loss, rel=1e-4)
        assert own.metrics == pytest.approx(found[0].metrics, rel=1e-3, abs=1e-4)
        assert own.perplexity is None and set(own.metrics) > {"kl", "margin", "accuracy"}


def test_references_are_computed_once(llama4, rows, pairs, tmp_path, monkeypatch):
    """The cache keeps separate references for rows with a mismatched response, for rows without
    one, and for pairs."""
    counted = counted_references(monkeypatch)

    def run(name, data=rows, method="kto", **changes):
        counted.clear()
        how = {"iters": 3, "batch_size": 4, "overwrite": True, **changes}
        train(setup_of(method, llama4, None, data, tmp_path / name, **how))
        return sum(counted), weights_of(tmp_path / name)

    n, fresh = run("a")
    assert n == 12 + 5
    assert run("b", kto_loss="apo_zero_unpaired")[0] == 12 + 5
    assert run("b", pairs, "dpo")[0] == 12 + 6
    n, cached = run("a")
    assert n == 0 and all(mx.array_equal(cached[key], fresh[key]) for key in fresh)
    assert run("b", seed=3, batch_size=2, iters=7, kto_beta=0.5)[0] == 0
    assert run("b", kto_loss="apo_zero_unpaired")[0] == 0 == run("b", pairs, "dpo")[0]


def test_weights_of_kinds_act(llama4, rows, tmp_path):
    how = {"iters": 1, "batch_size": 12}
    losses = [
        train(config(llama4, rows, tmp_path / name, **how, **more)).final_train_loss
        for name, more in (
            ("a", {}),
            ("b", {"desirable_weight": 0.0}),
            ("c", {"undesirable_weight": 2.0, "desirable_weight": 3.0}),
        )
    ]
    # Before the first step, every row's loss is one half.
    assert losses == pytest.approx([0.5, 3 / 24, (3 * 2 + 9 * 3) / 24], rel=1e-4)


def test_a_run_stays_within_its_plan(llama4, rows, tmp_path):
    """A plan that is made from the configuration alone equals the plan of an SFT run. A run's plan
    also accounts for the longest mismatched response."""
    own = config(llama4, rows, tmp_path / "a", batch_size=2, max_seq_length=100)
    plan = plan_run(own, full_batch(own, 0.5))
    single = config_of(llama4, rows, tmp_path / "a", batch_size=2, max_seq_length=100)
    assert plan.planned is not None
    assert plan.planned.peak == plan_run(single, full_batch(single, 0.5)).planned.peak  # pyright: ignore
    others = existing_bytes() / 1e9
    result = train(own)
    assert result.planned_gb is not None and result.peak_gb - others <= result.planned_gb


def test_one_prompt_for_all_rows_is_refused(llama4, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": "a", "completion": f"b{i}", "label": i % 2 == 0} for i in range(4)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"train\.jsonl: all rows have the same prompt") as caught:
        train(config(llama4, data, tmp_path / "a"))
    assert caught.value.field == "kto_loss" and not (tmp_path / "a").exists()
    result = train(config(llama4, data, tmp_path / "a", kto_loss="apo_zero_unpaired", iters=1))
    assert result.final_train_loss == pytest.approx(0.5, rel=1e-4)
