"""Caches tokenized data in memory-mapped files written by worker processes.

Each source has a folder below cache_dir()/tokens, named by a hash of everything that its tokens
depend on. The folder has a file for each block, and about.json, which is written last. After an
interruption, only the missing blocks are tokenized. Files are never modified in place, because
another run may have mapped them.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .. import events
from ..errors import InputError
from ..files import (
    cache_dir,
    clean,
    hashes,
    lock,
    make_folder,
    read_json,
    remove_folder,
    write_json,
)
from .blocks import Block
from .encoding import Options
from .prompting import Prompting
from .samples import Samples, check_method, check_mixed
from .sources import Source
from .template import Tokenizer
from .workers import Done, cores, in_workers, tokenized

if TYPE_CHECKING:
    import pyarrow as pa

#: The tokens of a source are cached if the total size of its rows is at least SMALL bytes. If it is
#: at least LARGE bytes, several processes tokenize the rows.
SMALL, LARGE = 1 << 20, 8 << 20
#: Extensions of the files in a model's folder that define its tokenizer.
OF_TOKENIZER = (".json", ".jinja", ".model", ".tiktoken", ".txt")
#: The options on which tokens depend.
OF_TOKENS = (
    "format",
    "columns",
    "train_on",
    "append_eos",
    "prompt_format",
    "chat_template_kwargs",
    "tools",
)
PACKAGES = ("mlx-lm", "transformers", "tokenizers", "jinja2")
ABOUT, LOCK = "about.json", "lock"
#: Seconds between two progress events.
PACE_S = 0.3


def folder() -> Path:
    """Returns the folder that contains the cache folder of each source."""
    return cache_dir() / "tokens"


def read_samples(
    source: Source,
    tokenizer: Tokenizer,
    options: Options,
    model_dir: Path | None,
    tell: events.OnEvent,
) -> Samples:
    """Returns all samples of a source. Raises InputError for the first row that cannot be used.

    `model_dir` is the folder of the model to which the tokenizer belongs. If it is given and the
    source is large, the samples are cached.
    """
    blocks = source.blocks()
    first = list(islice(blocks, 2))
    if model_dir is None or (len(first) < 2 and sum(own.size for own in first) < SMALL):
        made = (
            tokenized(i, block, None, tokenizer, options)
            for i, block in enumerate(chain(first, blocks))
        )
        return _joined([_mapped(done.content or b"") for done in _in_order(made)], options)
    del blocks, first
    place = folder() / key_of(source, tokenizer, options, model_dir)
    if batches := _kept(place):
        return _joined(batches, options)
    return _joined(_made(place, source, tokenizer, options, model_dir, tell), options)


def key_of(source: Source, tokenizer: Tokenizer, options: Options, model_dir: Path) -> str:
    """Returns a hash of everything that a source's tokens depend on. Raises InputError."""
    own = {name: getattr(options, name) for name in OF_TOKENS}
    if options.labelled:
        own["labelled"] = True
    own["prompt_format"] = Prompting(options.prompt_format).is_raw(tokenizer)
    files = {
        path.relative_to(model_dir).as_posix(): path
        for path in (*model_dir.iterdir(), *model_dir.glob("additional_chat_templates/*"))
        if path.name.endswith(OF_TOKENIZER) and path.is_file()
    }
    try:
        parts = {
            "content": source.fingerprint(),
            "name": source.name,
            "tokenizer": hashes(files),
            "options": own,
            "code": _code(),
        }
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror or error}.") from None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@lru_cache(1)
def _code() -> list[str]:
    """Returns a hash of the code of mlx_segtrain.data, and the versions of the packages used for
    tokenizing."""
    own = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        own.update(path.read_bytes())
    found = [own.hexdigest()]
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return found


def _joined(batches: Sequence["pa.RecordBatch"], options: Options) -> Samples:
    samples = Samples(batches)
    check_method(samples.formats, options.method)
    check_mixed(samples.formats)
    return samples


def _in_order(made: Iterator[Done]) -> Iterator[Done]:
    """Yields the results in `made`, which must be in the order of the blocks. Raises InputError for
    the first block with an error."""
    first: dict[str, str] = {}
    for done in made:
        _check(done, first)
        first |= {**done.first, **first}
        yield done


def _check(done: Done, before: dict[str, str]) -> None:
    """Raises InputError if a block has an error, or mixes pairs with other rows. `before` maps each
    format that occurs in earlier blocks to the first row of that format."""
    check_mixed({**before, **done.first})
    if done.fault is not None:
        raise InputError(done.fault)


def _mapped(file: Path | bytes) -> "pa.RecordBatch":
    """Returns the record batch in an Arrow file. `file` is either a path, which is mapped into
    memory, or the content of the file. Raises OSError or ValueError if the file is damaged."""
    import pyarrow as pa

    source = pa.memory_map(str(file)) if isinstance(file, Path) else pa.py_buffer(file)
    return pa.ipc.open_file(source).get_batch(0)


def _file(place: Path, index: int) -> Path:
    return place / f"{index:06d}.arrow"


def _kept(place: Path) -> list["pa.RecordBatch"]:
    """Returns the batches in a folder, or [] if the folder is incomplete or a batch is damaged."""
    try:
        about = read_json(place / ABOUT, 64 << 20)
        files = [_file(place, index) for index in range(len(about["sizes"]))]
        if [file.stat().st_size for file in files] != about["sizes"]:
            return []
        batches = [_mapped(file) for file in files]
    except (OSError, ValueError, KeyError, TypeError):  # ArrowInvalid is a ValueError
        return []
    with suppress(OSError):
        os.utime(place / ABOUT)  # marks the last use
    return batches


@dataclass(frozen=True)
class About:
    """The content of about.json: the sizes of the files in bytes, and information for users."""

    sizes: list[int]
    data: str
    model: str
    rows: int
    tokens: int


def _made(
    place: Path,
    source: Source,
    tokenizer: Tokenizer,
    options: Options,
    model_dir: Path,
    tell: events.OnEvent,
) -> list["pa.RecordBatch"]:
    """Creates the missing batches of a source, then returns all of its batches. Raises InputError.

    Only one process at a time creates batches. If the folder is not writable, the new batches stay
    in memory.
    """
    progress = _Progress(source, tell)
    with _alone(place, progress) as fault:
        if batches := _kept(place):  # another process has finished in the meantime
            return batches
        store = None if fault else place
        if fault:
            progress.warn(fault)
        found = {} if store is None else dict(_sound(store))
        for batch in found.values():
            progress.skip(batch)
        try:
            for done in _all_done(source, tokenizer, options, store, found):
                if done.unwritten and store is not None:
                    progress.warn(done.unwritten)
                    store = None
                found[done.index] = _mapped(done.content or _file(place, done.index))
                progress.add(done)
        except InputError:
            with suppress(OSError):  # these rows would fail again
                remove_folder(place)
            raise
        batches = [found[index] for index in sorted(found)]
        if store is not None:
            _finish(place, source, model_dir, batches)
    return batches


def _sound(place: Path) -> Iterator[tuple[int, "pa.RecordBatch"]]:
    """Yields the undamaged batches in a folder, each with its index."""
    for file in place.glob("*.arrow"):
        with suppress(OSError, ValueError):
            yield int(file.stem), _mapped(file)


def _all_done(
    source: Source,
    tokenizer: Tokenizer,
    options: Options,
    store: Path | None,
    found: Mapping[int, "pa.RecordBatch"],
) -> Iterator[Done]:
    """Yields the result of each missing block of a source as soon as the block is tokenized.

    Raises InputError for the first row with an error, after all earlier blocks have been tokenized.
    """
    waiting = {
        index: Done(index, own.size, own.n_rows, own.formats)
        for index, own in ((index, Samples([batch])) for index, batch in found.items())
    }
    have = set(waiting)
    start = next(index for index in count() if index not in have)
    last, why = None, None  # index of the last block needed; read error

    def jobs() -> Iterator[tuple[int, Block, Path | None]]:
        nonlocal why
        try:
            for index, block in enumerate(source.blocks(start), start):
                if last is not None and index > last:
                    return
                if index not in have:
                    yield index, block, store and _file(store, index)
        except InputError as error:  # raised later, since an earlier row may also have an error
            why = str(error)

    small = source.size is not None and source.size < LARGE
    if small or cores() == 1:
        made = (tokenized(*job, tokenizer, options) for job in jobs())
    else:
        made = in_workers(jobs(), tokenizer, options, cores())
    checked, first = 0, {}
    for done in made:
        if done.fault is None:
            yield done
        elif last is None or done.index < last:
            last = done.index
        waiting[done.index] = done
        while own := waiting.pop(checked, None):
            _check(own, first)
            first |= {**own.first, **first}
            checked += 1
    if why is not None:
        raise InputError(why)


@contextmanager
def _alone(place: Path, progress: "_Progress") -> Iterator[str | None]:
    """Prevents other processes from writing to the folder `place`. Yields None, or the reason if
    the folder is not writable."""
    file = None
    try:
        try:
            while file is None:
                make_folder(place)
                file = open(place / LOCK, "w", encoding="utf-8")  # noqa: SIM115 - closed below
                while not lock(file):
                    progress.wait()
                    time.sleep(0.2)
                if not _is_at(file, place / LOCK):  # another process has removed it in the meantime
                    file.close()
                    file = None
            clean(place)
        except OSError as error:
            yield error.strerror or str(error)
            return
        yield None
    finally:
        if file is not None:
            file.close()


def _is_at(file: IO[str], path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _finish(
    place: Path, source: Source, model_dir: Path, batches: Sequence["pa.RecordBatch"]
) -> None:
    samples = Samples(batches)
    about = About(
        sizes=[_file(place, index).stat().st_size for index in range(len(batches))],
        data=source.name,
        model=model_dir.name,
        rows=samples.n_rows,
        tokens=int(samples.lengths.sum()),
    )
    with suppress(OSError):
        write_json(place / ABOUT, asdict(about))


class _Progress:
    """Reports the progress of tokenizing a source, a few times per second."""

    def __init__(self, source: Source, tell: events.OnEvent):
        self.source, self.tell = source, tell
        self.size = self.rows = 0
        self.before = 0, 0
        self.told, self.begun = 0.0, time.monotonic()
        self.waits = False

    def warn(self, reason: str) -> None:
        self.tell(
            events.warning(
                f"the tokens of {self.source.name} cannot be cached in {folder()} ({reason}): they "
                "stay in memory, and the next run will tokenize the data again"
            )
        )

    def wait(self) -> None:
        if not self.waits:
            self.tell(
                events.stage(
                    "data",
                    0.01,
                    f"waiting for another process that is tokenizing {self.source.name}",
                )
            )
        self.waits = True

    def skip(self, batch: "pa.RecordBatch") -> None:
        """Counts a batch that was already cached."""
        own = Samples([batch])
        self.size += own.size
        self.rows += own.n_rows
        self.before = self.size, self.rows

    def add(self, done: Done) -> None:
        self.size += done.size
        self.rows += done.rows
        now = time.monotonic()
        if now - self.told < PACE_S:
            return
        self.told = now
        spent, (size, rows) = now - self.begun, self.before
        share = left_s = None
        if self.source.size:
            share = min(self.size / self.source.size, 1.0)
            left_s = spent * max(self.source.size - self.size, 0) / max(self.size - size, 1)
        per_s = (self.rows - rows) / max(spent, 1e-3)
        self.tell(events.tokenizing(self.source.name, share, self.rows, per_s, left_s))


@dataclass(frozen=True)
class Entry:
    """A folder of cached tokens: its name, its size in bytes, and the time of its last use in
    seconds since 1970. `about` is None if the folder is incomplete."""

    key: str
    size: int
    used: float
    about: About | None


def entries() -> list[Entry]:
    """Returns the entries of the cache, beginning with the most recently used one."""
    found = []
    for place in folder().glob("*/") if folder().is_dir() else ():
        with suppress(OSError):
            files = [file.stat() for file in place.iterdir()]
            about = None
            with suppress(InputError, TypeError):
                about = About(**read_json(place / ABOUT, 64 << 20))
            at = place / ABOUT if about else place
            size = sum(own.st_size for own in files)
            found.append(Entry(place.name, size, at.stat().st_mtime, about))
    return sorted(found, key=lambda own: -own.used)


def prune(keys: Sequence[str]) -> list[str]:
    """Removes the entries with these keys. Returns the keys of entries that were kept because they
    are in use."""
    stay = []
    for key in keys:
        place = folder() / key
        with suppress(FileNotFoundError), open(place / LOCK, "a", encoding="utf-8") as file:
            if lock(file):
                remove_folder(place)
            else:
                stay.append(key)
    return stay
