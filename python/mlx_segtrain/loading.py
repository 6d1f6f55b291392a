"""A model with its adapter, ready for generation."""

from pathlib import Path
from typing import Any

import mlx.nn as nn

from .adapters import read_adapter
from .models import chain_of, load_base
from .models.adapting import attach


def load(model_dir: str | Path, adapter_path: str | Path | None = None) -> tuple[nn.Module, Any]:
    """An mlx-lm model with an adapter attached, and its tokenizer, ready for `mlx_lm.generate`.

    Adapted linears run through our `lora_linear`; the model's float weights are float32 on the CPU.
    InputError if the model or the adapter cannot be read or do not fit each other.
    """

    model, _, tokenizer = load_base(model_dir)
    chain = chain_of(model)
    attach(model, chain, read_adapter(adapter_path, chain) if adapter_path else None)
    model.eval()
    return model, tokenizer
