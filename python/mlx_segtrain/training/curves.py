"""Loss curves of a run, as files beside its log."""

import json
from collections.abc import Callable
from pathlib import Path

from ..config import TrainConfig
from ..files import atomic
from ..hub import title
from ..objectives import OBJECTIVES
from ..objectives.sft import Sft

FORMATS = ("png", "svg")


def losses(log: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and loss of every training report (`train`) and evaluation (`val`) in metrics.jsonl."""
    points: dict[str, list[tuple[int, float]]] = {"train": [], "val": []}
    for line in log.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event.get("type") == "metric" and event["kind"] in points and event["loss"] is not None:
            points[event["kind"]].append((event["step"], event["loss"]))
    return points


def draw(log: Path, title: str, unit: str = Sft.unit) -> list[Path]:
    """Draws loss.png and loss.svg beside a metrics.jsonl; OSError if they are not written."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    found = losses(log)
    for kind, label, style in (("train", "training", "-"), ("val", "held out", "o-")):
        if found[kind]:
            axes.plot(*zip(*found[kind], strict=True), style, label=label)
    axes.set(xlabel="step", ylabel=f"loss ({unit})")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    if any(found.values()):
        axes.legend()
    files = [log.with_name(f"loss.{form}") for form in FORMATS]
    for file in files:
        with atomic(file) as aside:
            figure.savefig(aside, format=file.suffix[1:], dpi=120, metadata={})
    return files


def draw_run(config: TrainConfig, warn: Callable[[str], None]) -> None:
    """The curves of a run that is over; it is not lost for want of a picture."""
    heading = title(config.model_dir)
    heading += f" on {config.data_dir.name}" if config.data_dir else ""
    try:
        draw(config.adapter_path / "metrics.jsonl", heading, OBJECTIVES[config.method].unit)
    except Exception as error:
        warn(f"the loss curves cannot be drawn ({error})")
