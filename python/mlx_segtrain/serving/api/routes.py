"""/api: the routes for training, data, models and jobs (docs/serving.md)."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Query
from fastapi.responses import PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from sse_starlette import EventSourceResponse, ServerSentEvent

from ... import __version__, hub
from ...config import ROWS
from ...errors import InputError
from ...events import now
from ...objectives import OBJECTIVES
from .. import catalog
from ..generation.mounting import Base
from ..jobs.row import Row
from ..service import Service
from . import copies, forms
from .bodies import JsonRoute
from .dependencies import Used
from .guard import PATIENCE_S


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Returns the error responses of a route for the API's schema."""
    return {code: {"model": forms.Problem} for code in codes}


router = APIRouter(
    route_class=JsonRoute,
    responses=problems(400, 401, 403, 408, 413, 422, 429, 500, 503),
)


@router.get("/healthz", tags=["server"])
async def health(service: Used) -> forms.Health:
    """Reports that the server is up, and returns its version and the id of its model. The status is
    503 if the server can no longer generate completions."""
    base = service.engine.base
    if service.engine.fault is not None:
        raise HTTPException(503, service.engine.fault)
    model = None if base is None else base.id
    return forms.Health(version=__version__, model=model, training=service.jobs.training)


@router.get("/metrics", tags=["server"], response_class=PlainTextResponse)
async def metrics(service: Used) -> PlainTextResponse:
    """Metrics for each adapter in Prometheus format: requests, tokens and response times."""
    text = service.engine.metrics.text()
    return PlainTextResponse(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.get("/api/state", tags=["server"])
async def state(service: Used) -> forms.State:
    """The state of the server: running jobs, the served model and the device."""
    running, device = service.jobs.running(), service.device
    return forms.State(
        served=None if (base := service.engine.base) is None else _served(base),
        waits=service.waits,
        training=service.jobs.training,
        needs_token=service.settings.token is not None,
        downloads=service.settings.downloads,
        ranks=len(service.hosts.hosts),
        device=forms.DeviceRow(**vars(device), free_bytes=device.free_bytes),
        uploads=str(service.uploads),
        running=[_shown(service, row) for row in running],
        waiting=len(service.jobs.live) - len(running),
    )


@router.get("/api/models", tags=["models and data"])
async def models(service: Used) -> forms.ModelsAnswer:
    """Lists the models in the server's root directories (`--root`)."""
    faults: list[catalog.Unreadable] = []
    found, roots = await service.models(faults), map(str, service.roots.folders)
    return forms.ModelsAnswer(models=found, faults=faults, roots=list(roots))


@router.post("/api/models/serve", tags=["models and data"])
async def serve(body: forms.ServeModel, service: Used) -> forms.Served:
    """Loads a model for /v1. It replaces the model that is being served."""
    return _served(await service.serve(body.model_dir))


@router.post("/api/hub/download", tags=["models and data"], responses=problems(409))
async def download(body: forms.Download, service: Used) -> forms.Submitted:
    """Starts a job that downloads a model or a data set from the hub. Requires
    `--allow-downloads`. When the job is done, the name can be used as `model_dir` or `data_dir`."""
    row = service.download(body.name, body.kind)
    return forms.Submitted(job_id=row.id, jobId=row.id)


@router.get("/api/hub/search", tags=["models and data"])
async def search(
    service: Used,
    words: Annotated[str, Query(min_length=2, max_length=100)],
    kind: hub.Kind = "model",
) -> forms.HubAnswer:
    """Lists the models or data sets on the hub whose names contain all of these words, most
    downloaded first. Requires `--allow-downloads`."""
    return forms.HubAnswer(found=await service.search(words, kind))


@router.get("/api/datasets", tags=["models and data"])
async def datasets(service: Used) -> forms.DatasetsAnswer:
    """Lists the folders in the server's root directories that contain a training file, such as
    train.jsonl."""
    return forms.DatasetsAnswer(datasets=await service.datasets())


@router.get("/api/adapters", tags=["models and data"])
async def adapters(service: Used, model_dir: str | None = None) -> forms.AdaptersAnswer:
    """Lists the adapters in the server's root directories that fit the model `model_dir`, or all
    adapters if `model_dir` is omitted."""
    found = await service.adapters(None if model_dir is None else service.place(model_dir))
    rows = [
        forms.AdapterFolder(
            path=str(x.path),
            base_model=x.base or None,
            rank=max(x.ranks, default=0),
            size_bytes=x.size,
            best_loss=x.best_loss,
        )
        for x in found
    ]
    return forms.AdaptersAnswer(adapters=rows)


@router.post("/api/finetune/inspect-dataset", tags=["training"])
async def inspect_dataset(body: forms.InspectDataset, service: Used) -> forms.Inspected:
    """Inspects a data set: returns counts, problems, and which tokens of the first rows are in the
    loss."""
    report = await service.inspect(**body.model_dump())
    return forms.Inspected(**{**vars(report), "format": report.format or "unknown"})


@router.get("/api/finetune/defaults", tags=["training"])
async def defaults() -> forms.Defaults:
    """Lists all configuration fields of a training run, with their allowed values and defaults."""
    return forms.schema()


@router.post("/api/finetune/plan", tags=["training"])
async def plan(body: forms.PlanRequest, service: Used) -> forms.Planned:
    """Estimates the memory usage of a training run without loading the model."""
    values = body.model_dump(exclude_unset=True, exclude={"ranks"})
    return forms.Planned(**vars(await service.plan(values, body.ranks)))


@router.post("/api/finetune/copy", tags=["training"])
async def copy(body: forms.CopyRequest) -> forms.Copies:
    """Returns a training run as a command, as a YAML file and as a Python program."""
    given = {"exclude_none": True, "exclude_unset": True, "exclude": {"ranks"}}
    values = body.model_dump(mode="json", **given)
    values.setdefault("adapter_path", "adapters")  # the default is a folder of this server
    return forms.Copies(
        command=copies.command(values, body.ranks),
        yaml=copies.as_yaml(values),
        python=copies.as_python(values),
    )


@router.post("/api/finetune/read", tags=["training"])
async def read(body: forms.Settings, service: Used) -> forms.ReadSettings:
    """Reads the settings in a YAML file, and lists the errors in it."""
    values, found = await service.looks.run(copies.read_yaml, body.yaml)
    faults = [forms.Fault(field=own.field, message=str(own)) for own in found]
    return forms.ReadSettings(values=values, faults=faults)


@router.post("/api/finetune/submit", tags=["training"], responses=problems(409))
async def submit(body: forms.FinetuneSubmit, service: Used) -> forms.Submitted:
    """Starts a training run as a job."""
    row = service.submit(body.model_dump(exclude_unset=True, exclude={"ranks"}), body.ranks)
    return forms.Submitted(job_id=row.id, jobId=row.id, adapter_path=row.output_path)


@router.post("/api/finetune/evaluate", tags=["training"], responses=problems(409))
async def evaluate(body: forms.EvaluateRequest, service: Used) -> forms.Submitted:
    """Starts a job that computes a model's loss and perplexity on a split of the data, with or
    without an adapter."""
    values = body.model_dump(exclude_unset=True)
    how = values.pop("split", "valid"), values.pop("with_base", False)
    row = service.evaluate(values, *how)
    return forms.Submitted(job_id=row.id, jobId=row.id)


@router.post("/api/finetune/merge", tags=["adapters"], responses=problems(409))
async def merge(body: forms.Merge, service: Used) -> forms.Merged | forms.FoldSubmitted:
    """Losslessly merges two adapters into one, or starts a job that merges an adapter into its
    base model."""
    if body.model_dir is not None and body.adapter_path is not None:
        of_two = {"adapter_a", "adapter_b", "scales"}
        row = service.enqueue("fold", **body.model_dump(exclude=of_two))
        return forms.FoldSubmitted(job_id=row.id, jobId=row.id, output_dir=str(row.output_path))
    sources = [body.adapter_a or "", body.adapter_b or ""]
    row = service.enqueue("merge", adapters=sources, scales=body.scales, output_dir=body.output_dir)
    made = await _result(service, row)
    stats = forms.Stats(
        layersMerged=made["linears_in_all"],
        layersOnlyInOne=made["linears_in_some"],
        totalKeysOut=2 * made["linears"],
        sources=sources,
        scales=body.scales or [1.0, 1.0],
    )
    return forms.Merged(job_id=row.id, merged_path=made["path"], stats=stats)


@router.post("/api/finetune/export", tags=["adapters"], responses=problems(409))
async def export(body: forms.Export, service: Used) -> forms.Exported:
    """Exports an adapter for HF PEFT, stock mlx-lm or llama.cpp."""
    row = service.enqueue("export", **body.model_dump())
    made = await _result(service, row)
    return forms.Exported(job_id=row.id, export_path=made["path"], manifest=made)


@router.post("/api/finetune/push", tags=["adapters"], responses=problems(404, 409))
async def push(body: forms.Push, service: Used) -> forms.Pushed:
    """Uploads an adapter or a model to the Hugging Face hub. Other files in the folder are not
    uploaded."""
    source = body.source_path
    if body.job_id is not None:
        source = service.jobs.get(body.job_id).output_path
    if source is None:
        raise InputError(f"{body.job_id} wrote no folder: choose a job that did.")
    if not service.has_hf_token:
        raise InputError("there is no hub token: POST one to /api/settings/hf-token.")
    row = service.enqueue("push", repo_id=body.repo_id, source=source, private=body.private)
    return forms.Pushed(job_id=row.id, url=(await _result(service, row))["url"])


@router.get("/api/settings/hf-token", tags=["server"])
async def has_hf_token(service: Used) -> forms.HasHfToken:
    """Returns whether the server has a hub token. The token itself is never returned."""
    return forms.HasHfToken(hasToken=service.has_hf_token)


@router.post("/api/settings/hf-token", tags=["server"])
async def set_hf_token(body: forms.HfToken, service: Used) -> forms.Answer:
    """Sets the hub token, which is kept until the server stops and is not written to disk."""
    service.jobs.environment["HF_TOKEN"] = body.token
    return forms.Answer()


@router.delete("/api/sessions", tags=["server"])
async def end_sessions(service: Used) -> forms.Answer:
    """Logs out all browsers, which then have to log in with the token again."""
    service.sessions.close_all()
    return forms.Answer()


@router.get("/api/jobs", tags=["jobs"])
async def list_jobs(
    service: Used,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    kind: Annotated[str | None, Query(max_length=100)] = None,
    before: Annotated[
        int | None, Query(ge=0, lt=1 << 63, description="The value of `next` in the previous page.")
    ] = None,
) -> forms.JobsAnswer:
    """Lists jobs without their configurations, newest first."""
    rows = service.jobs.store.newest(limit, kind, before)
    more = str(rows[-1].place) if len(rows) == limit else None
    return forms.JobsAnswer(jobs=[_shown(service, row) for row in rows], next=more)


@router.get("/api/jobs/{id}", tags=["jobs"], responses=problems(404))
async def job(id: str, service: Used) -> forms.JobAnswer:
    return forms.JobAnswer(job=_shown(service, service.jobs.get(id)))


@router.patch("/api/jobs/{id}", tags=["jobs"], responses=problems(404))
async def describe(id: str, body: forms.Description, service: Used) -> forms.JobAnswer:
    """Sets the label, the note and the tags of a job."""
    given = body.model_dump(exclude_unset=True, exclude_none=True)
    return forms.JobAnswer(job=_shown(service, service.jobs.describe(id, **given)))


@router.post("/api/jobs/{id}/cancel", tags=["jobs"], responses=problems(404, 409))
async def cancel(id: str, service: Used) -> forms.JobAnswer:
    """Cancels a job. A training run saves the state after its last completed step."""
    return forms.JobAnswer(job=_shown(service, service.jobs.cancel(id)))


@router.post("/api/jobs/{id}/resume", tags=["jobs"], responses=problems(404, 409))
async def resume(id: str, service: Used) -> forms.JobAnswer:
    """Requeues a job that failed or was cancelled. A training run resumes from its checkpoint."""
    return forms.JobAnswer(job=_shown(service, service.resume(id)))


@router.delete("/api/jobs/{id}", tags=["jobs"], responses=problems(404, 409))
async def delete(id: str, service: Used) -> forms.Answer:
    """Deletes a job that has ended, and its log. Its outputs are not deleted."""
    service.jobs.remove(id)
    return forms.Answer()


@router.get(
    "/api/jobs/{id}/stream",
    tags=["jobs"],
    response_class=EventSourceResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def stream(
    service: Used,
    id: str,
    after: Annotated[int, Query(ge=0, description="Only events with a higher id are sent.")] = 0,
    last_event_id: Annotated[str | None, Header()] = None,
) -> EventSourceResponse:
    """Streams the events of a job until it has ended, and then sends `event: end`. If `after` is
    set, only later events are sent."""
    if last_event_id and last_event_id.isdecimal() and len(last_event_id) < 16:
        after = int(last_event_id)
    events = _frames(service, id, after)
    return EventSourceResponse(events, sep="\n", send_timeout=PATIENCE_S, ping=15)


def _shown(service: Service, row: Row) -> forms.JobRow:
    name, inputs, method = service.jobs.about(row.id)
    kind, log = row.job_kind, str(service.jobs.log(row.id))
    values = {"title": kind.title, "trains": kind.trains, "computes": kind.computes}
    values |= {**vars(row), "config_json": row.config_json or None}
    values |= {"cancelling": bool(row.cancelling)}  # the row stores an integer
    values |= {"name": row.label or name, "inputs": inputs, "result": row.result}
    unit = OBJECTIVES[method].unit if method in OBJECTIVES else None
    values |= {"loss_unit": unit, "rewarded": ROWS.get(method or "") == "prompt"}
    return forms.JobRow(**values, tags=row.tags, ranks=row.ranks, log_path=log)


def _served(base: Base) -> forms.Served:
    chats = base.tokenizer.has_chat_template
    return forms.Served(id=base.id, path=str(base.path), chats=chats)


async def _result(service: Service, row: Row) -> dict[str, Any]:
    """Waits until a job has ended, and returns its result. Raises InputError if the job failed."""
    end = await service.jobs.ended(row.id)
    if end.status != "done":
        raise InputError(end.error or f"{row.id} was {end.status}.")
    return end.result


async def _frames(service: Service, id: str, after: int) -> AsyncIterator[ServerSentEvent | bytes]:
    yield ServerSentEvent(retry=1500, sep="\n")
    try:
        service.jobs.get(id)
    except InputError as error:
        failed = {"type": "failed", "error": str(error), "ts": now()}
        yield ServerSentEvent(json.dumps(failed), sep="\n")
    else:
        async for found in service.jobs.follow(id, after):
            events = (ServerSentEvent(frame, id=str(place), sep="\n") for place, frame in found)
            yield b"".join(event.encode() for event in events)  # one write is faster than many
    yield ServerSentEvent("{}", event="end", sep="\n")
