"""Downloads models, adapters and data sets from the Hugging Face hub to the cache that all Hugging
Face tools share.

A name, `org/name` or `org/name@revision`, is replaced with a folder in this cache as early as
possible; `origin` converts the folder back to the name. Files in the cache are used without a
request, and only the files that are needed are downloaded. Unlike with the hub's own client, an
interrupted download continues where it stopped, even in a new process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from . import events, files
from .errors import InputError, reason

if TYPE_CHECKING:
    from .config import TrainConfig

Kind = Literal["model", "dataset"]
PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[\w-])?"
NAME = re.compile(rf"(?P<id>{PART}/{PART})(?:@(?P<revision>[\w.][\w./-]{{0,200}}))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
#: Matches the folder of a repository in the cache, or the folder of one of its snapshots.
FOLDER = re.compile(
    r"(?P<kind>models|datasets)--(?P<org>[^/]+?)--(?P<name>[^/]+)(/snapshots/(?P<revision>[^/]+))?"
)
#: Matches the hash under which the cache stores a file's content.
ETAG = re.compile(r"[\w.-]{8,128}", re.ASCII)

#: The name endings of the files required for a model.
OF_MODEL = (".safetensors", ".json", ".jinja", ".model", ".tiktoken", "merges.txt", "vocab.txt")
#: The folders in a repository that can contain files of a model.
BELOW_MODEL = ("", "optiq", "additional_chat_templates")
WEIGHTS = re.compile(r"model[^/]*\.safetensors")
OF_ADAPTER = re.compile(r"adapter\w*\.safetensors|[^/]+\.json")
#: The size in bytes of the largest file that the hub serves in one piece. Xet's client downloads
#: larger files.
MOST_AT_ONCE = 50_000_000_000
#: MARGIN is the number of bytes to leave free on the disk, PATIENCE_S the timeout for a response in
#: seconds, and TELL_S the interval between events in seconds.
MARGIN, PATIENCE_S, TELL_S = 200_000_000, 10.0, 0.25
#: HEADER is the number of bytes in the first request for the header of a weight file, and
#: MOST_HEADER the maximum size of a header.
HEADER, MOST_HEADER = 1 << 18, 32 << 20
#: A download fails after this many successive connections that deliver no data.
TRIES = 5


@dataclass(frozen=True)
class Repository:
    """A repository on the hub. Without a revision, the cached commit is used if its files are
    complete, and otherwise the newest commit."""

    id: str
    revision: str | None = None
    kind: Kind = "model"

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"

    @property
    def folder(self) -> Path:
        """The folder of the repository in the cache."""
        return cache() / f"{self.kind}s--{self.id.replace('/', '--')}"

    @property
    def page(self) -> str:
        return f"{endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"


def cache() -> Path:
    """Returns the folder in which the hub's client stores downloads. The user's token is in its
    parent folder."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def offline() -> str | None:
    """Returns the name of the environment variable that forbids requests to the hub, or None if
    they are allowed."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return name
    return None


def named(text: str | Path, kind: Kind = "model") -> Repository | None:
    """Returns the repository that `text` names as org/name or org/name@revision, or None if `text`
    is an existing path or is not such a name."""
    found = NAME.fullmatch(str(text))
    if found is None or ".." in found[0] or "--" in found["id"] or Path(text).exists():
        return None
    return Repository(found["id"], found["revision"], kind)


def origin(path: str | Path) -> Repository | None:
    """Returns the repository to which a folder in the cache belongs, with its commit, or None for
    other folders."""
    found = FOLDER.search(str(path))
    if found is None:
        return None
    kind: Kind = "model" if found["kind"] == "models" else "dataset"
    return Repository(f"{found['org']}/{found['name']}", found["revision"], kind)


def title(path: str | Path) -> str:
    """Returns a short name for display, which is org/name for a folder from the hub, and otherwise
    the last part of the path."""
    own = origin(path)
    return Path(path).name if own is None else own.id


def name_of(path: str | Path) -> str:
    """Returns a name that is valid on other machines if possible: org/name for a folder from the
    hub, otherwise the absolute path of a folder on this machine."""
    own = origin(path)
    if own is not None:
        return own.id
    return str(Path(path).absolute() if Path(path).exists() else path)


def _nobody(event: events.Event) -> None:
    pass


def model(text: str | Path, tell: events.OnEvent = _nobody, *, weights: bool = True) -> Path:
    """Returns the folder of a model, given its path or its name on the hub. Downloads missing
    files.

    Without `weights`, downloads only the configuration and the tokenizer. Raises InputError if the
    model is not available.
    """
    repository = named(text)
    if repository is None:
        return Path(text).expanduser()

    def wanted(file: str) -> bool:
        place, _, name = file.rpartition("/")
        if name.endswith(".safetensors"):
            return weights and WEIGHTS.fullmatch(file) is not None
        return place in BELOW_MODEL and name.endswith(OF_MODEL)

    def check(there: Mapping[str, int]) -> None:
        if any(WEIGHTS.fullmatch(file) for file in there):
            return
        others = sorted({Path(file).suffix for file in there} & {".gguf", ".bin", ".onnx", ".pt"})
        has = f"only {' and '.join(others)} files" if others else "no weights"
        raise InputError(
            f"{repository} has {has}, but MLX reads model*.safetensors: use the repository of the "
            "original weights, which `mlx-segtrain convert NAME --bits 4 --out DIR` can quantize, "
            "or a repository in MLX's format (mlx-community has many)."
        )

    return fetch(repository, wanted, tell, check)


def outline(text: str | Path, tell: events.OnEvent = _nobody) -> Path:
    """Returns the folder of a model for planning, which needs no weights. If the weights are not in
    the cache, the folder contains sparse weight files with the real headers and sizes."""
    repository = named(text)
    if repository is None or cached(text) is not None:
        return model(text, tell)
    folder = model(text, tell, weights=False)
    exact = replace(repository, revision=folder.name)
    place = _listing(exact, folder.name).with_suffix("") / "headers"
    files.make_folder(place)
    for path in folder.iterdir():
        with suppress(FileExistsError):
            (place / path.name).symlink_to(path)
    for name, size in files_of(folder).items():
        if WEIGHTS.fullmatch(name) and not (place / name).exists():
            tell(events.stage("load", 0.0, f"reading the header of {repository.id}, {name}"))
            header = _header(exact, name)
            with files.atomic(place / name) as aside, open(aside, "wb") as file:
                file.write(header)
                file.truncate(max(size, len(header)))
    return place


def adapter(text: str | Path, tell: events.OnEvent = _nobody) -> Path:
    """Returns the folder of an adapter, given its path or its name on the hub. Downloads missing
    files. Raises InputError if the adapter is not available."""
    repository = named(text)
    if repository is None:
        return Path(text).expanduser()
    return fetch(repository, lambda file: OF_ADAPTER.fullmatch(file) is not None, tell)


def located(
    config: TrainConfig,
    tell: events.OnEvent = _nobody,
    earlier: Mapping[str, str] | None = None,
    bring: Callable[[Path, events.OnEvent], Path] = model,
) -> TrainConfig:
    """Returns the configuration, in which local folders replace names on the hub. `bring` is the
    function that returns the folder of a model.

    `earlier` contains the folders of the run that is resumed. A name without a revision refers to
    the same commit as in that run.
    """

    def at(path: Path, part: str) -> Path:
        before = origin((earlier or {}).get(part, ""))
        same = before is not None and named(path) == Repository(before.id)
        return Path(str(before)) if same else path

    places = {"model_dir": bring(at(config.model_dir, "model"), tell)}
    if config.warm_start is not None:
        places["warm_start"] = adapter(at(config.warm_start, "warm_start"), tell)
    if config.reward_model is not None:
        places["reward_model"] = bring(at(config.reward_model, "reward_model"), tell)
    return config.model_copy(update=places)


def fetch(
    repository: Repository,
    wanted: Callable[[str], bool],
    tell: events.OnEvent = _nobody,
    check: Callable[[Mapping[str, int]], None] = lambda there: None,
    *,
    ask: bool = True,
) -> Path:
    """Returns the snapshot of a repository in the cache, after downloading the `wanted` files that
    are missing.

    `tell` receives at most four events per second. Their stage is `load`, and their `share` is the
    fraction of the download that is complete. `check` receives the sizes of the repository's files,
    keyed by name, and raises InputError if the files cannot be used. Without `ask`, no request is
    sent.
    """
    folder, listed = _cached(repository)
    if folder is not None and listed is not None and _has(folder, listed, wanted):
        check(listed)
        return folder
    forbidden = offline()
    if forbidden or not ask:
        if folder is not None and listed is None and _seems_whole(folder, repository.kind):
            return folder
        if ask:
            why = f"{forbidden} forbids requests: unset it, or copy the repository to this folder"
        else:
            why = "this command downloads nothing: download the repository first"
        raise InputError(f"{repository} is incomplete in {cache()}, but {why}.")
    try:
        commit, listed = _listed(repository)
    except _Unreachable as error:
        if folder is not None and listed is None and _seems_whole(folder, repository.kind):
            return folder
        raise InputError(
            f"{repository} is not a local folder, and the hub cannot be reached ({error}): check "
            f"the network, or download the repository on another machine and copy it to {cache()}."
        ) from None
    check(listed)
    # The configuration and the tokenizer are downloaded first, so a snapshot with all weights is
    # complete.
    names = sorted(filter(wanted, listed), key=lambda name: (WEIGHTS.match(name) is not None, name))
    _download(repository, commit, {name: listed[name] for name in names}, tell)
    files.make_folder(repository.folder / "snapshots" / commit)
    files.make_folder(_listing(repository, commit).parent)
    files.write_json(_listing(repository, commit), listed)
    return repository.folder / "snapshots" / commit


# The cache


def _listing(repository: Repository, commit: str) -> Path:
    """Returns the path of the file that records the names and sizes of a commit's files, which
    never change."""
    return files.cache_dir() / "hub" / repository.folder.name / f"{commit}.json"


def _cached(repository: Repository) -> tuple[Path | None, dict[str, int] | None]:
    """Returns the snapshot in the cache, and the sizes of the files in its commit, keyed by name.
    Either is None if it is not available."""
    commit = repository.revision or "main"
    if not COMMIT.fullmatch(commit):
        try:
            commit = files.read_at_most(repository.folder / "refs" / commit, 200).strip()
        except (OSError, ValueError):
            return None, None
    folder = repository.folder / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not folder.is_dir():
        return None, None
    try:
        listed = files.read_json(_listing(repository, commit), 64 << 20)
    except InputError:
        return folder, None
    return folder, listed


def cached(text: str | Path, kind: Kind = "model") -> Path | None:
    """Returns the folder for a name on the hub if the cache contains all of its files, otherwise
    None. Sends no request."""
    repository = named(text, kind)
    folder, listed = (None, None) if repository is None else _cached(repository)
    if folder is None:
        return None
    if listed is None:
        return folder if _seems_whole(folder, kind) else None
    return folder if _has(folder, listed, lambda name: bool(WEIGHTS.fullmatch(name))) else None


def _has(folder: Path, listed: Mapping[str, int], wanted: Callable[[str], bool]) -> bool:
    return all((folder / name).is_file() for name in filter(wanted, listed))


def files_of(folder: Path) -> dict[str, int]:
    """Returns the sizes of a snapshot's files in bytes, keyed by name. If another tool has
    downloaded the snapshot, only the files that exist are included."""
    own = origin(folder)
    with suppress(InputError):
        if own is not None:
            return files.read_json(_listing(own, folder.name), 64 << 20)
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _seems_whole(folder: Path, kind: Kind) -> bool:
    """Returns whether a snapshot without a known list of files seems complete. A model must have
    weights, including all files that its index names; a data set must have files."""
    if kind == "dataset":
        return any(path.is_file() for path in folder.rglob("*"))
    own = [path.name for path in folder.glob("*.safetensors") if path.is_file()]
    if not own:
        return False
    wanted: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        with suppress(InputError):
            places = files.read_json(index, 64 << 20).get("weight_map")
            wanted |= set(map(str, places.values())) if isinstance(places, dict) else set()
    return wanted <= set(own)


# Responses of the hub


class _Unreachable(Exception):
    """The hub did not respond."""


#: What the hub's error responses mean, keyed by status code.
REFUSALS = {
    401: "rejects your token: log in again with `hf auth login`, or correct HF_TOKEN",
    403: "does not let you read it: check the permissions of your token",
    429: "has received too many requests from you: wait a while, or log in",
}


@contextmanager
def _answers(repository: Repository) -> Iterator[None]:
    """Converts exceptions of the hub's client to InputError or _Unreachable."""
    from huggingface_hub import errors

    refused = errors.HfHubHTTPError
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f"{repository.id} is gated: accept its licence on {repository.page}, then log in here "
            "with `hf auth login`, or set HF_TOKEN."
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"{repository.id} has no revision {repository.revision or 'main'}: "
            f"see {repository.page}/tree/main for its revisions."
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{repository.id} is neither a path nor a {repository.kind} on the hub that you can "
            "access: check the spelling; if it is private, log in with `hf auth login` or set "
            "HF_TOKEN."
        ) from None
    except refused as error:
        status = getattr(error.response, "status_code", None)
        said = REFUSALS.get(status or 0, f"answered {status}: try again later")
        raise InputError(f"{repository.id} is not available: the hub {said}.") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{repository.id} cannot be downloaded, because the disk that contains {cache()} "
                "is full: free some space and start again to continue the download, or set "
                "HF_HOME to a folder on another disk."
            ) from None
        if isinstance(error, PermissionError | FileExistsError | NotADirectoryError):
            raise InputError(
                f"{repository.id} cannot be written to {cache()} ({error.strerror}): set HF_HOME "
                "to a folder that you own."
            ) from None
        raise _Unreachable(reason(error)) from None
    except _http_error() as error:
        raise _Unreachable(reason(error)) from None


def _http_error() -> type[Exception]:
    """Returns the base class of HTTP errors in the library that the hub's client uses, which is
    httpx or a later replacement."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]  # type: ignore[return-value]


def _listed(repository: Repository) -> tuple[str, dict[str, int]]:
    """Returns the newest commit of the repository's revision, and the sizes of its files, keyed by
    name."""
    from huggingface_hub import HfApi

    with _answers(repository):
        info: Any = HfApi(endpoint=endpoint()).repo_info(
            repository.id,
            repo_type=repository.kind,
            revision=repository.revision,
            files_metadata=True,
            timeout=PATIENCE_S,
        )
    named = {own.rfilename: own.size or 0 for own in info.siblings or ()}
    return info.sha, {name: n for name, n in named.items() if _is_below(name)}


def _is_below(name: str) -> bool:
    """Returns whether a file name stays inside the folder of the repository."""
    return not name.startswith("/") and not {"", ".", ".."} & set(name.split("/"))


# Downloads


class Meter:
    """Counts received bytes, and reports the progress every TELL_S seconds."""

    def __init__(self, what: str, total: int, tell: events.OnEvent):
        self.what, self.there, self.total, self.tell = what, 0, total, tell
        self.told, self.begun = 0.0, time.monotonic()

    def __call__(self, n: int) -> None:
        self.there += n
        now = time.monotonic()
        if now - self.told < TELL_S and self.there != self.total:
            return
        self.told, share = now, min(1.0, self.there / max(1, self.total))
        text = f"downloading {self.what}: {amount(self.there)} of {amount(self.total)}"
        rate = self.there / max(1e-3, now - self.begun)
        left_s = (self.total - self.there) / rate if rate > 0 else None
        self.tell(events.stage("load", 0.01 * share, text, share=share, left_s=left_s))


def amount(n: float) -> str:
    """Formats a number of bytes in MB or GB."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _download(
    repository: Repository, commit: str, sizes: Mapping[str, int], tell: events.OnEvent
) -> None:
    """Downloads files of a commit to the cache. `sizes` maps the names of the files to their sizes
    in bytes. Raises InputError if a download fails."""
    snapshot = repository.folder / "snapshots" / commit
    missing = [name for name in sizes if not (snapshot / name).is_file()]
    total = sum(sizes[name] for name in missing)
    parts = list((repository.folder / "blobs").glob(f"*{BEGUN}"))
    there = sum(path.stat().st_size for path in parts)
    free = files.free(repository.folder)
    needed = total - there + MARGIN
    if needed > free:
        raise InputError(
            f"{repository} needs another {amount(needed)}, but only {amount(free)} is free on the "
            f"disk that contains {cache()}: free some space, or set HF_HOME to a folder on another "
            "disk."
        )
    meter = Meter(str(repository), total, tell)
    exact = replace(repository, revision=commit)
    try:
        with _quiet():
            for name in missing:
                with _answers(repository):
                    _bring(exact, name, sizes[name], meter)
        if repository.revision != commit:
            ref = repository.folder / "refs" / (repository.revision or "main")
            files.make_folder(ref.parent)
            files.write_text(ref, commit)
    except _Unreachable as error:
        raise InputError(
            f"the download of {repository} stopped after {amount(meter.there)} of {amount(total)} "
            f"({error}): start again to continue the download."
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the progress bars and log lines of the hub's client, since we report progress and
    errors ourselves."""
    from huggingface_hub import utils

    bars, level = utils.are_progress_bars_disabled(), utils.logging.get_verbosity()
    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        utils.logging.set_verbosity(level)
        if not bars:
            utils.enable_progress_bars()


#: The suffix of an incomplete file. Unlike the suffix that the hub's client uses, it is always the
#: same, so a later process finds the file.
BEGUN = ".segtrain.incomplete"


def _bring(repository: Repository, name: str, size: int, meter: Meter) -> None:
    """Downloads a file to the cache, or only the missing part of an incomplete file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    where: Any = {"repo_type": repository.kind, "revision": repository.revision}
    if size > MOST_AT_ONCE:
        hf_hub_download(repository.id, name, cache_dir=cache(), endpoint=endpoint(), **where)
        meter(size)
        return
    url = hf_hub_url(repository.id, name, endpoint=endpoint(), **where)
    facts = get_hf_file_metadata(url, endpoint=endpoint(), timeout=PATIENCE_S)
    if facts.etag is None or not ETAG.fullmatch(facts.etag):
        raise InputError(
            f"{repository.id}: the hub has no checksum for {name}, so the file cannot be verified."
        )
    blob = repository.folder / "blobs" / facts.etag
    files.make_folder(blob.parent)
    _fill(repository, name, url, blob, facts.size, meter)
    link = repository.folder / "snapshots" / str(repository.revision) / name
    files.make_folder(link.parent)
    try:
        link.symlink_to(os.path.relpath(blob, link.parent))
    except FileExistsError:
        pass
    except OSError:  # the file system may not support links
        os.replace(blob, link)


def _fill(
    repository: Repository, name: str, url: str, blob: Path, size: int | None, meter: Meter
) -> None:
    """Downloads the content of a file, and adds it to the cache once it is complete and
    verified."""
    begun = blob.with_name(blob.name + BEGUN)
    with open(os.open(begun, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        while not files.lock(file):  # another process is downloading the file
            time.sleep(0.1)
        if blob.exists():
            meter(blob.stat().st_size)
            begun.unlink(missing_ok=True)
            return
        there = file.seek(0, os.SEEK_END)
        if size is not None and there > size:  # left over from another attempt
            there = file.truncate(0)
        meter(there)
        _receive(url, file, size, meter)
        if not _is(file, blob.name):
            file.truncate(0)
            raise InputError(
                f"{name} of {repository.id} did not match the hub's checksum and was removed: "
                "start again to download it."
            )
        files.sync_open(file.fileno())
        os.replace(begun, blob)


def _receive(url: str, file: BinaryIO, size: int | None, meter: Meter) -> None:
    """Appends the missing bytes of a file, up to its `size` if it is known. Reconnects when a
    connection ends, but fails after TRIES successive connections that delivered no bytes."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers, tries = {**build_hf_headers(), "accept-encoding": "identity"}, 0
    while (there := file.seek(0, os.SEEK_END)) != size:
        part = {"range": f"bytes={there}-"} if there else {}
        before, ended = there, None
        try:
            # The hub may redirect to another host; the client does not send the token there.
            how: Any = {"headers": headers | part, "timeout": PATIENCE_S, "follow_redirects": True}
            with get_session().stream("GET", url, **how) as answer:
                hf_raise_for_status(answer)
                if there and answer.status_code != 206:
                    file.truncate(0)
                    there = file.seek(0)
                    meter(-before)
                for piece in answer.iter_bytes():
                    there += file.write(piece)
                    meter(len(piece))
                    if size is not None and there > size:
                        break
            if size is None:
                return
        except _http_error() as error:
            ended = error
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
        if size is not None and there > size:
            file.truncate(0)
            raise OSError(f"the hub sent more than the expected {size:,} bytes of a file")
        tries = 0 if there > before else tries + 1
        if tries == TRIES:
            raise ended or OSError("no more data arrived")
        if ended is not None:
            time.sleep(1)


def _header(repository: Repository, name: str) -> bytes:
    """Downloads the beginning of a safetensors file, up to the end of its header. Raises InputError
    if the header is invalid."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(repository.id, name, revision=repository.revision, endpoint=endpoint())
    found, wanted = b"", HEADER
    try:
        with _answers(repository):
            while len(found) < wanted:
                part = {"range": f"bytes={len(found)}-{wanted - 1}", "accept-encoding": "identity"}
                how: Any = {"timeout": PATIENCE_S, "follow_redirects": True}
                headers = build_hf_headers() | part
                before = found
                with get_session().stream("GET", url, headers=headers, **how) as answer:
                    hf_raise_for_status(answer)
                    found = found if answer.status_code == 206 else b""
                    for piece in answer.iter_bytes():
                        found += piece
                        if len(found) >= wanted:
                            break
                if len(found) < 8 or len(found) <= len(before):
                    break
                wanted = 8 + min(int.from_bytes(found[:8], "little"), MOST_HEADER)
    except _Unreachable as error:
        raise InputError(f"{repository.id}: the hub cannot be reached ({error}).") from None
    return found[:wanted]


def _is(file: BinaryIO, etag: str) -> bool:
    """Returns whether the content of the file matches the etag, if the etag is a hash (SHA-256 or
    git's). Returns True for other etags."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if len(etag) == 64:
        digest = hashlib.sha256()
    elif len(etag) == 40:
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    else:
        return True
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest() == etag
