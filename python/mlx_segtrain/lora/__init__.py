"""Low-rank updates: the factors, and the modules that apply them."""

from .adapter import Adapter, Tensors
from .modules import (
    EMBEDDINGS,
    LoRALinear,
    LoRASwitchLinear,
    fresh_a,
    has_experts,
    shapes,
    wrap,
)

__all__ = [
    "EMBEDDINGS",
    "Adapter",
    "LoRALinear",
    "LoRASwitchLinear",
    "Tensors",
    "fresh_a",
    "has_experts",
    "shapes",
    "wrap",
]
