"""The Llama form: norm, attention with rotary q and k, norm, SwiGLU; residual around each.

Serves what mlx-lm loads as `llama`: Llama, Mistral, SmolLM2, MiniCPM5.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import Llama3RoPE

from .. import ops
from ..schedule import Stage
from . import Chain, Projection

PROJECTIONS = (
    *(f"self_attn.{p}_proj" for p in "qkvo"),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
)


def serves(model: nn.Module) -> bool:
    return type(model).__module__ == "mlx_lm.models.llama"


def chain(model: Any) -> Chain:
    body, args = model.model, model.args
    linears = {
        f"model.layers.{i}.{name}": _at(layer, name)
        for i, layer in enumerate(body.layers)
        for name in PROJECTIONS
    }

    def stages(scales: Mapping[str, float]) -> list[Stage]:
        return [
            Stage(f"model.layers.{i}", _layer(layer, args, _below(scales, f"model.layers.{i}.")))
            for i, layer in enumerate(body.layers)
        ]

    return Chain(
        embed=body.embed_tokens,
        stages=stages,
        norm=lambda h: ops.rms_norm(h, body.norm.weight, body.norm.eps),
        head=ops.base_of(body.embed_tokens if args.tie_word_embeddings else model.lm_head),
        linears=linears,
        layer_of={path: int(path.split(".")[2]) for path in linears},
        n_layers=len(body.layers),
        max_length=args.max_position_embeddings,
    )


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = module[name]
    return module


def _below(scales: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {p.removeprefix(prefix): s for p, s in scales.items() if p.startswith(prefix)}


def _rotary(rope: Any) -> Callable[[mx.array], mx.array]:
    """mlx-lm's rotary module as our op; one that also scales its input (YaRN) stays as it is."""
    if isinstance(rope, nn.RoPE):
        options: dict[str, Any] = {"base": rope.base, "scale": rope.scale}
    elif isinstance(rope, Llama3RoPE):
        options = {"freqs": rope._freqs}
    else:
        return rope
    return lambda x: ops.rope(x, rope.dims, traditional=rope.traditional, **options)


def _layer(layer: Any, args: Any, scales: Mapping[str, float]) -> Callable[..., mx.array]:
    """h [B, T, H] → h [B, T, H]"""
    projections = [Projection(_at(layer, name), name) for name in PROJECTIONS]
    attn, norm_1, norm_2 = layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm
    rotate = _rotary(attn.rope)
    window = args.sliding_window if layer.use_sliding else None

    def forward(params: Mapping[str, mx.array], h: mx.array) -> mx.array:
        b, t, _ = h.shape
        q_proj, k_proj, v_proj, o_proj, gate, up, down = (
            p.linear(params, scales) for p in projections
        )

        def heads(x: mx.array, n: int) -> mx.array:  # [B, T, n·D] → [B, n, T, D]
            return x.reshape(b, t, n, -1).transpose(0, 2, 1, 3)

        x = ops.rms_norm(h, norm_1.weight, norm_1.eps)
        q, k, v = ops.lora_linears(x, [q_proj, k_proj, v_proj])
        q, k = rotate(heads(q, attn.n_heads)), rotate(heads(k, attn.n_kv_heads))
        o = ops.attention(q, k, heads(v, attn.n_kv_heads), scale=attn.scale, window=window)
        (o,) = ops.lora_linears(o.transpose(0, 2, 1, 3).reshape(b, t, -1), [o_proj])

        h, x = ops.add_rms_norm(h, o, norm_2.weight, norm_2.eps)
        return h + ops.lora_glu_mlp(x, gate, up, down)

    return forward
