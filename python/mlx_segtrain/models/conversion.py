"""Converts an unquantized model to a quantized model in MLX's format, with mlx-lm's converter."""

import io
import math
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, is_out_of_memory, reason
from ..files import free, new_folder
from ..hub import MARGIN, amount, title
from . import opened
from .limits import check_model, check_tokenizer
from .snapshot import Snapshot

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Made:
    """The folder of a quantized model, and the size of its weights in bytes before and after
    quantization."""

    path: Path
    before: int
    size: int


def convert(model_dir: Path, out: Path, *, bits: int = 4, group_size: int = 64) -> Made:
    """Writes the model to a new folder, with its linear layers and embeddings quantized by mlx-lm.

    Raises InputError if the model cannot be read, is already quantized, or belongs to a family that
    mlx-lm does not support, or if the disk has too little space. The folder `out` appears only when
    all of its files are complete.
    """
    base = opened(model_dir)
    name = title(base.folder)
    check_tokenizer(base.folder)
    check_model(base)
    if any(path.endswith(".scales") for path in base.tensors):
        raise InputError(f"{name} is already quantized: use it as it is.")
    need, room = _size(base, bits, group_size), free(out)
    if need + MARGIN > room:
        raise InputError(
            f"{out} needs {amount(need)}, but only {amount(room)} is free on its disk: free some "
            "space, or choose another --out."
        )
    from mlx_lm.convert import convert

    with new_folder(out) as aside:
        aside.rmdir()  # the converter creates it
        try:
            with redirect_stdout(io.StringIO()):
                convert(
                    str(base.folder),
                    mlx_path=str(aside),
                    quantize=True,
                    q_bits=bits,
                    q_group_size=group_size,
                )
        except (KeyboardInterrupt, SystemExit, OSError, InputError):
            raise
        except BaseException as error:  # a panic in Rust is not an Exception
            if is_out_of_memory(error):
                raise
            raise InputError(f"{name} cannot be converted: {reason(error, 500)}") from error
        for program in aside.glob("*.py"):  # this package never runs a model's own code
            program.unlink()
        size = Snapshot(aside).size_bytes
    return Made(out, base.size_bytes, size)


def _size(base: Snapshot, bits: int, group_size: int) -> int:
    """Returns an upper bound on the size of the quantized weights in bytes. Each group of weights
    has a 16-bit scale and a 16-bit bias."""
    each = (bits + 32 / group_size) / 8
    return sum(
        math.ceil(math.prod(shape) * (each if len(shape) > 1 else 4))
        for _, shape in base.tensors.values()
    )
