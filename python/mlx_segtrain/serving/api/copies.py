"""Writes a run's configuration as a command, a YAML file or a Python program, and reads YAML
files."""

import json
import math
import shlex
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import yaml

from ...config import REFUSED, TrainConfig, flag, load_config, parse_yaml, renamed
from ...errors import InputError

#: Placeholders for required settings. A file may omit these settings, because the page's form
#: provides their values.
REQUIRED = {name: "." for name, own in TrainConfig.model_fields.items() if own.is_required()}

#: The YAML tokens that begin and end a list or a mapping in brackets, and the maximum depth of
#: nesting. The limit is needed because parsing time grows with the square of the depth.
OPEN = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken)
CLOSE = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)
DEEP = 100


def command(values: Mapping[str, Any], ranks: int = 1) -> str:
    """Returns the command line of a run, one option per line. If `ranks` is greater than 1, the
    command starts all ranks on this machine."""
    words = [_option(name, value) for name, value in values.items() if value != []]
    start = "mlx-segtrain train"
    if ranks > 1:
        start = f'mlx.launch -n {ranks} -- "$(which mlx-segtrain)" train'
    return " \\\n  ".join([start, *words])


def _option(name: str, value: Any) -> str:
    own = flag(name)
    if TrainConfig.model_fields[name].annotation is bool:
        return own if value else own.replace("--", "--no-", 1)
    words = value if isinstance(value, list) else [value]
    return shlex.join([own, *(x if isinstance(x, str) else json.dumps(x) for x in words)])


def as_yaml(values: Mapping[str, Any]) -> str:
    """Returns the content of a YAML file for `mlx-segtrain train --config`."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def as_python(values: Mapping[str, Any]) -> str:
    """Returns a Python program that starts the run."""
    given = "".join(f"    {name}={value!r},\n" for name, value in values.items())
    imports = "from mlx_segtrain import TrainConfig, train"
    return f"{imports}\n\nconfig = TrainConfig(\n{given})\nresult = train(config)\n"


def read_yaml(text: str) -> tuple[dict[str, Any], list[InputError]]:
    """Returns the known settings in a YAML file for `train --config`, and all errors in it. Raises
    InputError if the file cannot be read at all."""
    _check_references(text)
    given, _ = parse_yaml(text, "the file")
    fields = TrainConfig.model_fields
    if len(given) > 2 * len(fields):  # the loop below runs once per error
        raise InputError(f"the file has {len(given)} settings, but only {len(fields)} exist.")
    faults = [
        InputError(f"{name} is not allowed here: {REFUSED[name]}.", field=name)
        for name in given
        if name in REFUSED
    ]
    left = known = {name: value for name, value in given.items() if name not in REFUSED}
    while True:  # each error hides the errors after it
        try:
            load_config(None, left, REQUIRED)
            break
        except InputError as error:
            faults.append(error)
            if error.field not in left:
                break
            left = {name: value for name, value in left.items() if name != error.field}
    known |= renamed(left)
    return {name: _plain(value) for name, value in known.items() if name in fields}, faults


def _check_references(text: str) -> None:
    """Raises InputError for YAML that is nested too deeply, or that contains anchors, aliases or
    merge keys, which might expand to gigabytes."""
    depth = 0
    with suppress(yaml.YAMLError):  # parse_yaml reports it
        for own in yaml.scan(text):
            merges = isinstance(own, yaml.ScalarToken) and own.plain and own.value == "<<"
            if merges or isinstance(own, yaml.AnchorToken | yaml.AliasToken):
                raise InputError(
                    "the file has anchors, aliases or merge keys (&name, *name, <<): write out the "
                    "values instead."
                )
            depth += isinstance(own, OPEN) - isinstance(own, CLOSE)
            if depth > DEEP:
                raise InputError("the file is not valid YAML: it is nested too deeply")


def _plain(value: Any) -> Any:
    """Returns a YAML value as a JSON value. Dates, bytes and infinity become text."""
    if isinstance(value, dict):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_plain(own) for own in value]
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return hex(value)  # Python refuses to write integers of more than 4300 digits in decimal
    if value is None or isinstance(value, str | int):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)
