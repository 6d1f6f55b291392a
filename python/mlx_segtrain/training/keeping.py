"""What a run writes to its folder, besides the log: checkpoints, adapters, reports."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import events
from ..adapters import write_adapter
from ..config import TrainConfig
from ..errors import InputError, RunError
from ..files import atomic_folder, clean, remove_folder, write_json
from ..lora import Adapter
from . import checkpoint, record
from .diagnosis import Fault
from .log import RunLog
from .references import references_of
from .results import TrainResult
from .setup import Setup, with_params
from .state import State


@dataclass
class Keeper:
    """The folder of a run. A write that the run can do without is told if it fails.

    `unwritten` is the best adapter, as long as it could not be written.
    """

    config: TrainConfig
    setup: Setup
    log: RunLog
    made_of: record.Record
    warn: Callable[[str], None]
    unwritten: Adapter | None = None

    @property
    def path(self) -> Path:
        return self.config.adapter_path

    def open(self, state: State, resumed: checkpoint.Checkpoint | None) -> None:
        """Puts the folder back to where it was at the checkpoint; or removes what an overwritten
        run has left, but for its adapter, which stays until there is another.

        InputError if nothing can be written.
        """
        path = self.path
        try:
            for folder in (path, path / "best", path / "checkpoints", path / checkpoint.STATE):
                clean(folder)
            if resumed is None:
                for name in (checkpoint.STATE, "checkpoints", "best", "tensorboard"):
                    remove_folder(path / name)
                for old in path.glob("fault-step-*.json"):
                    old.unlink()
            (path / "metrics.json").unlink(missing_ok=True)
            self.log.begin(resumed.log_bytes if resumed else 0)
            self.made_of.write()
        except OSError as error:
            raise InputError(
                f"adapter_path {path} cannot be written ({error.strerror or error}): make room, "
                "give access, or choose another folder."
            ) from error
        config = json.loads(self.config.model_dump_json())
        self.log.write(events.meta(config, self.made_of.values["id"], state.step))

    def adapter(self, state: State) -> Adapter:
        """As of the last finished step."""
        setup = self.setup
        return with_params(setup.scales, setup.layout.split(state.at.vector))

    def checkpoint(self, state: State) -> None:
        """RunError, behind it, if the model is no longer what it was."""
        self._write_best()
        self._attempt(self.path, lambda: self._write(state))
        self.made_of.check_model(state.step)

    def last(self, state: State) -> None:
        """The last finished step, for good; RunError if the disk does not take it."""
        self._write_best()
        try:
            self._write(state)
            self.made_of.finish(state.step)
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"step {state.step}: {self.path} cannot be written ({reason}): make room or give "
                "access, and resume from the last checkpoint there."
            ) from error

    def _write(self, state: State) -> None:
        """Checkpoint and adapter."""
        config, setup = self.config, self.setup
        paired = config.method == "dpo" and not config.reference_free
        data = {"train": setup.train, "valid": setup.valid} if paired else {}
        checkpoint.save(
            self.path,
            state,
            config.keep_checkpoints,
            record=self.made_of.values,
            log_bytes=self.log.sync(),
            apart=setup.apart,
            **{name: references_of(own) for name, own in data.items() if own is not None},
        )
        write_adapter(self.path, self.adapter(state), config)
        if not (self.path / record.NAME).exists():  # the folder had vanished
            self.made_of.write()

    def best(self, state: State) -> None:
        """The adapter as the best there is; one that cannot be written is tried again later."""
        self.unwritten = self.adapter(state)
        self._write_best()

    def _write_best(self) -> None:
        best, path = self.unwritten, self.path / "best"
        if best is not None and self._attempt(path, lambda: write_adapter(path, best, self.config)):
            self.unwritten = None

    def evaluated(self, state: State, name: str) -> None:
        """The adapter of an evaluation, whole or not there."""
        folder = self.path / "checkpoints" / name

        def write() -> None:
            with atomic_folder(folder) as aside:
                write_adapter(aside, self.adapter(state), self.config)

        self._attempt(folder, write)

    def fault(self, fault: Fault) -> None:
        file = self.path / f"fault-step-{fault.step:05d}.json"
        self._attempt(file, lambda: write_json(file, fault.to_json()))

    def result(self, result: TrainResult, vals: list[dict[str, float]]) -> None:
        """metrics.json."""
        summary: dict[str, Any] = {**asdict(result), "adapter_path": str(self.path)}
        config = json.loads(self.config.model_dump_json())
        file, values = self.path / "metrics.json", {"config": config, **summary, "val_losses": vals}
        self._attempt(file, lambda: write_json(file, values))

    def _attempt(self, path: Path, write: Callable[[], None]) -> bool:
        try:
            write()
        except OSError as error:
            self.warn(f"{path} cannot be written ({error.strerror or error}): the run goes on")
            return False
        return True
