"""Model families: an mlx-lm model as a chain of stages over our ops. Only this package knows them.

Weights, configuration, tokenizer and generation stay mlx-lm's. A fast family is a module with
`serves(text_model) -> bool` and `chain_of(text_model, prefix) -> Chain`; every other model takes
the generic path.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..errors import InputError
from .chain import Chain, Head

__all__ = ["Chain", "Head", "chain_of", "family_of", "load", "load_base"]


def family_of(model: nn.Module) -> Any:
    """The module of the model's fast family; None if it takes the generic path."""
    from . import gemma, llama

    text = model.get("language_model", model)
    return next((family for family in (llama, gemma) if family.serves(text)), None)


def chain_of(model: nn.Module) -> Chain:
    """The chain of a loaded mlx-lm model.

    Of a model for text and images it is the text model's, and names keep its prefix. InputError if
    the model cannot be cut into layers or not be differentiated.
    """
    from . import generic

    family = family_of(model)
    if family is None:
        return generic.chain_of(model)
    inner = model.get("language_model")
    return family.chain_of(inner or model, "language_model." if inner else "")


def load_base(model_dir: str | Path) -> tuple[nn.Module, dict[str, Any], Any]:
    """mlx-lm's model, configuration and tokenizer from a local folder.

    On the CPU floating weights become float32, the dtype its kernels compute in. InputError if the
    folder is missing, is no model, or cannot be read.
    """
    from mlx_lm.utils import load_model, load_tokenizer

    model_dir = Path(model_dir).expanduser()
    if not model_dir.is_dir():
        raise InputError(f"model_dir {model_dir} is not a folder: give the path of a model.")
    for name, what in (("config.json", "configuration"), ("tokenizer_config.json", "tokenizer")):
        if not (model_dir / name).is_file():
            raise InputError(f"model_dir {model_dir} holds no {name} ({what}): not a model folder.")
    if not any(model_dir.glob("model*.safetensors")):
        raise InputError(f"model_dir {model_dir} holds no model*.safetensors: no weights to load.")
    try:
        model, config = load_model(model_dir, lazy=True)
        tokenizer = load_tokenizer(model_dir, eos_token_ids=config.get("eos_token_id"))
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model_dir {model_dir} cannot be loaded: {reason}") from error
    if mx.default_device() == mx.Device(mx.cpu):
        model.update(tree_map(_float32, model.parameters()))
    mx.eval(model.parameters())
    return model, config, tokenizer


def _float32(x: mx.array) -> mx.array:
    return x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x


def load(model_dir: str | Path, adapter_path: str | Path | None = None) -> tuple[nn.Module, Any]:
    """An mlx-lm model with an adapter attached, and its tokenizer, ready for `mlx_lm.generate`.

    Adapted linears run through our `lora_linear`; the model's float weights are float32 on the CPU.
    InputError if the model or the adapter cannot be read or do not fit each other.
    """
    from .. import lora
    from ..adapters import read_adapter

    model, _, tokenizer = load_base(model_dir)
    chain = chain_of(model)
    lora.attach(model, chain, read_adapter(adapter_path, chain) if adapter_path else None)
    model.eval()
    return model, tokenizer
