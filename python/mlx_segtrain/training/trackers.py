"""Passes metrics to external experiment trackers. A tracker that fails does not stop the run."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .. import events
from ..config import TrainConfig
from ..errors import InputError

Close = Callable[[], None]


def tensorboard(config: TrainConfig, run_id: str) -> tuple[events.OnEvent, Close]:
    """Writes scalars to the folder adapter_path/tensorboard. To view them, run `tensorboard
    --logdir` on that folder."""
    writer = import_module("tensorboard.summary").Writer(str(config.adapter_path / "tensorboard"))

    def on_event(event: events.Event) -> None:
        for name, x in scalars(event).items():
            writer.add_scalar(name, x, event["step"])
        writer.flush()

    return on_event, writer.close


def wandb(config: TrainConfig, run_id: str) -> tuple[events.OnEvent, Close]:
    """Logs to a Weights & Biases run, which is configured by the environment variables WANDB_*. A
    resumed training run continues the same Weights & Biases run."""
    run = import_module("wandb").init(
        project=os.environ.get("WANDB_PROJECT", "mlx-segtrain"),
        id=run_id,
        resume="allow",
        name=config.adapter_path.name,
        dir=str(config.adapter_path),
        config=config.model_dump(mode="json"),
    )

    def on_event(event: events.Event) -> None:
        if found := scalars(event):
            run.log({**found, "step": event["step"]})

    return on_event, run.finish


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb}


def scalars(event: events.Event) -> dict[str, float]:
    """Returns the values in a metric event, keyed by names such as train/loss. Other events have no
    values."""
    if event["type"] != "metric":
        return {}
    values: dict[str, Any] = event.get("scores", event)
    return {
        f"{event['kind']}/{name}": float(x)
        for name, x in values.items()
        if isinstance(x, int | float) and name not in ("step", "progress", "slowest")
    }


def check_installed(config: TrainConfig) -> None:
    """Raises InputError if the package of a configured tracker is not installed."""
    for name in config.report_to:
        if find_spec(name) is None:
            raise InputError(
                f"report_to {name} needs a package that is not installed: run pip install {name}."
            )


@contextmanager
def tracked(
    config: TrainConfig, run_id: str, warn: Callable[[str], None]
) -> Iterator[events.OnEvent]:
    """Yields a function that passes events to the trackers. A tracker that fails receives no
    further events."""
    live: dict[str, tuple[events.OnEvent, Close]] = {}

    def attempt(name: str, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:
            live.pop(name, None)
            text = " ".join(str(error).split())[:200]
            warn(f"{name} failed and will receive no more metrics ({type(error).__name__}: {text})")

    for name in config.report_to:
        if made := attempt(name, TRACKERS[name], config, run_id):
            live[name] = made

    def tell(event: events.Event) -> None:
        for name, (on_event, _) in list(live.items()):
            attempt(name, on_event, event)

    try:
        yield tell
    finally:
        for name, (_, close) in list(live.items()):
            attempt(name, close)
