"""Tests complete runs of the preference methods on tiny models, and features that all methods
support."""

import dataclasses
import json
import math
import os
import shlex
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from lib.folders import write_pairs
from lib.runs import METHODS, config_of, counted_references, setup_of, weights_of
from mlx_segtrain import InputError, adapters, train
from mlx_segtrain.training import evaluate, probe

pytestmark = [pytest.mark.acceptance, pytest.mark.usefixtures("cache")]


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_run_prefers_what_was_chosen(method, llama4, pairs, tmp_path):
    seen = []
    config = setup_of(method, llama4, None, pairs, tmp_path / "a", iters=25, steps_per_eval=25)
    result = train(config, seen.append)
    first, last = [event for event in seen if event.get("kind") == "val"]
    assert last["loss"] < first["loss"] and last["perplexity"] is None
    assert math.isclose(last["accuracy"], 1, rel_tol=1e-6)
    assert last["margin"] > first["margin"]
    better, worse = ("desirable", "undesirable") if method == "kto" else ("chosen", "rejected")
    assert last[f"{better}_reward"] > last[f"{worse}_reward"]
    assert result.final_val_accuracy == last["accuracy"]
    if method == "dpo":  # before the first step, the model equals the reference
        assert math.isclose(first["loss"], math.log(2), rel_tol=1e-5)
        assert abs(first["margin"]) < 1e-4
    step = next(event for event in seen if event.get("kind") == "train")
    own = {"accuracy"} if method == "kto" else {"accuracy", "margin", f"{worse}_reward"}
    assert own <= step.keys()
    again = evaluate(config, tmp_path / "a")
    assert math.isclose(again.loss, last["loss"], rel_tol=1e-4)
    assert again.metrics["accuracy"] == last["accuracy"] and again.perplexity is None
    tokens = mx.array([[1, 5, 9, 200, 17, 33]])
    stock, _ = mlx_lm.load(str(llama4), adapter_path=str(tmp_path / "a"))
    assert mx.isfinite(stock(tokens)).all()


def test_references_are_computed_once_and_by_content(llama4, llama, pairs, tmp_path, monkeypatch):
    """Cached references equal computed ones. They are not reused for other data, lengths or
    models."""
    counted = counted_references(monkeypatch)
    write_pairs(pairs, n=6, valid=3)

    def run(name, model=llama4, data=pairs, **changes):
        counted.clear()
        changes = {"iters": 6, "overwrite": True, **changes}
        train(setup_of("dpo", model, None, data, tmp_path / name, **changes))
        return sum(counted), weights_of(tmp_path / name)

    n, fresh = run("a")
    assert n == 6 + 3
    n, cached = run("a")
    assert n == 0 and all(mx.array_equal(cached[key], fresh[key]) for key in fresh)
    # The order, rank or learning rate changes, but the pairs do not.
    assert run("b", iters=15, seed=3)[0] == 0
    assert run("b", rank=8, learning_rate=1e-4, dpo_loss="ipo")[0] == 0
    assert run("b", max_seq_length=60)[0] == 9  # prompts are truncated
    write_pairs(pairs, n=8, valid=3)
    assert run("b", iters=8)[0] == 2
    assert run("b", model=llama, iters=8)[0] == 8 + 3
    weights = llama / "model.safetensors"
    os.utime(weights, ns=(1, 1))  # as if the file had been rewritten
    assert run("b", model=llama)[0] > 0
    assert run("b", reference_free=True)[0] == 0
    for file in (tmp_path / "cache" / "references").iterdir():
        file.write_bytes(file.read_bytes()[:100])  # truncates the file
    assert run("a")[0] > 0


def test_only_pairs_that_are_seen_are_computed(llama4, pairs, tmp_path):
    seen = []
    config = setup_of("dpo", llama4, None, pairs, tmp_path / "a", iters=2, batch_size=2)
    train(config, seen.append)
    messages = [event["message"] for event in seen if event.get("stage") == "data"]
    assert [m.split(":")[1].split()[0] for m in messages if m.startswith("reference:")] == [
        "4",
        "6",
    ]


@pytest.mark.parametrize(("method", "loss"), [("dpo", math.log(2)), ("kto", 0.5)])
def test_a_probe_computes_references_of_its_rows(method, loss, llama4, tmp_path, monkeypatch):
    """The adapter does not change, so the loss is that of rewards of 0. The probe trains on the
    longest rows, which the first step of a run would not."""
    counted = counted_references(monkeypatch)
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{i}", "chosen": "yes" + "x" * i, "rejected": "no"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"iters": 1, "batch_size": 2, "learning_rate": 1e-12, "seed": 2}
    found = probe(setup_of(method, llama4, None, path, tmp_path / "a", **how))
    assert math.isclose(found.loss, loss, rel_tol=1e-3) and sum(counted) == 2


@pytest.mark.parametrize("method", METHODS)
def test_dropout_acts_in_every_method_and_follows_the_seed(method, llama4, data, pairs, tmp_path):
    def run(name, **changes):
        # Two steps are needed: in the first one, the gradient of A is 0, because B is 0.
        train(setup_of(method, llama4, data, pairs, tmp_path / name, iters=2, **changes))
        return weights_of(tmp_path / name)

    plain, dropped, again = run("a"), run("b", lora_dropout=0.2), run("c", lora_dropout=0.2)
    whole = run("d", lora_dropout=0.2, segment_size=0)
    layers = run("e", lora_dropout=0.2, segment_size=1)
    assert any(not mx.array_equal(plain[key], dropped[key]) for key in plain)
    for other in (again, whole, layers):
        assert all(mx.array_equal(other[key], dropped[key]) for key in dropped)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == config["lora_parameters"]["dropout"] == 0.2


@pytest.mark.parametrize("method", METHODS)
def test_lora_plus_and_rslora_act_in_every_method(method, llama4, data, pairs, tmp_path):
    """After one SGD step, B has changed by its learning rate times its gradient, and A is
    unchanged."""

    def run(name, **changes):
        how = {"iters": 1, "optimizer": "sgd", "weight_decay": 0, "grad_clip_norm": 0, "rank": 4}
        how |= {"rank_scaling": "constant", "learning_rate": 1e-2}
        train(setup_of(method, llama4, data, pairs, tmp_path / name, **how, **changes))
        return adapters_of(tmp_path / name)

    plain, plus, root = run("a"), run("b", lora_plus_ratio=4), run("c", rs_lora=True)
    for key in plain:
        if key.endswith("lora_a"):
            assert mx.array_equal(plain[key], plus[key]) and mx.array_equal(plain[key], root[key])
        else:
            assert mx.abs(plain[key]).max() > 0
            assert mx.allclose(plus[key], 4 * plain[key], rtol=1e-5)
            # B's gradient includes the multiplier, scale / √4.
            assert mx.allclose(root[key], 0.5 * plain[key], rtol=1e-3, atol=1e-8)
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == 0.5


def adapters_of(path):
    return mx.load(str(path / "adapters.safetensors"))


@pytest.mark.parametrize("method", METHODS)
def test_ranks_by_bits_and_by_kl_in_every_method(method, llama_mixed, data, pairs, tmp_path):
    """The base has 4-bit and 8-bit layers. A copy of its folder also contains an OptiQ file."""
    result = train(setup_of(method, llama_mixed, data, pairs, tmp_path / "a", iters=1, rank=4))
    assert set(result.applied_ranks.values()) == {4, 8}
    model = tmp_path / "model"
    model.mkdir()
    for file in llama_mixed.iterdir():
        (model / file.name).symlink_to(file)
    paths = sorted(result.applied_ranks)
    kl = {path: {"kl": [0.01, 0.1, 0.9][i % 3]} for i, path in enumerate(paths)}
    (model / "optiq").mkdir()
    (model / "optiq" / "metadata.json").write_text(json.dumps({"per_layer": kl}))
    how = {"iters": 1, "rank": 4, "rank_scaling": "by_kl"}
    result = train(setup_of(method, model, data, pairs, tmp_path / "b", **how))
    wanted = {path: [2, 4, 8][i % 3] for i, path in enumerate(paths)}
    assert result.applied_ranks == wanted
    written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert written["optiq"]["applied_ranks"] == wanted
    assert written["optiq"]["rank_scaling"] == "by_kl"


def test_epochs_are_steps(llama4, pairs, tmp_path):
    how = {"epochs": 1.5, "batch_size": 2, "grad_accumulation_steps": 2}
    config = setup_of("orpo", llama4, None, pairs, tmp_path / "a", **how)
    seen = []
    assert train(config, seen.append).steps == math.ceil(1.5 * 12 / 4)
    start = next(event for event in seen if event.get("stage") == "train")
    assert start["iters"] == 5
    with pytest.raises(
        InputError, match=r"must be less than the number of steps \(1 for epochs = 0\.1\)"
    ):
        how = {"epochs": 0.1, "warmup_iters": 1, "batch_size": 2}
        config = setup_of("orpo", llama4, None, pairs, tmp_path / "b", **how)
        train(config)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_warm_start_goes_on_from_an_adapter(method, llama_mixed, data, pairs, tmp_path):
    """The run keeps the adapter's ranks (4 and 8) and multipliers, and its first loss equals the
    earlier run's last loss."""
    first = setup_of(method, llama_mixed, data, pairs, tmp_path / "a", rank=4, rs_lora=True)
    before = train(first)
    more = {"warm_start": tmp_path / "a", "iters": 3}
    config = setup_of(method, llama_mixed, data, pairs, tmp_path / "b", **more)
    after = train(config)
    assert math.isclose(after.first_val_loss, before.final_val_loss, rel_tol=1e-4)
    assert after.applied_ranks == before.applied_ranks
    assert after.final_val_loss < before.final_val_loss


def test_a_warm_start_of_another_model_is_refused_before_the_load(llama4, llama, data, tmp_path):
    train(config_of(llama4, data, tmp_path / "a", iters=1))
    weights = {
        f"model.layers.9.{k.split('.', 3)[3]}": x for k, x in weights_of(tmp_path / "a").items()
    }
    mx.save_safetensors(str(tmp_path / "a" / "adapters.safetensors"), weights)
    config = config_of(llama, data, tmp_path / "b", warm_start=tmp_path / "a")
    with pytest.raises(InputError, match="does not have: the adapter was trained on another model"):
        train(config)
    assert not (tmp_path / "b").exists()


def test_answers_and_scores_at_every_evaluation(llama4, data, tmp_path):
    score = tmp_path / "score.py"
    score.write_text(
        "import sys, json, pathlib\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "assert (folder / 'adapters.safetensors').is_file()\n"
        "print('some words'); print(json.dumps({'right': 0.5, 'n': 2}))\n"
    )
    calls = []

    def ask(model, tokenizer):
        calls.append(float(mx.abs(model(mx.array([[1, 2, 3]]))).max()))
        return calls[-1]

    seen = []
    how = {"iters": 4, "steps_per_eval": 2, "sample_prompts": ["one two", "three"]}
    command = shlex.join([sys.executable, str(score), "{adapter}"])
    how |= {"sample_tokens": 4, "eval_command": command}
    train(config_of(llama4, data, tmp_path / "a", **how), seen.append, score=ask)
    plain = train(config_of(llama4, data, tmp_path / "b", iters=4, steps_per_eval=2))
    answers = [event for event in seen if event["type"] == "sample"]
    assert [(a["step"], a["prompt"]) for a in answers] == [
        (step, prompt) for step in (0, 2, 4) for prompt in ("one two", "three")
    ]
    scores = [event["scores"] for event in seen if event.get("kind") == "score"]
    assert scores[1::2] == [{"right": 0.5, "n": 2.0}] * 3
    assert [s["score"] for s in scores[::2]] == calls and len(set(calls)) == 3
    # Scoring does not change the run.
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(mx.array_equal(a[key], b[key]) for key in a) and plain.steps == 4
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["type"] == "sample" for line in lines) == 6


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("false", "eval_command failed with exit code 1"),
        ("echo nothing", "the last line that eval_command printed is neither a number nor"),
        ("echo NaN", "the last line that eval_command printed is neither a number nor"),
        ("printf '\\351'", "the last line that eval_command printed is neither a number nor"),
    ],
)
def test_a_score_that_fails_is_told_and_ends_nothing(command, says, llama4, data, tmp_path):
    seen = []
    how = {"iters": 2, "eval_command": command}
    assert train(config_of(llama4, data, tmp_path / "a", **how), seen.append).steps == 2
    errors = [event["error"] for event in seen if event.get("kind") == "score"]
    assert len(errors) == 2 and all(says in error for error in errors)


def test_a_command_that_does_not_exist_is_an_error(llama4, data, tmp_path):
    config = config_of(llama4, data, tmp_path / "a", eval_command="no-such-program {adapter}")
    with pytest.raises(InputError, match=r"eval_command cannot be started \(no-such-program"):
        train(config)
    with pytest.raises(InputError, match="a run that saved no checkpoint: choose another folder"):
        train(config.model_copy(update={"eval_command": None}))
    config = config_of(llama4, data, tmp_path / "b", eval_command="echo it's")
    with pytest.raises(InputError, match=r"eval_command: .* is not a valid command line"):
        train(config)


def test_callbacks_may_return_numbers_of_numpy(llama4, data, tmp_path):
    seen = []
    found = train(
        config_of(llama4, data, tmp_path / "a", iters=4, steps_per_report=1),
        seen.append,
        on_step=lambda event: np.float64(event["step"]) >= 2,
        score=lambda model, tokenizer: {"a": np.float32(0.5), "b": np.int64(3)},
    )
    assert (found.steps, found.stopped_early) == (2, True)
    scores = [event["scores"] for event in seen if event.get("kind") == "score"]
    assert scores and all(own == {"a": 0.5, "b": 3.0} for own in scores)


def test_pairs_that_fit_only_apart_run_apart(llama4, pairs, tmp_path, monkeypatch):
    """The budget is too small to run each pair as a single stream. The loss is the same with two
    streams."""
    from mlx_segtrain.planning import run

    together = train(setup_of("dpo", llama4, None, pairs, tmp_path / "a", iters=3))
    original, tried = run.planned, []

    def planned(config, batches, **how):
        tried.append([len(batch.streams) for batch in batches])
        plan = original(config, batches, **how)
        return dataclasses.replace(plan, budget=0) if tried[-1] == [1] else plan

    monkeypatch.setattr(run, "planned", planned)
    apart = train(setup_of("dpo", llama4, None, pairs, tmp_path / "b", iters=3))
    assert tried == [[1], [2]]
    assert math.isclose(apart.final_train_loss, together.final_train_loss, rel_tol=1e-3)


def test_an_adapter_of_dpo_says_so(llama4, pairs, tmp_path):
    train(setup_of("dpo", llama4, None, pairs, tmp_path / "a", iters=1))
    written = json.loads((tmp_path / "a" / "optiq_lora_config.json").read_text())
    assert written["method"] == "dpo"
    assert adapters.holds_run(tmp_path / "a")


def test_events_of_pairs_are_json(llama4, pairs, tmp_path):
    seen = []
    result = train(setup_of("dpo", llama4, None, pairs, tmp_path / "a", iters=1), seen.append)
    for event in seen:
        json.dumps(event, allow_nan=False)
    json.dumps({**dataclasses.asdict(result), "adapter_path": ""}, allow_nan=False)
