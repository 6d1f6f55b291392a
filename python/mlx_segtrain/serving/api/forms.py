"""Requests and responses of /api."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, create_model, model_validator

from ...config import (
    FACETS,
    OF_LOSS,
    REFUSED,
    Method,
    TrainConfig,
    affecting,
    allowed,
    default,
    defaults,
    written,
)
from ...data import Report
from ...fields import Group, Int, choices, is_list, kind
from ...hub_search import Hit
from ...objectives import OBJECTIVES
from ..catalog import DataFolder, Model, Unreadable
from ..jobs.row import Figures, Row
from ..service import Device

#: Columns of a job that clients do not see.
INTERNAL = ("place", "result_json", "begins", "cancelling", "opened", "tags_json", "ranks_json")


#: Maximum number of ranks in a request.
MOST_RANKS = 10_000


class Answer(BaseModel):
    ok: Literal[True] = True


class Problem(BaseModel):
    """An error as one sentence. If a field caused the error, the response also contains the field's
    name, its value and the allowed values."""

    ok: Literal[False] = False
    error: str
    field: str | None = None
    value: Any = None
    allowed: str | None = None


class Closed(BaseModel, extra="forbid"):
    """A request that rejects unknown fields."""


def _fields(names: Iterable[str]) -> type[BaseModel]:
    """Returns a request model with these fields of TrainConfig."""
    known = TrainConfig.model_fields
    own: dict[str, Any] = {name: (known[name].annotation, known[name]) for name in names}
    return create_model("RunFields", __base__=Closed, **own)


def _answer(record: type, but: Sequence[str] = ()) -> type[BaseModel]:
    """Returns a response model with the fields of a dataclass, except those in `but`."""
    own: dict[str, Any] = {x.name: (x.type, ...) for x in fields(record) if x.name not in but}
    return create_model(record.__name__, **own)


class RunRequest(_fields(name for name in TrainConfig.model_fields if name not in REFUSED)):
    """A training run (docs/configuration.md), with the same checks as on the command line. If
    adapter_path is omitted, the server chooses a folder."""

    adapter_path: str | None = None


class Ranked(BaseModel):
    """The number of processes of a training run (docs/distributed.md)."""

    ranks: Int = Field(
        1,
        ge=1,
        le=MOST_RANKS,
        description="The number of processes. The maximum is `ranks` in the response of GET "
        "/api/state.",
    )


class FinetuneSubmit(RunRequest, Ranked):
    """A training run, and the number of its processes."""


class PlanRequest(RunRequest, Ranked):
    """A training run whose data_dir is optional, because memory use does not depend on the data."""

    data_dir: str | None = None


class CopyRequest(PlanRequest):
    """A training run to show as a command, a YAML file and a Python program."""


class EvaluateRequest(
    _fields(["model_dir", "data_dir", *(x for x in affecting("loss") if x not in REFUSED)])
):
    """A model, data, and the settings that affect the loss, which are also the flags of the command
    `eval`. If adapter_path is omitted, the base model is evaluated."""

    adapter_path: str | None = None
    split: Literal["valid", "train"] = "valid"
    with_base: bool = Field(
        False,
        description="Whether to also evaluate the base model. The job's result then contains "
        "`base`.",
    )


class JobRow(_answer(Row, but=INTERNAL)):
    """A job. Its times are UTC in the format "YYYY-MM-DD HH:MM:SS"."""

    title: str = Field(description="The kind of job, as shown to users.")
    name: str = Field(
        description="The job's label or, if it has none, a short description of its inputs."
    )
    trains: bool = Field(
        description="Whether the job is a training run, which saves checkpoints and can continue "
        "from them."
    )
    computes: bool = Field(description="Whether the job needs the accelerator.")
    cancelling: bool = Field(
        description="Whether the job has been cancelled but has not ended yet."
    )
    loss_unit: str | None = Field(
        description="The unit of the losses in the job's events and result."
    )
    rewarded: bool = Field(
        description="Whether the job measures the reward of completions instead of a loss."
    )
    config_json: str | None = Field(
        description="The job's configuration as JSON; null in lists of jobs."
    )
    inputs: list[str] = Field(description="The folders that the job reads.")
    tags: list[str]
    log_path: str
    ranks: Figures | None = Field(
        description="The latest report of each process of a training run with several ranks."
    )
    result: Any = None


class Description(Closed, str_strip_whitespace=True):
    """The label, note and tags of a job. Omitted fields stay unchanged."""

    label: Annotated[str, Field(max_length=120)] | None = None
    note: Annotated[str, Field(max_length=4000)] | None = None
    tags: (
        Annotated[list[Annotated[str, Field(pattern=r"^[^,\s][^,]{0,39}$")]], Field(max_length=10)]
        | None
    ) = None


class JobAnswer(Answer):
    job: JobRow


class JobsAnswer(Answer):
    jobs: list[JobRow]
    next: str | None = Field(
        description="The value to pass as `before` to get the next page; null on the last page."
    )


class Submitted(Answer):
    """The id of the new job, as `job_id` and as `jobId`."""

    job_id: str
    jobId: str
    adapter_path: str | None = None


class FoldSubmitted(Submitted):
    output_dir: str


class Merge(Closed):
    """A request to merge two adapters into one, or one adapter into its base model."""

    adapter_a: str | None = None
    adapter_b: str | None = None
    scales: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    model_dir: str | None = None
    adapter_path: str | None = None
    output_dir: str | None = None
    dequantize: bool = False
    bits: Literal[2, 3, 4, 5, 6, 8] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "Merge":
        two = self.adapter_a is not None and self.adapter_b is not None
        fold = self.model_dir is not None and self.adapter_path is not None
        if two == fold or (fold and (self.adapter_a or self.adapter_b or self.scales)):
            raise ValueError(
                "set adapter_a and adapter_b (and scales) to merge two adapters, or model_dir and "
                "adapter_path to merge one into its base model"
            )
        return self


class Stats(BaseModel):
    layersMerged: int
    layersOnlyInOne: int
    totalKeysOut: int
    sources: list[str]
    scales: list[float]


class Merged(Answer):
    job_id: str
    merged_path: str
    stats: Stats


class Copies(Answer):
    """A training run as a command, as a YAML file and as a Python program."""

    command: str
    yaml: str
    python: str


class Settings(Closed):
    """The content of a YAML file for `train --config`."""

    yaml: Annotated[str, Field(max_length=1 << 16)]


class Fault(BaseModel):
    field: str | None = Field(
        description="The name of the invalid or unknown setting; null if the error is not "
        "about one particular setting."
    )
    message: str


class ReadSettings(Answer):
    """The settings that were recognized in a file, and the errors in the file."""

    values: dict[str, Any]
    faults: list[Fault]


class Uploaded(Answer):
    path: str = Field(
        description="The path of the folder that contains the uploaded file. Pass it as `data_dir` "
        "or `adapter_path`."
    )
    size_bytes: int = Field(description="The size of the uploaded file.")


class Export(Closed):
    base_model: str | None = Field(
        None,
        description="The adapter's base model. Default: the model named in the adapter's files.",
    )
    adapter_path: str
    method: Literal["peft", "mlx-lm", "gguf"] = "peft"
    output_dir: str | None = None


class Exported(Answer):
    job_id: str
    export_path: str
    manifest: dict[str, Any]


class Push(Closed):
    """A request to upload a folder or a job's output to a repository on the Hugging Face hub."""

    repo_id: Annotated[str, Field(pattern=r"^\w[\w.-]{0,95}/\w[\w.-]{0,95}$")]
    job_id: str | None = None
    source_path: str | None = None
    private: bool = True

    @model_validator(mode="after")
    def _one_source(self) -> "Push":
        if (self.job_id is None) == (self.source_path is None):
            raise ValueError(
                "set either source_path, or job_id to the id of a job that wrote a folder"
            )
        return self


class Pushed(Answer):
    job_id: str
    url: str


class Download(Closed):
    """A request to download a model or a data set from the Hugging Face hub to the
    server's cache."""

    name: str = Field(description="org/name or org/name@revision.", max_length=600)
    kind: Literal["model", "dataset"] = "model"


class HubAnswer(Answer):
    found: list[Hit]


class HfToken(Closed, str_strip_whitespace=True):
    token: Annotated[str, Field(pattern=r"^[!-~]{1,500}$")]


class HasHfToken(Answer):
    hasToken: bool


class InspectDataset(_fields(affecting("rows"))):
    path: str = Field(
        description="A folder that contains a training file such as train.jsonl, or the path of a "
        "single file."
    )
    model_dir: str | None = Field(
        None,
        description="The model whose tokenizer is used. If omitted, tokens are neither counted nor "
        "shown.",
    )
    n_preview: int = Field(3, ge=0, le=50)
    method: Method | None = None


class Inspected(_answer(Report)):
    format: str


class Planned(Answer):
    fits: bool
    message: str
    plan: dict[str, Any] | None


class FieldRow(BaseModel):
    """A configuration field of a training run. `affects` lists what the field affects besides
    training: memory plans (memory), evaluations (loss) and inspections of data sets (rows). The
    field applies only to the methods in `methods`, or to all methods if that list is empty."""

    name: str
    title: str
    group: str | None = Field(
        description="The section of the web page's form that contains this field; null if the "
        "field is not in the form."
    )
    type: str
    default: str
    defaults: dict[str, dict[str, str]] = Field(
        description="The defaults that apply instead of `default`, by the name and the value of "
        "the setting on which they depend: `method`, or `grpo_loss` with method grpo."
    )
    required: bool
    methods: list[str]
    affects: list[str]
    texts: bool = Field(
        description="For a list: whether its items are free text, which may contain spaces, "
        "instead of names."
    )
    allowed: str
    choices: list[str]
    is_list: bool
    description: str


class Defaults(Answer):
    fields: list[FieldRow]
    groups: list[str] = Field(
        description="The sections of the web page's form, in the order in which they are shown."
    )
    loss_units: dict[str, str] = Field(description="The unit of the loss, by method.")


class ModelsAnswer(Answer):
    """Models, and folders that look like models but cannot be read."""

    models: list[Model]
    faults: list[Unreadable]
    roots: list[str] = Field(description="The folders that were searched.")


class DatasetsAnswer(Answer):
    datasets: list[DataFolder]


class AdapterFolder(BaseModel):
    path: str
    base_model: str | None
    rank: int = Field(description="The largest LoRA rank of any layer.")
    size_bytes: int
    best_loss: float | None = Field(
        description="The lowest validation loss of the run that trained the adapter; null if it is "
        "unknown."
    )


class AdaptersAnswer(Answer):
    adapters: list[AdapterFolder]


class Health(Answer):
    version: str
    model: str | None
    training: bool


class ServeModel(Closed):
    model_dir: str


class Served(Answer):
    id: str
    path: str
    chats: bool = Field(description="Whether the model has a chat template.")


class DeviceRow(_answer(Device)):
    """The device on which jobs run."""

    free_bytes: int = Field(
        description="The amount of memory, in bytes, that a run could use if it started now."
    )


class State(Answer):
    """The state of the server."""

    served: Served | None
    waits: bool = Field(
        description="Whether requests for completions are refused until the current job ends."
    )
    training: bool = Field(description="Whether a job is using the accelerator.")
    needs_token: bool
    downloads: bool = Field(description="Whether clients may download from the Hugging Face hub.")
    ranks: int = Field(description="The maximum number of processes for a training run.")
    device: DeviceRow
    uploads: str = Field(description="The folder that contains all uploaded files.")
    running: list[JobRow]
    waiting: int = Field(description="The number of jobs in the queue.")


def schema() -> Defaults:
    """Returns all fields of a run that the server accepts. The page builds its form from them."""
    units = {method: own.unit for method, own in OBJECTIVES.items()}
    return Defaults(fields=_rows(), groups=list(get_args(Group)), loss_units=units)


def _description(name: str) -> str:
    """Returns a field's description, with its defaults if they depend on other fields."""
    text = TrainConfig.model_fields[name].description or ""
    return f"{text} Default: {defaults(name)}." if FACETS[name].other_default else text


def _rows() -> list[FieldRow]:
    where = {"model_dir": ".", "data_dir": ".", "adapter_path": "."}

    def run(**given: str) -> TrainConfig:
        return TrainConfig.model_validate({**where, **given})

    methods = {method: run(method=method) for method in OBJECTIVES}
    losses = {loss: run(method="grpo", grpo_loss=loss) for loss in OF_LOSS}

    def others(name: str, runs: Mapping[str, TrainConfig], usual: Any) -> dict[str, str]:
        values = {key: getattr(run, name) for key, run in runs.items()}
        return {key: written(value) for key, value in values.items() if value != usual}

    def by_setting(name: str, usual: Any) -> dict[str, dict[str, str]]:
        found = {"grpo_loss": others(name, losses, getattr(methods["grpo"], name))}
        found["method"] = others(name, methods, usual)
        return {key: own for key, own in found.items() if own and key != name}

    return [
        FieldRow(
            name=name,
            title=FACETS[name].title or name.replace("_", " ").capitalize(),
            group=FACETS[name].group,
            type=getattr(kind(field), "__name__", "str"),
            default=default(name),
            defaults={} if name in (*where, "method") else by_setting(name, field.default),
            methods=list(FACETS[name].methods),
            affects=list(FACETS[name].affects),
            texts=FACETS[name].texts,
            required=field.is_required(),
            allowed=allowed(name),
            choices=list(choices(field)),
            is_list=is_list(field),
            description=_description(name),
        )
        for name, field in TrainConfig.model_fields.items()
        if name not in REFUSED
    ]
