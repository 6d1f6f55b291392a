"""Tiny runs: their configuration, and functions that interrupt them or compare them."""

import gc
import json
from dataclasses import replace

import mlx.core as mx
import mlx_lm

import mlx_segtrain
from lib.oracle import assert_close
from mlx_segtrain import TrainConfig
from mlx_segtrain.training import checkpoint, references, step


def config_of(model, data, out, **changes):
    base = {"learning_rate": 1e-2, "steps_per_report": 1, "max_seq_length": 100}
    base |= {} if "epochs" in changes else {"iters": 4}
    base |= {} if "warm_start" in changes else {"rank": 4}
    return TrainConfig(model_dir=model, data_dir=data, adapter_path=out, **{**base, **changes})


def existing_bytes():
    """Returns the size of the arrays that earlier tests in this process still reference.

    Reference cycles are freed first. Otherwise they would be counted here but freed during a step.
    """
    gc.collect()
    return mx.get_active_memory()


def counted_references(monkeypatch):
    """Returns a list that grows by one element for each row whose reference log-probabilities are
    computed."""
    counted, original = [], references.one_row

    def one_row(*args):
        counted.append(1)
        return original(*args)

    monkeypatch.setattr(references, "one_row", one_row)
    return counted


def weights_of(path):
    return mx.load(str(path / "adapters.safetensors"))


def assert_same_in_mlx_lm(model_dir, adapter, apart):
    """Asserts that our model and mlx-lm compute the same logits with the adapter, and that some
    differ from the base model's logits by more than `apart`. Returns tokens and logits."""
    tokens = mx.array([[1, 5, 9, 200, 17, 33]])
    stock, _ = mlx_lm.load(str(model_dir), adapter_path=str(adapter))
    own, _ = mlx_segtrain.load(model_dir, adapter)
    base, _ = mlx_segtrain.load(model_dir)
    assert_close("logits", own(tokens), stock(tokens), 1e-5)
    assert mx.abs(base(tokens) - stock(tokens)).max() > apart
    return tokens, stock(tokens)


def losses_of(monkeypatch, losses):
    """Makes evaluations return these losses in turn, and then the last one repeatedly."""
    left = list(losses)
    monkeypatch.setattr(step, "measure", lambda *_: (left.pop(0) if len(left) > 1 else left[0], {}))


TIMES = (
    *("ts", "pid", "id", "message", "at", "ranks", "skew_s", "slowest"),
    *("tokens_per_sec", "supervised_tokens_per_sec", "step_s", "left_s", "peak_gb", "active_gb"),
)


class Crash(BaseException):
    """Ends a run abruptly, so that it saves nothing."""


def crash_behind(last, told=None):
    """Returns an on_event function that ends the run when step `last` reports its loss."""

    def on_event(event):
        if told is not None:
            told.append(event)
        if event.get("kind") == "train" and event["step"] == last:
            raise Crash

    return on_event


def lines_of(run):
    """Returns the lines of metrics.jsonl without values that depend on the clock or on resuming."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: x for key, x in line.items() if key not in TIMES and "path" not in key}
        for line in lines
        if line["type"] in ("metric", "sample")
    ]


def essence(result):
    """Returns a result without its times, memory and paths."""
    return replace(
        result, adapter_path=None, wall_s=0, tokens_per_sec=0, supervised_tokens_per_sec=0,
        peak_gb=0, process_gb=0, resumed_from=None,
    )  # fmt: skip


def files_of(run):
    """Returns the contents of a run's safetensors files by path."""
    return {path.relative_to(run): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}


def assert_twins(config, resumed, plain):
    """Asserts that two runs wrote identical files and returned the same result."""
    (a, one), (b, two) = resumed, plain
    assert essence(one) == essence(two)
    assert lines_of(a) == lines_of(b)
    adapters = {name: x for name, x in files_of(a).items() if "state" not in name.parts}
    assert adapters == {name: x for name, x in files_of(b).items() if "state" not in name.parts}
    x, y = (checkpoint._read(checkpoint_of(run)) for run in (a, b))
    assert x.step == y.step and x.tensors.keys() == y.tensors.keys()
    assert all(mx.array_equal(x.tensors[name], own) for name, own in y.tensors.items())
    assert timeless(x.progress) == timeless(y.progress)


def timeless(progress):
    """Returns the progress of a run without values that depend on the clock."""
    last = progress.last and replace(progress.last, seconds=0)
    recent = [replace(outcome, seconds=0) for outcome in progress.recent]
    return replace(progress, last=last, recent=recent, train_s=0, wall_s=0, peak=0)


def checkpoint_of(run):
    return next(iter(checkpoint.found(run).values()))


def truncated(folder):
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "bytes instead of"


METHODS = ["sft", "dpo", "orpo", "simpo", "kto"]


def setup_of(method, model, data, pairs, out, **changes):
    changes = {"method": method, "learning_rate": 5e-3, "lr_schedule": "constant", **changes}
    return config_of(model, data if method == "sft" else pairs, out, **changes)
