"""After a failure, a run stops or continues with a one-sentence message, and preserves its
state."""

import gc
import json
import math
import os
import shutil
import threading
import time
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from lib.folders import write_llama, write_rows
from lib.runs import (
    Crash,
    assert_twins,
    config_of,
    crash_behind,
    files_of,
    lines_of,
    losses_of,
    weights_of,
)
from mlx_segtrain import InputError, RunError, train
from mlx_segtrain.training import checkpoint, clock, log, spikes, step
from mlx_segtrain.training.memory import process_peak

pytestmark = pytest.mark.acceptance


def warnings_of(told):
    return [event["message"] for event in told if event["type"] == "warning"]


def same(a, b):
    return all(mx.array_equal(weights_of(a)[key], x) for key, x in weights_of(b).items())


# ---- non-finite numbers


def poisoned(tmp_path):
    """Writes a model whose embedding of '7' is NaN."""
    model = write_llama(tmp_path / "model", tied=False)
    weights = mx.load(str(model / "model.safetensors"))
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    rows = np.array(weights["model.embed_tokens.weight"])
    rows[vocabulary["7"]] = np.nan
    weights["model.embed_tokens.weight"] = mx.array(rows)
    mx.save_safetensors(str(model / "model.safetensors"), weights, {"format": "mlx"})
    return model


def test_the_row_and_the_layer_are_named(tmp_path):
    model = poisoned(tmp_path)
    data = write_rows(tmp_path / "data", 6)  # "Count to 5." → "1 2 3 4 5 6"
    lines = (data / "train.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace("Count to 3", "Count to 7")
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    told = []
    config = config_of(model, data, tmp_path / "a", batch_size=3, seed=0, iters=6)
    with pytest.raises(RunError) as error:
        train(config, told.append)
    found = [int(word) for word in str(error.value).split(":")[0].split() if word.isdigit()]
    (at,) = found
    assert "train.jsonl:4 (first in h after model.layers.0.self_attn)" in str(error.value)
    kept = f"the state of step {at - 1} is saved" if at > 1 else "nothing has been trained yet"
    assert kept in str(error.value)
    report = json.loads((tmp_path / "a" / f"fault-step-{at:05d}.json").read_text())
    assert report["kind"] == "nonfinite" and report["loss"] is None and report["step"] == at
    assert report["rows"] == ["train.jsonl:4"]
    assert report["tensor"] == "h after model.layers.0.self_attn"
    assert told[-1]["type"] == "failed"
    # The state of the last good step is saved, so the run can be resumed.
    if at > 1:
        assert next(iter(checkpoint.found(tmp_path / "a"))) == at - 1


def test_a_gradient_that_is_not_finite_is_named(llama4, data, tmp_path, monkeypatch):
    original, calls = step.Stepper.gradient, []

    def broken(self, at, batches):
        outputs, gradient = original(self, at, batches)
        calls.append(1)
        bad = mx.arange(gradient.size) == gradient.size - 1
        return outputs, mx.where(bad, math.inf, gradient) if len(calls) == 3 else gradient

    monkeypatch.setattr(step.Stepper, "gradient", broken)
    with pytest.raises(RunError, match=r"norm is inf, .*first in the gradient of model.layer"):
        train(config_of(llama4, data, tmp_path / "a"))
    monkeypatch.undo()
    told = []
    train(config_of(llama4, data, tmp_path / "a", resume=True), told.append)
    train(config_of(llama4, data, tmp_path / "b"))
    assert same(tmp_path / "a", tmp_path / "b")


# ---- spikes


def test_what_a_spike_is():
    calm = [2.0 + 0.1 * math.sin(i) for i in range(spikes.WINDOW)]
    assert spikes.spike_bound(calm[: spikes.LEAST - 1]) == math.inf
    assert 3.0 < spikes.spike_bound(calm) < 3.3  # 1.5 times the largest loss
    wild = [5.0 + 3 * math.sin(i) for i in range(spikes.WINDOW)]
    assert spikes.spike_bound(wild) > 12
    # If losses stay high, only the first high loss is a spike.
    assert spikes.spike_bound([*calm[1:], 8.0]) > 8.0


def spiking(monkeypatch, at):
    """Multiplies the loss of step `at` by a hundred."""
    original, calls = step.Stepper.gradient, []

    def gradient(self, it, batches):
        outputs, found = original(self, it, batches)
        calls.append(it.step)
        return ([100 * outputs[0]] if it.step == at - 1 else outputs), found

    monkeypatch.setattr(step.Stepper, "gradient", gradient)


SPIKE = {"iters": 22, "steps_per_eval": 100, "learning_rate": 1e-3}


def test_a_spike_is_told(llama4, data, tmp_path, monkeypatch):
    spiking(monkeypatch, 20)
    told = []
    train(config_of(llama4, data, tmp_path / "a", **SPIKE), told.append)
    (text,) = warnings_of(told)
    assert text.startswith("step 20: the loss ") and text.endswith("the step was taken")
    monkeypatch.undo()
    train(config_of(llama4, data, tmp_path / "b", **SPIKE))
    assert same(tmp_path / "a", tmp_path / "b")


def test_a_spike_is_left_out(llama4, data, tmp_path, monkeypatch):
    spiking(monkeypatch, 20)
    told = []
    options = {**SPIKE, "on_spike": "skip"}
    train(config_of(llama4, data, tmp_path / "a", **{**options, "iters": 20}), told.append)
    (text,) = warnings_of(told)
    assert text.endswith("the step was skipped")
    train(config_of(llama4, data, tmp_path / "b", **{**options, "iters": 19}))
    assert same(tmp_path / "a", tmp_path / "b")
    # A skipped step is counted, so the next step uses another batch.
    seen = []
    train(config_of(llama4, data, tmp_path / "c", **options), seen.append)
    assert [e["step"] for e in seen if e.get("kind") == "train"] == list(range(1, 23))
    assert not same(tmp_path / "c", tmp_path / "a")


def test_a_run_stops_at_a_spike_and_can_go_on(llama4, data, tmp_path, monkeypatch):
    spiking(monkeypatch, 20)
    with pytest.raises(
        RunError, match=r"step 20: the loss .* on train.jsonl:\d+: the state of step 19"
    ):
        train(config_of(llama4, data, tmp_path / "a", **SPIKE, on_spike="stop"))
    report = json.loads((tmp_path / "a" / "fault-step-00020.json").read_text())
    assert report["kind"] == "spike" and len(report["losses"]) == 19 and report["loss"] > 100
    more = {**SPIKE, "on_spike": "skip"}
    assert train(config_of(llama4, data, tmp_path / "a", **more, resume=True)).resumed_from == 19
    train(config_of(llama4, data, tmp_path / "b", **more))
    assert same(tmp_path / "a", tmp_path / "b")


# ---- memory, model, folder, clock


def no_memory(monkeypatch, times):
    original, left = step.Stepper.gradient, [times]

    def gradient(self, at, batches):
        if at.step == 2 and left[0]:
            left[0] -= 1
            raise RuntimeError("[malloc] Unable to allocate 12345 bytes.")
        return original(self, at, batches)

    monkeypatch.setattr(step.Stepper, "gradient", gradient)


def test_a_step_without_memory_is_taken_by_a_cheaper_plan(llama4, data, tmp_path, monkeypatch):
    no_memory(monkeypatch, 1)
    told = []
    train(config_of(llama4, data, tmp_path / "a"), told.append)
    stages = [e["message"] for e in told if e.get("stage") == "setup"]
    assert len(stages) == 2 and stages[1].startswith("out of memory in a step; new memory plan:")
    monkeypatch.undo()
    train(config_of(llama4, data, tmp_path / "b"))
    assert same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("options", [{}, {"segment_size": 1}])
def test_no_plan_takes_less(options, llama4, data, tmp_path, monkeypatch):
    no_memory(monkeypatch, 1000)
    with pytest.raises(RunError, match=r"step 3: the device is out of memory .*no plan needs less"):
        train(config_of(llama4, data, tmp_path / "a", **options))
    monkeypatch.undo()
    assert train(config_of(llama4, data, tmp_path / "a", resume=True)).resumed_from == 2


def test_other_errors_are_not_taken_for_a_want_of_memory(llama4, data, tmp_path, monkeypatch):
    def gradient(self, at, batches):
        raise RuntimeError("[matmul] shapes differ")

    monkeypatch.setattr(step.Stepper, "gradient", gradient)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(config_of(llama4, data, tmp_path / "a"))


def at_step(n, do):
    told = []

    def on_event(event):
        told.append(event)
        if event.get("kind") == "train" and event["step"] == n:
            do()

    return on_event, told


def test_the_model_changes_under_the_run(data, tmp_path):
    model = write_llama(tmp_path / "model", bits=4)
    kept = shutil.copytree(model, tmp_path / "kept")
    options = {"iters": 8, "steps_per_save": 2}
    on_event, _ = at_step(3, lambda: write_llama(model, bits=4, seed=1))
    with pytest.raises(RunError, match=r"step 4: .*model.safetensors was changed"):
        train(config_of(model, data, tmp_path / "a", **options), on_event)
    with pytest.raises(InputError, match="has changed since the run"):
        train(config_of(model, data, tmp_path / "a", resume=True, **options))
    shutil.copytree(kept, model, dirs_exist_ok=True)
    resumed = train(config_of(model, data, tmp_path / "a", resume=True, **options))
    assert resumed.resumed_from == 4
    plain = train(config_of(model, data, tmp_path / "b", **options))
    assert_twins(None, (tmp_path / "a", resumed), (tmp_path / "b", plain))


def test_a_model_that_was_only_touched_is_the_same(data, tmp_path):
    model = write_llama(tmp_path / "model", bits=4)
    on_event, told = at_step(1, lambda: os.utime(model / "model.safetensors", (1, 1)))
    options = {"iters": 4, "steps_per_save": 1}
    assert train(config_of(model, data, tmp_path / "a", **options), on_event).steps == 4
    assert not warnings_of(told)
    on_event, _ = at_step(1, lambda: (model / "model.safetensors").unlink())
    with pytest.raises(RunError, match=r"step 1: .*model.safetensors was removed"):
        train(config_of(model, data, tmp_path / "b", **options), on_event)


def test_a_folder_that_vanishes_is_made_anew(llama4, data, tmp_path):
    options = {"iters": 6, "steps_per_save": 2}
    plain = train(config_of(llama4, data, tmp_path / "b", **options))
    on_event, told = at_step(3, lambda: shutil.rmtree(tmp_path / "a"))
    result = train(config_of(llama4, data, tmp_path / "a", **options), on_event)
    assert warnings_of(told) == [
        f"{tmp_path / 'a'} was deleted during the run and has been recreated"
    ]
    assert_twins(None, (tmp_path / "a", result), (tmp_path / "b", plain))
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in (tmp_path / "b").iterdir()}


def test_a_folder_that_another_run_took(llama4, data, tmp_path):
    held = []

    def take():
        shutil.rmtree(tmp_path / "a")
        held.append(log.RunLog(tmp_path / "a", print))

    on_event, _ = at_step(3, take)
    with pytest.raises(RunError, match=r"was removed and has since been used by another run"):
        train(config_of(llama4, data, tmp_path / "a", steps_per_save=1), on_event)
    held[0].close()


def test_a_folder_that_cannot_be_made(llama4, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .(File exists|Not a directory)"):
        train(config_of(llama4, data, tmp_path / "file" / "a"))


def test_a_clock_that_jumps_is_told_once(llama4, data, tmp_path, monkeypatch):
    ahead = [0.0]

    class Time:
        monotonic = time.monotonic

        @staticmethod
        def time():
            return time.time() + ahead[0]

    monkeypatch.setattr(clock, "time", Time)
    on_event, told = at_step(2, lambda: ahead.__setitem__(0, 3600.0))
    result = train(config_of(llama4, data, tmp_path / "a"), on_event)
    (text,) = warnings_of(told)
    assert text.startswith("step 2: the clock jumped by +3600 s") and result.wall_s < 60


def test_a_log_that_cannot_be_written_waits(llama4, data, tmp_path, monkeypatch):
    """Lines are written as soon as the log is writable again, without delaying any step."""
    train(config_of(llama4, data, tmp_path / "b"))
    broken = []
    original = log.RunLog._open

    class File:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if broken:
                raise OSError(28, "No space left on device")
            return self.file.write(data[:7])  # a partial write

    monkeypatch.setattr(log.RunLog, "_open", lambda self, *flags: File(original(self, *flags)))
    told = []

    def on_event(event):
        told.append(event)
        if event.get("kind") == "train":
            broken[:] = [1] if event["step"] in (1, 2) else []

    train(config_of(llama4, data, tmp_path / "a"), on_event)
    (text,) = warnings_of(told)
    assert "metrics.jsonl cannot be written (No space left on device); trying again" in text
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")


def test_the_last_write_that_fails_is_said(llama4, data, tmp_path, monkeypatch):
    def save(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", save)
        with pytest.raises(RunError, match=r"step 4: .*/a cannot be written \(No space left"):
            train(config_of(llama4, data, tmp_path / "a"))
    assert train(config_of(llama4, data, tmp_path / "a", resume="auto")).steps == 4


def test_training_in_a_thread(llama4, data, tmp_path):
    """A run also works outside the main thread, where no signals arrive."""
    found = []
    config = config_of(llama4, data, tmp_path / "a", iters=2)
    thread = threading.Thread(target=lambda: found.append(train(config).steps))
    thread.start()
    thread.join()
    assert found == [2]


# ---- nothing grows


def test_nothing_grows_with_the_steps(llama4, data, tmp_path):
    """The numbers of open files and threads, the resident memory and MLX's memory stay constant,
    even with a checkpoint after every step."""
    steps = int(os.environ.get("STEPS", 150))
    seen = []

    def on_event(event):
        if event.get("kind") == "train" and event["step"] % (steps // 10) == 0:
            with open("/proc/self/statm") as statm:
                resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            files, threads = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
            seen.append((files, threads, resident, mx.get_active_memory()))

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("/proc is available only on Linux")
    gc.collect()  # frees garbage before the memory is measured
    options = {"steps_per_save": 1, "steps_per_eval": steps // 5, "keep_best": True}
    train(config_of(llama4, data, tmp_path / "a", iters=steps, **options), on_event)
    assert len(seen) == 10
    files, threads, resident, active = zip(*seen, strict=True)
    print(f"{steps} steps: files {files}, threads {threads}, active {active}, resident {resident}")
    assert len(set(files[1:])) == 1 and max(threads[2:]) <= threads[1]
    assert max(active[1:]) <= min(active[1:]) + 100_000
    assert resident[-1] <= resident[3] + 8e6 and process_peak() > 0
    assert len(list((tmp_path / "a" / "state").iterdir())) == 2


def test_crash_keeps_what_was_saved(llama4, data, tmp_path):
    """An exception in a caller's callback propagates, and the last checkpoint remains."""
    with pytest.raises(Crash):
        train(config_of(llama4, data, tmp_path / "a", steps_per_save=2), crash_behind(3))
    assert list(checkpoint.found(tmp_path / "a")) == [2]
    assert any("adapters" in name.name for name in files_of(tmp_path / "a"))


def test_an_update_that_is_not_finite_is_not_taken(llama4, data, tmp_path, monkeypatch):
    original = step.Optimizer.__call__

    def broken(self, gradient, at):
        new = original(self, gradient, at)
        return replace(new, vector=new.vector * math.inf) if at.step == 2 else new

    monkeypatch.setattr(step.Optimizer, "__call__", broken)
    with pytest.raises(RunError, match=r"step 3: the update is not finite, on train.jsonl:"):
        train(config_of(llama4, data, tmp_path / "a", keep_checkpoints=1, steps_per_save=1))
    assert list(checkpoint.found(tmp_path / "a")) == [2]
    assert all(mx.isfinite(x).all() for x in weights_of(tmp_path / "a").values())


def test_a_validation_loss_that_is_no_number(llama4, data, tmp_path, monkeypatch):
    losses_of(monkeypatch, [math.nan, 4.0, math.nan, 3.5])
    options = {"iters": 6, "steps_per_eval": 2, "keep_best": True, "save_checkpoints": True}
    result = train(config_of(llama4, data, tmp_path / "a", **options))
    assert result.best_step == 6 and result.best_val_loss == 3.5
    text = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert "NaN" not in text and '"loss": null' in text
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["first_val_loss"] is None


def test_spikes_are_not_left_out_for_ever(llama4, data, tmp_path, monkeypatch):
    """If losses stay high, they become the baseline for later losses."""
    original = step.Stepper.gradient

    def gradient(self, at, batches):
        outputs, found = original(self, at, batches)
        return ([outputs[0] + (1000 if at.step >= 20 else 0)]), found

    monkeypatch.setattr(step.Stepper, "gradient", gradient)
    told = []
    options = {**SPIKE, "iters": 40, "on_spike": "skip"}
    train(config_of(llama4, data, tmp_path / "a", **options), told.append)
    steps = [int(text.split()[1][:-1]) for text in warnings_of(told)]
    assert steps == list(range(21, 21 + spikes.MOST_SKIPPED))


def test_an_error_of_somebody_else_keeps_the_state(llama4, data, tmp_path):
    """If a user's function raises an error (here during an evaluation), the state of the run is
    saved."""

    def score(model, tokenizer):
        if calls:
            raise RuntimeError("[malloc] Unable to allocate 5 bytes.")
        calls.append(1)
        return 1.0

    calls = []
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        train(config_of(llama4, data, tmp_path / "a", steps_per_eval=3), score=score)
    assert list(checkpoint.found(tmp_path / "a")) == [3]
    last = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["type"] == "failed"


def test_a_folder_that_another_run_took_and_left(llama4, data, tmp_path):
    """The other run's files are not overwritten."""
    other = config_of(llama4, data, tmp_path / "a", seed=5)

    def take():
        (tmp_path / "a").rename(tmp_path / "away")
        train(other)

    on_event, _ = at_step(2, take)
    config = config_of(llama4, data, tmp_path / "a", steps_per_eval=3, keep_best=True)
    with pytest.raises(RunError, match="was removed and has since been used by another run"):
        train(config, on_event)
    train(config_of(llama4, data, tmp_path / "b", seed=5))
    assert same(tmp_path / "a", tmp_path / "b") and not (tmp_path / "a" / "best").exists()


def test_inputs_that_cannot_be_read(llama4, data, tmp_path):
    with pytest.raises(InputError, match="is not a folder: pass the path of an adapter's folder"):
        train(config_of(llama4, data, tmp_path / "a", warm_start=tmp_path / "nope"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"cannot be written \(Is a directory\)"):
        train(config_of(llama4, data, tmp_path / "a", resume="auto"))
