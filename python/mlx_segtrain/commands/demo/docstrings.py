"""A small data set that every machine has: the docstrings of Python's standard library.

The sources are parsed, not imported. Therefore no module can open a window, start a thread or print
a line, and the rows depend only on the version of Python.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_segtrain import files
from mlx_segtrain.errors import InputError

# Tests, demos, generated tables and vendored copies, whose docstrings do not describe an interface.
SKIPPED = {"antigravity", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "this"}
SKIPPED |= {"turtle", "turtledemo"}

QUESTION_CHARS = 300  # maximum characters; a few signatures are very long
VALID_ROWS = 100  # enough for a stable mean, but few enough to be evaluated in seconds
HELD_OUT_SHARE = 0.1  # as a fraction of the modules

Row = dict[str, Any]


def write_dataset(out_dir: Path, seed: int = 0) -> dict[str, int]:
    """Writes train.jsonl and valid.jsonl (`messages` rows), and returns the number of rows in each.

    No top-level module has rows in both files. The rows depend on the version of Python; `seed`
    determines their order and which modules are held out. Raises InputError if the sources of the
    library are not installed.
    """
    return _write(out_dir, _split(seed))


def write_preferences(out_dir: Path, seed: int = 0) -> dict[str, int]:
    """Writes the rows of `write_dataset` as preference pairs. The question is the prompt, and the
    summary is the chosen response. The rejected response consists of the summaries of the next
    three rows, so it is long and wrong."""

    def pairs(rows: list[Row]) -> list[Row]:
        turns = [row["messages"] for row in rows]
        summaries = [assistant["content"] for _, assistant in turns]
        wrong = [" ".join((summaries * 2)[i + 1 : i + 4]) for i in range(len(summaries))]
        return [
            {"prompt": [user], "chosen": assistant["content"], "rejected": other}
            for (user, assistant), other in zip(turns, wrong, strict=True)
        ]

    return _write(out_dir, {name: pairs(part) for name, part in _split(seed).items()})


def _split(seed: int) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {"train": [], "valid": []}
    for module, row in _rows(Path(sysconfig.get_path("stdlib"))):
        top = module.partition(".")[0]
        rows["valid" if _held_out(top, seed) else "train"].append(row)
    if not rows["train"] or not rows["valid"]:
        raise InputError(
            f"{sysconfig.get_path('stdlib')} does not contain the sources of Python's standard "
            "library, which the demo uses as data: use a Python installation that includes them"
        )
    for part in rows.values():
        random.Random(seed).shuffle(part)
    del rows["valid"][VALID_ROWS:]
    return rows


def _write(out_dir: Path, rows: dict[str, list[Row]]) -> dict[str, int]:
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, part in rows.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        files.write_text(out_dir / f"{name}.jsonl", "".join(lines))
    return {name: len(part) for name, part in rows.items()}


def _held_out(top: str, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed}:{top}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def _rows(stdlib: Path) -> Iterator[tuple[str, Row]]:
    """Yields (module, row) for each public definition, sorted by name and without repeated
    summaries."""
    seen: set[str] = set()
    for module, path in _modules(stdlib):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some sources contain invalid escapes
            tree = ast.parse(path.read_bytes())
        for kind, name, signature, doc in _definitions(tree, f"{module}."):
            summary = summary_line(doc, name.rpartition(".")[2])
            question = f"What does this Python {kind} do?\n\n{name}{signature}"
            if summary is None or len(question) > QUESTION_CHARS:
                continue
            if summary.casefold() in seen or question in seen:
                continue
            seen |= {summary.casefold(), question}
            turns = (("user", question), ("assistant", summary))
            yield module, {"messages": [{"role": r, "content": text} for r, text in turns]}


def _modules(stdlib: Path) -> list[tuple[str, Path]]:
    found = []
    for name in sys.stdlib_module_names:  # not the folder's content, which includes site-packages
        for path in (stdlib / f"{name}.py", *(stdlib / name).rglob("*.py")):
            parts = path.relative_to(stdlib).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            left_out = any(part.startswith("_") or part in SKIPPED for part in parts)
            if not left_out and path.is_file():
                found.append((".".join(parts), path))
    return sorted(found)


def _definitions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Yields (kind, dotted name, signature, docstring) for public functions, methods and
    classes."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.If | ast.Try):  # definitions that depend on the platform
            yield from _definitions(node, prefix)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        is_class = isinstance(node, ast.ClassDef)
        if doc := ast.get_docstring(node):
            kind = "class" if is_class else "function"
            yield kind, prefix + node.name, _signature(node), doc
        if is_class:
            yield from _definitions(node, f"{prefix}{node.name}.")


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """Returns the parameters and the return annotation of a function. For a class, returns those of
    its __init__, or "" if it has none."""
    if isinstance(node, ast.ClassDef):
        functions = (child for child in node.body if isinstance(child, ast.FunctionDef))
        init = next((child for child in functions if child.name == "__init__"), None)
        if init is None:
            return ""
        node = init
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def summary_line(docstring: str, name: str) -> str | None:
    """Returns the first sentence of a docstring on one line. Returns None if the sentence starts
    like a signature of `name`, contains code, ends in a colon, or has fewer than 3 or more than 40
    words."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])(?<!\.\.)(?<!\.\w\.) (?=[A-Z])", paragraph, maxsplit=1)[0]
    echo = re.match(r"([\w.]+) ?[(:=-]", sentence)
    if echo and echo[1].rpartition(".")[2].casefold() == name.casefold():
        return None
    if "->" in sentence or ">>>" in sentence or sentence.endswith(":"):
        return None
    return sentence if 3 <= len(sentence.split()) <= 40 else None
