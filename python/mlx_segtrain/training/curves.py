"""Draws the loss curves of a run into files in the folder of its log."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .. import events
from ..config import TrainConfig
from ..files import atomic
from ..hub import title
from ..objectives import OBJECTIVES
from ..objectives.sft import Sft

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
#: The (step, loss) pairs of all training reports (`train`) and all evaluations (`val`).
Points = dict[str, list[tuple[int, float]]]


def metrics(log: Path) -> list[events.Event]:
    """Returns the metric events in a metrics.jsonl file, or [] if the file does not exist."""
    if not log.exists():
        return []
    with log.open(encoding="utf-8") as lines:  # unlike `splitlines`, keeps U+2028 in texts
        return [event for event in map(json.loads, lines) if event.get("type") == "metric"]


def points(found: Iterable[events.Event]) -> Points:
    points: Points = {"train": [], "val": []}
    for event in found:
        if event["kind"] in points and event["loss"] is not None:
            points[event["kind"]].append((event["step"], event["loss"]))
    return points


def figure_of(found: Points, title: str, unit: str = Sft.unit) -> Figure:
    from matplotlib.figure import Figure  # not pyplot, which needs a display and has global state

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for kind, label, style in (("train", "training", "-"), ("val", "held out", "o-")):
        if found[kind]:
            axes.plot(*zip(*found[kind], strict=True), style, label=label)
    axes.set(xlabel="step", ylabel=f"loss ({unit})")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    if any(found.values()):
        axes.legend()
    return figure


def draw(log: Path, title: str, unit: str = Sft.unit) -> list[Path]:
    """Draws the loss curves from a metrics.jsonl file as loss.png and loss.svg in the same folder,
    and returns the paths of both images. Raises OSError if an image cannot be written."""
    figure = figure_of(points(metrics(log)), title, unit)
    files = [log.with_name(f"loss.{form}") for form in FORMATS]
    for file in files:
        with atomic(file) as aside:
            figure.savefig(aside, format=file.suffix[1:], dpi=120, metadata={})
    return files


def draw_run(config: TrainConfig, warn: Callable[[str], None]) -> None:
    """Draws the loss curves of a finished run. If this fails, calls `warn`."""
    heading = title(config.model_dir)
    heading += f" on {config.data_dir.name}" if config.data_dir else ""
    try:
        draw(config.adapter_path / "metrics.jsonl", heading, OBJECTIVES[config.method].unit)
    except Exception as error:
        warn(f"the loss curves cannot be drawn ({error})")
