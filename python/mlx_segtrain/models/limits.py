"""What the files of a model's folder may ask for, looked at before a library reads them."""

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_at_most
from ..safetensors import read_header

#: Bytes of a file of JSON that is read as a whole: a tokenizer of half a million tokens has 40 MB.
MOST_JSON = {"config.json": 4 << 20, "tokenizer.json": 256 << 20, "vocab.json": 64 << 20}
MOST_OTHER_JSON = 16 << 20
#: Tensors and layers of a model, and experts of a layer, at most.
MOST_TENSORS, MOST_LAYERS, MOST_EXPERTS = 400_000, 4096, 65_536
#: Numbers of a configuration for which a module, or more, is made each.
LAYERS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks)|\w+_layers|depth")
EXPERTS = re.compile(r"\w*experts\w*")


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


def check_model(folder: Path) -> None:
    """InputError for a configuration that asks for more layers than there are tensors, or weights
    whose headers are none."""
    config = json.loads(read_at_most(folder / "config.json", MOST_JSON["config.json"]))
    tensors = 0
    for file in folder.glob("model*.safetensors"):
        tensors += len(read_header(file))
        if tensors > MOST_TENSORS:
            raise InputError(f"model_dir {folder} has more than {MOST_TENSORS:,} tensors.")
    for name, value in _numbers(config):
        layers, experts = LAYERS.fullmatch(name), EXPERTS.fullmatch(name)
        most = min(tensors, MOST_LAYERS) if layers else MOST_EXPERTS if experts else None
        if most is not None and value > most:
            why = f"the weights have {tensors:,} tensors" if layers else f"{most:,} is the most"
            raise InputError(f"model_dir {folder}: {name} is {value:,}, and {why}.")


def _numbers(values: Any) -> Iterator[tuple[str, int]]:
    """Names and values of the integers in a configuration, at any depth."""
    left = [values]
    while left:
        own = left.pop()
        if isinstance(own, Mapping):
            left += own.values()
            for name, value in own.items():
                if isinstance(value, int) and not isinstance(value, bool):
                    yield name, value
        elif isinstance(own, list):
            left += own
