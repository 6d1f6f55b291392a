"""Kills runs at random moments, resumes them, and checks that their results are bit-identical.

    python bench/kills.py [--kills 50] [--seed 0] [--shape SHAPE [--length 8192]]

By default, the runs use grpo with a tiny random model and a reward check on the CPU, and write a
checkpoint at each step. With --shape, the objective is sft, and the runs use a GPU if there is one.
They take 30 steps on rows of --length tokens, with a model of this shape (see bench/step.py), and
write a checkpoint every five steps. They are killed only after the first step. Each run is a
process that is killed with SIGKILL after a random time and restarted with --resume auto until it
completes. Then its adapter and its completions are compared with those of a run that was never
killed, and the next run begins. Prints the number of kills during each part of a step.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

# These imports are slow, so they run once, before the children are forked. They must not make MLX
# compute anything, because MLX would then not work in the forked children.
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

from lib.folders import write_llama  # pyright: ignore[reportMissingImports]
from mlx_segtrain import TrainConfig, training
from mlx_segtrain.training import checkpoint, cycle, keeping
from ranks import write_inputs

FILES = ("adapters.safetensors", "completions.jsonl")
ITERS = 4
LONG_ITERS = 30


def train(model, out, state):
    """Starts a run, or resumes it if it was killed. Writes the current part of the step to the file
    `state`."""
    import mlx.core as mx

    mx.set_default_device(mx.Device(mx.cpu))
    wrap(state)
    rows = [{"prompt": f"Say {i}." + " x" * i} for i in range(9)]
    config = TrainConfig(
        model_dir=model,
        adapter_path=out,
        method="grpo",
        rewards=["regex:[aeiou]"],
        grpo_beta=0.05,
        batch_size=3,
        group_size=4,
        max_completion_tokens=5,
        max_seq_length=100,
        learning_rate=2e-2,
        lr_schedule="constant",
        rank=4,
        iters=ITERS,
        steps_per_save=1,
        steps_per_report=1,
        resume="auto",
    )
    training.train(config, train_data=rows)


def train_long(place, shape, length, out, state):
    """Starts a run on long rows, or resumes it if it was killed."""
    model, data = write_inputs(place, shape, length)
    wrap(state)
    config = TrainConfig(
        model_dir=model,
        data_dir=data,
        adapter_path=out,
        max_seq_length=length,
        rank=16,
        iters=LONG_ITERS,
        steps_per_save=5,
        steps_per_report=1,
        val_split=0,
        resume="auto",
    )
    training.train(config)


def wrap(state):
    """Makes a run write the current part of the step to a file, because a killed run cannot
    report it."""

    def told(module, name, word):
        plain = getattr(module, name)

        def called(*what, **how):
            state.write_text(word)
            try:
                return plain(*what, **how)
            finally:
                state.write_text("between")

        setattr(module, name, called)

    told(cycle, "complete", "generating")
    told(cycle.Cycle, "_with_references", "references")
    told(cycle.Stepper, "__call__", "updating")
    told(keeping.Keeper, "checkpoint", "checkpoint")
    told(keeping.Keeper, "last", "last")
    told(checkpoint, "newest", "resuming")


def started(out, state, work):
    """Forks a process for a run and returns the process id. The parent process has imported the
    libraries but has computed nothing, so a child can use MLX."""
    state.write_text("setup")
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            work(out, state)
        code = 0
    finally:
        os._exit(code)


def waited(pid, seconds=None, first=None):
    """Waits for a process and returns its exit status, or kills it after `seconds` and returns
    None. If `first` is a file, the timeout starts when a line is added to it."""
    end = None if seconds is None or first else time.monotonic() + seconds
    before = size_of(first)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if end is None and seconds is not None and size_of(first) not in (0, before):
            end = time.monotonic() + seconds
        if end is not None and time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            return None if os.WIFSIGNALED(status) else status
        time.sleep(0.002)


def content(out):
    return {name: (out / name).read_bytes() for name in FILES if (out / name).exists()}


def size_of(file):
    return file.stat().st_size if file and file.exists() else 0


def execute(*what):
    """Replaces this forked process with one that can use a GPU."""
    os.execv(sys.executable, [sys.executable, __file__, "--work", *map(str, what)])


def main():
    parser = argparse.ArgumentParser(description="Kills runs at random moments and resumes them.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", help="a shape in bench/step.py, for runs of sft with long rows")
    parser.add_argument("--length", type=int, default=8192, help="tokens per row, with --shape")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        place, shape, length, out, state = args.work
        train_long(Path(place), shape, int(length), Path(out), Path(state))
        return
    rng, places = random.Random(args.seed), Counter()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        os.environ["MLX_SEGTRAIN_CACHE"] = str(place / "cache")
        state, plain = place / "state", place / "plain"
        if args.shape:
            work = partial(execute, place, args.shape, args.length)
        else:
            if not (pid := os.fork()):  # after computing, the parent could not fork
                write_llama(place / "model", bits=4)
                os._exit(0)
            assert waited(pid) == 0
            work = partial(train, place / "model")
        begun = time.monotonic()
        assert waited(started(plain, state, work)) == 0, "the run without kills failed"
        whole, runs, kills = time.monotonic() - begun, 0, 0
        if args.shape:
            lines = map(json.loads, (plain / "metrics.jsonl").read_text().splitlines())
            whole = sum(own["step_s"] for own in lines if own.get("kind") == "train")
        wanted = content(plain)
        while kills < args.kills:
            out = place / f"run{runs}"
            first = out / "metrics.jsonl" if args.shape else None
            while True:
                status = waited(started(out, state, work), rng.uniform(0, whole), first)
                if status is not None:
                    assert status == 0, f"run {runs} failed after {kills} kills"
                    break
                kills += 1
                places[state.read_text() or "between"] += 1
                if kills == args.kills:
                    assert waited(started(out, state, work)) == 0, "the last run failed"
                    break
            assert content(out) == wanted, f"run {runs} ended with different results"
            shutil.rmtree(out)
            runs += 1
            print(f"{kills} kills, {runs} runs with identical results; {dict(places)}", flush=True)


if __name__ == "__main__":
    main()
