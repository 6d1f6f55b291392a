"""Computes scores of an adapter during training, in addition to its loss."""

import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..adapters import About, write_adapter
from ..config import TrainConfig
from ..errors import InputError
from ..lora import Adapter
from ..rewards.calling import words_of

#: A function that is called with two arguments: the model, with the adapter attached, and the
#: tokenizer. It returns a number, or several numbers keyed by name.
Score = Callable[[nn.Module, Any], float | Mapping[str, float]]


def numbers(found: Any) -> dict[str, float]:
    """Returns the result of a `Score` as finite numbers, keyed by name. Raises ValueError if the
    result has any other form."""
    named = found if isinstance(found, Mapping) else {"score": found}
    for name, x in named.items():
        # NumPy's numbers are also instances of Real.
        if isinstance(x, bool) or not isinstance(x, Real) or not math.isfinite(float(x)):
            raise ValueError(f"a score must be a finite number; '{name}' is {x!r}")
    return {str(name): float(x) for name, x in named.items()}


def command_score(config: TrainConfig, adapter: Adapter) -> dict[str, float] | str:
    """Returns the scores that `eval_command` prints for the adapter. If the command fails, returns
    the reason instead of raising an error, because a failure must not end the run. Raises
    InputError if the command cannot be started."""
    assert config.eval_command is not None
    words = words_of(config.eval_command, "eval_command")
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_adapter(Path(folder), adapter, About.of(config))
        except OSError as error:
            return f"cannot write the adapter to {folder}: {error.strerror or error}"
        command = [word.replace("{adapter}", folder) for word in words]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False
            )
        except OSError as error:
            said = f"eval_command cannot be started ({command[0]}: {error.strerror})."
            raise InputError(said) from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        return f"eval_command failed with exit code {done.returncode}: {' '.join(last)}"
    lines = done.stdout.strip().splitlines()
    try:
        return numbers(json.loads(lines[-1]))
    except (IndexError, ValueError):
        return (
            "the last line that eval_command printed is neither a number nor a JSON object of "
            f"numbers: {lines[-1:]}"
        )
