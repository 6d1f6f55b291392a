"""The events of a training run. An event is a JSON object. The functions that create events are
defined in the order in which the events first occur."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from .errors import fault_of

Event = dict[str, Any]
OnEvent = Callable[[Event], None]
Stage = Literal["load", "setup", "data", "checkpoint", "train", "evaluate", "fold", "done"]


def now() -> str:
    """Returns the current UTC time in ISO 8601 format."""
    return datetime.now(timezone.utc).isoformat()


def started() -> Event:
    """Returns the first event of a run."""
    return {"type": "started", "ts": now()}


def meta(config: dict[str, Any], run_id: str, step: int) -> Event:
    """Returns the event that starts a log. If a run is resumed at `step`, the event also starts the
    part of the log that this run appends."""
    return {
        **{"type": "meta", "ts": now(), "pid": os.getpid(), "id": run_id, "step": step},
        "config": config,
    }


def warning(message: str) -> Event:
    """Returns the event that warns the user of a problem that does not stop the run."""
    return {"type": "warning", "message": message}


def stage(name: Stage, progress: float, message: str, **more: Any) -> Event:
    """Returns the event for the start of a stage. `progress` is the progress of the run, from 0 to
    1. The event of the stage `done` also contains adapter_path and applied_ranks."""
    return {"type": "stage", "stage": name, "progress": progress, "message": message, **more}


def tokenizing(
    name: str, share: float | None, rows: int, rows_per_s: float, left_s: float | None
) -> Event:
    """Returns the event that reports the progress of tokenizing the rows of a source. `share` is
    the finished fraction, from 0 to 1, and `left_s` is the remaining time in seconds; both are None
    if they are unknown."""
    figures = {"share": share, "rows": rows, "rows_per_s": rows_per_s, "left_s": left_s}
    part = "" if share is None else f" {share:.0%},"
    message = f"tokenizing {name}:{part} {rows:,} rows, {rows_per_s:,.0f} rows/s"
    return stage("data", 0.01 + 0.01 * (share or 0), message, **figures)


def evaluating(done: int, batches: int, left_s: float) -> Event:
    """Returns the event that reports the progress of an evaluation outside a run. `done` is the
    number of finished batches, and `left_s` is the remaining time in seconds."""
    share = done / batches
    message = f"evaluating: {share:.0%}, batch {done:,} of {batches:,}"
    return stage("evaluate", share, message, share=share, left_s=left_s)


def plan(progress: float, message: str, peak: int | None, budget: int) -> Event:
    """Returns the event with the memory plan for the rest of the run. `peak` and `budget` are in
    bytes; `peak` is None if it is not predicted."""
    planned = {} if peak is None else {"planned_gb": peak / 1e9, "budget_gb": budget / 1e9}
    return stage("setup", progress, message, **planned)


def train_metric(
    step: int, iters: int, *, loss: float, metrics: dict[str, float], **figures: float
) -> Event:
    """Returns the event with the metrics of a training report. The loss is the mean over the last
    `steps_per_report` steps, in nats per token.

    With preference methods the loss is per pair or row, and `metrics` contains the accuracy, the
    margin, the rewards and, for kto, kl. A metric is absent if it applies to none of the rows of
    these steps. `figures` contains grad_norm, learning_rate, tokens_per_sec,
    supervised_tokens_per_sec (which counts only tokens in the loss), step_s, peak_gb, active_gb and
    left_s. left_s is the estimated time in seconds until the run ends, including evaluations and
    checkpoints.
    """
    return {
        "type": "metric",
        "kind": "train",
        "step": step,
        "loss": loss,
        **metrics,
        **figures,
        "progress": run_progress(step, iters),
        "message": f"step {step}/{iters} loss {loss:.4f} {speed(figures)}",
    }


def with_ranks(metric: Event, ranks: Sequence[Mapping[str, float]]) -> Event:
    """Adds the figures of each rank to a training metric.

    The figures of a rank are busy_s and waited_s, the mean times per step that the rank has spent
    computing and waiting for other ranks, respectively, since the last report; tokens_per_sec, its
    speed while computing; peak_gb; and active_gb. `skew_s` is the difference in busy_s between the
    slowest and the fastest rank. `slowest` is the rank that the others wait for.
    """
    busy = [own["busy_s"] for own in ranks]
    slowest = busy.index(max(busy))
    skew = {"skew_s": busy[slowest] - min(busy), "slowest": slowest}
    return {**metric, "ranks": [dict(own) for own in ranks], **skew}


def about_ranks(metric: Event) -> str:
    """Describes the figures added by with_ranks, on one line."""
    ranks, slowest = metric["ranks"], metric["slowest"]
    busy, waited, speed, peak = (
        [own[name] for own in ranks] for name in ("busy_s", "waited_s", "tokens_per_sec", "peak_gb")
    )
    skew = metric["skew_s"] / min(busy)
    return (
        f"rank {slowest} is the slowest of {len(ranks)}: {busy[slowest]:.3f} s of work per step, "
        f"{skew:.0%} more than rank {busy.index(min(busy))}; the ranks wait {min(waited):.3f} to "
        f"{max(waited):.3f} s, work at {min(speed):,.0f} to {max(speed):,.0f} tokens/s, and have a "
        f"peak memory of {min(peak):.2f} to {max(peak):.2f} GB"
    )


def step(metric: Event) -> Event:
    """Returns the event for a step between two reports, with some of its metrics."""
    kept = ("step", "active_gb", "peak_gb", "left_s", "progress", "message")
    return {"type": "step", **{name: metric[name] for name in kept}}


def speed(figures: Mapping[str, Any]) -> str:
    """Formats the speed in tokens per second, for the tokens in the loss and for all tokens."""
    supervised, every = (figures[f"{x}tokens_per_sec"] for x in ("supervised_", ""))
    return f"{supervised:,.0f} supervised of {every:,.0f} tokens/s"


def val_metric(
    step: int, iters: int, *, loss: float, tokens: int, metrics: dict[str, float]
) -> Event:
    """Returns the event with the result of an evaluation. The loss is the mean over `tokens`
    supervised tokens, in nats per token. With preference methods, the loss and the `metrics` are as
    in train_metric."""
    return {
        "type": "metric",
        "kind": "val",
        "step": step,
        "loss": loss,
        **metrics,
        "perplexity": None if metrics else perplexity(loss),
        "tokens": tokens,
        "progress": run_progress(step, iters),
    }


def sample(step: int, prompt: str, text: str) -> Event:
    """Returns the event for an answer that the model generated with the adapter of this step."""
    return {"type": "sample", "step": step, "prompt": prompt, "text": text}


def score(step: int, scores: dict[str, float] | str) -> Event:
    """Returns the event with the scores that the user's command or function gave the adapter. If
    the command or function failed, `scores` is the error message."""
    found: Event = {"error": scores} if isinstance(scores, str) else {"scores": scores}
    return {"type": "metric", "kind": "score", "step": step, **found}


def done(output_dir: Path) -> Event:
    """Returns the event for the successful end of a run. output_dir contains the adapter."""
    return {"type": "done", "ts": now(), "output_dir": str(output_dir)}


def failed(error: BaseException) -> Event:
    """Returns the event for a run that ended with an exception. `fault` is an errors.Fault, and
    `field` is the configuration field that must be changed, if there is one."""
    event = {"type": "failed", "error": f"{type(error).__name__}: {error}", "ts": now()}
    field = getattr(error, "field", None)
    return {**event, "fault": fault_of(error), **({} if field is None else {"field": field})}


def run_progress(step: int, iters: int) -> float:
    """Returns the progress of the whole run, from 0 to 1. Loading and preparation count as the
    first twentieth."""
    return 0.05 + 0.95 * step / iters


def perplexity(loss: float) -> float | None:
    """Returns exp(loss), or None if this is not finite, since JSON has no infinity."""
    return math.exp(loss) if loss < 700 else None
