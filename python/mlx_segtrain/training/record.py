"""run.json: what a run was made of, so that it can be gone on with, told and made again."""

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlx.core as mx

from .. import events
from ..adapters import WEIGHTS
from ..config import TrainConfig, flag
from ..data.dataset import split_paths
from ..errors import InputError, RunError
from ..files import hashes, sha256, write_json
from .checkpoint import found, torn

NAME = "run.json"
#: What a model's folder holds that says what the model is, by the end of its name.
OF_MODEL = (".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt", ".py")
PACKAGES = ("mlx-segtrain", "mlx", "mlx-lm", "numpy", "transformers", "tokenizers")
#: Fields that change nothing of what a run computes.
FREE = (
    *("adapter_path", "model_dir", "data_dir", "warm_start", "overwrite", "resume"),
    *("grad_checkpoint", "segment_size", "memory_budget_gb", "report_to"),
    *("steps_per_report", "steps_per_save", "keep_checkpoints", "save_checkpoints"),
    *("sample_prompts", "sample_tokens", "eval_command", "keep_best"),
)
#: Fields that make the steps to come others than they would have been.
STEERING = (
    *("iters", "epochs", "learning_rate", "lr_schedule", "warmup_iters", "weight_decay"),
    *("grad_clip_norm", "on_spike", "steps_per_eval", "early_stopping_patience"),
)


def files_of(config: TrainConfig) -> dict[str, Path]:
    """What a run reads, by a name that stays when its folder is moved; InputError without data."""
    train, valid = split_paths(config.data_dir)
    files = {f"model/{path.name}": path for path in _files_in(config.model_dir)}
    files |= {f"data/{path.name}": path for path in (train, valid) if path}
    if config.warm_start is not None:
        files |= {f"warm_start/{path.name}": path for path in _files_in(config.warm_start)}
    return files


def _files_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in OF_MODEL and not path.name.startswith(".") and path.is_file()
    )


def machine() -> dict[str, Any]:
    """Versions and device that the last bits of a run depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # some are others' dependencies
            continue
    device = mx.default_device()
    info = {
        "type": str(device.type).rpartition(".")[2],
        "name": str(mx.device_info().get("device_name") or platform.processor() or "CPU"),
        "platform": f"{sys.platform} {platform.machine()}",
    }
    settings = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("MLX_") and not name.startswith("MLX_SEGTRAIN_")
    }
    return {"versions": versions, "device": info, "settings": settings}


def read(run: Path) -> dict[str, Any]:
    """InputError if there is none that can be read."""
    try:
        record = json.loads((run / NAME).read_text(encoding="utf-8"))
        if not {"id", "config", "inputs", "versions"} <= set(record):
            raise KeyError
    except OSError as error:
        raise InputError(
            f"{run / NAME} cannot be read ({error.strerror}): give the folder of a run."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{run / NAME} is not the record of a run.") from None
    return record


class Record:
    """What run.json of a run that goes on will hold, and the inputs as they were at its start."""

    def __init__(self, config: TrainConfig, resumed: dict[str, Any] | None):
        self.folder = config.adapter_path
        self.files = files_of(config)
        self.stats = {name: _stat(path) for name, path in self.files.items()}
        self.inputs = hashes(self.files)
        earlier = resumed or {}
        self.values: dict[str, Any] = {
            "id": earlier.get("id", uuid4().hex),
            "started": earlier.get("started", events.now()),
            "config": json.loads(config.model_dump_json()),
            **machine(),
            "inputs": self.inputs,
            "resumed": earlier.get("resumed", []),
        }

    def write(self) -> None:
        write_json(self.folder / NAME, self.values)

    def resume(self, step: int) -> None:
        """Notes that the run goes on behind this step."""
        self.values["resumed"] = [*self.values["resumed"], {"step": step, "at": events.now()}]

    def finish(self, step: int) -> None:
        """Notes what the run has made, for `verify`."""
        made = {WEIGHTS: sha256(self.folder / WEIGHTS)} if (self.folder / WEIGHTS).exists() else {}
        self.values["made"] = {"step": step, "at": events.now(), "files": made}
        self.write()

    def check_model(self, step: int) -> None:
        """RunError if a file of the model is not what it was when the run began."""
        for name, path in self.files.items():
            if not name.startswith("model/") or _stat(path) == self.stats[name]:
                continue
            if _stat(path) and sha256(path) == self.inputs[name]:
                self.stats[name] = _stat(path)
                continue
            what = "was changed" if _stat(path) else "was removed"
            raise RunError(
                f"step {step}: {path} {what} under the run, whose adapter would be of no model "
                f"there is: the state of step {step} is kept; put the file back and resume."
            )


def _stat(path: Path) -> tuple[int, int] | None:
    """Size and time of change; None if there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def check_same(record: Record, earlier: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """InputError if a run cannot go on with this configuration and these files; `warn` is told of
    what makes its steps to come others than they would have been."""
    run, now, before = record.folder, record.values["config"], earlier["config"]
    for name in now:
        if name in FREE or now[name] == before.get(name):
            continue
        change = f"{name} is {now[name]}, but the run in {run} began with {before.get(name)}"
        if name not in STEERING:
            raise InputError(
                f"{change}: give {flag(name)} {before.get(name)}, or begin another run."
            )
        warn(f"{change}: from here on it is another run than it would have been")
    for what, differs in differences(record.inputs, earlier["inputs"]).items():
        raise InputError(
            f"{what} {differs} since the run in {run} began: put it back, or begin another run."
        )
    for part in ("versions", "device", "settings"):
        for what, differs in differences(record.values[part], earlier.get(part, {})).items():
            warn(f"{what} {differs} since the run began: its last bits may be others")


def differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, str]:
    """What is not as it was, by name, in words."""
    found = {}
    for name in sorted({*now, *then}):
        if name not in now:
            found[name] = "is missing"
        elif name not in then:
            found[name] = "has come"
        elif now[name] != then[name]:
            long = isinstance(now[name], str) and len(now[name]) == 64
            found[name] = "has changed" if long else f"has changed from {then[name]} to {now[name]}"
    return found


@dataclass(frozen=True)
class Verified:
    """What of a run is as it was, by part: model, data, warm_start, versions, device, settings,
    adapter, checkpoints. Each has the sentences that say what is not; [] if all is."""

    run: Path
    step: int | None  #: of the adapter; None for a run that has not ended
    iters: int
    parts: dict[str, list[str]]

    @property
    def ok(self) -> bool:
        return not any(self.parts.values())


def verify(run: Path) -> Verified:
    """Compares a run's record with what is there now, reading every file; InputError without one.

    Model and data are looked for where the run found them.
    """
    record = read(run)
    config = record["config"]
    folders = {"model": "model_dir", "data": "data_dir", "warm_start": "warm_start"}
    parts: dict[str, list[str]] = {}
    for part, name in folders.items():
        if config.get(name) is None:
            continue
        folder = Path(config[name])
        then = {k: v for k, v in record["inputs"].items() if k.startswith(f"{part}/")}
        files = {k: folder / k.partition("/")[2] for k in then}
        if part != "data" and folder.is_dir():
            files |= {f"{part}/{path.name}": path for path in _files_in(folder)}
        parts[part] = _sentences(_hashes_of(files), then)
    here = machine()
    for part in ("versions", "device", "settings"):
        parts[part] = _sentences(here[part], record[part])
    made = record.get("made")
    if made:
        files = {name: run / name for name in made["files"]}
        parts["adapter"] = _sentences(_hashes_of(files), made["files"])
    faults = {folder.name: torn(folder) for folder in found(run).values()}
    parts["checkpoints"] = [f"{name} is torn: {why}" for name, why in faults.items() if why]
    return Verified(run, made and made["step"], config["iters"], parts)


def _hashes_of(files: Mapping[str, Path]) -> dict[str, str]:
    return hashes({name: path for name, path in files.items() if path.is_file()})


def _sentences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    return [f"{name} {differs}" for name, differs in differences(now, then).items()]
