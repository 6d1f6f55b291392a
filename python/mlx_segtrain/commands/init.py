"""The command init: asks three questions and writes a commented YAML file for a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mlx_segtrain.commands.flags import DATA, FIRST, Parser, add_flags, group_of, in_groups
from mlx_segtrain.commands.runs import OUTPUT
from mlx_segtrain.commands.words import wrapped
from mlx_segtrain.config import TrainConfig, defaults, flag, load_config
from mlx_segtrain.errors import InputError

#: The fields to ask for if their flags are not given, each with its question and the value that an
#: empty answer selects (None: an answer is required).
QUESTIONS = {
    "model_dir": ("Which model? A folder, or a name on the Hugging Face hub", None),
    "data_dir": ("Which data? A file or folder with rows, or a name on the hub", None),
    "epochs": ("How many passes over the data?", "3"),
}
#: The fields of the groups that `train --help` shows.
SHOWN = [name for name in TrainConfig.model_fields if group_of(name) in (DATA, FIRST)]


def add_command(command: Callable[..., Parser]) -> None:
    """Adds the command. `command(name, run, text)` creates its parser."""
    added = command(
        "init", _init, "ask three questions and write a commented YAML file for `train`"
    )
    added.add_argument(
        "file",
        type=Path,
        nargs="?",
        default=Path("run.yaml"),
        metavar="FILE",
        help="file to write. Default: run.yaml.",
    )
    add_flags(added, [name for name in SHOWN if name != "resume"])
    added.add_argument(
        "--force", action="store_true", help="overwrite the file if it already exists"
    )


def _init(args: argparse.Namespace) -> int:
    from mlx_segtrain import files
    from mlx_segtrain.commands.terminal import Terminal

    if args.file.exists() and not args.force:
        raise InputError(f"{args.file} already exists: choose another name, or pass --force.")
    given = {name: value for name, value in vars(args).items() if name in TrainConfig.model_fields}
    asks = dict(QUESTIONS)
    if "iters" in given:
        del asks["epochs"]
    for name in asks:
        if name not in given:
            given[name] = _asked(name)
    config = load_config(None, given, OUTPUT)
    given = {name: getattr(config, name) for name in {*given, *OUTPUT}}
    try:
        files.write_text(args.file, text_of(given))
    except OSError as error:
        raise InputError(f"{args.file} cannot be written: {error.strerror or error}.") from None
    with Terminal() as show:
        show.say(f"wrote {args.file}")
        own = ["--model", str(config.model_dir)]
        data = str(config.data_dir)
        show.command("look at the data", ["mlx-segtrain", "inspect", data, *own])
        show.command("see whether it fits", ["mlx-segtrain", "plan", "--config", str(args.file)])
        show.command("train", ["mlx-segtrain", "train", "--config", str(args.file)])
    return 0


def _asked(name: str) -> str:
    """Asks the user for a field's value. If stdin is not a terminal, returns the default."""
    question, otherwise = QUESTIONS[name]
    if not sys.stdin.isatty():
        if otherwise is None:
            raise InputError(
                f"{name} is missing: pass {flag(name)}, or run this command in a terminal, where "
                "it asks for the value."
            )
        return otherwise
    hint = "" if otherwise is None else f" [{otherwise}]"
    while True:
        try:
            answer = input(f"{question}{hint}: ").strip() or otherwise
        except EOFError:
            raise InputError(f"{name} is missing: pass {flag(name)}.") from None
        if answer:
            return answer


def text_of(values: Mapping[str, Any]) -> str:
    """Returns the text of a YAML file with these values. All other fields are commented out, with
    their defaults."""
    parts = ["# Configuration of a run. To start the run: mlx-segtrain train --config FILE"]
    title = None
    for name in in_groups():
        if group_of(name) != title:
            title = group_of(name)
            parts += ["", f"# ---- {title}"]
        parts += ["", *_lines(name, values)]
    return "\n".join(parts) + "\n"


def _lines(name: str, values: Mapping[str, Any]) -> list[str]:
    """Returns the lines for a field: its description as a comment, and its value."""
    field = TrainConfig.model_fields[name]
    about = str(field.description)
    if not field.is_required():
        about += f" Default: {defaults(name)}."
    lines = [f"# {line}" for line in wrapped(about, 98).splitlines()]
    value = values.get(name, field.default)
    value = str(value) if isinstance(value, Path) else value
    shown = yaml.safe_dump({name: value}, default_flow_style=True, allow_unicode=True, width=10**6)
    line = shown.strip().removeprefix("{").removesuffix("}")
    return [*lines, line if name in values else f"# {line}"]
