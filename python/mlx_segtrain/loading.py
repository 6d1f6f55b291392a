"""Loads a model with its adapter for generation."""

from pathlib import Path
from typing import Any

import mlx.nn as nn

from . import events, hub
from .adapters import read_adapter
from .models import chain_of, load_base
from .models.adapting import attach


def load(
    model_dir: str | Path,
    adapter_path: str | Path | None = None,
    on_event: events.OnEvent | None = None,
) -> tuple[nn.Module, Any]:
    """Loads an mlx-lm model and its tokenizer, and attaches an adapter to the model. Returns the
    model and the tokenizer, ready for `mlx_lm.generate`.

    The model and the adapter are folders or names on the Hugging Face hub. `on_event` receives the
    progress of downloads. Adapted layers use our op `lora_linear`. On the CPU, floating-point
    weights of the model are converted to float32. Raises InputError if the model or the adapter
    cannot be read, or if the adapter does not fit the model.
    """
    tell = on_event or (lambda event: None)
    adapter = hub.adapter(adapter_path, tell) if adapter_path else None
    model, _, tokenizer = load_base(hub.model(model_dir, tell))
    chain = chain_of(model)
    attach(model, chain, read_adapter(adapter, chain) if adapter else None)
    model.eval()
    return model, tokenizer
