"""The kinds of jobs: everything that depends on a job's kind is declared here.

The functions that run jobs are called in a job's process (worker.py), which sends its first event
before it imports large packages. Therefore these functions import what they need when they are
called.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import events
from ...errors import InputError
from ...files import to_json
from ...hub import title
from ...processes import NETWORK

if TYPE_CHECKING:
    from ...adapters.folding import Folded

Values = dict[str, Any]
#: Minimum seconds between two events about the current step of a run.
STEP_S = 2.0
#: Matches the commit in the pinned name of a data set on the hub.
COMMIT = re.compile("@[0-9a-f]{40}")
#: Environment variables that connections to the hub need.
HUB = ("HF_*", "HUGGING_FACE_HUB_TOKEN", *NETWORK)


@dataclass(frozen=True)
class JobKind:
    """A kind of job."""

    name: str
    title: str  #: the name that users see
    run: Callable[[Values], events.Event]  #: runs the job; returns its last event
    named: Callable[[Values], str]  #: returns a short description of the job's inputs
    computes: bool = False  #: whether the job needs the accelerator; such jobs run one at a time
    variables: tuple[str, ...] = ()  #: additional environment variables
    measures: bool = False  #: whether the job measures a method's loss or reward
    trains: bool = False  #: whether the job saves its state after a signal, and can be resumed
    folders: tuple[str, ...] = ()  #: names of values that are existing folders, or lists of them
    makes: str | None = None  #: the kind of the job's output_dir (outputs.py)
    check: Callable[[Values], None] = lambda values: None  #: raises InputError to refuse the job


def tell(event: events.Event) -> None:
    """Writes an event to stdout, as one line of ASCII."""
    line = memoryview(to_json(event, ascii=True).encode() + b"\n")
    while line:  # a signal may interrupt writing to a pipe
        line = line[os.write(1, line) :]


def done(output_dir: str | Path | None, **result: Any) -> events.Event:
    end: events.Event = {"type": "done", "ts": events.now(), "result": result}
    return end if output_dir is None else {**end, "output_dir": str(output_dir)}


def finetune(values: Values) -> events.Event:
    from ...config import load_config
    from ...training import train
    from ...training.curves import draw_run
    from ...training.ranks import launched

    values.pop("ranks", None)  # group.py has already started the ranks
    config = load_config(None, values)

    def pass_on(event: events.Event) -> None:
        if event["type"] not in ("started", "done", "failed"):  # worker.py sends these events
            tell(event)

    begin = told = time.monotonic()

    def step(metric: events.Event) -> None:
        nonlocal told
        now = time.monotonic()
        # This limits the log of a run of many days to a few thousand such events.
        if now - told >= max(STEP_S, (now - begin) / 500):
            told = now
            tell(events.step(metric))

    first = not launched()  # rank 0, or the only process
    result = train(config, pass_on, on_step=step if first else None)
    if first:
        draw_run(config, lambda message: tell(events.warning(message)))
    if result.interrupted:
        kept = f"step {result.steps} is saved in {result.adapter_path}" if result.steps else ""
        return {"type": "cancelled", "ts": events.now(), "step": result.steps, "message": kept}
    facts = asdict(result)
    facts.pop("applied_ranks")
    return done(result.adapter_path, **facts | {"adapter_path": str(result.adapter_path)})


def evaluate(values: Values) -> events.Event:
    from ...config import ROWS, load_config
    from ...training import evaluate, score

    split, with_base = values.pop("split"), values.pop("with_base", False)
    adapter = values.get("adapter_path")
    config = load_config(None, {"adapter_path": "unused", **values})
    measure = score if ROWS[config.method] == "prompt" else evaluate
    tell(events.stage("load", 0.05, f"{split} rows of {config.data_dir}"))
    base, begin = {}, 0.05

    def pass_on(event: events.Event) -> None:
        share = event.get("share") if event.get("stage") == "evaluate" else None
        end = 0.5 if with_base and not base else 1.0
        tell(event if share is None else event | {"progress": begin + (end - begin) * share})

    if adapter and with_base:
        base = {"base": asdict(measure(config, split=split, on_event=pass_on))}
        begin = 0.5
        tell(events.stage("load", begin, f"{split} rows with the adapter"))
    adapter_path = config.adapter_path if adapter else None
    result = measure(config, adapter_path, split=split, on_event=pass_on)
    return done(None, **asdict(result), split=split, **base)


def fold(values: Values) -> events.Event:
    from ...adapters.conversion import DTYPES
    from ...adapters.folding import fold
    from ...adapters.merging import weighted

    adapter = weighted([Path(values["adapter_path"])], model_dir=Path(values["model_dir"]))
    number = count(1)

    def report_layer(own: Folded) -> None:
        message = f"{own.path}: {own.lost:.1%} of the update lost"
        tell(events.stage("fold", next(number) / len(adapter.tensors), message))

    how = {"dequantize": values["dequantize"], "bits": values["bits"]}
    how["dtype"] = DTYPES.get(values["dtype"])
    base, out = Path(values["model_dir"]), Path(values["output_dir"])
    report = fold(adapter, base, out, **how, on_linear=report_layer)
    swallowed = [own.path for own in report.swallowed]
    facts = {"linears": len(report.linears), "swallowed": swallowed, "size_bytes": report.size}
    return done(report.path, lost=report.lost, **facts)


def export(values: Values) -> events.Event:
    from ...adapters.conversion import export

    adapter, out = Path(values["adapter_path"]), Path(values["output_dir"])
    base = Path(values["base_model"]) if values["base_model"] else None
    made = export(adapter, out, values["method"], model_dir=base)
    return done(made.path, **asdict(made) | {"path": str(made.path), "method": values["method"]})


def merge(values: Values) -> events.Event:
    from ...adapters.merging import merge
    from ...adapters.reading import read_stored

    paths = [Path(path) for path in values["adapters"]]
    own = [set(read_stored(path).tensors) for path in paths]
    made = merge(paths, Path(values["output_dir"]), values["scales"])
    both = set.intersection(*own)
    facts = {"linears_in_all": len(both), "linears_in_some": len(set.union(*own) - both)}
    return done(made.path, **asdict(made) | {"path": str(made.path)}, **facts)


def download(values: Values) -> events.Event:
    from ... import hub
    from ...data.sources import sources_of

    def pass_on(event: events.Event) -> None:
        tell(event | {"progress": event["share"]} if "share" in event else event)

    try:
        if values["kind"] == "model":
            folder = hub.model(values["name"], pass_on)
        else:
            train, _ = sources_of(values["name"], tell=pass_on)
            own = hub.origin(next(iter(train.files.values())))
            assert own is not None  # these files are in the Hugging Face cache
            folder = own.folder / "snapshots" / str(own.revision)
    except KeyboardInterrupt:
        kept = "the downloaded part is kept: another download continues from there"
        return {"type": "cancelled", "ts": events.now(), "message": kept}
    return done(None, path=str(folder), name=values["name"])


def push(values: Values) -> events.Event:
    from . import pushing

    source, repo = Path(values["source"]), values["repo_id"]
    pushed = pushing.push(source, repo, private=values["private"], tell=tell)
    return done(None, url=pushed.url, commit=pushed.commit)


def _can_be_sent(values: Values) -> None:
    from . import pushing

    pushing.check(Path(values["source"]))


def _end(values: Values, name: str) -> str:
    """Returns the last part of a path, or the name of a data set on the hub without its commit."""
    text = str(values.get(name) or "")
    return title(text) if text.startswith("/") else COMMIT.sub("", text)


def _evaluated(values: Values) -> str:
    what = _end(values, "adapter_path") or f"{_end(values, 'model_dir')} alone"
    return f"{what} on {_end(values, 'data_dir')}"


def _named(values: Values) -> str:
    return str(values.get("name"))


def _merged(values: Values) -> str:
    return " + ".join(Path(path).name for path in values.get("adapters", []))


KINDS = {
    kind.name: kind
    for kind in (
        JobKind(
            "finetune",
            "Training",
            finetune,
            lambda values: f"{_end(values, 'model_dir')} on {_end(values, 'data_dir')}",
            computes=True,
            measures=True,
            variables=("WANDB_*", *NETWORK),
            trains=True,
        ),
        JobKind("evaluate", "Evaluation", evaluate, _evaluated, computes=True, measures=True),
        JobKind(
            "fold",
            "Merge into base",
            fold,
            lambda values: f"{_end(values, 'adapter_path')} into {_end(values, 'model_dir')}",
            computes=True,
            folders=("model_dir", "adapter_path"),
            makes="model",
        ),
        JobKind("merge", "Merge", merge, _merged, folders=("adapters",), makes="merged"),
        JobKind(
            "export",
            "Export",
            export,
            lambda values: f"{_end(values, 'adapter_path')} as {values.get('method')}",
            folders=("base_model", "adapter_path"),
            makes="export",
        ),
        JobKind("download", "Download", download, _named, variables=HUB),
        JobKind(
            "push",
            "Push",
            push,
            lambda values: f"{_end(values, 'source')} to {values.get('repo_id')}",
            variables=HUB,
            folders=("source",),
            check=_can_be_sent,
        ),
    )
}


def kind_of(name: str) -> JobKind:
    """Returns the kind of job with this name. For an unknown kind, which a newer version must have
    added, returns a kind whose jobs fail with an error."""
    return KINDS.get(name) or JobKind(name, name.capitalize(), _unknown, lambda values: name)


def _unknown(values: Values) -> events.Event:
    raise InputError(
        "this version of mlx_segtrain does not know this kind of job: install a newer version."
    )
