"""Tests runs on several local ranks, connected by MLX's ring over loopback."""

import json
import signal

import numpy as np
import pytest

from lib.folders import write_llama, write_pairs, write_rows
from lib.launched import FACTORS, ends, ranks_of, said, wait_for_step
from lib.oracle import assert_close
from lib.runs import checkpoint_of, config_of, weights_of
from mlx_segtrain import train
from mlx_segtrain.training import checkpoint

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / "llama", layers=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_rows(path)
    return write_rows(path, 6, "valid.jsonl", first=24)


def lines(run, kind):
    text = (run / "metrics.jsonl").read_text().splitlines()
    return [own for own in map(json.loads, text) if own.get("kind") == kind]


def alike(one, many, bound=1e-6):
    """Compares the losses, gradient norms and validation losses of two runs step by step."""
    for kind, names in (("train", ("loss", "grad_norm")), ("val", ("loss",))):
        a, b = lines(one, kind), lines(many, kind)
        assert len(a) == len(b) > 0
        for x, y in zip(a, b, strict=True):
            assert x["step"] == y["step"]
            for name in names:
                assert y[name] == pytest.approx(x[name], rel=bound), (x["step"], name)


@pytest.mark.parametrize("n", [2, 4])
def test_ranks_are_one_run(n, model, rows, tmp_path):
    how = {"steps_per_eval": 10, "lora_dropout": 0.1}
    pairs = write_pairs(tmp_path / "pairs")
    sft = config_of(model, rows, tmp_path / "sft", iters=20, **how)
    dpo = config_of(model, pairs, tmp_path / "dpo", method="dpo", iters=4, batch_size=2)
    with ranks_of(n, tmp_path, sft, dpo, before=FACTORS) as started:
        alone = [
            (own.adapter_path, own.model_copy(update=changes))
            for own in (sft, dpo)
            for changes in [
                {
                    "adapter_path": tmp_path / f"one-{own.method}",
                    "grad_accumulation_steps": n,
                }
            ]
        ]
        for _, own in alone:
            train(own)
        ends(tmp_path, started)
    for rank in range(n):
        assert [own for own in said(tmp_path, rank) if isinstance(own, list)] == [
            ["ended", 20, False],
            ["ended", 4, False],
        ], (tmp_path / f"err{rank}").read_text()
    for many, own in alone:
        alike(own.adapter_path, many)
        mine, theirs = weights_of(own.adapter_path), weights_of(many)
        for name, x in mine.items():
            assert_close(name, theirs[name], x, 1e-5)
        factors = [np.load(tmp_path / f"{many.name}-{rank}.npy") for rank in range(n)]
        assert all(np.array_equal(factors[0], x) for x in factors)


def endless(model, rows, out, **changes):
    return config_of(model, rows, out, iters=10000, steps_per_eval=10000, **changes)


def test_a_killed_rank_is_named_by_all_and_the_run_goes_on_with_three(model, rows, tmp_path):
    out = tmp_path / "run"
    config = endless(model, rows, out, grad_accumulation_steps=4)
    with ranks_of(4, tmp_path, config) as started:
        wait_for_step(tmp_path, 3)
        started[1].send_signal(signal.SIGKILL)
        found, seconds = ends(tmp_path, started, but=[1])
    assert seconds < 30
    kind, name, text = found[0]
    assert (kind, name) == ("failed", "LostRank")
    assert f"rank 1 (process {started[1].pid} on " in text and "has ended" in text
    step = checkpoint._read(checkpoint_of(out)).step
    assert f"the state of step {step} is saved" in text

    last = step + 4
    again = {"resume": True, "iters": last, "steps_per_eval": 10000}
    with ranks_of(3, tmp_path, config_of(model, rows, out, **again), before=FACTORS) as started:
        whole = config_of(model, rows, tmp_path / "whole", iters=last, steps_per_eval=10000,
                          grad_accumulation_steps=4)  # fmt: skip
        train(whole)
        found, _ = ends(tmp_path, started)
    assert all(own == ["ended", last, False] for own in found.values()), found
    mine, theirs = weights_of(tmp_path / "whole"), weights_of(out)
    for name, x in mine.items():
        assert_close(name, theirs[name], x, 1e-5)
    factors = [np.load(tmp_path / f"run-{rank}.npy") for rank in range(3)]
    assert all(np.array_equal(factors[0], x) for x in factors)


def test_a_frozen_rank_is_named_by_all_and_by_itself(model, rows, tmp_path):
    out = tmp_path / "run"
    with ranks_of(3, tmp_path, endless(model, rows, out)) as started:
        wait_for_step(tmp_path, 3)
        started[1].send_signal(signal.SIGSTOP)
        found, seconds = ends(tmp_path, started, but=[1])
        started[1].send_signal(signal.SIGCONT)
        found |= ends(tmp_path, started)[0]
    assert seconds < 30
    for kind, name, text in found.values():
        assert (kind, name) == ("failed", "LostRank")
        assert f"rank 1 (process {started[1].pid} on " in text
        assert "has not answered for 4 s" in text
    assert "which is this one" in found[1][2]
    assert f"the state of step {checkpoint._read(checkpoint_of(out)).step} is saved" in found[0][2]


#: Makes one of rank 1's steps take longer than the time after which a rank that sends no messages
#: is considered lost. Later, rank 2 fails.
SLOW = """
from mlx_segtrain.training import step
ranks.SLOW = 1.0
own = step.Stepper.gradient
def gradient(self, at, accumulated, total):
    if rank == 1 and at.step == 2:
        time.sleep(6)
    if rank == 2 and at.step == 4:
        raise RuntimeError("a cable")
    return own(self, at, accumulated, total)
step.Stepper.gradient = gradient
"""


def test_a_slow_rank_is_waited_for_and_one_that_fails_is_named(model, rows, tmp_path):
    with ranks_of(3, tmp_path, endless(model, rows, tmp_path / "run"), before=SLOW) as started:
        found, _ = ends(tmp_path, started)
    warnings = [
        own["message"]
        for own in said(tmp_path, 0)
        if isinstance(own, dict) and own["type"] == "warning"
    ]
    (waited,) = warnings
    assert waited.startswith("the other ranks have waited 1 s for rank 1 (process ")
    assert found[2] == ["failed", "RuntimeError", "a cable"]
    slow = lines(tmp_path / "run", "train")[2]
    assert slow["step"] == 3 and slow["slowest"] == 1 and slow["skew_s"] > 5
    assert slow["ranks"][1]["busy_s"] > 6 > slow["ranks"][1]["waited_s"]
    assert all(slow["ranks"][r]["waited_s"] > 5 > slow["ranks"][r]["busy_s"] for r in (0, 2))
    for rank in (0, 1):
        kind, name, text = found[rank]
        assert (kind, name) == ("failed", "LostRank")
        assert text.startswith("step 5: rank 2 (process ") and "failed: a cable" in text


def test_a_signal_to_one_ends_all_after_the_same_step(model, rows, tmp_path):
    with ranks_of(2, tmp_path, endless(model, rows, tmp_path / "run")) as started:
        wait_for_step(tmp_path, 2)
        started[1].send_signal(signal.SIGTERM)
        found, _ = ends(tmp_path, started)
    assert found[0] == found[1] and found[0][0] == "ended" and found[0][2] is True
    assert found[0][1] == checkpoint._read(checkpoint_of(tmp_path / "run")).step


def test_ranks_with_other_data_do_not_begin(model, rows, tmp_path):
    other = write_rows(tmp_path / "other", 20)
    before = f"""
if rank == 1:
    sys.argv[1] = sys.argv[1].replace({str(rows)!r}, {str(other)!r})
"""
    config = config_of(model, rows, tmp_path / "run")
    few = config_of(model, rows, tmp_path / "few", grad_accumulation_steps=1)
    with ranks_of(2, tmp_path, few, config, before=before) as started:
        ends(tmp_path, started)
    for rank in range(2):
        first, second = (own for own in said(tmp_path, rank) if isinstance(own, list))
        assert first[:2] == ["failed", "InputError"]
        assert "grad_accumulation_steps = 1, but there are 2 ranks" in first[2]
        assert second[:2] == ["failed", "RunError"]
        assert second[2].startswith("data/train.jsonl is ") and "on rank 1 (process" in second[2]
    assert not (tmp_path / "run").exists()
