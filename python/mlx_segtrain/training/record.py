"""Writes and compares run.json, a record of a run's inputs and environment that is used to resume,
verify and repeat the run."""

import functools
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlx.core as mx

from .. import events
from ..config import FACETS, PATHS, TrainConfig, flag
from ..data.sources import Source
from ..errors import InputError, RunError
from ..files import hashes, known_sha256, sha256, write_json
from ..hub import OF_MODEL, origin
from ..lora.folder import CONFIG, OPTIQ_CONFIG, PEFT_WEIGHTS, UNPADDED, WEIGHTS
from ..rewards.calling import file_of
from .checkpoint import found, torn
from .ranks import ALONE, LAUNCH, Ranks

NAME = "run.json"
#: The files by which a folder is recognized as an adapter.
OF_ADAPTER = (WEIGHTS, UNPADDED, PEFT_WEIGHTS, CONFIG, OPTIQ_CONFIG)
#: The parts of a record that are JSON objects.
PARTS = ("config", "folders", "inputs", "versions", "device", "settings")
#: The parts of a record on which the last bits of a run's results may depend.
OF_MACHINE = ("versions", "device", "settings")
PACKAGES = ("mlx-segtrain", "mlx", "mlx-lm", "numpy", "transformers", "tokenizers")


def files_of(
    config: TrainConfig, sources: tuple[Source, Source | None]
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Returns the files that a run reads and their folders. The files are keyed by names such as
    "model/config.json", which do not change when a folder moves; the folders are keyed by the first
    part of these names."""
    files, folders = _files_in("model", config.model_dir, OF_MODEL), {"model": config.model_dir}
    for part, source in zip(("data", "valid"), sources, strict=True):
        for name, path in source.files.items() if source else ():
            folder = path.parents[name.count("/")]
            part = "data" if folder == folders.get("data") else part
            folders[part] = folder
            files[f"{part}/{name}"] = path
    if config.warm_start is not None:
        folders["warm_start"] = config.warm_start
        files |= _files_in("warm_start", config.warm_start, OF_ADAPTER)
    if config.reward_model is not None:
        folders["reward_model"] = config.reward_model
        files |= _files_in("reward_model", config.reward_model, OF_MODEL)
    specs = [*config.reward_functions, *filter(None, [config.environment])]
    own = dict.fromkeys(filter(None, map(file_of, specs)))
    for i, path in enumerate(own, 1):  # each has its own part, since folders may differ
        part = "rewards" if i == 1 else f"rewards {i}"
        folders[part] = path.parent
        files[f"{part}/{path.name}"] = path
    return files, folders


def _files_in(part: str, folder: Path, ends: tuple[str, ...]) -> dict[str, Path]:
    """Returns the files in a folder whose names have one of the endings `ends`, keyed by
    "part/name". The result is {} if the folder does not exist."""
    return {
        f"{part}/{path.name}": path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if path.name.endswith(ends) and not path.name.startswith(".") and path.is_file()
    }


def machine() -> dict[str, Any]:
    """Returns the package versions, the device and the settings that this process uses."""
    device = mx.default_device()
    info = {
        "type": str(device.type).rpartition(".")[2],
        "name": str(mx.device_info().get("device_name") or platform.processor() or "CPU"),
        "platform": f"{sys.platform} {platform.machine()}",
    }
    settings = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("MLX_") and not name.startswith("MLX_SEGTRAIN_") and name not in LAUNCH
    }
    return {"versions": dict(_versions()), "device": info, "settings": settings}


@functools.cache
def _versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages. They are read once per process, because
    reading them takes about a tenth of the time of a tiny run."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # the package is optional
            versions[name] = version(name)
    return versions


def read(run: Path) -> dict[str, Any]:
    """Reads the record of a run. Raises InputError if the record is missing or not valid."""
    try:
        record = json.loads((run / NAME).read_text(encoding="utf-8"))
        if "id" not in record or not all(isinstance(record[part], dict) for part in PARTS):
            raise KeyError
    except OSError as error:
        raise InputError(
            f"{run / NAME} cannot be read ({error.strerror}): pass the folder of a run."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{run / NAME} is not the record of a run.") from None
    return record


class Record:
    """The content of run.json, and the state of the input files at the start of the run."""

    def __init__(
        self,
        config: TrainConfig,
        sources: tuple[Source, Source | None],
        resumed: dict[str, Any] | None,
        ranks: Ranks = ALONE,
    ):
        self.folder = config.adapter_path
        self.files, folders = files_of(config, sources)
        self.stats = {name: _stat(path) for name, path in self.files.items()}
        try:
            self.inputs = hashes(self.files, known_sha256)
        except OSError as error:
            raise InputError(
                f"{error.filename} cannot be read: {error.strerror or error}."
            ) from None
        for name, source in zip(("train_data", "valid_data"), sources, strict=True):
            if source and not source.files:
                self.inputs[name] = source.fingerprint()
        first = next((name for name in self.inputs if name.startswith("data/")), "train_data")
        place, digest = folders.get("data", "rows of Python"), self.inputs[first]
        self.data = (
            f"{place} ({first.removeprefix('data/')} {digest[:16]})"  #: text for human readers
        )
        earlier = resumed or {}
        self.values: dict[str, Any] = {
            "id": earlier.get("id", uuid4().hex),
            "started": earlier.get("started", events.now()),
            "config": config.model_dump(mode="json"),
            "folders": {part: str(own.resolve()) for part, own in folders.items()},
            **machine(),
            "inputs": self.inputs,
            "hub": {part: str(own) for part, x in folders.items() if x and (own := origin(x))},
            "resumed": earlier.get("resumed", []),
            "ranks": ranks.size,
        }
        ranks.check_same(self._in_common())

    def _in_common(self) -> dict[str, Any]:
        """Returns the values that must be the same on all ranks, keyed by name."""
        apart = {*PATHS, *(name for name, own in FACETS.items() if own.group == "Memory")}
        config = {k: x for k, x in self.values["config"].items() if k not in apart}
        versions = self.values["versions"]
        return config | self.inputs | {name: versions[name] for name in ("mlx-segtrain", "mlx")}

    def write(self) -> None:
        write_json(self.folder / NAME, self.values)

    def resume(self, step: int) -> None:
        """Records that the run was resumed after this step."""
        self.values["resumed"] = [*self.values["resumed"], {"step": step, "at": events.now()}]

    def finish(self, step: int) -> None:
        """Adds the hashes of the run's adapters to the record, for `verify`."""
        files = hashes(_made(self.folder))
        self.values["made"] = {"step": step, "at": events.now(), "files": files}
        self.write()

    def check_model(self, step: int) -> None:
        """Raises RunError if a file of the model has changed since the run began. Call this only
        after the state of `step` has been saved, because the error message says that it is
        saved."""
        for name, path in self.files.items():
            now = _stat(path)
            if not name.startswith("model/") or now == self.stats[name]:
                continue
            try:
                if now and sha256(path) == self.inputs[name]:
                    self.stats[name] = now
                    continue
            except OSError:  # the next checkpoint checks again
                continue
            what = "was changed" if now else "was removed"
            raise RunError(
                f"step {step}: {path} {what} during the run, but an adapter must be trained on a "
                f"single base model. The state of step {step} is saved: restore the file, then "
                "resume."
            )


def _made(run: Path) -> dict[str, Path]:
    """Returns the files of a run's adapters, keyed by their paths relative to the folder of the
    run."""
    own = {file.name: file for file in _files_in("", run, OF_ADAPTER).values()}
    return own | _files_in("best", run / "best", OF_ADAPTER)


def _stat(path: Path) -> tuple[int, int] | None:
    """Returns the size and the modification time of a file, or None if it does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def check_same(record: Record, earlier: Mapping[str, Any], warn: Callable[[str], None]) -> bool:
    """Returns whether a resumed run will take the same steps as it would have without the
    interruption. Raises InputError if the run cannot continue with this configuration and these
    files. Calls `warn` for every change that makes the steps differ."""
    run, now, before = record.folder, record.values["config"], earlier["config"]
    same = True
    for name, own in FACETS.items():
        then = before.get(name, TrainConfig.model_fields[name].default)
        if own.on_resume == "free" or now[name] == then:
            continue
        change = f"{name} = {now[name]}, but the run in {run} began with {then}"
        if own.on_resume == "refuse":
            raise InputError(f"{change}: use {flag(name)} {then}, or start a new run.")
        warn(f"{change}: the remaining steps will differ from those of an uninterrupted run")
        same = False
    for what, differs in differences(record.inputs, earlier["inputs"]).items():
        if what.startswith("rewards"):  # the user may have repaired a reward that failed
            warn(f"{what} {differs} since the run in {run} began: the remaining steps will differ")
            same = False
            continue
        # A new file makes no difference unless it is a weight file, because mlx-lm reads weight
        # files of any name.
        if differs != COME or what.endswith(".safetensors"):
            raise InputError(
                f"{what} {differs} since the run in {run} began: undo the change, or start a new "
                "run."
            )
    for part in OF_MACHINE:
        for what, differs in differences(record.values[part], earlier[part]).items():
            warn(f"{what} {differs} since the run began: results may differ in the last bits")
    return same


#: The description of a change that adds a value.
COME = "has been added"


def differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, str]:
    """Returns the changes from `then` to `now`, keyed by the name of the changed value. Each change
    is the end of a sentence that begins with the name, such as "has been added"."""
    found = {}
    for name in sorted({*now, *then}):
        if name not in now:
            found[name] = "has been removed"
        elif name not in then:
            found[name] = COME
        elif now[name] != then[name]:
            long = isinstance(now[name], str) and len(now[name]) == 64
            found[name] = "has changed" if long else f"has changed from {then[name]} to {now[name]}"
    return found


@dataclass(frozen=True)
class Verified:
    """The changes since a run, as lists of sentences keyed by part: model, data, warm_start,
    rewards, versions, device, settings, adapter and checkpoints. The list of an unchanged part is
    empty."""

    run: Path
    step: int | None  #: the step of the adapter; None if the run has not ended
    iters: int
    parts: dict[str, list[str]]

    @property
    def ok(self) -> bool:
        return not any(self.parts.values())


def verify(run: Path) -> Verified:
    """Reads all files of a run again and compares them with the run's record. The model and the
    data must still be at their recorded paths. Raises InputError if there is no record."""
    record = read(run)
    parts: dict[str, list[str]] = {}
    for part, folder in record["folders"].items():
        then = {k: v for k, v in record["inputs"].items() if k.startswith(f"{part}/")}
        files = {name: Path(folder) / name.partition("/")[2] for name in then}
        if part == "model":
            files |= _files_in(part, Path(folder), OF_MODEL)
        there = {name: path for name, path in files.items() if path.is_file()}
        parts[part] = _sentences(hashes(there), then)
    here = machine()
    for part in OF_MACHINE:
        parts[part] = _sentences(here[part], record[part])
    made = record.get("made")
    if made:
        parts["adapter"] = _sentences(hashes(_made(run)), made["files"])
    faults = {folder.name: torn(folder) for folder in found(run).values()}
    parts["checkpoints"] = [f"{name} is damaged: {why}" for name, why in faults.items() if why]
    return Verified(run, made and made["step"], record["config"]["iters"], parts)


def _sentences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    return [f"{name} {differs}" for name, differs in differences(now, then).items()]
