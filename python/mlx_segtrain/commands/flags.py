"""Argument parsers: flags derived from TrainConfig, help in groups, and suggestions for unknown
flags."""

from __future__ import annotations

import argparse
import math
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from mlx_segtrain.commands.words import wrapped
from mlx_segtrain.config import FACETS, TrainConfig, allowed, defaults, flag, meant, nearest
from mlx_segtrain.errors import InputError
from mlx_segtrain.fields import Float, Group, choices, is_list, kind

#: The maximum width of a help text, in columns. Longer lines are hard to read.
WIDEST = 100
#: The groups that `--help` shows; only `--help-all` shows the others.
DATA, FIRST = "model and data", "training"
OUTPUT = "output"
#: The help text of --adapter-path for commands that load an adapter.
WITH_ADAPTER = (
    "Adapter to load: its directory, or its name on the Hugging Face hub. By default, the model is "
    "used without an adapter."
)
WORD = "WORD"  # a placeholder for too many choices to show; the help text lists them


#: Maps names that other tools use to our commands.
COMMANDS_ELSEWHERE = {
    **dict.fromkeys(("finetune", "fine-tune", "lora", "sft"), "train"),
    **{"fuse": "merge", "quantize": "convert", "run": "generate", "ui": "serve", "web": "serve"},
    **{"evaluate": "eval", "test": "eval", "list": "adapters"},
}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Formats help in up to WIDEST columns, and shows the placeholder for a flag's value only once,
    after all names of the flag."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns - 2, WIDEST)
        super().__init__(prog, max_help_position=28, width=width)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if list(self._iter_indented_subactions(action)):  # commands are indented once more
            self._action_max_length += self._indent_increment

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrapped(" ".join(text.split()), width).splitlines()

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(action.option_strings)
        if action.nargs == 0:
            return names
        return f"{names} {self._format_args(action, str(action.dest).upper())}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError and does not accept abbreviated flags.

    `rare` contains the titles of the groups that only `--help-all` shows.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=Formatter)
        self.rare: set[str] = set()

    def error(self, message: str) -> NoReturn:
        wrong = re.match(r"argument COMMAND: invalid choice: '(.*)' \(choose from (.*)\)$", message)
        if wrong:
            given, commands = wrong[1], re.findall(r"[\w-]+", wrong[2])
            own = COMMANDS_ELSEWHERE.get(given.lower())
            hint = f" Did you mean {own}?" if own else nearest(given, commands)
            message = f"there is no command {given}.{hint}"
        raise InputError(f"{message} (see {self.prog} --help)")

    def format_help(self, *, all: bool = False) -> str:
        every = self._action_groups
        if not all:
            self._action_groups = [own for own in every if own.title not in self.rare]
        try:
            return super().format_help()
        finally:
            self._action_groups = every

    def group(self, title: str) -> Any:
        """Returns the group with this title. Adds the group if it does not exist."""
        found = next((own for own in self._action_groups if own.title == title), None)
        return found or self.add_argument_group(title)

    def names(self) -> list[str]:
        """Returns all flags."""
        return [name for action in self._actions for name in action.option_strings]

    def knows(self, word: str) -> bool:
        """Returns whether a word is one of the flags, with or without a value."""
        return _name(word) in self.names()

    def meant(self, word: str) -> str:
        """Returns "Did you mean …?" with the flag that has a similar name, or an empty string if
        there is none."""
        return meant(_name(word), self.names(), flag)


def _name(word: str) -> str:
    """Returns the flag in a word such as --rank=8."""
    return word.partition("=")[0]


class HelpAll(argparse.Action):
    """Prints all options."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_help(all=True), end="")
        parser.exit()


def group_of(name: str) -> str:
    """Returns the title of a field's group in the help text of `train`."""
    if name in ("model_dir", "data_dir", "adapter_path"):
        return DATA
    return (FACETS[name].group or FIRST).lower()


def in_groups() -> list[str]:
    """Returns all fields in the order of their groups. The groups that `--help` shows come
    first."""
    titles = [DATA, FIRST, *(group.lower() for group in get_args(Group))]
    return sorted(TrainConfig.model_fields, key=lambda name: titles.index(group_of(name)))


def add_run_flags(parser: Parser) -> None:
    """Adds all fields of TrainConfig in groups. `--help` shows only the first groups."""
    for name in in_groups():
        title = group_of(name)
        if title not in (DATA, FIRST):
            parser.rare.add(title)
        add_flags(parser.group(title), [name])
    parser.add_argument("--help-all", action=HelpAll, help="show all options and exit")


def examples(*commands: tuple[str, str]) -> str:
    """Returns examples for the end of a help text: commands, each preceded by a description."""
    text = "\n".join(f"  # {what}\n  {command}" for what, command in commands)
    return f"examples:\n{text}"


def add_flags(
    parser: Any, names: Iterable[str], *, required: bool = False, text: str | None = None
) -> None:
    """Adds the flags for fields of TrainConfig. An omitted flag leaves its attribute unset. `text`
    replaces the default help text, which is the field's description for training runs."""
    for name in names:
        field = TrainConfig.model_fields[name]
        about = text or field.description or ""
        if is_list(field):
            about += f" Accepts {allowed(name)}."
        elif _metavar(name) == WORD:
            about += f" One of {allowed(name)}."
        if not (field.is_required() or required or text):
            about += f" Default: {defaults(name)}."
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "required": required}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif bool in get_args(field.annotation):
            options |= {"nargs": "?", "const": True, "metavar": _metavar(name)}
        else:
            options["metavar"] = _metavar(name)
            options["nargs"] = "+" if is_list(field) else None
        flags = (flag(name), *FACETS[name].aliases)
        parser.add_argument(*flags, dest=name, help=about.replace("%", "%%"), **options)


def _metavar(name: str) -> str:
    field = TrainConfig.model_fields[name]
    if is_list(field):
        if get_args(field.annotation) == (Float,):
            return "X"
        return "TEXT" if FACETS[name].texts else "NAME"
    if bool in get_args(field.annotation):  # true, false, or a word
        return get_args(get_args(field.annotation)[1])[0]
    if words := choices(field):
        text = "{" + ",".join(words) + "}"
        return text if len(text) <= 50 else WORD
    if FACETS[name].flag:
        return FACETS[name].flag.strip("-").upper()
    return {Path: "PATH", float: "X", str: "TEXT", dict: "JSON"}.get(kind(field), "N")


def add_output_flags(parser: Parser) -> None:
    """Adds the flags for the verbosity of a command and for its log file (output.py)."""
    group = parser.group(OUTPUT)
    how = group.add_mutually_exclusive_group()
    how.add_argument("--quiet", "-q", action="store_true", help="show warnings and results only")
    how.add_argument(
        "--verbose", "-v", action="store_true", help="show every step and event on its own line"
    )
    group.add_argument(
        "--log-file",
        type=Path,
        metavar="FILE",
        help="also append the output to this file, with a timestamp on each line",
    )


def number(expected: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """Returns an argument type that accepts numbers for which `holds` returns True. `expected`
    describes these numbers in errors."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return read


def count(least: int) -> Callable[[str], int]:
    """Returns an argument type for integers of at least `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer >= {least}, got {text}")
        return int(text)

    return read


def whole(text: str) -> int:
    """Parses an integer argument."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text}") from None


part = number("a number above 0 and up to 1", lambda x: 0 < x <= 1)
temperature = number("a finite number >= 0", lambda x: 0 <= x < math.inf)
finite = number("a finite number", math.isfinite)
seconds = number("a number > 0", lambda x: 0 < x < math.inf)


def share(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else part(text)
