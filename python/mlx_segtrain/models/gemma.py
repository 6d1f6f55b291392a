"""Gemma 2, 3 and 4: four norms per layer, GeGLU, and sliding-window or global attention.

Depending on its configuration, Gemma 4 also has layers that read the keys and values of an earlier
layer, a separate input for each layer (computed from the tokens), attention whose values are the
keys, experts in addition to the dense MLP, and a scalar for each layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from .. import ops
from ..errors import InputError
from .chain import Chain
from .form import LayerForm, LayerHeaders
from .layer import PROJECTIONS, Embedding, Layer, Linears, Mlp, Norm, Projection, chain, layer_of

TYPES = {"gemma2", "gemma3_text", "gemma4_text", "gemma3", "gemma4", "gemma4_unified"}
#: mlx-lm's defaults for values that config.json lacks, keyed by a prefix of `model_type`.
ASSUMED: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 256, "attn_logit_softcapping": 50.0},
    "gemma3": {"head_dim": 256, "sliding_window": 512, "sliding_window_pattern": 6},
    "gemma4": {
        **{"head_dim": 256, "global_head_dim": 512, "num_kv_shared_layers": 20},
        **{"sliding_window": 512, "sliding_window_pattern": 5},
    },
}
#: The additional linear layers of a decoder layer with its own input.
OWN_INPUT = ("per_layer_input_gate", "per_layer_projection")


def chain_of(model: Any, prefix: str) -> Chain:
    body, args = model.model, model.args
    kind = type(model).__module__.rpartition(".")[2]
    fourth = kind == "gemma4_text"
    # Up to Gemma 3, the weight files store each norm weight minus 1.
    norm = Norm.of if fourth else _norm_around_1
    names = [f"{prefix}model.layers.{i}" for i in range(len(body.layers))]
    donors = getattr(body, "previous_kvs", range(len(names)))

    factor = args.hidden_size**0.5
    if kind == "gemma3_text":  # these models round the factor first
        factor = float(mx.array(factor, mx.bfloat16))
    embedding = Embedding(body.embed_tokens, f"{prefix}model.embed_tokens", factor)

    def layer_at(i: int, name: str) -> Layer:
        layer, more = body.layers[i], {}
        attn = layer.self_attn
        attention = {
            "window": args.sliding_window if getattr(attn, "is_sliding", False) else None,
            "softcap": getattr(attn, "attn_logit_softcapping", None),
        }
        mlp, donor = partial(Mlp, gelu=True), names[donors[i]] if donors[i] != i else None
        if fourth:
            if size := body.hidden_size_per_layer_input:
                more["finish"], more["own_input"] = _finish(body, embedding, name, i), size
            else:
                more["factor"] = layer.layer_scalar
            if not donor:
                weight = mx.ones_like(attn.q_norm.weight)
                attention["v_norm"] = Norm(weight, attn.q_norm.eps)
        if getattr(layer, "enable_moe", False):
            config = layer.router.config
            numbers = config.top_k_experts * config.moe_intermediate_size
            mlp = partial(_Experts, gelu=True, experts=numbers, layer=layer)
        return layer_of(
            name,
            layer,
            args.num_attention_heads,
            norm=norm,
            mlp=mlp,
            paths=(*PROJECTIONS, *OWN_INPUT),
            donor=donor,
            attention=attention,
            **more,
        )

    return chain(
        model,
        prefix,
        embedding,
        [layer_at(i, name) for i, name in enumerate(names)],
        norm(body.norm),
        tied=getattr(model, "tie_word_embeddings", True),
        softcap=getattr(model, "final_logit_softcapping", None),
    )


def tied(text: Mapping[str, Any]) -> bool:
    """Returns whether the embedding is always used as the head. The result is False for Gemma 3,
    which uses the embedding only if the weights contain no separate head."""
    kind = _kind(text)
    return kind == "gemma2" or (kind == "gemma4" and text.get("tie_word_embeddings", True))


def forms(text: Mapping[str, Any], layers: Sequence[LayerHeaders]) -> list[LayerForm]:
    kind, n = _kind(text), len(layers)
    text = {**ASSUMED[kind], **text}
    shared = text.get("num_kv_shared_layers") or 0
    if not 0 <= shared < n:
        raise InputError(f"num_kv_shared_layers is {shared}, but the weights have {n} layers.")
    types = _types(kind, text, n)
    experts = text.get("enable_moe_block") and text.get("top_k_experts")
    found = []
    for i, layer in enumerate(layers):
        donor, more = None, {}
        if i >= n - shared:
            donor = layers[max(j for j in range(n - shared) if types[j] == types[i])].name
        if types[i] == "sliding_attention":
            more["window"] = text.get("sliding_window")
        elif text.get("global_head_dim"):
            more["head"] = text["global_head_dim"]
        found.append(
            layer.form(
                text,
                softcap=bool(text.get("attn_logit_softcapping")),
                v_norm=kind == "gemma4" and donor is None,
                experts=(experts or 0) * (text.get("moe_intermediate_size") or 0),
                donor=donor,
                **more,
            )
        )
    return found


def _kind(text: Mapping[str, Any]) -> str:
    return str(text.get("model_type"))[: len("gemma2")]


def _types(kind: str, text: Mapping[str, Any], n: int) -> list[str]:
    """Returns the attention type of each layer, full_attention or sliding_attention, determined
    from the configuration in the same way as in mlx-lm."""
    if kind == "gemma2":
        return ["full_attention"] * n
    if kind == "gemma4" and text.get("layer_types"):
        return list(text["layer_types"])
    pattern: int = text["sliding_window_pattern"]
    return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(n)]


def _norm_around_1(module: Any) -> Norm:
    return Norm(1.0 + module.weight, module.eps)


@dataclass(frozen=True)
class _Experts(Mlp):
    """The dense MLP with experts in parallel. The router and the experts are frozen.

    Gradients flow through the experts and through the weights that the router assigns to them, but
    not through its choice of experts. mlx-lm's router is not used, because some versions of it also
    differentiate the choice.
    """

    layer: Any = None

    def __call__(self, linears: Linears, h: mx.array, x: mx.array) -> mx.array:
        layer = self.layer
        y = Norm.of(layer.post_feedforward_layernorm_1)(super().__call__(linears, h, x))
        sparse = layer.experts(
            Norm.of(layer.pre_feedforward_layernorm_2)(h), *self._route(layer.router, h)
        )
        return y + Norm.of(layer.post_feedforward_layernorm_2)(sparse)

    @staticmethod
    def _route(router: Any, h: mx.array) -> tuple[mx.array, mx.array]:
        """Returns the indices of the experts for each row, [..., K], and their weights."""
        k = router.config.top_k_experts
        x = ops.rms_norm(h, router.scale * router.config.hidden_size**-0.5, router.eps)
        scores = router.proj(x)
        chosen = mx.argpartition(mx.stop_gradient(scores), kth=-k, axis=-1)[..., -k:]
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1)
        return chosen, weights * router.per_expert_scale[chosen]


def _finish(
    body: Any, embed: Callable[[mx.array], mx.array], name: str, i: int
) -> Callable[[Linears, mx.array, mx.array], mx.array]:
    """Returns `Layer.finish` for layer i of Gemma 4. The function adds the contribution of the
    layer's own input to h, and multiplies the sum by the layer's scalar."""
    layer, size = body.layers[i], body.hidden_size_per_layer_input
    own = [Projection(ops.base_of(layer[p]), f"{name}.{p}") for p in OWN_INPUT]
    norm, after = Norm.of(body.per_layer_projection_norm), Norm.of(layer.post_per_layer_input_norm)
    begin = i * size
    base = ops.rows_of(ops.base_of(body.per_layer_model_projection), begin, begin + size)
    table = ops.base_of(body.embed_tokens_per_layer)
    factors = [
        body.per_layer_projection_scale,
        body.embed_tokens_per_layer_scale,
        body.per_layer_input_scale,
    ]

    def own_input(tokens: mx.array) -> mx.array:
        """Adds the tokens' second embedding to a normalized projection of their first embedding,
        and returns layer i's part of the sum."""
        (x,) = ops.lora_linears(embed(tokens), [ops.Linear(base)])
        return ops.own_input(x, norm.weight, norm.eps, table, tokens, begin, factors)

    def finish(linears: Linears, h: mx.array, tokens: mx.array) -> mx.array:
        x = own_input(tokens[:, -h.shape[1] :])
        (gate,) = linears(h, own[0])
        (x,) = linears(ops.geglu(gate, x), own[1])
        return after.added(h, x, layer.layer_scalar)

    return finish
