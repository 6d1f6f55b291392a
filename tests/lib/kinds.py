"""Adds one finished job of each kind to a server's store, and one of an unknown, newer kind."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_segtrain.serving.jobs.kinds import KINDS
from mlx_segtrain.serving.jobs.store import Store

#: For each kind: a job's configuration, its result, and the name shown by the page.
OF_EACH_KIND = {
    "finetune": (
        {"model_dir": "/m/model", "data_dir": "/d/notes"},
        {"final_train_loss": 1.5},
        "Training",
        "model on notes",
    ),
    "evaluate": (
        {"model_dir": "/m/model", "data_dir": "/d/notes", "split": "valid"},
        {"loss": 1.5, "tokens": 10},
        "Evaluation",
        "model alone on notes",
    ),
    "fold": (
        {"model_dir": "/m/model", "adapter_path": "/a/one"},
        {"lost": 0.25},
        "Merge into base",
        "one into model",
    ),
    "merge": ({"adapters": ["/a/one", "/a/two"]}, {"linears": 2}, "Merge", "one + two"),
    "export": ({"adapter_path": "/a/one", "method": "gguf"}, {}, "Export", "one as gguf"),
    "download": (
        {"name": "org/tiny", "kind": "model"},
        {"name": "org/tiny", "path": "/hub/models--org--tiny/snapshots/1"},
        "Download",
        "org/tiny",
    ),
    "push": (
        {"source": "/a/one", "repo_id": "me/one"},
        {"url": "https://hub.example/me/one"},
        "Push",
        "one to me/one",
    ),
}
OF_LATER = {"distill": ({"x": 1}, {"y": 2}, "Distill", "distill")}


@contextmanager
def of_each_kind(store: Path) -> Iterator[dict[str, tuple[str, str, str]]]:
    """Adds a finished job of each kind, and removes the jobs when the context ends. Yields the
    kind, title and name of each job by the job's id."""
    assert set(OF_EACH_KIND) == set(KINDS)
    jobs, known = Store(store / "jobs.sqlite"), {}
    try:
        for kind, (config, result, title, name) in {**OF_EACH_KIND, **OF_LATER}.items():
            id = jobs.add(kind, json.dumps(config), None).id
            own = {"status": "done", "progress": 1.0, "result_json": json.dumps(result)}
            jobs.update(id, **own)
            known[id] = (kind, title, name)
        yield known
    finally:
        for id in known:
            jobs.remove(id)
        jobs.close()
