"""Tests trackers, run.json and `verify`."""

import hashlib
import json
import subprocess
import sys
import time

import pytest

from lib.folders import write_llama, write_rows
from lib.runs import Crash, config_of, crash_behind, truncated
from mlx_segtrain import InputError, train
from mlx_segtrain.training import checkpoint, trackers, verify

pytestmark = pytest.mark.acceptance


def test_tensorboard_reads_the_metrics(llama4, data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = []
    config = config_of(llama4, data, tmp_path / "a", report_to=["tensorboard"], steps_per_eval=2)
    train(config, seen.append)
    found = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    found.Reload()
    for kind in ("train", "val"):
        events = [event for event in seen if event.get("kind") == kind]
        series = found.Tensors(f"{kind}/loss")
        assert [point.step for point in series] == [event["step"] for event in events]
        values = [point.tensor_proto.float_val[0] for point in series]
        assert values == pytest.approx([event["loss"] for event in events])
    assert {"train/tokens_per_sec", "train/learning_rate", "val/perplexity"} <= set(
        found.Tags()["tensors"]
    )


def test_wandb_offline(llama4, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    told = []
    config = config_of(llama4, data, tmp_path / "a", report_to=["wandb"], iters=3)
    train(config, told.append)
    assert not [event for event in told if event["type"] == "warning"]
    (file,) = (tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb")
    run = json.loads((tmp_path / "a" / "run.json").read_text())["id"]
    end = time.monotonic() + 30  # wandb's own process writes the file, and may be slower than us
    while any(text not in file.read_bytes() for text in (run.encode(), b"train/loss", b"val/per")):
        assert time.monotonic() < end, file.read_bytes()
        time.sleep(0.1)


@pytest.mark.parametrize("when", ["made", "told", "closed"])
def test_a_tracker_that_fails_stops_nothing(when, llama4, data, tmp_path, monkeypatch):
    calls = []

    def fail(*_):
        calls.append(1)
        raise ConnectionError("no route\n to host")

    def broken(config, run_id):
        if when == "made":
            fail()
        return (fail if when == "told" else lambda event: None), fail

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", broken)
    told = []
    result = train(config_of(llama4, data, tmp_path / "a", report_to=["tensorboard"]), told.append)
    assert result.steps == 4 and len(calls) == 1
    (text,) = [event["message"] for event in told if event["type"] == "warning"]
    assert text == (
        "tensorboard failed and will receive no more metrics (ConnectionError: no route to host)"
    )


def test_a_tracker_that_is_not_installed(llama4, data, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"report_to wandb needs a package .* pip install wandb"):
        train(config_of(llama4, data, tmp_path / "a", report_to=["wandb"]))
    assert not (tmp_path / "a").exists()


def test_scalars():
    event = {"type": "metric", "kind": "val", "step": 3, "loss": 2, "progress": 0.1, "x": None}
    assert trackers.scalars(event) == {"val/loss": 2.0}
    event = {"type": "metric", "kind": "score", "step": 3, "scores": {"exact": 0.5}}
    assert trackers.scalars(event) == {"score/exact": 0.5}
    assert trackers.scalars({"type": "metric", "kind": "score", "step": 3, "error": "no"}) == {}
    assert trackers.scalars({"type": "stage"}) == {}


# ---- the record of a run, and `verify`


@pytest.fixture
def run(tmp_path):
    model = write_llama(tmp_path / "model", bits=4)
    data = write_rows(tmp_path / "data", 8)
    write_rows(data, 3, "valid.jsonl")
    train(config_of(model, data, tmp_path / "run", iters=3, steps_per_save=1))
    return tmp_path / "run"


def faults(run):
    return {part: found for part, found in verify(run).parts.items() if found}


def test_the_record_tells_what_a_run_was_made_of(run):
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["iters"] == 3 and record["versions"]["mlx"] == "0.32.4"
    assert {"type", "name", "platform"} == set(record["device"])
    names = set(record["inputs"])
    assert {"model/model.safetensors", "model/config.json", "model/tokenizer.json"} <= names
    assert {"data/train.jsonl", "data/valid.jsonl"} <= names
    content = (run.parent / "data" / "train.jsonl").read_bytes()
    assert record["inputs"]["data/train.jsonl"] == hashlib.sha256(content).hexdigest()
    assert record["made"]["step"] == 3


def test_nothing_has_changed(run):
    found = verify(run)
    assert found.ok and found.step == 3 and found.iters == 3
    parts = {"model", "data", "versions", "device", "settings", "adapter", "checkpoints"}
    assert set(found.parts) == parts


def change_data(run):
    with open(run.parent / "data" / "valid.jsonl", "a") as file:
        file.write("\n")
    return "data", "data/valid.jsonl has changed"


def lose_data(run):
    (run.parent / "data" / "train.jsonl").unlink()
    return "data", "data/train.jsonl has been removed"


def change_model(run):
    write_llama(run.parent / "model", bits=4, seed=1)
    return "model", "model/model.safetensors has changed"


def add_to_model(run):
    (run.parent / "model" / "model-2.safetensors").write_bytes(b"x")
    return "model", "model/model-2.safetensors has been added"


def change_adapter(run):
    file = run / "adapters.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return "adapter", "adapters.safetensors has changed"


def tear_checkpoint(run):
    truncated(run / "state" / "step-00002")
    return "checkpoints", "step-00002 is damaged: state.safetensors has"


def other_version(run):
    record = json.loads((run / "run.json").read_text())
    record["versions"]["mlx"] = "0.1"
    (run / "run.json").write_text(json.dumps(record))
    return "versions", "mlx has changed from 0.1 to 0.32.4"


def other_setting(run):
    record = json.loads((run / "run.json").read_text())
    record["settings"]["MLX_ENABLE_TF32"] = "0"
    (run / "run.json").write_text(json.dumps(record))
    return "settings", "MLX_ENABLE_TF32 has been removed"


CHANGES = [change_data, lose_data, change_model, add_to_model, change_adapter, tear_checkpoint]
CHANGES += [other_version, other_setting]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_named(change, run):
    part, sentence = change(run)
    ((found_part, (found,)),) = faults(run).items()
    assert found_part == part and found.startswith(sentence)


def test_a_run_that_has_not_ended(llama4, data, tmp_path):
    with pytest.raises(Crash):
        train(config_of(llama4, data, tmp_path / "a", steps_per_save=1), crash_behind(3))
    found = verify(tmp_path / "a")
    assert found.ok and found.step is None and "adapter" not in found.parts
    assert list(checkpoint.found(tmp_path / "a")) == [2, 1]


def test_the_command(run, tmp_path):
    command = [sys.executable, "-m", "mlx_segtrain.commands.main", "verify"]
    done = subprocess.run([*command, run], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr
    assert f"{run}: 3 of 3 steps" in done.stdout and "model         the same\n" in done.stdout
    change_data(run)
    done = subprocess.run([*command, run], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "data          data/valid.jsonl has changed\n" in done.stdout
    done = subprocess.run([*command, "--json", run], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and json.loads(done.stdout)["ok"] is False
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "run.json cannot be read" in done.stderr
    (run / "run.json").write_text("[]")
    done = subprocess.run([*command, run], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is not the record of a run" in done.stderr
