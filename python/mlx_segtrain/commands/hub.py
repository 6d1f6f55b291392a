"""Commands for the Hugging Face hub: search and push."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_segtrain.errors import InputError

if TYPE_CHECKING:
    from mlx_segtrain.hub_search import Hit


def add_commands(command: Callable[..., Any]) -> None:
    """Adds the commands. `command(name, run, text)` creates the parser of each command."""
    text = "search the Hugging Face hub for models or data sets"
    added = command("search", _search, text, json=True)
    added.add_argument(
        "words", nargs="+", metavar="WORD", help="words that the name of each result must contain"
    )
    added.add_argument(
        "--datasets", action="store_true", help="search for data sets instead of models"
    )

    text = "upload an adapter or a model to the Hugging Face hub"
    added = command("push", _push, text, json=True)
    added.add_argument(
        "folder", type=Path, metavar="DIR", help="directory of the adapter or model to upload"
    )
    added.add_argument(
        "repo", metavar="ORG/NAME", help="repository to upload to; created if it does not exist"
    )
    added.add_argument(
        "--public",
        action="store_true",
        help="make the repository public if it has to be created. Default: private.",
    )


def _search(args: argparse.Namespace) -> int:
    from mlx_segtrain.commands.terminal import answer
    from mlx_segtrain.hub_search import search

    found = search(" ".join(args.words), "dataset" if args.datasets else "model", limit=20)
    return answer(found, _show, args.json)


def _show(found: list[Hit]) -> None:
    if not found:
        print("nothing on the hub has all of these words in its name")
        return
    width = max(len(hit.name) for hit in found)
    for hit in found:
        print(f"{hit.name:{width}}  {hit.downloads:>12,} downloads")


def _push(args: argparse.Namespace) -> int:
    from huggingface_hub import get_token

    from mlx_segtrain.commands.terminal import answer, waiting
    from mlx_segtrain.serving.jobs import pushing

    folder = args.folder.expanduser().resolve()
    if not folder.is_dir():
        raise InputError(
            f"{args.folder} is not a directory: pass the directory of an adapter or a model."
        )
    if get_token() is None:
        raise InputError("no hub token: log in with `hf auth login`, or set HF_TOKEN.")
    with waiting() as show:
        pushed = pushing.push(folder, args.repo, private=not args.public, tell=show)
    return answer(pushed, lambda own: print(f"pushed to {own.url}"), args.json)
