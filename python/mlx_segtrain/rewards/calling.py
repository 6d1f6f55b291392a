"""Rewards written by the user: Python functions and a command."""

import functools
import importlib
import importlib.util
import inspect
import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, RunError, reason, shown
from ..torchless import show_torch


def found_at(spec: str, field: str, kind: str, given: Any = None) -> tuple[str, Callable[..., Any]]:
    """Returns the name and the function or class that `spec` refers to. `spec` has the form
    `module:name` or `file.py:name`. `field` is the field of the configuration that contains `spec`,
    and `given` is the function or class itself if a Python caller passed it. Raises InputError if
    the object cannot be found."""
    place, _, name = spec.rpartition(":")
    try:
        if not place or not name:
            raise ValueError(f"it must have the form module:{kind} or file.py:{kind}")
        found = getattr(_module(place), name) if given is None else given
        if not callable(found):
            raise TypeError(f"it is not a {kind}")
    except Exception as error:  # importing a module may fail in any way
        said = f"{field}: {spec} cannot be used ({reason(error, 300)})."
        raise InputError(said, field=field) from error
    return name, found


def function_of(spec: str) -> tuple[str, Callable[..., Any]]:
    """Returns the name and the function for an entry of reward_functions. The function is wrapped
    to receive only the columns in its signature. Raises InputError if the function cannot be
    found."""
    name, found = found_at(spec, "reward_functions", "function")
    return name, with_what_it_takes(found)


def file_of(spec: str) -> Path | None:
    """Returns the file in `file.py:name`, or None if `spec` names a module."""
    place = spec.rpartition(":")[0]
    return Path(place).expanduser() if place.endswith(".py") else None


def _module(place: str) -> Any:
    show_torch()  # the user's functions may need torch
    path = file_of(f"{place}:")
    if path is None:
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_what_it_takes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function so that it receives only the columns in its signature, or all columns if the
    signature includes **columns."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        return function
    if any(own.kind is own.VAR_KEYWORD for own in parameters):
        return function
    names = {own.name for own in parameters}

    @functools.wraps(function)  # `takes` reads the signature
    def called(**given: Any) -> Any:
        return function(**{name: x for name, x in given.items() if name in names})

    return called


def takes(function: Callable[..., Any], column: str) -> bool:
    """Returns whether a function that `with_what_it_takes` returned receives a column."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True
    every = any(own.kind is own.VAR_KEYWORD for own in parameters.values())
    return every or column in parameters


def words_of(command: str, field: str) -> list[str]:
    """Splits the command line in a field of the configuration into words. Raises InputError."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(
            f"{field}: {shown(command, 80)} is not a valid command line ({error}).", field=field
        ) from None
    if not words:
        raise InputError(f"{field} is empty: set it to a command line.", field=field)
    return words


def by_command(command: str) -> Callable[..., list[float]]:
    """Returns a reward that runs a command. The command reads the completions as JSON lines and
    must print one score per line."""
    words = words_of(command, "reward_command")

    def score(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        lines = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            own = {name: x[i] for name, x in columns.items() if name != "environments"}
            lines.append(json.dumps({**own, "prompt": prompt, "completion": completion}))
        try:
            done = subprocess.run(
                words, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise RunError(
                f"reward_command cannot be started ({words[0]}: {error.strerror})."
            ) from error
        if done.returncode:
            last = " ".join(done.stderr.strip().splitlines()[-1:])[:300]
            raise RunError(f"reward_command exited with code {done.returncode}: {last}")
        return [float(line) for line in done.stdout.split()]

    return score
