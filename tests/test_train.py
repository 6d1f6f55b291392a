"""Tests complete runs on tiny models: their files, the numbers that they report, and
interruptions."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import mlx.core as mx
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import pytest

import mlx_segtrain
from lib.checks import needs_router_gradient
from lib.folders import write_rows, write_tiny
from lib.oracle import assert_close
from lib.runs import assert_same_in_mlx_lm, config_of, losses_of, weights_of
from mlx_segtrain import InputError, RunError, adapters, train
from mlx_segtrain.models import adapting, chain_of, load_base
from mlx_segtrain.training import evaluate, probe, step
from mlx_segtrain.training.layout import Layout


def test_a_run_learns_writes_and_reports(llama4, data, tmp_path):
    seen = []
    config = config_of(llama4, data, tmp_path / "a", iters=30, steps_per_eval=10)
    result = train(config, seen.append)
    assert result.steps == 30 and not result.interrupted
    assert result.first_val_loss > 4 and result.final_val_loss < 0.7 * result.first_val_loss
    assert result.best_val_loss <= result.final_val_loss
    kinds = [event["type"] for event in seen]
    assert kinds[0] == "started" and kinds[-1] == "done"
    stages = [event["stage"] for event in seen if event["type"] == "stage"]
    assert stages == ["load", "setup", "data", "train", "checkpoint", "done"]
    done = next(event for event in seen if event.get("stage") == "done")
    assert done["adapter_path"] == str(tmp_path / "a") and len(done["applied_ranks"]) == 21
    steps = [event["step"] for event in seen if event.get("kind") == "train"]
    assert steps == list(range(1, 31))
    vals = [event["step"] for event in seen if event.get("kind") == "val"]
    assert vals == [0, 10, 20, 30]
    progress = [event["progress"] for event in seen if "progress" in event]
    assert progress == sorted(progress) and progress[-1] == 1
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["config"]["iters"] == 30
    assert [json.loads(line) for line in lines[1:]] == seen[seen.index(json.loads(lines[1])) :]
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "adapters.safetensors",
        "adapter_config.json",
        "optiq_lora_config.json",
        "metrics.jsonl",
        "metrics.json",
        "README.md",
        "run.json",
        "state",
    }
    for a_or_b in weights_of(tmp_path / "a").values():
        assert a_or_b.dtype == mx.float32 and mx.isfinite(a_or_b).all()


def test_a_folder_is_of_one_run_at_a_time(llama4, data, tmp_path):
    """A run locks its folder until it ends, no matter how it ends. A second run is refused and
    changes nothing."""
    config = config_of(llama4, data, tmp_path / "a", overwrite=True)
    refused = []

    def second(event):
        if event.get("kind") == "train" and event["step"] == 2:
            before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
            with pytest.raises(InputError) as error:
                train(config)
            refused.append(str(error.value))
            assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before

    assert train(config, second).steps == 4
    assert refused == [
        f"adapter_path {tmp_path / 'a'} is in use by another run (process {os.getpid()}): "
        "choose another folder, or wait until it ends."
    ]
    assert train(config).steps == 4


def test_a_killed_run_leaves_its_folder_free(llama4, data, tmp_path):
    config = config_of(llama4, data, tmp_path / "a", overwrite=True)
    flags = ["--model", llama4, "--data", data, "--adapter-path", tmp_path / "a"]
    long = [*flags, "--max-seq-length", "100", "--iters", "1000000"]
    with subprocess.Popen(
        [sys.executable, "-m", "mlx_segtrain.commands.main", "train", *long]
    ) as run:
        try:
            begin = time.monotonic()
            while not (tmp_path / "a" / "metrics.jsonl").exists():
                assert run.poll() is None and time.monotonic() < begin + 60
                time.sleep(0.1)
            with pytest.raises(InputError, match="in use by another run"):
                train(config)
        finally:
            run.kill()
    assert train(config).steps == 4


@pytest.mark.parametrize("fixture", ["llama4", "llama_mixed"])
def test_the_adapter_loads_in_stock_mlx_lm_and_gives_our_logits(fixture, data, tmp_path, request):
    """llama_mixed has 4-bit and 8-bit layers, so `by_bits` chooses two ranks. mlx-lm supports only
    one rank in an adapter."""
    model_dir = request.getfixturevalue(fixture)
    result = train(config_of(model_dir, data, tmp_path / "a", scale=2.0))
    assert set(result.applied_ranks.values()) == ({4, 8} if fixture == "llama_mixed" else {4})
    tokens, stock = assert_same_in_mlx_lm(model_dir, tmp_path / "a", apart=1e-2)
    # The forward pass in training computes the same logits.
    model, _, _ = load_base(model_dir)
    chain = chain_of(model)
    adapter = adapters.read_adapter(tmp_path / "a", chain)
    assert adapter.ranks == result.applied_ranks
    stages = chain.stages(adapter.scales)
    params = adapting.stage_params(chain, adapter)
    values = {**chain.start(tokens), "positions": mx.arange(tokens.shape[1])}
    h = mlx_segtrain.schedule.forward(stages, params, values)["h"]
    logits = chain.head.logits(h)
    assert_close("training forward", logits, stock, 1e-5)


def test_generate_with_the_adapter(llama4, data, tmp_path):
    train(config_of(llama4, data, tmp_path / "a", iters=2))
    model, tokenizer = mlx_segtrain.load(llama4, tmp_path / "a")
    stock, _ = mlx_lm.load(str(llama4), adapter_path=str(tmp_path / "a"))
    options = {"prompt": [1, 2, 3, 4], "max_tokens": 12}
    text = mlx_lm.generate(model, tokenizer, **options)
    assert text == mlx_lm.generate(stock, tokenizer, **options) and text


def test_same_seed_same_bytes_and_another_seed_another_run(llama4, data, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(config_of(llama4, data, tmp_path / name, seed=seed))
    first = (tmp_path / "a" / "adapters.safetensors").read_bytes()
    assert first == (tmp_path / "b" / "adapters.safetensors").read_bytes()
    assert first != (tmp_path / "c" / "adapters.safetensors").read_bytes()


def test_accumulation_equals_a_larger_batch(llama, tmp_path):
    """Rows differ in length, so a mean of means would weight them incorrectly."""
    data = write_rows(tmp_path / "data", 4)
    runs = {}
    for name, changes in {
        "batch": {"batch_size": 4},
        "accumulated": {"grad_accumulation_steps": 4},
    }.items():
        # The order is irrelevant, because every step contains all four rows.
        train(config_of(llama, data, tmp_path / name, iters=3, **changes))
        runs[name] = weights_of(tmp_path / name)
    for key, value in runs["batch"].items():
        assert_close(key, runs["accumulated"][key], value, 2e-3)


def test_the_optimizer_is_adamw_with_bias_correction_and_clipping(
    llama, data, tmp_path, monkeypatch
):
    """Three steps lead to the same weights as `mlx.optimizers.AdamW` with the same gradients."""
    taken = []
    original = step.Stepper.gradient

    def recorded(self, at, batches):
        loss, gradient = original(self, at, batches)
        taken.append((self.setup.layout.split(at.vector), self.setup.layout.split(gradient)))
        return loss, gradient

    monkeypatch.setattr(step.Stepper, "gradient", recorded)
    seen = []
    config = config_of(llama, data, tmp_path / "a", iters=3, grad_clip_norm=0.5, weight_decay=0.1)
    train(config, seen.append)
    optimizer = optim.AdamW(
        1e-2, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.1, bias_correction=True
    )
    params = taken[0][0]
    reported = [event["grad_norm"] for event in seen if event.get("kind") == "train"]
    for (_, grads), norm in zip(taken, reported, strict=True):
        clipped, total = optim.clip_grad_norm(grads, 0.5)
        assert math.isclose(total.item(), norm, rel_tol=1e-5)
        params = optimizer.apply_gradients(clipped, params)
    final = weights_of(tmp_path / "a")
    for own in params.values():
        for key, value in own.items():
            assert_close(key, final[key], value, 1e-4)
    assert max(reported) > 0.5


def test_a_layout_joins_splits_and_names():
    b = {"x": mx.arange(6.0).reshape(2, 3), "a": mx.full((4,), 7.0)}
    params = {"b": b, "a": {"y": mx.ones(1)}}
    layout = Layout.of(params)
    vector = layout.join(params)
    assert vector.tolist() == [7, 7, 7, 7, 0, 1, 2, 3, 4, 5, 1]
    again = layout.split(vector)
    assert all(mx.array_equal(again["b"][key], value) for key, value in b.items())
    assert layout.names(vector == 5) == ["x"] and layout.names(vector == 1) == ["x", "y"]


def test_memory_of_each_step_is_told_to_those_who_ask(llama4, data, tmp_path, monkeypatch, capfd):
    train(config_of(llama4, data, tmp_path / "a", iters=2))
    assert "peak" not in capfd.readouterr().err
    monkeypatch.setenv("MLX_SEGTRAIN_MEM_LOG", "1")
    result = train(config_of(llama4, data, tmp_path / "b", iters=3))
    number = r"(\d+\.\d{3}) GB"
    line = rf"step (\d): peak {number}, active {number}, cache {number}, process {number}\n"
    found = re.findall(line, capfd.readouterr().err)
    assert [step for step, *_ in found] == ["1", "2", "3"]
    for _, peak, active, _, process in found:  # the model needs only a few kilobytes
        assert float(process) > float(peak) >= float(active)
    assert abs(max(float(peak) for _, peak, *_ in found) - result.peak_gb) < 1e-3


def test_segment_sizes_and_checkpointing_train_the_same(llama4, data, tmp_path):
    losses = {}
    for name, changes in {
        "auto": {},
        "off": {"segment_size": 0},
        "two": {"segment_size": 2},
        "checkpoint": {"grad_checkpoint": True, "segment_size": 0},
    }.items():
        losses[name] = train(config_of(llama4, data, tmp_path / name, **changes)).final_val_loss
    assert losses["auto"] == losses["checkpoint"]
    assert np.allclose(list(losses.values()), losses["auto"], rtol=1e-5)


GOLDEN = [5.6145, 5.5636, 5.344, 4.8838, 5.0153, 4.8762, 4.3232, 4.502, 4.3224, 4.0853]


def test_ten_losses_of_a_tiny_model(llama4, data, tmp_path):
    """The expected losses are literals, so any change in the arithmetic is noticed."""
    seen = []
    changes = {"iters": 10, "batch_size": 4, "learning_rate": 2e-3}
    train(config_of(llama4, data, tmp_path / "a", **changes), seen.append)
    losses = [event["loss"] for event in seen if event.get("kind") == "train"]
    assert np.allclose(losses, GOLDEN, atol=1e-3), [round(x, 4) for x in losses]


def test_checkpoints_and_metrics(llama4, data, tmp_path):
    config = config_of(
        llama4, data, tmp_path / "a", iters=4, steps_per_eval=2, save_checkpoints=True
    )
    result = train(config)
    folders = sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir())
    assert [name.split("-val")[0] for name in folders] == ["step-00002", "step-00004"]
    assert folders[-1].endswith(f"val{result.final_val_loss:.4f}")
    for name in folders:
        mlx_lm.load(str(llama4), adapter_path=str(tmp_path / "a" / "checkpoints" / name))
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["config"]["iters"] == 4 and [v["step"] for v in metrics["val_losses"]] == [
        0,
        2,
        4,
    ]
    assert metrics["final_val_loss"] == result.final_val_loss and metrics["peak_gb"] > 0


def test_last_layers_only(llama4, data, tmp_path):
    result = train(config_of(llama4, data, tmp_path / "a", num_layers=1))
    assert {path.split(".")[2] for path in result.applied_ranks} == {"2"}
    assert len(weights_of(tmp_path / "a")) == 14
    mlx_lm.load(str(llama4), adapter_path=str(tmp_path / "a"))


def test_ranks_by_kl(llama_mixed, tmp_path):
    model, _, _ = load_base(llama_mixed)
    chain = chain_of(model)
    paths = sorted(chain.linears)
    kl = {path: {"bits": 4, "kl": 1.0} for path in paths[:3]}
    kl[paths[1]]["kl"], kl[paths[2]]["kl"] = 100.0, 0.01
    (tmp_path / "optiq_metadata.json").write_text(json.dumps({"per_layer": kl}))
    options = {"rank": 10, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
               "up_proj", "down_proj"], "num_layers": -1}  # fmt: skip
    ranks = adapting.choose_ranks(chain, rank_scaling="by_kl", model_dir=tmp_path, **options)
    assert [ranks[path] for path in paths[:3]] == [10, 20, 5]
    by_bits = adapting.choose_ranks(chain, rank_scaling="by_bits", model_dir=tmp_path, **options)
    assert {p: r for p, r in ranks.items() if p not in paths[:3]} == {
        p: r for p, r in by_bits.items() if p not in paths[:3]
    }
    assert set(by_bits.values()) == {10, 20}
    constant = adapting.choose_ranks(chain, rank_scaling="constant", model_dir=tmp_path, **options)
    assert set(constant.values()) == {10}
    none = adapting.choose_ranks(chain, rank_scaling="by_kl", model_dir=tmp_path / "x", **options)
    assert none == by_bits


GENERIC = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "mamba2": ["in_proj", "out_proj"],
    # Includes expert layers.
    "qwen3_moe": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "gemma4": ["q_proj", "v_proj", "per_layer_input_gate", "per_layer_projection"],
}


@pytest.mark.parametrize("family", GENERIC)
def test_adapters_of_other_families_load_in_mlx_lm(family, data, tmp_path):
    if family == "qwen3_moe":
        needs_router_gradient()
    model_dir = write_tiny(tmp_path / "model", family)
    options = {"target_modules": GENERIC[family], "learning_rate": 1e-2, "iters": 8}
    result = train(config_of(model_dir, data, tmp_path / "a", **options))
    assert result.final_val_loss < 0.9 * result.first_val_loss
    own, _ = mlx_segtrain.load(model_dir, tmp_path / "a")
    stock, _ = mlx_lm.load(str(model_dir), adapter_path=str(tmp_path / "a"))
    tokens = mx.arange(10, 40)[None]
    assert_close("logits", own(tokens), stock(tokens), 1e-4)
    again = evaluate(config_of(model_dir, data, tmp_path), tmp_path / "a")
    assert math.isclose(again.loss, result.final_val_loss, rel_tol=1e-5)


@pytest.mark.parametrize("at", ["between steps", "in a stage"])
def test_ctrl_c_saves_the_last_finished_step(llama4, data, tmp_path, at, monkeypatch):
    # Shells start background jobs with SIGINT ignored. Python keeps this setting, so the test sets
    # Python's default handler.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = []

    def on_event(event):
        seen.append(event)
        if at == "between steps" and event.get("kind") == "train" and event["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    if at == "in a stage":
        original, calls = mlx_segtrain.ops.lora_glu_mlp, []

        def mlp(*args, **kwargs):
            calls.append(1)
            if len(calls) == 80:
                signal.raise_signal(signal.SIGINT)
            return original(*args, **kwargs)

        monkeypatch.setattr(mlx_segtrain.ops, "lora_glu_mlp", mlp)
    config = config_of(llama4, data, tmp_path / "a", iters=50, steps_per_eval=100)
    result = train(config, on_event)
    assert result.interrupted and 0 < result.steps < 50
    plain = config_of(llama4, data, tmp_path / "b", iters=result.steps, steps_per_eval=100)
    monkeypatch.undo()
    train(plain)
    stopped, full = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(mx.array_equal(stopped[key], full[key]) for key in full)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(llama4, data, tmp_path, monkeypatch):
    original, calls = step.Stepper.gradient, []

    def broken(self, at, batches):
        outputs, gradient = original(self, at, batches)
        calls.append(1)
        return ([math.nan] if len(calls) == 3 else outputs), gradient

    monkeypatch.setattr(step.Stepper, "gradient", broken)
    seen = []
    with pytest.raises(RunError, match=r"step 3: the loss is nan .*, on .*train.jsonl:\d+"):
        train(config_of(llama4, data, tmp_path / "a"), seen.append)
    assert seen[-1]["type"] == "failed"
    monkeypatch.undo()
    train(config_of(llama4, data, tmp_path / "b", iters=2))
    kept, two = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(mx.array_equal(kept[key], two[key]) for key in two)


def test_probe_writes_nothing_and_takes_the_longest_rows(llama4, data, tmp_path):
    result = probe(config_of(llama4, data, tmp_path / "a"))
    assert result.finite and result.loss > 0 and result.grad_norm > 0
    assert result.peak_gb > result.resting_gb > 0 and result.step_s > 0
    _, _, tokenizer = load_base(llama4)
    from mlx_segtrain.data import Options, load_dataset

    rows, _ = load_dataset(data, tokenizer, Options(max_seq_length=100))
    assert result.tokens == max(len(row.ids) for row in rows.rows)
    assert not (tmp_path / "a").exists()


def test_evaluate_agrees_with_the_run(llama4, data, tmp_path):
    result = train(config_of(llama4, data, tmp_path / "a"))
    own = evaluate(config_of(llama4, data, tmp_path), tmp_path / "a")
    assert math.isclose(own.loss, result.final_val_loss, rel_tol=1e-5) and own.rows == 6
    assert math.isclose(own.perplexity, math.exp(own.loss))
    base = evaluate(config_of(llama4, data, tmp_path, batch_size=4))
    assert math.isclose(base.loss, result.first_val_loss, rel_tol=1e-5)


def test_files_are_written_aside_and_renamed(tmp_path):
    from mlx_segtrain.files import atomic, write_text

    write_text(tmp_path / "a.json", "old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "a.json") as aside:
        aside.write_text("half")
        assert (tmp_path / "a.json").read_text() == "old"
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(InputError):
        adapters.read_adapter(tmp_path / "nothing", None)


def test_early_stopping_counts_evaluations_without_a_lower_loss(
    llama4, data, tmp_path, monkeypatch
):
    losses_of(monkeypatch, [5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 3.1])
    options = {"iters": 40, "steps_per_eval": 2, "early_stopping_patience": 3, "keep_best": True}
    seen = []
    result = train(config_of(llama4, data, tmp_path / "a", **options), seen.append)
    # The first evaluation precedes the first step. The loss of 3.0 occurs at step 6, and a second
    # 3.0 is no improvement.
    assert (result.best_step, result.best_val_loss, result.steps) == (6, 3.0, 12)
    assert result.stopped_early and not result.interrupted
    best = mx.load(str(tmp_path / "a/best/adapters.safetensors"))
    last = mx.load(str(tmp_path / "a/adapters.safetensors"))
    assert best.keys() == last.keys() and any(not mx.array_equal(best[k], last[k]) for k in best)

    losses_of(monkeypatch, [5.0, 6.0])
    options |= {"iters": 6, "overwrite": True, "keep_best": False}
    again = train(config_of(llama4, data, tmp_path / "a", **options))
    # The last evaluation cannot stop a run early.
    assert not again.stopped_early and again.steps == 6
    assert not (tmp_path / "a/best").exists()


def test_the_best_adapter_is_that_of_its_step(llama4, data, tmp_path, monkeypatch):
    losses_of(monkeypatch, [5.0, 4.0, 4.5])
    options = {"steps_per_eval": 3, "keep_best": True}
    train(config_of(llama4, data, tmp_path / "a", iters=9, **options))
    train(config_of(llama4, data, tmp_path / "b", iters=3))
    first, second = ((tmp_path / x / "adapters.safetensors").read_bytes() for x in ("a/best", "b"))
    assert first == second


@pytest.mark.parametrize("option", [{"keep_best": True}, {"early_stopping_patience": 1}])
def test_options_that_need_a_validation_set_say_so(option, llama4, tmp_path):
    data = write_rows(tmp_path / "data", 4)
    with pytest.raises(InputError, match="needs a validation loss"):
        train(config_of(llama4, data, tmp_path / "a", **option))
