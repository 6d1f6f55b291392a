"""Uploads files of data sets and adapters, and downloads their folders as ZIP archives.

Each upload has its own folder in the store. A file is written under a temporary name, and renamed
when it is complete and verified.
"""

import asyncio
import os
import re
import shutil
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Request
from fastapi import Path as InPath
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ... import files
from ...data.limits import told
from ...data.sources import SPLITS, format_of, split_in, stem_of
from ...errors import InputError
from ...hub import MARGIN
from ...lora.folder import CONFIG, PEFT_WEIGHTS, UNPADDED, WEIGHTS
from ..jobs import pushing
from ..jobs.queue import Conflict
from ..service import Service
from . import forms
from .dependencies import Used
from .guard import PATIENCE_S
from .routes import problems

#: File objects, keyed by their names in an archive.
Opened = Mapping[str, BinaryIO]
Kind = Literal["datasets", "adapters"]
#: The files of an adapter that may be uploaded.
OF_ADAPTER = (CONFIG, WEIGHTS, UNPADDED, PEFT_WEIGHTS)
#: Advice at the end of error messages.
ADVICE = "choose another name"
#: The number of bytes that are read at a time.
BLOCK = 1 << 20
Name = Annotated[str, InPath(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
BINARY = {"schema": {"type": "string", "format": "binary"}}
BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/octet-stream": BINARY}}
}
ARCHIVE: dict[int | str, dict[str, Any]] = {200: {"content": {"application/zip": BINARY}}}

router = APIRouter(
    tags=["models and data"],
    responses=problems(400, 401, 403, 408, 413, 422, 429, 500, 503),
)


@router.put("/api/datasets/{name}/{file}", responses=problems(409), openapi_extra=BODY)
async def put_data(name: Name, file: str, request: Request, service: Used) -> forms.Uploaded:
    """Uploads a file of a data set. The file must be called train or valid, with the extension of
    its format (docs/data.md)."""
    if format_of(Path(file)) is None or stem_of(Path(file)) not in SPLITS:
        raise InputError(
            "a file of a data set must be called train or valid, with the extension of its format: "
            "train.jsonl, train.csv, valid.parquet, …",
            status=422,
        )
    return await _receive(service, "datasets", name, file, request)


@router.put("/api/adapters/{name}/{file}", responses=problems(409), openapi_extra=BODY)
async def put_adapter(name: Name, file: str, request: Request, service: Used) -> forms.Uploaded:
    """Uploads a file of an adapter: its configuration, or its weights in mlx-lm or PEFT format."""
    if file not in OF_ADAPTER:
        names = ", ".join(OF_ADAPTER)
        raise InputError(f"a file of an adapter must be one of {names}.", status=422)
    return await _receive(service, "adapters", name, file, request)


@router.delete("/api/datasets/{name}", responses=problems(404, 409))
async def remove_data(name: Name, service: Used) -> forms.Answer:
    """Deletes an uploaded data set."""
    return await _remove(service, "datasets", name)


@router.delete("/api/adapters/{name}", responses=problems(404, 409))
async def remove_adapter(name: Name, service: Used) -> forms.Answer:
    """Deletes an uploaded adapter."""
    return await _remove(service, "adapters", name)


@router.delete("/api/datasets/{name}/{file}", responses=problems(404, 409))
async def remove_data_file(name: Name, file: Name, service: Used) -> forms.Answer:
    """Deletes a file of an uploaded data set."""
    return await _remove(service, "datasets", name, file)


@router.delete("/api/adapters/{name}/{file}", responses=problems(404, 409))
async def remove_adapter_file(name: Name, file: Name, service: Used) -> forms.Answer:
    """Deletes a file of an uploaded adapter."""
    return await _remove(service, "adapters", name, file)


@router.get("/api/datasets/archive", responses=ARCHIVE, response_model=None)
async def data_archive(path: str, service: Used) -> StreamingResponse:
    """Returns the training and validation files in a folder as a ZIP file. The folder must be in
    one of the server's root directories."""
    return await _archive_of(service, path, _opened_rows)


@router.get("/api/adapters/archive", responses=ARCHIVE, response_model=None)
async def adapter_archive(path: str, service: Used) -> StreamingResponse:
    """Returns the files of an adapter as a ZIP file. The adapter's folder must be in one of the
    server's root directories."""
    return await _archive_of(service, path, _opened_adapter)


# Uploads


async def _remove(service: Service, kind: Kind, name: str, file: str | None = None) -> forms.Answer:
    """Deletes an uploaded folder, or only a file in it. A folder that becomes empty is also
    deleted."""
    place = service.uploads / kind / name
    known = place.is_dir() if file is None else (place / file).is_file()
    if not known:
        what = name if file is None else f"{name}/{file}"
        raise InputError(f"{what} was not uploaded: only uploads can be deleted.", status=404)
    _check_unused(service, place, "cancel it first")
    service.transfers.check_none(place)
    if file is None:
        await run_in_threadpool(files.remove_folder, place)
    else:
        await run_in_threadpool((place / file).unlink)
        await run_in_threadpool(_remove_if_empty, place)
    return forms.Answer()


def _check_unused(service: Service, place: Path, advice: str) -> None:
    """Raises Conflict if a job that has not ended reads this folder or a file in it."""
    for id in service.jobs.live:
        row = service.jobs.store.get(id)
        if row and any(Path(own).is_relative_to(place) for own in row.inputs):
            raise Conflict(f"{id} has not ended and uses {place.name}: {advice}.")


def _role(kind: Kind, file: str) -> str:
    """Returns the role of a file in its folder. A folder may have only one file for each role."""
    if kind == "datasets":
        return stem_of(Path(file))
    return CONFIG if file == CONFIG else "weights"


def _in_the_way(place: Path, kind: Kind, file: str) -> Iterable[str]:
    """Returns the files in a folder that conflict with this file."""
    if kind == "datasets":
        return split_in(place, place, _role(kind, file))
    others = (WEIGHTS, UNPADDED) if file == PEFT_WEIGHTS else (PEFT_WEIGHTS,)
    names = (file,) if file == CONFIG else (file, *others)
    return [name for name in names if (place / name).exists()]


async def _receive(
    service: Service, kind: Kind, name: str, file: str, request: Request
) -> forms.Uploaded:
    place = service.uploads / kind / name
    path = place / file
    with service.transfers.place(place / _role(kind, file)):
        for other in _in_the_way(place, kind, file):
            raise Conflict(f"{name} already has a file {other}: {ADVICE}.")
        _check_unused(service, place, ADVICE)
        length = request.headers.get("content-length", "")
        _check_room(place, int(length) if length.isdecimal() else 0)
        try:
            await run_in_threadpool(files.make_folder, place)
            size = await _write(service, path, kind, request.stream())
        except ClientDisconnect:
            raise InputError(f"{file} is incomplete: send it again.") from None
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{file} cannot be written: {reason}.") from None
        finally:
            await run_in_threadpool(_remove_if_empty, place)
    return forms.Uploaded(path=str(place), size_bytes=size)


async def _write(service: Service, path: Path, kind: Kind, parts: AsyncIterator[bytes]) -> int:
    """Writes a file and returns its size in bytes. Raises InputError if the content does not match
    the name."""
    most = pushing.MOST_OF_ADAPTER if path.name == CONFIG else None
    with ExitStack() as written:
        aside = written.enter_context(files.atomic(path))
        with open(aside, "xb", opener=files.private) as file:
            async for part in parts:
                await run_in_threadpool(file.write, part)
                _check_room(path, 0)
                if most is not None and file.tell() > most:
                    raise InputError(f"{path.name} is larger than {most >> 20} MiB.", status=413)
            size = file.tell()
        if size == 0:
            raise InputError(f"{path.name} is empty.", status=422)
        if kind == "adapters":
            with open(aside, "rb") as content:
                await run_in_threadpool(pushing.check_content, path, content, "kept")
        _check_unused(service, path.parent, ADVICE)  # the upload may have taken an hour
        await run_in_threadpool(written.close)  # this may take a while on a slow disk
    return size


def _check_room(place: Path, wanted: int) -> None:
    if files.free(place) < wanted + MARGIN:
        raise InputError("the disk is full: free some space.", status=413)


def _remove_if_empty(place: Path) -> None:
    if place.is_dir() and not any(place.iterdir()):
        os.rmdir(place)


# Downloads


@contextmanager
def _opened_rows(place: Path) -> Iterator[dict[str, BinaryIO]]:
    found = [split_in(place, place, split) for split in SPLITS]
    if not found[0]:
        raise InputError(f"{place} has no training rows: specify the folder of a data set.")
    named = {name: own for split in found for name, own in split.items()}
    with ExitStack() as stack:
        with told(place):
            opened = {name: stack.enter_context(files.open_regular(x)) for name, x in named.items()}
        yield opened


_opened_adapter = partial(pushing.opened, done="downloaded", models=False)


async def _archive_of(
    service: Service, path: str, opened: Callable[[Path], AbstractContextManager[Opened]]
) -> StreamingResponse:
    """Returns the archive of a folder below the roots. The folder's files are opened and checked
    in a thread before the response starts. The archive occupies a transfer slot."""
    with ExitStack() as held:
        held.enter_context(service.transfers.place())

        def look() -> tuple[str, Opened]:
            place = service.roots.resolve(path)
            return place.name, held.enter_context(opened(place))

        name, found = await service.looks.run(look)
        return Archive(name, found, held.pop_all())


class Archive(StreamingResponse):
    """A response that sends open files as a ZIP file. When the response ends, `held` is closed,
    which closes the files and frees a transfer slot. A client that reads too slowly is
    disconnected."""

    def __init__(self, name: str, opened: Opened, held: ExitStack) -> None:
        shown = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII) or "files"
        how = {"content-disposition": f'attachment; filename="{shown}.zip"'}
        super().__init__(_archive(opened), media_type="application/zip", headers=how)
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with closing(self.held):
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Any) -> None:
            await asyncio.wait_for(send(message), PATIENCE_S)

        await super().stream_response(send_in_time)


class _Sink:
    """A buffer between the writer of the ZIP file and the response."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, part: bytes) -> int:
        self.parts.append(bytes(part))
        return len(part)

    def flush(self) -> None:
        pass

    def take(self) -> bytes:
        taken, self.parts = b"".join(self.parts), []
        return taken


def _archive(opened: Opened) -> Iterator[bytes]:
    """Yields the blocks of a ZIP file. The files are not compressed, because weights are barely
    compressible."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[arg-type]
        for name, file in opened.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as out:
                while block := file.read(BLOCK):
                    out.write(block)
                    yield sink.take()
    yield sink.take()


def clean(uploads: Path) -> None:
    """Removes temporary files that a killed server did not remove."""
    for folder in uploads.glob("*/*"):
        if folder.is_dir():
            files.clean(folder)
            _remove_if_empty(folder)
    for leftover in uploads.glob("*/.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
