"""What the files of a model's folder may ask for, looked at before a library reads them."""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, word
from ..files import read_json
from .snapshot import MOST_LAYERS, Snapshot

#: Bytes of a file of JSON that is read as a whole: a tokenizer of half a million tokens has 40 MB.
MOST_JSON = {"config.json": 4 << 20, "tokenizer.json": 256 << 20, "vocab.json": 64 << 20}
MOST_OTHER_JSON = 16 << 20
#: Experts of a layer, at most.
MOST_EXPERTS = 65_536
#: Numbers of a configuration for which a module, or more, is made each.
LAYERS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks)|\w+_layers|depth")
EXPERTS = re.compile(r"\w*(experts|heads|groups|inputs|streams|branches|stages)\w*")
#: Times that something runs for each token, and how often at most.
ROUNDS, MOST_ROUNDS = re.compile(r"\w*(loops|iters|iterations|repeats|rounds|passes)\w*"), 256
#: Settings of a tokenizer that are text, whatever files are called.
TEXTS = re.compile(r"\w*tokens?|added_tokens_decoder|chat_template|(_?name_or|_?commit)_\w+")


def check_files(folder: Path) -> None:
    """InputError for what is no regular file, or larger than its kind may be."""
    try:
        for entry in os.scandir(folder):
            facts = entry.stat()
            if stat.S_ISDIR(facts.st_mode):
                continue
            if not stat.S_ISREG(facts.st_mode):
                raise InputError(f"{entry.path} is no regular file: remove it from the model.")
            most = MOST_JSON.get(entry.name, MOST_OTHER_JSON)
            if entry.name.endswith((".json", ".jinja")) and facts.st_size > most:
                raise InputError(f"{entry.path} has more than {most >> 20} MiB.")
    except OSError as error:
        raise InputError(f"model_dir {folder} cannot be read: {error}.") from None


def check_tokenizer(folder: Path) -> None:
    """InputError for settings of a tokenizer by which it would open files that lie elsewhere.

    transformers hands all settings to the tokenizer's class, of which some take a vocabulary's path
    under the name of its content, or anything by position. Each line of such a file is a token.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if not file.is_file():
            continue
        values = read_json(file, MOST_OTHER_JSON)
        if values.get("init_inputs"):
            raise InputError(f"{file}: init_inputs is not taken: leave it out.")
        for key, value in values.items():
            for _, leaf in () if TEXTS.fullmatch(key) else _leaves(value):
                if isinstance(leaf, str) and _names_other_file(leaf, folder):
                    raise InputError(f"{file}: {word(key)} names a file that lies elsewhere.")


def _names_other_file(text: str, folder: Path) -> bool:
    """Paths of the machine where it was made are harmless: nothing is there."""
    try:
        return os.path.lexists(text) and not Path(text).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def check_model(snapshot: Snapshot) -> None:
    """InputError for a configuration that names a program or asks for more layers than there are
    tensors, or weights whose headers are none."""
    if snapshot.config.get("model_file") is not None:  # some releases of mlx-lm would run it
        raise InputError(
            f"model_dir {snapshot.folder} brings a program of its own (model_file in config.json), "
            "which is not run: take a model of a family that mlx-lm has."
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
            why = f"the weights have {tensors:,} tensors" if few else f"{most:,} is the most"
            raise InputError(f"model_dir {snapshot.folder}: {name} is {value:,}, and {why}.")


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value of JSON holds at any depth, with its name; of a list's parts that is empty."""
    left = [("", value)]
    while left:
        name, own = left.pop()
        if isinstance(own, Mapping):
            left += own.items()
        elif isinstance(own, list):
            left += [("", part) for part in own]
        else:
            yield name, own
