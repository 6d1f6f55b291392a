"""Tests models whose layers are divided among several local ranks, which are connected by MLX's
ring over loopback."""

import itertools
import json
import signal

import numpy as np
import pytest

from lib.folders import write_llama, write_pairs, write_rows, write_tiny
from lib.launched import ends, ranks_of, said, wait_for_step
from lib.oracle import assert_close
from lib.runs import checkpoint_of, config_of, lines_of, weights_of
from mlx_segtrain import train
from mlx_segtrain.training import checkpoint, step

pytestmark = pytest.mark.acceptance
#: The timeout in seconds, which is long enough for busy machines.
WAIT = 600


#: Code that makes each rank write the gradients of its first step to a file, and print its memory
#: use at the end.
SEEN = """
import gc
import numpy as np
from pathlib import Path
from mlx_segtrain.planning.pipeline import weight_bytes
from mlx_segtrain.training import loop, pipelined
own, own_result = pipelined.Pipelined.gradient, loop.Run._result
def gradient(self, at, accumulated, total=None):
    outputs, gradient = own(self, at, accumulated, total)
    if at.step == 0:
        own_parts = self.setup.own.split(gradient).values()
        parts = {name: np.array(x) for part in own_parts for name, x in part.items()}
        np.savez(f"{self.setup.config.adapter_path}-{rank}.npz", **parts)
    return outputs, gradient
def result(self, *args):
    gc.collect()  # frees arrays of earlier runs
    plan = self.step.plan
    share = weight_bytes(plan.shape, plan.part, True) + 3 * 4 * self.setup.own.size
    most = plan.planned.peak if plan.planned else 0
    print(json.dumps({"type": "held", "active": mx.get_active_memory(), "share": share,
                      "whole": plan.shape.weight_bytes(True), "peak": self.state.memory.peak,
                      "most": most, "layers": [plan.part.begin, plan.part.end]}), flush=True)
    return own_result(self, *args)
pipelined.Pipelined.gradient, loop.Run._result = gradient, result
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_rows(path)
    return write_rows(path, 6, "valid.jsonl", first=24)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns a Llama, a Gemma 4 whose layers share keys and values, and a model on the generic
    path. Their layers contain most of the weights."""
    path, wide = tmp_path_factory.mktemp("models"), {"intermediate_size": 2048}
    return {
        "llama": write_llama(path / "llama", layers=4, **wide),
        "gemma4": write_tiny(path / "gemma4", "gemma4_text", **wide),
        "cohere": write_tiny(path / "cohere", "cohere", **wide),
    }


def metrics_of(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [own for own in lines if own.get("kind") == "train"]


@pytest.fixture
def first_gradient(monkeypatch):
    """Returns a list that collects the gradients of each run's first step, by name."""
    found, own = [], step.Stepper.gradient

    def gradient(self, at, accumulated, total=None):
        outputs, gradient = own(self, at, accumulated, total)
        if at.step == 0:
            parts = self.setup.layout.split(gradient).values()
            found.append({name: np.array(x) for own in parts for name, x in own.items()})
        return outputs, gradient

    monkeypatch.setattr(step.Stepper, "gradient", gradient)
    return found


@pytest.mark.parametrize("n", [2, 3])
def test_a_pipeline_is_the_run_of_one_rank(n, models, rows, tmp_path, first_gradient):
    how = {"grad_accumulation_steps": 3, "iters": 3, "steps_per_eval": 2}
    pairs = write_pairs(tmp_path / "pairs")
    given = {
        2: [("llama", "sft", {"lora_dropout": 0.1}), ("cohere", "sft", {}), ("gemma4", "dpo", {})],
        3: [("gemma4", "sft", {"lora_plus_ratio": 4.0}), ("llama", "dpo", {"batch_size": 2})],
    }[n]
    configs = [
        config_of(models[name], rows if method == "sft" else pairs, tmp_path / f"{name}-{method}",
                  parallel="pipeline", method=method, **how, **more)
        for name, method, more in given
    ]  # fmt: skip
    with ranks_of(n, tmp_path, *configs, before=SEEN) as started:
        for own in configs:
            train(
                own.model_copy(update={"adapter_path": tmp_path / f"one-{own.adapter_path.name}"})
            )
        ends(tmp_path, started, seconds=WAIT)
    for rank in range(n):
        ended = [own for own in said(tmp_path, rank) if isinstance(own, list)]
        assert ended == [["ended", 3, False]] * len(configs), (tmp_path / f"err{rank}").read_text()
    for own, expected in zip(configs, first_gradient, strict=True):
        found = [np.load(f"{own.adapter_path}-{rank}.npz") for rank in range(n)]
        assert all(x.files for x in found)
        assert sorted(name for x in found for name in x.files) == sorted(expected)
        for x in found:
            for name in x.files:
                assert_close(name, x[name], expected[name], 1e-6)
        one = tmp_path / f"one-{own.adapter_path.name}"
        for a, b in zip(lines_of(one), lines_of(own.adapter_path), strict=True):
            assert a["kind"] == b["kind"] and b["loss"] == pytest.approx(
                a["loss"], rel=1e-5, abs=1e-6
            )
        (*_, last) = metrics_of(own.adapter_path)
        assert len(last["ranks"]) == n
        for figures in last["ranks"]:
            assert figures["busy_s"] > 0 and figures["waited_s"] > 0
            assert figures["peak_gb"] >= figures["active_gb"] > 0
        mine, theirs = weights_of(one), weights_of(own.adapter_path)
        for name, x in mine.items():
            assert_close(name, theirs[name], x, 1e-4)
    held = [
        [own for own in said(tmp_path, rank) if isinstance(own, dict) and own["type"] == "held"]
        for rank in range(n)
    ]
    for name, own in ((name, x) for run in held for (name, *_), x in zip(given, run, strict=True)):
        assert own["active"] <= 1.1 * own["share"], (name, own)
        if own["most"]:  # models on the generic path have no plan
            assert own["peak"] <= 1.1 * own["most"], (name, own)
        if name == "llama":  # in the other models, less of the memory is divided among the ranks
            assert own["share"] < 0.75 * own["whole"], (name, own)
    for runs in zip(*held, strict=True):
        ends_of = [own["layers"] for own in runs]
        assert ends_of[0][0] == 0
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ends_of))


def test_a_killed_rank_is_named_and_files_are_those_of_any_number_of_ranks(models, rows, tmp_path):
    """A single rank takes two steps, a pipeline continues until one of its ranks is killed, and a
    single rank resumes from the last checkpoint."""
    how = {"grad_accumulation_steps": 2, "lr_schedule": "constant", "steps_per_eval": 10000}
    out, model = tmp_path / "run", models["llama"]
    train(config_of(model, rows, out, iters=2, **how))
    more = {"resume": True, "parallel": "pipeline", "steps_per_save": 2, **how}
    with ranks_of(2, tmp_path, config_of(model, rows, out, iters=10000, **more)) as started:
        wait_for_step(tmp_path, 5, seconds=WAIT)
        started[1].send_signal(signal.SIGKILL)
        found, seconds = ends(tmp_path, started, but=[1], seconds=WAIT)
    assert seconds < 60
    kind, name, text = found[0]
    assert (kind, name) == ("failed", "LostRank")
    assert f"rank 1 (process {started[1].pid} on " in text
    assert "its factors are lost, so the run resumes from the last checkpoint" in text
    kept = checkpoint._read(checkpoint_of(out)).step
    assert kept >= 4 and kept % 2 == 0

    train(config_of(model, rows, out, iters=kept + 2, resume=True, **how))
    train(config_of(model, rows, tmp_path / "whole", iters=kept + 2, **how))
    mine, theirs = weights_of(tmp_path / "whole"), weights_of(out)
    for name, x in mine.items():
        assert_close(name, theirs[name], x, 1e-4)


def test_what_a_pipeline_cannot_do_is_said_by_all_ranks(models, rows, tmp_path):
    how = {"parallel": "pipeline"}
    asks = config_of(models["llama"], rows, tmp_path / "a", sample_prompts=["Hello"], **how)
    tied = config_of(models["llama"], rows, tmp_path / "b", target_modules=["embed_tokens"], **how)
    small = config_of(models["llama"], rows, tmp_path / "c", memory_budget_gb=0.001, **how)
    few = config_of(models["cohere"], rows, tmp_path / "d", **how)
    with ranks_of(3, tmp_path, asks, tied, small, few) as started:
        ends(tmp_path, started, seconds=WAIT)
    for rank in range(3):
        texts = [own[2] for own in said(tmp_path, rank) if isinstance(own, list)]
        assert texts[0].startswith(
            "sample_prompts requires the whole model, but each rank of a pipeline has"
        )
        assert (
            texts[1].startswith("model.embed_tokens of ") and "on the first rank, and" in texts[1]
        )
        assert texts[2].startswith(
            "the model does not fit on 3 ranks: rank 0 does not have enough memory for layer 1 of 4"
        )
        assert "there are 3 ranks for 2 layers: start at most 2 ranks" in texts[3]
    assert not any((tmp_path / name / "metrics.jsonl").exists() for name in "abcd")
