"""Resumed runs are bit-identical to uninterrupted twins."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from lib.folders import write_first_layers, write_llama, write_pairs, write_rows, write_tiny
from lib.runs import (
    Crash,
    assert_twins,
    checkpoint_of,
    config_of,
    crash_behind,
    essence,
    files_of,
    lines_of,
    truncated,
    weights_of,
)
from mlx_segtrain import InputError, RunError, _core, adapters, train
from mlx_segtrain.adapters import ranks_in, step_of
from mlx_segtrain.commands.demo import snapshot
from mlx_segtrain.files import cache_dir
from mlx_segtrain.safetensors import read_header
from mlx_segtrain.training import checkpoint, step
from mlx_segtrain.training import log as training_log

pytestmark = pytest.mark.acceptance

DPO = {"method": "dpo", "learning_rate": 5e-3}
RUNS = {
    "sft": {},
    "batches": {"batch_size": 4},
    "accumulation": {"grad_accumulation_steps": 3},
    "dropout": {"lora_dropout": 0.2},
    "accumulation and dropout": {"grad_accumulation_steps": 2, "lora_dropout": 0.1},
    "by bits": {"model": "mixed"},
    "by bits, cosine": {"model": "mixed", "lr_schedule": "cosine", "warmup_iters": 2},
    "wsd": {"lr_schedule": "wsd"},
    "epochs": {"epochs": 0.25},
    "lion": {"optimizer": "lion", "learning_rate": 1e-3},
    "sgd": {"optimizer": "sgd"},
    "adafactor": {"optimizer": "adafactor"},
    "muon": {"optimizer": "muon", "lora_plus_ratio": 4.0},
    "lora plus": {"lora_plus_ratio": 8.0},
    "dora": {"use_dora": True},
    "rslora": {"rs_lora": True, "model": "mixed"},
    "head": {"target_modules": ["q_proj", "lm_head"], "model": "untied"},
    "gemma": {"model": "gemma4"},
    "patience": {
        **{"early_stopping_patience": 3, "steps_per_eval": 1, "learning_rate": 0.05, "iters": 12}
    },
    "packed": {"packing": True},
    "packed, epochs": {"packing": "auto", "batch_size": 2, "epochs": 1.5, "model": "gemma4"},
    "dpo": DPO,
    "dpo, batches": {**DPO, "batch_size": 2, "grad_accumulation_steps": 2},
    "dpo, dropout": {**DPO, "lora_dropout": 0.1},
    "orpo": {"method": "orpo", "learning_rate": 5e-3},
    "kto": {"method": "kto", "learning_rate": 5e-3},
    "kto, batches, dropout": {
        **{"method": "kto", "learning_rate": 5e-3, "lora_dropout": 0.1},
        **{"batch_size": 2, "grad_accumulation_steps": 2},
    },
    "simpo": {"method": "simpo", "learning_rate": 5e-3, "lr_schedule": "linear"},
}


@pytest.fixture(scope="session")
def models(tmp_path_factory, llama4, llama_mixed):
    folder = tmp_path_factory.mktemp("resumed")
    return {
        "plain": llama4,
        "mixed": llama_mixed,
        "untied": write_llama(folder / "untied", bits=4, tied=False),
        "gemma4": write_tiny(folder / "gemma4", "gemma4"),
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_its_twin(name, models, tmp_path, monkeypatch):
    """A run crashes between two checkpoints, is resumed, is interrupted, and is resumed again. Its
    results equal those of an uninterrupted run."""
    monkeypatch.setenv("MLX_SEGTRAIN_CACHE", str(tmp_path / "cache"))
    options = {"iters": 6, "steps_per_eval": 2, "steps_per_save": 2, "keep_best": True}
    options |= {"save_checkpoints": True, **RUNS[name]}
    if "epochs" in options:
        del options["iters"]
    model = models[options.pop("model", "plain")]
    if options.get("method", "sft") == "sft":
        data = write_rows(write_rows(tmp_path / "data"), 2, "valid.jsonl", first=24)
    else:
        data = write_pairs(tmp_path / "pairs", valid=2)

    def config(out, **more):
        return config_of(model, data, tmp_path / out, **options, **more)

    plain = train(config("plain"))
    with pytest.raises(Crash):
        train(config("a"), crash_behind(3))
    if "dpo" in name or "kto" in name:  # references must be recomputed
        for file in (tmp_path / "cache").rglob("*.npz"):
            file.unlink()
    assert next(iter(checkpoint.found(tmp_path / "a"))) == 2
    stopped = train(config("a", resume=True), interrupt_behind(5))
    assert stopped.interrupted and stopped.steps == 5 and stopped.resumed_from == 2
    result = train(config("a", resume="auto"))
    assert result.resumed_from == 5
    assert_twins(config("a"), (tmp_path / "a", result), (tmp_path / "plain", plain))


def interrupt_behind(last):
    def on_event(event):
        if event.get("kind") == "train" and event["step"] == last:
            raise KeyboardInterrupt

    return on_event


def test_smollm2_resumes_to_the_bytes_of_its_twin(tmp_path):
    model = write_first_layers(tmp_path / "few", snapshot.smollm2_snapshot(cache_dir()), 10)
    data = write_rows(tmp_path / "data", 8)
    # A single step after resuming suffices, because it depends on the whole state.
    options = {"iters": 2, "steps_per_save": 1, "grad_accumulation_steps": 2, "lora_dropout": 0.05}
    options |= {"learning_rate": 1e-4, "max_seq_length": 48}
    plain = train(config_of(model, data, tmp_path / "plain", **options))
    with pytest.raises(Crash):
        train(config_of(model, data, tmp_path / "a", **options), crash_behind(2))
    config = config_of(model, data, tmp_path / "a", resume=True, **options)
    result = train(config)
    assert result.resumed_from == 1
    assert_twins(config, (tmp_path / "a", result), (tmp_path / "plain", plain))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_keeps_the_last_finished_step(number, llama4, data, tmp_path):
    """A signal in the middle of a step ends the process with exit code 130. The saved weights equal
    those of an uninterrupted run with the same number of steps."""
    options = ["--model", llama4, "--data", data, "--adapter-path", tmp_path / "a"]
    options += ["--max-seq-length", "100", "--rank", "4", "--learning-rate", "1e-2"]
    options += ["--steps-per-eval", "1000", "--steps-per-save", "0", "--steps-per-report", "1"]
    command = [sys.executable, "-m", "mlx_segtrain.commands.main", "train", *options]
    long = [*command, "--iters", "1000000"]
    with subprocess.Popen(long, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("step 5/"):
                run.send_signal(number)
                break
        rest = run.stdout.read()
    assert run.returncode == 130 and "interrupted after" in rest
    done = int(checkpoint_of(tmp_path / "a").name.removeprefix("step-"))
    assert done >= 5 and checkpoint.torn(checkpoint_of(tmp_path / "a")) is None
    plain = {"iters": done, "steps_per_eval": 1000}
    train(config_of(llama4, data, tmp_path / "b", **plain))
    stopped, full = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(mx.array_equal(stopped[key], full[key]) for key in full)


def test_signals_mean_again_what_they_meant_before(llama4, data, tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    within = []
    config = config_of(llama4, data, tmp_path / "a", iters=1)
    train(config, lambda event: within.append(signal.getsignal(signal.SIGTERM)))
    assert {number: signal.getsignal(number) for number in before} == before
    assert before[signal.SIGTERM] in within and len(set(within)) == 2


def test_a_finished_run_has_nothing_left_to_do_and_can_be_lengthened(llama4, data, tmp_path):
    options = {"steps_per_eval": 100, "steps_per_save": 3}
    first = train(config_of(llama4, data, tmp_path / "a", iters=5, **options))
    before = files_of(tmp_path / "a")
    again = train(config_of(llama4, data, tmp_path / "a", iters=5, resume="auto", **options))
    assert essence(again) == essence(first) and again.resumed_from == 5
    assert {n: x for n, x in files_of(tmp_path / "a").items() if "state" not in n.parts} == {
        n: x for n, x in before.items() if "state" not in n.parts
    }
    told = []
    config = config_of(llama4, data, tmp_path / "a", iters=9, resume=True, **options)
    assert train(config, told.append).steps == 9
    warnings = [event["message"] for event in told if event["type"] == "warning"]
    assert len(warnings) == 1 and "iters = 9, but the run in" in warnings[0]
    train(config_of(llama4, data, tmp_path / "b", iters=9, **options))
    assert weights_of(tmp_path / "a").keys() == weights_of(tmp_path / "b").keys()
    for key, value in weights_of(tmp_path / "b").items():
        assert mx.array_equal(weights_of(tmp_path / "a")[key], value)


def test_the_newest_checkpoints_are_kept(llama4, data, tmp_path):
    options = {"iters": 11, "steps_per_save": 2, "keep_checkpoints": 3}
    train(config_of(llama4, data, tmp_path / "a", **options))
    assert list(checkpoint.found(tmp_path / "a")) == [11, 10, 8]


def flipped(folder):
    file = folder / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "the SHA-256 of state.safetensors has changed"


def without_manifest(folder):
    (folder / "manifest.json").unlink()
    return "manifest.json: No such file"


def without_tensors(folder):
    (folder / "state.safetensors").unlink()
    return "state.safetensors: No such file"


def bad_manifest(folder):
    (folder / "manifest.json").write_text('{"files": {"state.saf')
    return "manifest.json has changed since it was written"


TWO_A_SAVE = {"iters": 8, "steps_per_save": 2, "steps_per_eval": 4}


@pytest.fixture(scope="module")
def plain(llama4, data, tmp_path_factory):
    """Returns the folder and the result of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    return folder, train(config_of(llama4, data, folder, **TWO_A_SAVE))


@pytest.fixture(scope="module")
def crashed(llama4, data, tmp_path_factory):
    """Returns the folder of a run that has the same options as `plain` and crashed after step 7."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    with pytest.raises(Crash):
        train(config_of(llama4, data, folder, **TWO_A_SAVE), crash_behind(7))
    return folder


@pytest.mark.parametrize(
    "damage", [truncated, flipped, without_manifest, without_tensors, bad_manifest]
)
def test_a_torn_checkpoint_is_left_out_with_a_warning(
    damage, plain, crashed, llama4, data, tmp_path
):
    shutil.copytree(crashed, tmp_path / "a")
    reason = damage(tmp_path / "a/state/step-00006")
    told = []
    config = config_of(llama4, data, tmp_path / "a", resume=True, **TWO_A_SAVE)
    result = train(config, told.append)
    assert result.resumed_from == 4
    (warning,) = [event["message"] for event in told if event["type"] == "warning"]
    assert "state/step-00006 is damaged (" in warning and reason in warning
    assert_twins(config, (tmp_path / "a", result), plain)


def test_every_flipped_bit_of_a_checkpoint_is_seen_or_means_nothing(llama4, data, tmp_path):
    train(config_of(llama4, data, tmp_path / "a", iters=1))
    folder = checkpoint_of(tmp_path / "a")
    rng = np.random.default_rng(0)
    whole = checkpoint._read(folder)
    for name in ("state.safetensors", "manifest.json"):
        content = (folder / name).read_bytes()
        for bit in rng.choice(8 * len(content), 150, replace=False):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(changed)
            # Damage that is not noticed can only be a change of whitespace in the manifest.
            if checkpoint.torn(folder) is None:
                assert name == "manifest.json"
                assert mx.array_equal(
                    checkpoint._read(folder).tensors["factors"], whole.tensors["factors"]
                )
        (folder / name).write_bytes(content)


# ---- refused runs


def begun(llama4, data, path, **changes):
    train(config_of(llama4, data, path, iters=2, **changes))


@pytest.fixture(scope="module")
def begun_once(llama4, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun") / "a"
    begun(llama4, data, folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rank": 8}, "rank = 8, but the run in .* began with 4: use rank 4, or start"),
        ({"seed": 1}, "seed = 1, but the run in .* began with 0"),
        ({"batch_size": 2}, "batch_size = 2"),
        ({"optimizer": "sgd"}, "optimizer = sgd"),
        ({"max_seq_length": 64}, "max_seq_length = 64"),
        ({"lora_dropout": 0.1}, "lora_dropout = 0.1"),
    ],
)
def test_another_run_is_not_gone_on_with(changes, error, begun_once, llama4, data, tmp_path):
    shutil.copytree(begun_once, tmp_path / "a")
    before = files_of(tmp_path / "a")
    with pytest.raises(InputError, match=error):
        train(config_of(llama4, data, tmp_path / "a", iters=2, resume=True, **changes))
    assert files_of(tmp_path / "a") == before


def test_a_steering_change_is_told(llama4, data, tmp_path):
    begun(llama4, data, tmp_path / "a")
    told = []
    changes = {"iters": 3, "learning_rate": 1e-3, "resume": True}
    train(config_of(llama4, data, tmp_path / "a", **changes), told.append)
    (line,) = [e["learning_rate"] for e in told if e.get("kind") == "train"]
    assert line == 1e-3
    warnings = [event["message"] for event in told if event["type"] == "warning"]
    assert any("learning_rate = 0.001, but the run in" in text for text in warnings)


@pytest.mark.parametrize("what", ["data", "model"])
def test_changed_files_are_not_gone_on_with(what, data, tmp_path):
    model = write_llama(tmp_path / "model", bits=4)
    own = write_rows(tmp_path / "data", 8)
    begun(model, own, tmp_path / "a")
    if what == "data":
        write_rows(own, 9)
        name = "data/train.jsonl"
    else:
        write_llama(model, bits=4, seed=1)
        name = "model/model.safetensors"
    with pytest.raises(InputError, match=f"{name} has changed since the run in"):
        train(config_of(model, own, tmp_path / "a", iters=4, resume=True))


def test_a_folder_that_was_moved_is_the_same_run(llama4, tmp_path):
    own = write_rows(tmp_path / "data", 8)
    begun(llama4, own, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    own.rename(tmp_path / "moved")
    config = config_of(llama4, tmp_path / "moved", tmp_path / "b", iters=4, resume=True)
    assert train(config).resumed_from == 2


def test_nothing_to_resume(llama4, data, tmp_path):
    with pytest.raises(InputError, match="contains no checkpoint to resume"):
        train(config_of(llama4, data, tmp_path / "a", resume=True))
    assert train(config_of(llama4, data, tmp_path / "a", resume="auto")).resumed_from is None
    with pytest.raises(InputError, match="use resume=True to continue it, or overwrite="):
        train(config_of(llama4, data, tmp_path / "a"))
    for folder in checkpoint.found(tmp_path / "a").values():
        truncated(folder)
    before = files_of(tmp_path / "a")
    with pytest.raises(InputError, match="contains an adapter, but no checkpoint to resume"):
        train(config_of(llama4, data, tmp_path / "a", resume="auto"))
    assert files_of(tmp_path / "a") == before
    with pytest.raises(ValueError, match="resume and overwrite contradict"):
        config_of(llama4, data, tmp_path / "a", resume="auto", overwrite=True)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(llama4, data, tmp_path):
    with pytest.raises(Crash):
        train(config_of(llama4, data, tmp_path / "a"), crash_behind(2))
    assert train(config_of(llama4, data, tmp_path / "a", resume="auto")).resumed_from is None
    assert [x["step"] for x in lines_of(tmp_path / "a") if x.get("kind") == "train"] == [1, 2, 3, 4]


@pytest.mark.parametrize("inside", ["", "best", "checkpoints/step-00002"])
def test_a_run_does_not_replace_what_it_starts_from(inside, llama4, data, tmp_path):
    own = tmp_path / "a" / inside
    begun(llama4, data, own)
    changes = {"warm_start": own, "overwrite": True}
    with pytest.raises(InputError, match="is inside adapter_path"):
        train(config_of(llama4, data, tmp_path / "a", **changes))
    assert (own / "adapters.safetensors").exists()


def test_a_torn_last_line_of_the_log_goes(llama4, data, tmp_path):
    options = {"iters": 8, "steps_per_save": 2}
    train(config_of(llama4, data, tmp_path / "plain", **options))
    with pytest.raises(Crash):
        train(config_of(llama4, data, tmp_path / "a", **options), crash_behind(5))
    file = tmp_path / "a" / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-25])
    train(config_of(llama4, data, tmp_path / "a", resume=True, **options))
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "plain")
    metas = [json.loads(x) for x in file.read_text().splitlines() if '"meta"' in x]
    assert [meta["step"] for meta in metas] == [0, 4] and len({meta["id"] for meta in metas}) == 1
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert [x["step"] for x in record["resumed"]] == [4] and record["id"] == metas[0]["id"]


def test_two_resumers_do_not_meet(llama4, data, tmp_path):
    begun(llama4, data, tmp_path / "a")
    with open(tmp_path / "a" / training_log.NAME, "rb") as file:
        training_log._claim(file, tmp_path / "a")
        with pytest.raises(InputError, match=f"in use by another run .process {os.getpid()}"):
            train(config_of(llama4, data, tmp_path / "a", iters=4, resume="auto"))


def test_a_checkpoint_of_another_structure_is_refused(llama4, data, tmp_path, monkeypatch):
    begun(llama4, data, tmp_path / "a")
    monkeypatch.setattr(step.Optimizer, "start", lambda self, vector: step.Iterate(vector[1:], []))
    with pytest.raises(InputError, match="this run: the tensor factors is missing"):
        train(config_of(llama4, data, tmp_path / "a", iters=4, resume=True))


def test_fewer_steps_than_there_were(llama4, data, tmp_path):
    train(config_of(llama4, data, tmp_path / "a", iters=6))
    before = files_of(tmp_path / "a")
    with pytest.raises(
        InputError, match=r"iters = 4, but the run in .* has already finished step 6"
    ):
        train(config_of(llama4, data, tmp_path / "a", iters=4, resume=True))
    assert files_of(tmp_path / "a") == before


def test_another_future_has_its_own_best(llama4, data, tmp_path):
    """Results of steps after the checkpoint are discarded, because the resumed run may reach these
    steps in a different state."""
    options = {"iters": 8, "steps_per_eval": 2, "keep_best": True, "save_checkpoints": True}
    train(config_of(llama4, data, tmp_path / "a", **options))
    shutil.rmtree(checkpoint_of(tmp_path / "a"))
    assert list(checkpoint.found(tmp_path / "a")) == [6]
    changes = {**options, "iters": 9, "learning_rate": 1e-9, "resume": True}
    assert step_of(tmp_path / "a" / "best") == 8
    result = train(config_of(llama4, data, tmp_path / "a", **changes))
    names = sorted(path.name[:10] for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == ["step-00002", "step-00004", "step-00006", "step-00008", "step-00009"]
    assert step_of(tmp_path / "a" / "best") == result.best_step


def test_a_run_over_another_keeps_its_adapter_until_it_has_one(llama4, data, tmp_path):
    train(config_of(llama4, data, tmp_path / "a", iters=6, keep_best=True))
    before = (tmp_path / "a" / "adapters.safetensors").read_bytes()
    changes = {"overwrite": True, "rank": 8, "steps_per_save": 3}
    with pytest.raises(Crash):
        train(config_of(llama4, data, tmp_path / "a", iters=6, **changes), crash_behind(2))
    assert (tmp_path / "a" / "adapters.safetensors").read_bytes() == before
    assert not list(checkpoint.found(tmp_path / "a")) and not (tmp_path / "a" / "best").exists()
    with pytest.raises(Crash):
        train(config_of(llama4, data, tmp_path / "a", iters=6, **changes), crash_behind(4))
    assert list(checkpoint.found(tmp_path / "a")) == [3]
    assert set(read_header(tmp_path / "a" / "adapters.safetensors").values()) != before
    mlx_lm.load(str(llama4), adapter_path=str(tmp_path / "a"))


def test_an_adapter_stays_until_the_next_is_on_the_disk(llama4, data, tmp_path, monkeypatch):
    """Simulates a full disk when a run with another configuration overwrites the adapter."""
    train(config_of(llama4, data, tmp_path / "a"))
    before = (tmp_path / "a" / "adapters.safetensors").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters.writing, "write_tensors", full)
    config = config_of(llama4, data, tmp_path / "a", overwrite=True, rank=8)
    with pytest.raises(RunError, match="No space left on device"):
        train(config)
    assert (tmp_path / "a" / "adapters.safetensors").read_bytes() == before
    assert ranks_in(tmp_path / "a").popitem()[1] == 4


def test_a_checkpoint_that_was_being_replaced_comes_back(llama4, data, tmp_path):
    train(config_of(llama4, data, tmp_path / "a", keep_checkpoints=1))
    folder = checkpoint_of(tmp_path / "a")
    folder.rename(folder.with_name(".step-00004.123.tmp.old"))
    assert train(config_of(llama4, data, tmp_path / "a", resume=True)).resumed_from == 4
    assert [path.name for path in (tmp_path / "a" / "state").iterdir()] == ["step-00004"]


def test_another_run_came_and_went_while_this_one_loaded(llama4, data, tmp_path):
    changes = {"overwrite": True}
    other = config_of(llama4, data, tmp_path / "a", **changes)

    def on_event(event):
        if event.get("stage") == "setup":
            train(other)

    with pytest.raises(InputError, match="was used by another run while this run was loading"):
        train(config_of(llama4, data, tmp_path / "a", **changes), on_event)
    assert list(checkpoint.found(tmp_path / "a")) == [4]


@pytest.mark.parametrize("ends", ["interrupted", "finished"])
def test_nobody_listens_any_more(ends, llama4, data, tmp_path):
    """If the process that reads the run's output exits, the run still ends normally and saves its
    state."""
    options = ["--model", llama4, "--data", data, "--adapter-path", tmp_path / "a"]
    options += ["--max-seq-length", "100", "--rank", "4", "--steps-per-report", "1"]
    iters = 1_000_000 if ends == "interrupted" else 30
    options += ["--steps-per-save", "0", "--steps-per-eval", "1000000", "--iters", str(iters)]
    command = [sys.executable, "-m", "mlx_segtrain.commands.main", "train", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("step 10/"):
                break
        run.stdout.close()
        if ends == "interrupted":
            time.sleep(0.3)
            run.send_signal(signal.SIGHUP)
            # Closing a terminal sends both signals, which count as one.
            run.send_signal(signal.SIGTERM)
        run.wait(60)
    done = next(iter(checkpoint.found(tmp_path / "a")))
    assert done == 30 if ends == "finished" else done >= 10
    assert checkpoint.torn(checkpoint_of(tmp_path / "a")) is None
    assert (tmp_path / "a" / "adapters.safetensors").exists()


def test_a_second_signal_later_ends_the_process(llama4, data, tmp_path):
    """Signals are deferred while a run writes (simulated by `sleep`). A second signal kills the
    process only if it arrives at least two seconds after the first."""
    code = (
        "import time, sys\n"
        "from mlx_segtrain.training.interrupts import Interrupts\n"
        "with Interrupts():\n"
        "    print('in', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        run.stdout.readline()
        run.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        run.send_signal(signal.SIGTERM)
        time.sleep(2.2)
        assert run.poll() is None
        run.send_signal(signal.SIGTERM)
        assert run.wait(10) == -signal.SIGTERM


def test_the_same_bytes_are_asked_for_by_default_and_only_within_a_run(llama4, data, tmp_path):
    seen = []

    def on_event(event):
        before = _core.set_repeatable(True)
        _core.set_repeatable(before)
        seen.append(before)

    train(config_of(llama4, data, tmp_path / "a", iters=1), on_event)
    assert set(seen[1:]) == {True}
    seen.clear()
    train(config_of(llama4, data, tmp_path / "b", iters=1, deterministic=False), on_event)
    assert set(seen) == {False}
