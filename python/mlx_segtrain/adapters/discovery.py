"""Finds the adapters below given folders, and decides whether a model can use them."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from ..files import open_regular
from ..lora.folder import PEFT_WEIGHTS, WEIGHTS, Folder, open_folder
from ..lora.paths import bare
from ..models.headers import ModelShape, read_shape
from .conversion import about_of
from .multipliers import common_multiplier
from .reading import ranks_in, stored_shapes

#: The maximum depth below a root at which folders are searched.
DEPTH = 6
#: Maximum size, in bytes, of a run's log from which the best loss is read.
MOST_LOG = 64 << 20


@dataclass(frozen=True)
class Found:
    """An adapter on disk. `fits` says whether the given model can use it, or is None if no model
    was given. `fault` says why the adapter cannot be used."""

    path: Path
    kind: str = ""
    base: str = ""
    ranks: list[int] = field(default_factory=list)
    linears: int = 0
    scale: float | None = None
    step: int | None = None
    best_loss: float | None = None
    size: int = 0
    fits: bool | None = None
    fault: str | None = None


def adapters(roots: Sequence[Path], model_dir: Path | None = None) -> list[Found]:
    """Returns all adapters below the roots, sorted by path. If `model_dir` is given, `fits` says
    whether this model can use them."""
    shape = read_shape(model_dir) if model_dir is not None else None
    return [look(folder, shape) for root in roots for folder in sorted(_folders(root))]


def _folders(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: pass the folder to search.")
    for place, folders, files in os.walk(root):
        depth = len(Path(place).relative_to(root).parts)
        # A run's `state` folder contains checkpoints, which are not adapters. Other folders of the
        # run may contain adapters, such as the copies that are saved at evaluations.
        folders[:] = [
            x for x in folders if not x.startswith(".") and x != "state" and depth < DEPTH
        ]
        if {WEIGHTS, PEFT_WEIGHTS} & set(files):
            yield Path(place)


def look(folder: Path, shape: ModelShape | None = None) -> Found:
    """Describes the adapter in a folder. If the adapter cannot be used, `fault` is set."""
    try:
        opened = open_folder(folder)
        ranks, about = ranks_in(opened), about_of(opened)
        scale = common_multiplier(opened, max(ranks.values(), default=1))
        fits = None if shape is None else _fits(opened, shape)
    except InputError as error:
        return Found(folder, fault=str(error))
    return Found(
        path=folder,
        kind=opened.kind.name,
        base=about.model,
        ranks=sorted(set(ranks.values())),
        linears=len(ranks),
        scale=scale,
        step=about.step,
        best_loss=best_loss(folder),
        size=opened.weights.stat().st_size,
        fits=fits,
    )


def _fits(folder: Folder, shape: ModelShape) -> bool:
    """Returns whether the model contains all adapted layers, with matching widths."""
    widths = {bare(path): ends for path, ends in shape.widths.items()}
    known = {bare(name) for name in shape.tensors}

    def fits(path: str, width: int, out: int) -> bool:
        ends = (out, width) if path.endswith("embed_tokens") else (width, out)
        # `widths` contains only matrices. The weights of experts have three dimensions, so only
        # their names are checked.
        return widths.get(path) == ends or (path not in widths and f"{path}.weight" in known)

    try:
        found = stored_shapes(folder, shape.tied).items()
    except InputError:
        return False
    return all(fits(bare(path), width, out) for path, (width, _, out) in found)


def best_loss(run: Path) -> float | None:
    """Returns the lowest validation loss in a run's log, or None if the log has none."""
    best = math.inf
    try:
        with open_regular(run / "metrics.jsonl") as log:
            # The log is untrusted and may grow while it is read, so limit the bytes that are read.
            lines = log.readlines(MOST_LOG) if os.fstat(log.fileno()).st_size < MOST_LOG else ()
            for line in lines:
                if b'"val"' not in line:
                    continue
                event = json.loads(line)
                if event.get("kind") == "val" and isinstance(event.get("loss"), float):
                    best = min(best, event["loss"])
    except (OSError, ValueError, AttributeError, RecursionError):
        pass  # the loss found so far is returned
    return best if math.isfinite(best) else None
