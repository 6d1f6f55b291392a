"""Checks the files in a model's folder against limits before a library reads them."""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, word
from ..files import read_json
from .snapshot import MOST_LAYERS, Snapshot

#: The maximum size of a JSON file, in bytes. For comparison, a tokenizer.json with half a million
#: tokens is 40 MB.
MOST_JSON = {"config.json": 4 << 20, "tokenizer.json": 256 << 20, "vocab.json": 64 << 20}
MOST_OTHER_JSON = 16 << 20
#: Maximum number of experts in a layer.
MOST_EXPERTS = 65_536
#: Names of configuration values that determine how many modules are created.
LAYERS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks)|\w+_layers|depth")
EXPERTS = re.compile(r"\w*(experts|heads|groups|inputs|streams|branches|stages)\w*")
#: Names of configuration values that set how often work is repeated for each token, and the maximum
#: of these values.
ROUNDS, MOST_ROUNDS = re.compile(r"\w*(loops|iters|iterations|repeats|rounds|passes)\w*"), 256
#: Names of tokenizer settings whose values are plain text and never paths, even if a file with that
#: name exists.
TEXTS = re.compile(r"\w*tokens?|added_tokens_decoder|chat_template|(_?name_or|_?commit)_\w+")


def check_files(folder: Path) -> None:
    """Raises InputError if the folder contains anything other than regular files and subfolders, or
    a JSON file or template above its size limit."""
    try:
        for entry in os.scandir(folder):
            facts = entry.stat()
            if stat.S_ISDIR(facts.st_mode):
                continue
            if not stat.S_ISREG(facts.st_mode):
                raise InputError(
                    f"{entry.path} is not a regular file: remove it from the model's folder."
                )
            most = MOST_JSON.get(entry.name, MOST_OTHER_JSON)
            if entry.name.endswith((".json", ".jinja")) and facts.st_size > most:
                raise InputError(
                    f"{entry.path} is larger than {most >> 20} MiB, the limit for this file."
                )
    except OSError as error:
        raise InputError(f"model_dir {folder} cannot be read: {error}.") from None


def check_tokenizer(folder: Path) -> None:
    """Raises InputError for settings that would make a tokenizer open files outside the folder.

    transformers passes all settings to the tokenizer's class, and some classes accept the path of a
    vocabulary as a setting or as a positional argument. Each line of such a file would become a
    token.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if not file.is_file():
            continue
        values = read_json(file, MOST_OTHER_JSON)
        if values.get("init_inputs"):
            raise InputError(f"{file}: init_inputs is not supported: remove it.")
        for key, value in values.items():
            for _, leaf in () if TEXTS.fullmatch(key) else _leaves(value):
                if isinstance(leaf, str) and _names_other_file(leaf, folder):
                    raise InputError(
                        f"{file}: {word(key)} names a file outside the model's folder: remove this "
                        "entry."
                    )


def _names_other_file(text: str, folder: Path) -> bool:
    """Returns whether a setting names an existing file outside the folder. Paths on the machine on
    which the tokenizer was saved are harmless, because they do not exist here."""
    try:
        return os.path.lexists(text) and not Path(text).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def check_model(snapshot: Snapshot) -> None:
    """Raises InputError if the configuration specifies its own model code or implausible numbers
    (such as more layers than there are tensors), or if a weight file has no valid header."""
    if snapshot.config.get("model_file") is not None:  # some releases of mlx-lm would run it
        raise InputError(
            f"model_dir {snapshot.folder} specifies its own model code (model_file in "
            "config.json), which is never run: use a model whose type mlx-lm supports."
        )
    tensors = len(snapshot.tensors)
    layers = min(tensors, MOST_LAYERS)
    bounds = ((LAYERS, layers), (ROUNDS, MOST_ROUNDS), (EXPERTS, MOST_EXPERTS))
    for name, value in _leaves(snapshot.config):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        most = next((most for names, most in bounds if names.fullmatch(name)), None)
        if most is not None and value > most:
            few = LAYERS.fullmatch(name)
            why = f"the weights have only {tensors:,} tensors" if few else f"{most:,} is the limit"
            raise InputError(f"model_dir {snapshot.folder}: {name} is {value:,}, but {why}.")


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the names and values in a JSON value at any depth. Elements of lists have an empty
    name."""
    left = [("", value)]
    while left:
        name, own = left.pop()
        if isinstance(own, Mapping):
            left += own.items()
        elif isinstance(own, list):
            left += [("", part) for part in own]
        else:
            yield name, own
