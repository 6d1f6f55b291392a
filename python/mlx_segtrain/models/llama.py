"""Llama-style models: a norm before attention with rotary q and k, a norm before SwiGLU, and a
residual connection around each.

The following differences between models are read from mlx-lm's modules: biases, norms of q and k,
norms after the branches, fused projections, layers without rotation, and multipliers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from .. import ops
from .chain import Chain
from .form import LayerForm, LayerHeaders
from .layer import Embedding, Layer, Norm, Rotate, chain, layer_of

#: Modules of mlx-lm that always use full attention, even if config.json specifies a window.
WITHOUT_WINDOWS = ("granite", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
#: Includes types for which mlx-lm loads the module of another type, and types of multimodal models
#: that contain a model of one of these types.
TYPES = {
    *(*WITHOUT_WINDOWS, "llama", "ministral3", "mistral", "xverse", "iquestcoder"),
    *("mistral3", "pixtral", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
}


def chain_of(model: Any, prefix: str) -> Chain:
    body, args = model.model, model.args
    names = [f"{prefix}model.layers.{i}" for i in range(len(body.layers))]
    shrink = 1 / getattr(model, "logits_scaling", 1.0)
    grow = getattr(body, "embedding_multiplier", 1.0)

    # A multiplier of the logits is merged into the norm's weight, which scales every row.
    weight = body.norm.weight if shrink == 1 else body.norm.weight * shrink
    return chain(
        model,
        prefix,
        Embedding(body.embed_tokens, f"{prefix}model.embed_tokens", grow),
        [_layer(name, layer, args) for name, layer in zip(names, body.layers, strict=True)],
        Norm(weight, body.norm.eps),
        tied=args.tie_word_embeddings,
    )


def tied(text: Mapping[str, Any]) -> bool:
    return text.get("tie_word_embeddings", text.get("model_type") != "phi3")


def forms(text: Mapping[str, Any], layers: Sequence[LayerHeaders]) -> list[LayerForm]:
    types = None if text.get("model_type") in WITHOUT_WINDOWS else text.get("layer_types") or None
    slides = [types is not None and types[i] == "sliding_attention" for i in range(len(layers))]
    return [
        layer.form(text, window=text.get("sliding_window") if own else None)
        for layer, own in zip(layers, slides, strict=True)
    ]


def _layer(name: str, layer: Any, args: Any) -> Layer:
    slides = getattr(layer, "use_sliding", False)
    return layer_of(
        name,
        layer,
        args.num_attention_heads,
        attention={
            "window": args.sliding_window if slides else None,
            "scale_q": _scale_by_position(args),
        },
        branch_scale=getattr(layer, "residual_multiplier", 1.0),
    )


def _scale_by_position(args: Any) -> Rotate | None:
    """Returns the function that scales q as in Ministral 3: the scale grows with the logarithm of
    the number of original context lengths that precede a position. Returns None for models without
    this scaling."""
    rope: dict[str, Any] = getattr(args, "rope_parameters", None) or {}
    beta: float | None = rope.get("llama_4_scaling_beta")
    if beta is None:
        return None
    length = rope["original_max_position_embeddings"]

    def scale(q: mx.array, offset: int, segments: ops.Segments | None) -> mx.array:
        passed = mx.floor(ops.positions_of(offset, q.shape[2], segments) / length)
        return q * (1 + beta * mx.log1p(passed)).astype(q.dtype)[:, None]

    return scale
