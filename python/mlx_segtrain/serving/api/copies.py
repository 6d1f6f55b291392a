"""A run's configuration as people keep it: as a command, a YAML file and a program of Python."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from ...config import TrainConfig, flag


def command(values: Mapping[str, Any]) -> str:
    """The command line of a run, an option a line."""
    words = [_option(name, value) for name, value in values.items()]
    return " \\\n  ".join(["mlx-segtrain train", *words])


def _option(name: str, value: Any) -> str:
    own = flag(name)
    if TrainConfig.model_fields[name].annotation is bool:
        return own if value else own.replace("--", "--no-", 1)
    words = value if isinstance(value, list) else [value]
    return shlex.join([own, *(x if isinstance(x, str) else json.dumps(x) for x in words)])


def as_yaml(values: Mapping[str, Any]) -> str:
    """A file for `mlx-segtrain train --config`."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def as_python(values: Mapping[str, Any]) -> str:
    """A program that takes the run."""
    given = "".join(f"    {name}={value!r},\n" for name, value in values.items())
    imports = "from mlx_segtrain import TrainConfig, train"
    return f"{imports}\n\nconfig = TrainConfig(\n{given})\nresult = train(config)\n"
