"""A model's folder: its config.json and the headers of its weights.

The size of both is limited, and both are read only once. No weight is read, and no model library is
imported. Missing and invalid files raise InputError.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json
from ..lora.paths import spellings
from ..safetensors import FLOATS, Tensors, read_header

#: Maximum number of tensors, and maximum number of layers, in a model.
MOST_TENSORS, MOST_LAYERS = 400_000, 4096
#: MLX's quantization modes whose scales are not floating-point values, keyed by bits and group
#: size.
CODES = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}


class Snapshot:
    """A folder in mlx-lm's format. If `whole` is false, weight files may still be downloading."""

    def __init__(self, folder: str | Path, *, whole: bool = False):
        self.folder, self.whole = Path(folder).expanduser(), whole
        if not self.folder.is_dir():
            raise InputError(
                f"model_dir {self.folder} is not a folder: pass the folder of a model."
            )

    def file(self, name: str, what: str) -> Path:
        """Returns the path of a file that every model folder must contain. Raises InputError if it
        is missing."""
        file = self.folder / name
        if not file.is_file():
            raise InputError(
                f"model_dir {self.folder} contains no {name} ({what}), so it is not a model folder."
            )
        return file

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.file("config.json", "configuration"))

    @cached_property
    def headers(self) -> dict[Path, Tensors]:
        """The headers of the weight files that mlx-lm loads, sorted by file name."""
        found: dict[Path, Tensors] = {}
        for file in sorted(self.folder.glob("model*.safetensors")):
            found[file] = read_header(file, whole=self.whole)
            if sum(map(len, found.values())) > MOST_TENSORS:
                raise InputError(f"model_dir {self.folder} has more than {MOST_TENSORS:,} tensors.")
        if not any(found.values()):
            raise InputError(
                f"model_dir {self.folder} contains no model*.safetensors, so there are no weights "
                "to load."
            )
        return found

    @cached_property
    def tensors(self) -> Tensors:
        return {name: own for header in self.headers.values() for name, own in header.items()}

    @property
    def size_bytes(self) -> int:
        """The size of the weight files on disk, in bytes."""
        return sum(file.stat().st_size for file in self.headers)

    def spelled(self, path: str) -> str | None:
        """Returns the path under which the files store a module, or None if they do not contain its
        weight."""
        return next((p for p in spellings(path) if f"{p}.weight" in self.tensors), None)

    def quantization(self, path: str) -> "Quantization | None":
        """Returns how the module with this path in the files is quantized, or None if it is not
        quantized."""
        config, tensors = self.config, self.tensors
        with self.consistent():
            return quantization_of(config, tensors, path)

    @contextmanager
    def consistent(self) -> Iterator[None]:
        """Inside this context, errors caused by a config.json that contradicts the headers are
        raised as InputError."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"{self.folder / 'config.json'} does not match the weights "
                f"({type(error).__name__}: {error})."
            ) from error


@dataclass(frozen=True)
class Quantization:
    """How the weight of a module is quantized, as parameters of `mx.quantize`."""

    group_size: int
    bits: int
    mode: str


def quantization_of(
    config: Mapping[str, Any], tensors: Tensors, path: str
) -> "Quantization | None":
    """Returns how the module with this path in the files is quantized, or None if it is not
    quantized.

    As in mlx-lm, the width of the weight is the number of groups times the group size, and the
    number of bits follows from the width. If the configuration does not match the tensors, raises
    LookupError, TypeError, ValueError, AttributeError or ArithmeticError.
    """
    dtype, shape = tensors.get(f"{path}.weight", ("", ()))
    if f"{path}.scales" not in tensors or dtype != "U32":
        return None
    whole = config.get("quantization") or config.get("quantization_config") or {}
    own = next((whole[p] for p in spellings(path) if isinstance(whole.get(p), dict)), {})
    group = int(own.get("group_size") or whole.get("group_size") or 64)
    kind, scales = tensors[f"{path}.scales"]
    bits = shape[-1] * 32 // (scales[-1] * group)
    mode = own.get("mode") or whole.get("mode") or "affine"
    if kind in FLOATS:
        mode = "affine"
    elif mode == "affine":
        mode = CODES.get((bits, group), mode)
    return Quantization(group, bits, mode)
