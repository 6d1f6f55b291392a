"""Low-rank updates: the factors, and the modules that apply them."""

from .adapter import ARRAYS, KINDS, LORA, Adapter, Kind
from .modules import (
    EMBEDDINGS,
    LoRALinear,
    fresh_a,
    has_experts,
    shapes,
    unwrap,
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
    "fresh_a",
    "has_experts",
    "shapes",
    "unwrap",
    "wrap",
]
