"""Chooses and checks the folders to which jobs write."""

import time
from pathlib import Path

from ...config import TrainConfig
from ...errors import InputError, either
from ...training import record
from ...training.contents import check_own
from ..roots import Roots
from .queue import Jobs

#: Folders in the store that contain outputs.
OUTPUTS = ("adapters", "exports", "models")


class Outputs:
    """The output folders of jobs. `store` is the server's own folder."""

    def __init__(self, store: Path, roots: Roots, jobs: Jobs):
        self.store, self.roots, self.jobs = store.resolve(), roots, jobs

    def check_run(self, config: TrainConfig) -> None:
        """Raises InputError unless the run's folder is new, or contains an earlier run whose files
        the new run may remove."""
        path = config.adapter_path
        self._check_place(path)
        store = self.store
        near = [*self.roots.folders, store, store / "jobs", config.model_dir, config.data_dir]
        near += [config.warm_start] if config.warm_start else []
        if any(other.is_relative_to(path) for other in near) or any(
            path.is_relative_to(other) for other in (store / "jobs", config.model_dir)
        ):
            raise InputError(
                f"adapter_path {path} overlaps a folder with other contents, such as the model or "
                "the data: choose a separate folder.",
                field="adapter_path",
            )
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        try:
            record.read(path)
            check_own(path)
        except InputError as error:
            raise InputError(
                f"adapter_path {path} exists and does not contain a run: choose another folder. "
                f"{error}",
                field="adapter_path",
            ) from None
        if not (config.overwrite or config.resume):
            raise InputError(
                f"adapter_path {path} already contains a run: choose another folder, or set "
                "resume or overwrite.",
                field="adapter_path",
            )

    def given(self, text: str | None, kind: str) -> Path:
        """Returns the folder that a client names, or a new folder if the client names none. Raises
        InputError if the folder already exists."""
        out = self.new(kind) if text is None else self.roots.resolve(text)
        self._check_place(out)
        if out.exists():
            raise InputError(f"{out} already exists: choose another folder.")
        return out

    def _check_place(self, out: Path) -> None:
        """Raises InputError for a path that is in the store but not below one of its output
        folders."""
        store = self.store
        if out.is_relative_to(store):
            parts = out.relative_to(store).parts
            if len(parts) < 2 or parts[0] not in OUTPUTS:
                raise InputError(
                    f"{out} is reserved by the store: choose a path inside the store's "
                    f"{either(OUTPUTS)} folder."
                )

    def new(self, kind: str) -> Path:
        """Returns a path in the store that does not exist yet."""
        where = {"export": "exports", "model": "models"}.get(kind, "adapters")
        stamp = time.time_ns() // 1_000_000
        taken = {row.output_path for row in map(self.jobs.store.get, self.jobs.live) if row}
        while True:
            path = self.store / where / f"{kind}-{stamp}"
            if not path.exists() and str(path) not in taken:
                return path
            stamp += 1
