"""The command cache: lists or removes the cached tokens of data sets (list, size, prune)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlx_segtrain.errors import InputError

if TYPE_CHECKING:
    from mlx_segtrain.data.cache import Entry


def add_commands(command: Callable[..., Any]) -> None:
    """Adds the command. `command(name, run, text)` creates its parser."""
    added = command("cache", _list, "list or remove the cached tokens of data sets")
    added.add_argument("--json", action="store_true", help="print JSON")
    parts = added.add_subparsers(metavar="", title="actions; the default is list")
    for name, run, text in (
        ("list", _list, "list the cached data sets with their sizes and last use"),
        ("size", _size, "show the total size of the cache"),
        ("prune", _prune, "remove cached tokens; running jobs are not affected"),
    ):
        own = parts.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        own.set_defaults(run=run)
        if run is _prune:
            which = own.add_mutually_exclusive_group(required=True)
            which.add_argument(
                "keys",
                nargs="*",
                default=[],
                metavar="KEY",
                help="keys of the entries to remove, as shown by `mlx-segtrain cache list`",
            )
            which.add_argument(
                "--older",
                type=float,
                metavar="DAYS",
                help="remove the cached tokens of data sets that have not been used for this many "
                "days",
            )
            which.add_argument("--all", action="store_true", help="remove all cached tokens")
        else:
            own.add_argument("--json", action="store_true", help="print JSON")


def _list(args: argparse.Namespace) -> int:
    from mlx_segtrain.commands.terminal import answer
    from mlx_segtrain.data.cache import entries

    return answer(entries(), _show, args.json)


def _show(found: list[Entry]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from mlx_segtrain.commands.views import wide

    if not found:
        print("no tokens are cached")
        return
    table = Table("key", "data", "model", box=box.SIMPLE_HEAD)
    for name in ("rows", "tokens", "MB", "last used"):
        table.add_column(name, justify="right")
    for own in found:
        about = own.about
        what = (about.data, about.model) if about else ("not complete", "–")
        counts = (f"{about.rows:,}", f"{about.tokens:,}") if about else ("–", "–")
        days = (time.time() - own.used) / 86400
        ago = "today" if days < 1 else f"{days:.0f} days ago"
        table.add_row(own.key, *map(escape, what), *counts, f"{own.size / 1e6:,.1f}", ago)
    wide().print(table)


def _size(args: argparse.Namespace) -> int:
    import json

    from mlx_segtrain.data.cache import entries, folder

    found = entries()
    size = sum(own.size for own in found)
    if args.json:
        print(json.dumps({"folder": str(folder()), "size": size, "count": len(found)}))
    else:
        print(f"{size / 1e6:,.1f} MB in {len(found)} folders of {folder()}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    from mlx_segtrain.data.cache import entries, prune

    found = {own.key: own for own in entries()}
    if unknown := [key for key in args.keys if key not in found]:
        raise InputError(
            f"no cached data set has the key {unknown[0]}: run mlx-segtrain cache list to see the "
            "keys."
        )
    keys = args.keys or list(found)
    if args.older is not None:
        keys = [key for key in keys if time.time() - found[key].used > 86400 * args.older]
    stay = prune(keys)
    freed = sum(found[key].size for key in keys if key not in stay)
    print(f"removed {len(keys) - len(stay)} of {len(found)} folders, {freed / 1e6:,.1f} MB")
    for key in stay:
        print(f"{key} was not removed, because another process is writing it")
    return 0
