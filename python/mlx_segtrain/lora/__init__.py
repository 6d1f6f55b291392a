"""Low-rank updates: the factors, and the modules that apply them."""

from .adapter import ARRAYS, KINDS, LORA, Adapter, Kind, Tensors
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
    "ARRAYS",
    "EMBEDDINGS",
    "KINDS",
    "LORA",
    "Adapter",
    "Kind",
    "LoRALinear",
    "LoRASwitchLinear",
    "Tensors",
    "fresh_a",
    "has_experts",
    "shapes",
    "wrap",
]
