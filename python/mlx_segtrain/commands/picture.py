"""Plots the predicted and the measured memory during one step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import ROWS, TrainConfig
from ..errors import InputError
from ..hub import title
from ..planning.run import RunPlan
from ..training.policy import run_policy


def draw(file: Path, run: RunPlan, config: TrainConfig) -> None:
    """Loads the model, runs two steps on random tokens, and writes the plot to `file`.

    Raises InputError if memory cannot be predicted for the model's family.
    """
    if ROWS[config.method] != "single":
        raise InputError(f"--plot supports only method sft, not {config.method}: leave --plot out.")
    if run.planned is None:
        raise InputError(f"--plot needs a model whose memory can be predicted, but {run}.")
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:] not in kinds or not file.parent.is_dir():
        raise InputError(
            f"--plot {file}: the folder must exist and the name must end in .png, .svg or .pdf."
        )
    predicted = np.array(run.planned.moves) / 1e9
    measured = np.array(measure(run, config)) / 1e9
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    moves = np.arange(len(predicted))
    axes.bar(moves, measured, width=1.0, color="#9ecae1", label="measured")
    axes.step(moves, predicted, where="mid", color="#d62728", label="predicted")
    axes.axhline(run.planned.peak / 1e9, color="#d62728", linestyle=":", label="planned peak")
    head = next(i for i, line in enumerate(run.planned.lines) if line.startswith("head"))
    axes.axvline(head, color="gray", linewidth=0.8)
    axes.annotate("loss", (head, 0), textcoords="offset points", xytext=(3, 4), color="gray")
    axes.set_xlabel("moves of the plan, in order")
    axes.set_ylabel("active memory, GB")
    axes.set_title(
        f"{title(config.model_dir)}, {run.batch.rows} × {run.batch.length} tokens\n"
        f"{run.planned.text}",
        fontsize=9,
    )
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=120)


def measure(run: RunPlan, config: TrainConfig) -> Sequence[int]:
    """Runs two steps on random tokens. Returns the peak memory, in bytes, during each move of the
    second step's schedule."""
    from mlx_segtrain.data.encoding import Row

    from ..data import Batch, Dataset
    from ..training.setup import Inputs, load_setup
    from ..training.step import Stepper

    rng = np.random.default_rng(0)
    batch, length = run.batch, run.batch.length
    vocabulary = run.shape.vocabulary
    tokens = rng.integers(0, vocabulary, (batch.rows, length + 1)).astype(np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, length + 1 - batch.loss // batch.rows :] = 1
    rows = [Row(t, w, "random") for t, w in zip(tokens, weights, strict=True)]
    data = Dataset.of(rows)
    peaks: list[int] = []

    def watch() -> None:
        peaks.append(mx.get_peak_memory())
        mx.reset_peak_memory()

    with run_policy(config):
        setup, vector = load_setup(Inputs(config, None, data, None, []), run)
        step = Stepper(setup, watch)
        at = step.optimizer.start(vector)
        del vector
        with run.limits():
            for _ in range(2):
                peaks.clear()
                mx.clear_cache()
                mx.reset_peak_memory()
                one = Batch(tokens, weights, np.arange(batch.rows), np.full(batch.rows, length + 1))
                at, _ = step(at, [one])
    return peaks
