"""Checkpoints: the complete state of a run between two steps, in folders written atomically.

    state/step-00050/state.safetensors  the factors and the optimizer state; everything else is
                                        in the metadata of this file, as JSON
    state/step-00050/manifest.json      the size and the SHA-256 of that file

The order of rows, the dropout masks and the learning rate follow from the configuration and the
step, so there is no random state to save.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from ..errors import InputError
from ..files import atomic_folder, clean, remove_folder, sha256, write_json, write_tensors
from .ranks import Ranks
from .state import Iterate, Moments, Progress, State

STATE, TENSORS, MANIFEST = "state", "state.safetensors", "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    `record` is the content of run.json (see record.py), `log_bytes` is the size of metrics.jsonl
    when the checkpoint was written, and `apart` says whether the two responses of each pair run as
    separate sequences.
    """

    folder: Path
    tensors: dict[str, mx.array]
    step: int
    progress: Progress
    record: dict[str, Any]
    log_bytes: int
    apart: bool

    def iterate(self, fresh: Iterate) -> Iterate:
        """Returns the factors and the optimizer state. Raises InputError unless they have the
        structure of `fresh`, the state of a new run."""

        def stored(name: str, like: mx.array) -> mx.array:
            found = self.tensors.get(name)
            if found is None or (found.shape, found.dtype) != (like.shape, like.dtype):
                raise InputError(
                    f"{self.folder} does not belong to this run: the tensor {name} is missing, or "
                    "has a different shape or dtype."
                )
            return found

        moments: Moments = tree_map_with_path(
            lambda path, like: stored(f"moments.{path}", like), fresh.moments
        )
        return Iterate(stored("factors", fresh.vector), moments, self.step)


def save(
    run: Path, state: State, keep: int, *, record: dict[str, Any], log_bytes: int, apart: bool
) -> None:
    """Writes a checkpoint in a run's folder. Then deletes the checkpoints of later steps, because
    the run may reach those steps in a different state, and keeps only the newest `keep` of the
    others.

    Raises OSError if the checkpoint cannot be written; in this case, earlier checkpoints stay
    intact.
    """
    tensors: dict[str, Any] = {"factors": state.at.vector}
    tensors |= {f"moments.{name}": x for name, x in tree_flatten(state.at.moments)}
    rest = {
        "version": VERSION,
        "record": record,
        "step": state.step,
        "log_bytes": log_bytes,
        "apart": apart,
        "progress": asdict(state.progress),
    }
    with atomic_folder(run / STATE / f"step-{state.step:05d}") as folder:
        write_tensors(folder / TENSORS, tensors, {"segtrain": json.dumps(rest)})
        file = folder / TENSORS
        own = {"size": file.stat().st_size, "sha256": sha256(file)}
        write_json(folder / MANIFEST, {"files": {TENSORS: own}})
    clean(run / STATE)
    steps = found(run)
    past = [step for step in steps if step <= state.step]
    for step in steps:
        if step not in past[:keep]:
            remove_folder(steps[step])


def found(run: Path) -> dict[int, Path]:
    """Returns the folders of all checkpoints, keyed by step, newest first. They may include damaged
    checkpoints."""
    named = {
        int(match[1]): path
        for path in (run / STATE).glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name))
    }
    return dict(sorted(named.items(), reverse=True))


def newest(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Returns the newest intact checkpoint of a run, or None if there is none. Calls `warn` for
    each damaged checkpoint that it skips."""
    for folder in found(run).values():
        fault = torn(folder)
        if fault is None:
            return _read(folder)
        warn(f"the checkpoint {folder} is damaged ({fault}) and is ignored")
    return None


def shared(own: Checkpoint | None, ranks: Ranks) -> Checkpoint | None:
    """Returns rank 0's checkpoint on every rank, so the other ranks need no access to rank 0's
    disk."""
    (name, *_) = ranks.gather(own and own.folder.name)
    if ranks.size == 1 or name is None:
        return own
    content = ranks.given((own.folder / TENSORS).read_bytes() if own else b"")
    if own is not None:
        return own
    with TemporaryDirectory() as folder:
        (Path(folder) / TENSORS).write_bytes(content)
        return _read(Path(folder))


def torn(folder: Path) -> str | None:
    """Describes how a checkpoint is damaged; returns None if it is intact."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        own = files[TENSORS]
        size = (folder / TENSORS).stat().st_size
        if size != own["size"]:
            return f"{TENSORS} has {size} bytes instead of {own['size']}"
        if sha256(folder / TENSORS) != own["sha256"]:
            return f"the SHA-256 of {TENSORS} has changed since it was written"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} has changed since it was written"
    return None


def _read(folder: Path) -> Checkpoint:
    loaded: Any = mx.load(str(folder / TENSORS), return_metadata=True)
    tensors, metadata = loaded
    rest = json.loads(metadata["segtrain"])
    version = rest.pop("version")
    if version != VERSION:
        raise InputError(
            f"{folder} has checkpoint format {version}, but this version of mlx-segtrain reads "
            f"only format {VERSION}: resume with a version that writes format {version}."
        )
    mx.eval(tensors)  # reads the file now, before the hashed content can change
    rest["progress"] = Progress.from_json(rest["progress"])
    return Checkpoint(folder, tensors, **rest)
