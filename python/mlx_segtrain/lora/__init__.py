"""Low-rank updates (LoRA and DoRA): their factors, and the modules that apply them."""

from .adapter import ARRAYS, KINDS, LORA, Adapter, Kind
from .modules import EMBEDDINGS, LoRALinear, few, fresh_a, has_experts, shapes, unwrap, wrap
from .twin import twin_of

__all__ = [
    "ARRAYS",
    "EMBEDDINGS",
    "KINDS",
    "LORA",
    "Adapter",
    "Kind",
    "LoRALinear",
    "few",
    "fresh_a",
    "has_experts",
    "shapes",
    "twin_of",
    "unwrap",
    "wrap",
]
