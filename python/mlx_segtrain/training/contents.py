"""Checks that a new run removes nothing from its folder except files written by an earlier run."""

import re
from pathlib import Path

from ..errors import InputError
from ..files import ASIDE
from ..lora.folder import CONFIG, OPTIQ_CONFIG, README, UNPADDED, WEIGHTS
from .checkpoint import MANIFEST, STATE, TENSORS

#: The subfolders of an earlier run that a new run in the same folder removes.
REMOVED = (STATE, "checkpoints", "best", "tensorboard")
ADAPTER = "|".join(map(re.escape, (WEIGHTS, UNPADDED, CONFIG, OPTIQ_CONFIG, README)))
#: Matches the paths that a run writes in its folder. The folder names in checkpoints/ come from
#: `evaluated_name`.
OWN = re.compile(
    rf"({STATE}/step-\d+(/({re.escape(TENSORS)}|{re.escape(MANIFEST)}))?"
    rf"|checkpoints/step-\d+(-val-?[\w.]+)?(/({ADAPTER}))?|best/({ADAPTER})"
    r"|tensorboard/events\.out\.tfevents\.[\w.-]+)"
)


def evaluated_name(step: int, loss: float | None) -> str:
    """Returns the name of the folder for the adapter that was evaluated after this step."""
    return f"step-{step:05d}" + ("" if loss is None else f"-val{loss:.4f}")


def check_own(run: Path) -> None:
    """Raises InputError if a folder that is to be removed contains a file that no run has
    written."""
    waiting = [run / name for name in REMOVED]
    for place in waiting:
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise _foreign(run, place)
    while waiting:
        place = waiting.pop()
        for path in place.iterdir() if place.is_dir() else ():
            if ASIDE.fullmatch(path.name):
                continue  # left by a run that was killed
            if not OWN.fullmatch(path.relative_to(run).as_posix()) or path.is_symlink():
                raise _foreign(run, path)
            waiting.append(path)


def _foreign(run: Path, path: Path) -> InputError:
    return InputError(
        f"adapter_path {run} contains {path.relative_to(run)}, which was not written by a run and "
        "which this run would delete: choose another folder, or move the file elsewhere."
    )
