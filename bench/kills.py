"""Kills runs of grpo at random moments, resumes them, and checks that they end bit-identically.

    python bench/kills.py [--kills 50] [--seed 0]

The model is tiny, random and on the CPU, its reward is a check, and each step writes a checkpoint.
Each run is a process that gets SIGKILL after a random time, and is started again with --resume auto
until it has ended. Then its adapter and its completions are compared with those of a run that was
never killed, and the next run begins. Prints the part of a step in which each kill came, and the
number of kills.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

# These imports are slow and compute nothing, so they happen once, before the children are forked.
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

from lib.folders import write_llama  # pyright: ignore[reportMissingImports]
from mlx_segtrain import TrainConfig, training
from mlx_segtrain.training import checkpoint, cycle, keeping

FILES = ("adapters.safetensors", "completions.jsonl")
ITERS = 4


def train(model, out, state):
    """Trains a run, or the rest of it; `state` receives its position."""
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


def wrap(state):
    """Makes a run write what it is doing to a file: it cannot do so when it is killed."""

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


def started(model, out, state):
    """Starts the process of a run, which has the libraries but has not computed anything."""
    state.write_text("setup")
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            train(model, out, state)
        code = 0
    finally:
        os._exit(code)


def waited(pid, seconds=None):
    """Returns the exit status of a process, or None if it was killed after `seconds`."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if end is not None and time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            return None if os.WIFSIGNALED(status) else status
        time.sleep(0.002)


def content(out):
    return {name: (out / name).read_bytes() for name in FILES}


def main():
    parser = argparse.ArgumentParser(description="Kills runs of grpo and resumes them.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, places = random.Random(args.seed), Counter()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        os.environ["MLX_SEGTRAIN_CACHE"] = str(place / "cache")
        if not (pid := os.fork()):  # the parent must compute nothing, or it could not fork
            write_llama(place / "model", bits=4)
            os._exit(0)
        assert waited(pid) == 0
        model, state, plain = place / "model", place / "state", place / "plain"
        begun = time.monotonic()
        assert waited(started(model, plain, state)) == 0, "the run itself fails"
        whole, runs, kills = time.monotonic() - begun, 0, 0
        wanted = content(plain)
        while kills < args.kills:
            out = place / f"run{runs}"
            while True:
                status = waited(started(model, out, state), rng.uniform(0, whole))
                if status is not None:
                    assert status == 0, f"run {runs} failed after {kills} kills"
                    break
                kills += 1
                places[state.read_text() or "between"] += 1
                if kills == args.kills:
                    assert waited(started(model, out, state)) == 0, "the last run failed"
                    break
            assert content(out) == wanted, f"run {runs} ended with different bytes"
            shutil.rmtree(out)
            runs += 1
            print(
                f"{kills} kills, {runs} runs ended with the same bytes; {dict(places)}", flush=True
            )


if __name__ == "__main__":
    main()
