"""A job's process: `python -m mlx_segtrain.serving.worker KIND FILE LOCK`.

FILE has its configuration; LOCK is the number of an open file, whose lock lives as long as it does.

Its events go to standard output, a line each, the first of them before anything heavy is imported;
whoever started it may be gone. What the libraries print stands between them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import events
from ..errors import InputError, RunError
from ..files import to_json

if TYPE_CHECKING:
    from ..adapters.folding import Folded

Values = dict[str, Any]


def tell(event: events.Event) -> None:
    """Writes a line, whole."""
    os.write(1, (to_json(event) + "\n").encode())


def done(output_dir: str | Path | None, **result: Any) -> events.Event:
    end: events.Event = {"type": "done", "ts": events.now(), "result": result}
    return end if output_dir is None else {**end, "output_dir": str(output_dir)}


def finetune(values: Values) -> events.Event:
    from ..config import load_config
    from ..curves import draw_run
    from ..training import train

    config = load_config(None, values)

    def pass_on(event: events.Event) -> None:
        if event["type"] not in ("started", "done", "failed"):  # these are the job's own
            tell(event)

    result = train(config, pass_on)
    draw_run(config, lambda message: tell(events.warning(message)))
    if result.interrupted:
        kept = f"step {result.steps} is kept in {result.adapter_path}" if result.steps else ""
        return {"type": "cancelled", "ts": events.now(), "step": result.steps, "message": kept}
    facts = asdict(result)
    facts.pop("applied_ranks")
    return done(result.adapter_path, **facts | {"adapter_path": str(result.adapter_path)})


def evaluate(values: Values) -> events.Event:
    from ..config import load_config
    from ..training import evaluate

    split = values.pop("split")
    adapter = values.get("adapter_path")
    config = load_config(None, {"adapter_path": "unused", **values})
    tell(events.stage("load", 0.05, f"{split} rows of {config.data_dir}"))
    result = evaluate(config, config.adapter_path if adapter else None, split=split)
    return done(None, **asdict(result))


def fold(values: Values) -> events.Event:
    from ..adapters.conversion import DTYPES
    from ..adapters.folding import fold
    from ..adapters.merging import weighted

    adapter = weighted([Path(values["adapter_path"])], model_dir=Path(values["model_dir"]))
    count = 0

    def count_on(own: Folded) -> None:
        nonlocal count
        count += 1
        message = f"{own.path}: {own.lost:.1%} of the update lost"
        tell(events.stage("fold", count / len(adapter.tensors), message))

    report = fold(
        adapter,
        Path(values["model_dir"]),
        Path(values["output_dir"]),
        dequantize=values["dequantize"],
        bits=values["bits"],
        dtype=DTYPES.get(values["dtype"]),
        on_linear=count_on,
    )
    swallowed = [own.path for own in report.swallowed]
    facts = {"linears": len(report.linears), "swallowed": swallowed, "size_bytes": report.size}
    return done(report.path, lost=report.lost, **facts)


def export(values: Values) -> events.Event:
    from ..adapters.conversion import export

    base = values["base_model"]
    made = export(
        Path(values["adapter_path"]),
        Path(values["output_dir"]),
        values["method"],
        model_dir=Path(base) if base else None,
    )
    return done(made.path, **asdict(made) | {"path": str(made.path), "method": values["method"]})


def merge(values: Values) -> events.Event:
    from ..adapters.merging import merge
    from ..adapters.reading import read_stored

    paths = [Path(path) for path in values["adapters"]]
    own = [set(read_stored(path).tensors) for path in paths]
    made = merge(paths, Path(values["output_dir"]), values["scales"])
    both = set.intersection(*own)
    facts = {"linears_in_all": len(both), "linears_in_some": len(set.union(*own) - both)}
    return done(made.path, **asdict(made) | {"path": str(made.path)}, **facts)


def push(values: Values) -> events.Event:
    from huggingface_hub import HfApi

    hub, repo = HfApi(), values["repo_id"]  # the token is in the environment
    tell(events.stage("load", 0.05, f"{values['source']} to {hub.endpoint}/{repo}"))
    made = hub.create_repo(repo, private=values["private"], exist_ok=True)
    commit = hub.upload_folder(
        repo_id=repo,
        folder_path=values["source"],
        commit_message="Adapter of mlx_segtrain",
        ignore_patterns=NOT_PUSHED,
    )
    return done(None, url=str(made), commit=commit.oid)


#: What of a run's folder is its own: the state to go on from, and what others keep of it.
NOT_PUSHED = ["state/*", "checkpoints/*", "best/*", ".*", "*/.*", "metrics.jsonl"]

KINDS: dict[str, Callable[[Values], events.Event]] = {
    "finetune": finetune,
    "fold": fold,
    "export": export,
    "merge": merge,
    "evaluate": evaluate,
    "push": push,
}


def main(kind: str, file: str, lock: str) -> int:
    """0, 1 (it failed) or 130 (it was cancelled)."""
    os.set_inheritable(int(lock), False)  # processes of libraries may live longer
    tell({**events.started(), "pid": os.getpid(), "kind": kind})
    if kind != "finetune":  # which ends in good order by itself
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        end = KINDS[kind](json.loads(Path(file).read_text(encoding="utf-8")))
    except KeyboardInterrupt:
        end = {"type": "cancelled", "ts": events.now(), "message": "nothing was written"}
    except (InputError, RunError) as error:
        end = {"type": "failed", "ts": events.now(), "error": str(error)}
    except Exception as error:
        # For people to mend: the log has the place, the answer to a client a sentence.
        import traceback

        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        end = events.failed(error)
    tell(end)
    return {"done": 0, "failed": 1, "cancelled": 130}[end["type"]]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
