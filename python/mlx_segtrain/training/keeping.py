"""Writes all files of a run except its log: checkpoints, adapters and reports."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import events
from ..adapters import About, step_of, write_adapter
from ..errors import InputError, RunError
from ..files import atomic_folder, clean, remove_folder, write_json
from ..lora import Adapter
from . import checkpoint, record
from .completions import CompletionLog
from .contents import REMOVED, check_own
from .diagnosis import Fault
from .log import RunLog
from .results import TrainResult
from .setup import Setup, Start, with_params
from .state import State


@dataclass
class Keeper:
    """Writes the files in the folder of a run. If a file that is not essential cannot be written,
    only a warning is issued.

    `unwritten` contains the best adapter and the data of its model card until they are written.
    """

    setup: Setup
    log: RunLog
    made_of: record.Record
    warn: Callable[[str], None]
    unwritten: tuple[Adapter, About] | None = None

    @property
    def path(self) -> Path:
        return self.setup.config.adapter_path

    def __post_init__(self) -> None:
        self.completions = CompletionLog(self.path, self.warn)

    def open(self, state: State, start: Start, same: bool) -> None:
        """Restores the folder to its state at the checkpoint. If there is no checkpoint, removes
        the files of an earlier run, except its adapter, which is kept until the new one replaces
        it.

        If `same` is true, the resumed run will produce the same adapters, so the adapters of later
        steps are kept. Raises InputError if the folder cannot be written, or if another run has
        used it in the meantime.
        """
        path, resumed = self.path, start.resumed
        if Start.trace(path) != start.seen:
            raise InputError(
                f"adapter_path {path} was used by another run while this run was loading: start "
                "this run again."
            )
        try:
            for folder in (path, path / "best", path / "checkpoints", path / checkpoint.STATE):
                clean(folder)
            if resumed is None:
                check_own(path)
                for name in REMOVED:
                    remove_folder(path / name)
                for old in path.glob("fault-step-*.json"):
                    old.unlink()
            elif not same:
                # The state contains only this rank's factors, but the checkpoint contains those of
                # all ranks.
                whole = replace(state.at, vector=resumed.tensors["factors"])
                self._forget(replace(state, at=whole))
            (path / "metrics.json").unlink(missing_ok=True)
            self.completions.begin(state.step)
            self.log.begin(resumed.log_bytes if resumed else 0)
            self.made_of.write()
        except OSError as error:
            raise InputError(
                f"adapter_path {path} cannot be written ({error.strerror or error}): free disk "
                "space, change permissions, or choose another folder."
            ) from error
        made_of = self.made_of.values
        self.log.write(events.meta(made_of["config"], made_of["id"], state.step))

    def _forget(self, state: State) -> None:
        """Removes the adapters of later steps, because the run may reach those steps in a different
        state. If the best adapter so far is from this step, saves it in best/ again."""
        for folder in (self.path / "best", *(self.path / "checkpoints").glob("step-*")):
            if (step_of(folder) or 0) > state.step:
                remove_folder(folder)
        best = state.progress.best
        is_best = best is not None and best["step"] == state.step
        if is_best and self.setup.config.keep_best and not (self.path / "best").exists():
            self.unwritten = self.adapter(state), self._about(state)

    def adapter(self, state: State) -> Adapter:
        """Returns the adapter after the last finished step."""
        setup = self.setup
        return with_params(setup.chain, setup.scales, setup.layout.split(state.at.vector))

    @property
    def ranks(self) -> dict[str, int]:
        """The LoRA rank of each adapted layer, keyed by the layer's path."""
        found = self.setup.layout.entries
        return {
            name.removesuffix(".lora_a"): shape[1]
            for _, name, shape in found
            if name.endswith(".lora_a")
        }

    def _about(self, state: State) -> About:
        """Returns the data for the model card of the current adapter."""
        setup, progress = self.setup, state.progress
        facts = {"data": self.made_of.data, "trained on": setup.train.summary}
        if setup.remarks:
            facts["remarks"] = "; ".join(setup.remarks)
        if progress.loss is not None:
            facts["training loss"] = f"{progress.loss:.4f}"
        if best := progress.best:
            first, last = progress.vals[0], progress.vals[-1]
            facts["validation loss"] = f"{first['loss']:.4f} -> {last['loss']:.4f}"
            facts["lowest"] = f"{best['loss']:.4f} at step {best['step']:.0f}"
        return About.of(setup.config, state.step, facts)

    def checkpoint(self, state: State) -> None:
        """Writes a checkpoint. Then raises RunError if a file of the model has changed."""
        self._write_best()
        if self._attempt(self.path, lambda: self._write(state)):
            self.made_of.check_model(state.step)

    def last(self, state: State) -> None:
        """Writes the final state of the run. Raises RunError if it cannot be written."""
        self._write_best()
        try:
            self.log.ensure()
            self._write(state)
            self.made_of.finish(state.step)
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"step {state.step}: {self.path} cannot be written ({reason}): free disk space or "
                "change permissions, then resume from the last checkpoint."
            ) from error

    def _write(self, state: State) -> None:
        """Writes the checkpoint and the current adapter."""
        self.completions.sync()
        checkpoint.save(
            self.path,
            state,
            self.setup.config.keep_checkpoints,
            record=self.made_of.values,
            log_bytes=self.log.sync(),
            apart=self.setup.apart,
        )
        write_adapter(self.path, self.adapter(state), self._about(state))
        if not (self.path / record.NAME).exists():  # the folder was deleted in the meantime
            self.made_of.write()

    def best(self, state: State) -> None:
        """Saves the adapter as the best one. If the write fails, it is retried later."""
        self.unwritten = self.adapter(state), self._about(state)
        self._write_best()

    def _write_best(self) -> None:
        if self.unwritten is None:
            return
        path, best = self.path / "best", self.unwritten
        if self._attempt(path, lambda: write_adapter(path, *best)):
            self.unwritten = None

    def evaluated(self, state: State, name: str) -> None:
        """Saves the evaluated adapter atomically, in the folder `name` inside checkpoints/."""
        folder = self.path / "checkpoints" / name

        def write() -> None:
            with atomic_folder(folder) as aside:
                write_adapter(aside, self.adapter(state), self._about(state))

        self._attempt(folder, write)

    def generated(self, lines: list[dict[str, Any]]) -> None:
        """Appends completions to completions.jsonl."""
        self.completions.write(lines)

    def fault(self, fault: Fault) -> None:
        file = self.path / f"fault-step-{fault.step:05d}.json"
        self._attempt(file, lambda: write_json(file, asdict(fault)))

    def result(self, result: TrainResult, vals: list[dict[str, float]]) -> None:
        """Writes metrics.json."""
        train, valid = self.setup.train, self.setup.valid
        values = {
            "config": self.made_of.values["config"],
            **asdict(result),
            "adapter_path": str(self.path),
            "val_losses": vals,
            "data": {
                "train": train.as_json(),
                "valid": valid and valid.as_json(),
                "remarks": self.setup.remarks,
            },
        }
        file = self.path / "metrics.json"
        self._attempt(file, lambda: write_json(file, values))

    def _attempt(self, path: Path, write: Callable[[], None]) -> bool:
        try:
            self.log.ensure()
            write()
        except OSError as error:
            self.warn(
                f"{path} cannot be written ({error.strerror or error}); the run continues without "
                "it"
            )
            return False
        return True


NOTHING: Any = lambda *_: None  # noqa: E731 - one value that can replace methods of any type


class Bystander(Keeper):
    """The Keeper of ranks other than 0. These ranks write nothing, because rank 0 writes all files,
    perhaps on another machine."""

    def checkpoint(self, state: State) -> None:
        self.made_of.check_model(state.step)

    open = last = best = evaluated = generated = fault = result = NOTHING
