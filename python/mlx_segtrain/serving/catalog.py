"""Lists models, data sets and adapters below the roots, without loading them."""

import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..adapters import discovery
from ..data.sources import split_in
from ..errors import InputError, reason
from ..hub import FOLDER, title
from ..models.headers import read_shape
from ..models.snapshot import Snapshot
from .roots import CLOSED

#: Maximum depth of the search below a root, and maximum number of folders searched.
DEPTH, MOST = 6, 20_000
#: Maximum number of unreadable folders that are reported.
MOST_FAULTS = 100
#: Names of folders that are skipped, because they contain no user data.
PASSED = {"node_modules", "site-packages", "__pycache__", "state", "blobs", "build"}


@dataclass(frozen=True)
class Model:
    """A model on disk. `bits` is the most common number of bits per weight in quantized layers.
    `fast` tells whether the model runs on the fast path."""

    id: str
    path: str
    family: str
    fast: bool
    bits: int | None
    size_bytes: int
    parameters: int
    max_length: int | None


@dataclass(frozen=True)
class DataFolder:
    """A folder with training rows."""

    path: str
    size_bytes: int
    has_valid: bool


@dataclass(frozen=True)
class Unreadable:
    """A folder that looks like a model, and the reason why it cannot be read."""

    path: str
    error: str


def _reason(error: Exception) -> str:
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return kind + reason(error, 500)


def models(roots: Sequence[Path], faults: list[Unreadable] | None = None) -> list[Model]:
    """Returns models, sorted by name. Folders that look like models but cannot be read are added to
    `faults`."""
    found = []
    for place, files in _folders(roots):
        if {"config.json", "tokenizer_config.json"} <= files:
            try:
                found.append(look(place))
            except Exception as error:  # one broken folder must not hide the others
                if faults is not None and len(faults) < MOST_FAULTS:
                    faults.append(Unreadable(str(place), _reason(error)))
    return sorted(found, key=lambda model: (model.id.lower(), model.path))


def look(path: Path) -> Model:
    """Returns the model in a folder. Raises InputError if the folder contains no model."""
    snapshot = Snapshot(path)
    shape = read_shape(snapshot)
    bits = list(shape.bits.values())
    n = sum(
        math.prod(shape.widths.get(name.removesuffix(".weight"), size))
        for name, (_, size) in shape.tensors.items()
        if name.endswith(".weight")
    )
    return Model(
        id=title(path),
        path=str(path),
        family=shape.family,
        fast=shape.fast,
        bits=max(set(bits), key=bits.count) if bits else None,
        size_bytes=snapshot.size_bytes,
        parameters=n,
        max_length=shape.max_length,
    )


def datasets(roots: Sequence[Path]) -> list[DataFolder]:
    """Returns data sets, sorted by path."""
    found = []
    for place, files in _folders(roots):
        if any(name.startswith("train") for name in files):
            with suppress(OSError, InputError):  # a dangling link
                train, valid = (split_in(place, place, split) for split in ("train", "valid"))
                facts = [path.stat() for path in train.values()]
                if facts and all(stat.S_ISREG(own.st_mode) for own in facts):
                    size = sum(own.st_size for own in facts)
                    found.append(DataFolder(str(place), size, bool(valid)))
    return sorted(found, key=lambda own: Path(own.path))


def adapters(roots: Sequence[Path], base: Path | None) -> list[discovery.Found]:
    """Returns the adapters that can be read, sorted by path. If `base` is given, only adapters that
    fit this model are returned."""
    shape = None if base is None else read_shape(base)
    found = []
    for place, files in _folders(roots):
        if {"adapters.safetensors", "adapter_model.safetensors"} & files:
            with suppress(Exception):  # one broken folder must not hide the others
                own = discovery.look(place, shape)
                if own.fault is None and own.fits is not False:
                    found.append(own)
    return sorted(found, key=lambda own: own.path)


def is_of(adapter: discovery.Found, base: Path) -> bool:
    """Returns whether an adapter's base model has the same name as `base`, ignoring case and
    organization. Returns True if the adapter names no base model."""
    name = title(Path(adapter.base)).rpartition("/")[2].lower()
    return not adapter.base or name == title(base).rpartition("/")[2].lower()


def _folders(roots: Sequence[Path]) -> Iterator[tuple[Path, set[str]]]:
    """Yields folders, each with the names of its files. Links to folders are not followed."""
    seen: set[Path] = set()
    for root in roots:
        for name, folders, files in os.walk(root):
            place = Path(name)
            if place in seen or len(seen) >= MOST:  # a root may be inside another one
                folders.clear()
                continue
            seen.add(place)
            deep = len(place.relative_to(root).parts) >= DEPTH
            hidden = [x for x in folders if x.startswith(CLOSED) or x in PASSED]
            folders[:] = [] if deep else sorted(set(folders) - set(hidden))
            # Skip links, which may point outside the roots, except links to files of the Hugging
            # Face cache.
            links = [file for file in files if os.path.islink(place / file)]
            own = {*files} - {file for file in links if not _is_blob(place, file)}
            if str(place).isprintable():  # a name that cannot be decoded cannot be sent as JSON
                yield place, own


def _is_blob(place: Path, file: str) -> bool:
    """Returns whether a link in the Hugging Face cache points to a file of the same repository."""
    found = FOLDER.search(str(place))
    if found is None or found["kind"] != "models":
        return False
    repository = os.path.join(str(place)[: found.end("name")], "")
    return os.path.realpath(place / file).startswith(repository)
