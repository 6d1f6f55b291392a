"""Model families: an mlx-lm model as a chain of stages over our ops. Only this package knows them.

Weights, configuration, tokenizer and generation stay mlx-lm's. A family is a module with
`serves(model) -> bool` and `chain(model) -> Chain`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from .. import ops
from ..errors import InputError
from ..schedule import Stage

__all__ = ["Chain", "Projection", "chain_of", "load", "load_base"]


class Projection:
    """A frozen linear of a stage that takes its LoRA update, if it has one, from the parameters."""

    def __init__(self, module: nn.Module, name: str):
        self.base = ops.base_of(module)
        self.name = name

    def linear(self, params: Mapping[str, mx.array], scales: Mapping[str, float]) -> ops.Linear:
        a = params.get(f"{self.name}.lora_a")
        if a is None:
            return ops.Linear(self.base)
        return ops.Linear(self.base, a, params[f"{self.name}.lora_b"], scales[self.name])


@dataclass(frozen=True)
class Chain:
    """A model as the trainer sees it.

    `stages(scales)` has one stage a layer, named by its path (`model.layers.3`); its parameters are
    `self_attn.q_proj.lora_a` and the like, and `scales` the multipliers by full path. `norm` and
    `head` turn the last h into logits.
    """

    embed: Callable[[mx.array], mx.array]  #: tokens [B, T] → h [B, T, H]
    stages: Callable[[Mapping[str, float]], list[Stage]]
    norm: Callable[[mx.array], mx.array]
    head: ops.Base
    linears: dict[str, nn.Module]  #: what can be adapted, by full path
    layer_of: dict[str, int]  #: index of the layer that a path belongs to
    n_layers: int
    max_length: int | None  #: positions the model was made for
    softcap: float | None = None


def chain_of(model: nn.Module) -> Chain:
    """The chain of a loaded mlx-lm model. InputError if no family serves it."""
    from . import llama

    for family in (llama,):
        if family.serves(model):
            return family.chain(model)
    raise InputError(
        f"model type '{getattr(model, 'model_type', type(model).__module__)}' cannot be trained "
        "yet: use a model of the Llama form (llama, mistral, SmolLM2, MiniCPM5)."
    )


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
    return model, tokenizer
