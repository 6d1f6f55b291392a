"""The command completion: prints a script that lets a shell complete commands and flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from mlx_segtrain.commands.flags import Parser
from mlx_segtrain.config import TrainConfig
from mlx_segtrain.fields import choices

#: The paths at which shells look for completion scripts.
PLACES = {
    "bash": "~/.local/share/bash-completion/completions/mlx-segtrain",
    "zsh": "~/.zfunc/_mlx-segtrain (with ~/.zfunc in fpath)",
    "fish": "~/.config/fish/completions/mlx-segtrain.fish",
}
#: Metavars of arguments whose values are files or folders.
FILES = {"FILE", "PATH", "DIR", "MODEL", "DATA", "ADAPTER", "RUN", "ROOT"}


def add_command(command: Callable[..., Parser]) -> None:
    """Adds the command. `command(name, run, text)` creates its parser."""
    added = command("completion", _completion, "print a completion script for a shell")
    added.add_argument("shell", choices=tuple(PLACES))
    places = "\n".join(f"  {shell:6}{place}" for shell, place in PLACES.items())
    added.epilog = f"Save the script to the file in which your shell looks for it:\n{places}"


def _completion(args: argparse.Namespace) -> int:
    import shtab

    from mlx_segtrain.commands.main import parsers

    parser, _ = parsers()
    for action in _actions(parser):
        if action.dest in TrainConfig.model_fields and action.choices is None:
            action.choices = choices(TrainConfig.model_fields[action.dest]) or None
        if action.metavar in FILES and action.nargs != 0:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yields the actions of a parser and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for own in action.choices.values():
                yield from _actions(own)
