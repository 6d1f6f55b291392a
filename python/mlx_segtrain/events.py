"""The events of a training run: plain JSON objects, in the order in which they happen."""

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
    """Returns the current time in UTC, in ISO 8601."""
    return datetime.now(timezone.utc).isoformat()


def started() -> Event:
    """The first event of a run."""
    return {"type": "started", "ts": now()}


def meta(config: dict[str, Any], run_id: str, step: int) -> Event:
    """The first line of a log; after a resume, the first line of the part that begins at this
    step."""
    return {
        **{"type": "meta", "ts": now(), "pid": os.getpid(), "id": run_id, "step": step},
        "config": config,
    }


def warning(message: str) -> Event:
    """A message for the user about a problem that does not stop the run."""
    return {"type": "warning", "message": message}


def stage(name: Stage, progress: float, message: str, **more: Any) -> Event:
    """The start of a stage of the run; `progress` is between 0 and 1. The stage `done` has
    adapter_path and applied_ranks."""
    return {"type": "stage", "stage": name, "progress": progress, "message": message, **more}


def tokenizing(
    name: str, share: float | None, rows: int, rows_per_s: float, left_s: float | None
) -> Event:
    """The progress of tokenizing the rows of a source: the share between 0 and 1, and the remaining
    seconds; both are None if unknown."""
    figures = {"share": share, "rows": rows, "rows_per_s": rows_per_s, "left_s": left_s}
    part = "" if share is None else f" {share:.0%},"
    message = f"tokenizing {name}:{part} {rows:,} rows, {rows_per_s:,.0f} rows/s"
    return stage("data", 0.01 + 0.01 * (share or 0), message, **figures)


def evaluating(done: int, batches: int, left_s: float) -> Event:
    """The progress of an evaluation outside of a run: the share between 0 and 1, and the remaining
    seconds."""
    share = done / batches
    message = f"evaluating: {share:.0%}, batch {done:,} of {batches:,}"
    return stage("evaluate", share, message, share=share, left_s=left_s)


def plan(progress: float, message: str, peak: int | None, budget: int) -> Event:
    """The memory plan of the run from now on, in bytes; `peak` is None if none is predicted."""
    planned = {} if peak is None else {"planned_gb": peak / 1e9, "budget_gb": budget / 1e9}
    return stage("setup", progress, message, **planned)


def train_metric(
    step: int, iters: int, *, loss: float, metrics: dict[str, float], **figures: float
) -> Event:
    """The training loss: the mean over the last `steps_per_report` steps, in nats per token.

    With preference methods the loss is per pair or row, and `metrics` are accuracy, margin, rewards
    and, for kto, kl; a metric for which these steps had no row is missing. `figures` are grad_norm,
    learning_rate, tokens_per_sec, supervised_tokens_per_sec (tokens in the loss only), step_s,
    peak_gb, active_gb, and left_s: the estimated seconds until the run ends, including evaluations
    and checkpoints.
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

    They are busy_s and waited_s (the mean seconds per step, since the last report, in which the
    rank did its own work, or waited for others), tokens_per_sec of its own work, peak_gb and
    active_gb. `skew_s` is the difference in busy_s between the slowest rank and the fastest; the
    others wait for the rank `slowest`.
    """
    busy = [own["busy_s"] for own in ranks]
    slowest = busy.index(max(busy))
    skew = {"skew_s": busy[slowest] - min(busy), "slowest": slowest}
    return {**metric, "ranks": [dict(own) for own in ranks], **skew}


def about_ranks(metric: Event) -> str:
    """Describes the figures of with_ranks in one line."""
    ranks, slowest = metric["ranks"], metric["slowest"]
    busy, waited, speed, peak = (
        [own[name] for own in ranks] for name in ("busy_s", "waited_s", "tokens_per_sec", "peak_gb")
    )
    skew = metric["skew_s"] / min(busy)
    return (
        f"rank {slowest} is the slowest of {len(ranks)}: {busy[slowest]:.3f} s of work per step, "
        f"{skew:.0%} more than rank {busy.index(min(busy))}; the ranks wait {min(waited):.3f} to "
        f"{max(waited):.3f} s, work at {min(speed):,.0f} to {max(speed):,.0f} tokens/s, and have "
        f"peaks of {min(peak):.2f} to {max(peak):.2f} GB"
    )


def step(metric: Event) -> Event:
    """The progress of a run between two reports: part of a step's metrics."""
    kept = ("step", "active_gb", "peak_gb", "left_s", "progress", "message")
    return {"type": "step", **{name: metric[name] for name in kept}}


def speed(figures: Mapping[str, Any]) -> str:
    """Formats the tokens per second: those in the loss, and all."""
    supervised, every = (figures[f"{x}tokens_per_sec"] for x in ("supervised_", ""))
    return f"{supervised:,.0f} supervised of {every:,.0f} tokens/s"


def val_metric(
    step: int, iters: int, *, loss: float, tokens: int, metrics: dict[str, float]
) -> Event:
    """An evaluation: the loss in nats per token over `tokens` tokens in the loss; with preference
    methods as in train_metric."""
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
    """An answer of the adapter at this step."""
    return {"type": "sample", "step": step, "prompt": prompt, "text": text}


def score(step: int, scores: dict[str, float] | str) -> Event:
    """The scores of the adapter from the user's command or function; a str is the error if it
    failed."""
    found: Event = {"error": scores} if isinstance(scores, str) else {"scores": scores}
    return {"type": "metric", "kind": "score", "step": step, **found}


def done(output_dir: Path) -> Event:
    """The run ended successfully; output_dir holds the adapter."""
    return {"type": "done", "ts": now(), "output_dir": str(output_dir)}


def failed(error: BaseException) -> Event:
    """The run ended with an exception. `fault` is errors.Fault, `field` names what has to be
    changed."""
    event = {"type": "failed", "error": f"{type(error).__name__}: {error}", "ts": now()}
    field = getattr(error, "field", None)
    return {**event, "fault": fault_of(error), **({} if field is None else {"field": field})}


def run_progress(step: int, iters: int) -> float:
    """Returns the progress of the whole run, from 0 to 1; loading and preparing are the first
    twentieth."""
    return 0.05 + 0.95 * step / iters


def perplexity(loss: float) -> float | None:
    """Returns exp(loss), or None if that is not a finite float (JSON has no infinity)."""
    return math.exp(loss) if loss < 700 else None
