"""Converts mlx-lm models to chains of stages that use our ops. No other package distinguishes model
families.

The weights, the configuration, the tokenizer and the forward pass for generation come from mlx-lm.
A fast family is a module in FAMILIES that has the members of `Family`. Every other model uses the
generic path.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import InputError, reason
from ..lora.paths import WRAPPER
from . import gemma, llama
from .chain import Chain
from .form import LayerForm, LayerHeaders
from .limits import check_files, check_model, check_tokenizer
from .snapshot import Snapshot

__all__ = [
    "Chain",
    "chain_of",
    "family_of",
    "load_base",
    "load_headless",
    "load_model",
    "load_tokenizer",
]


class Family(Protocol):
    """The interface of a fast family, which reads layers from mlx-lm's modules and from the files
    of a model.

    `text` is config.json, updated with the keys of its text_config if there is one.
    """

    @property
    def TYPES(self) -> Collection[str]:
        """The `model_type`s of the family's models, and of multimodal models that contain one of
        these models. Also includes the names of mlx-lm's modules for these models."""
        ...

    def chain_of(self, model: Any, prefix: str) -> Chain:
        """Returns the chain of a model of this family. `prefix` precedes the paths of the model's
        modules."""
        ...

    def forms(self, text: Mapping[str, Any], layers: Sequence[LayerHeaders]) -> list[LayerForm]:
        """Returns the forms that the layers of the model's chain will have."""
        ...

    def tied(self, text: Mapping[str, Any]) -> bool:
        """Returns whether the embedding is used as the head, even if the weights contain a separate
        head."""
        ...


FAMILIES: tuple[Family, ...] = (llama, gemma)


def of_type(model_type: str) -> Family | None:
    """Returns the fast family for a config.json's `model_type`, or None if there is none."""
    return next((family for family in FAMILIES if model_type in family.TYPES), None)


def family_of(model: nn.Module) -> Family | None:
    """Returns the model's fast family, or None if the model uses the generic path."""
    return of_type(type(text_model(model)).__module__.rpartition(".")[2])


def chain_of(model: nn.Module, layers: range | None = None) -> Chain:
    """Returns the chain of a loaded mlx-lm model. If `layers` is given, the weights of other layers
    may be missing.

    For a multimodal model, returns the chain of its text model. The paths in this chain include the
    text model's prefix. Raises InputError if the model cannot be split into layers or cannot be
    differentiated.
    """
    from . import generic

    family = family_of(model)
    if family is None:
        return generic.chain_of(model, layers)
    inner = model.get("language_model")
    return family.chain_of(inner or model, WRAPPER if inner else "")


def load_base(model_dir: str | Path) -> tuple[nn.Module, dict[str, Any], Any]:
    """Loads mlx-lm's model, configuration and tokenizer from a local folder.

    On the CPU, floating-point weights are converted to float32, the dtype in which MLX's CPU
    kernels compute. Raises InputError if the folder is missing, does not contain a model, or cannot
    be read.
    """
    tokenizer = load_tokenizer(model_dir)
    return *load_model(model_dir), tokenizer


def load_tokenizer(model_dir: str | Path) -> Any:
    """Loads mlx-lm's tokenizer for the model in a folder, without the weights. Raises InputError
    like load_base."""
    folder = opened(model_dir).folder
    from mlx_lm.utils import load_config, load_tokenizer

    check_tokenizer(folder)
    with _reading(folder):
        tokenizer = load_tokenizer(folder, eos_token_ids=load_config(folder).get("eos_token_id"))
    # In mlx-lm before 0.32 (used on Python 3.10), the EOS tokens in config.json may replace the
    # tokenizer's own EOS tokens.
    tokenizer.eos_token_ids = {*tokenizer.eos_token_ids, tokenizer.eos_token_id} - {None}
    return tokenizer


def load_model(
    model_dir: str | Path, reads: Callable[[str], bool] = lambda name: True
) -> tuple[nn.Module, dict[str, Any]]:
    """Loads mlx-lm's model and configuration. Raises InputError like load_base.

    A weight is read lazily if `reads` returns False for its name.
    """
    snapshot = opened(model_dir)
    from mlx_lm.utils import load_model

    with _reading(snapshot.folder):
        check_model(snapshot)
        model, config = load_model(snapshot.folder, lazy=True)
    return _evaluated(model, reads), config


def load_headless(
    model_dir: str | Path, instead: str
) -> tuple[nn.Module, dict[str, Any], mx.array]:
    """Loads mlx-lm's model without its head. Also returns the configuration, and the tensor named
    `instead`, which the files contain instead of a head. Raises InputError like load_base."""
    snapshot = opened(model_dir)
    from mlx_lm.utils import _get_classes, load_model

    found: dict[str, mx.array] = {}

    def classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
        whole, args = _get_classes(config)

        class Headless(whole):
            def __init__(self, args: Any):
                super().__init__(args)
                text_model(self).pop("lm_head", None)

            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                found[instead] = weights.pop(instead)
                known = getattr(super(), "sanitize", None)
                return known(weights) if known else weights

        return Headless, args

    with _reading(snapshot.folder):
        check_model(snapshot)
        model, config = load_model(snapshot.folder, lazy=True, get_model_classes=classes)
    return _evaluated(model), config, found[instead]


def text_model(model: nn.Module) -> nn.Module:
    """Returns the text model inside a multimodal model. A text-only model is returned unchanged."""
    return model.get("language_model", model)


def _evaluated(model: nn.Module, reads: Callable[[str], bool] = lambda name: True) -> nn.Module:
    """Loads weights into memory if `reads` returns True for their names. On the CPU, converts all
    weights to float32."""
    if mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)
    mx.eval([weight for name, weight in tree_flatten(model.parameters()) if reads(name)])
    return model


def opened(model_dir: str | Path) -> Snapshot:
    """Checks a folder before mlx-lm reads it, because mlx-lm would download missing files."""
    snapshot = Snapshot(model_dir, whole=True)
    snapshot.file("config.json", "configuration")
    snapshot.file("tokenizer_config.json", "tokenizer")
    check_files(snapshot.folder)
    return snapshot


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, InputError):
        raise
    # Untrusted files can make the libraries raise any error. A panic in Rust, for example, is not a
    # subclass of Exception.
    except BaseException as error:
        raise InputError(f"model_dir {folder} cannot be loaded: {reason(error, 500)}") from error
