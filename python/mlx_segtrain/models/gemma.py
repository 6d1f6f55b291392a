"""Gemma 2, 3 and 4: four norms a layer, GeGLU, sliding and global attention.

Gemma 4 adds, each where the configuration has it: layers that read the keys and values of an
earlier one, an input of each layer's own made from the tokens, values that are the keys, experts
beside the dense MLP, and a scalar a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..errors import InputError
from .chain import Chain
from .form import LayerForm, LayerHeaders
from .layer import (
    Attention,
    Embedding,
    Layer,
    LinearHead,
    Linears,
    Mlp,
    Norm,
    Projection,
    at,
    chain,
    outer_of,
    rotary,
)

FORMS = ("gemma2", "gemma3_text", "gemma4_text")
TYPES = {*FORMS, "gemma3", "gemma4", "gemma4_unified"}
#: What mlx-lm assumes where config.json is silent, by the beginning of `model_type`.
ASSUMED: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 256, "attn_logit_softcapping": 50.0},
    "gemma3": {"head_dim": 256, "sliding_window": 512, "sliding_window_pattern": 6},
    "gemma4": {
        **{"head_dim": 256, "global_head_dim": 512, "num_kv_shared_layers": 20},
        **{"sliding_window": 512, "sliding_window_pattern": 5},
    },
}
PROJECTIONS = (
    *(f"self_attn.{p}_proj" for p in "qkvo"),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
    "per_layer_input_gate",
    "per_layer_projection",
)


def serves(model: nn.Module) -> bool:
    return type(model).__module__.rsplit(".", 1)[-1] in FORMS


def chain_of(model: Any, prefix: str) -> Chain:
    body, args = model.model, model.args
    fourth = type(model).__module__.endswith("gemma4_text")
    donors = getattr(body, "previous_kvs", range(len(body.layers)))
    names = [f"{prefix}model.layers.{i}" for i in range(len(body.layers))]

    def scaled(h: mx.array) -> mx.array:
        if type(model).__module__.endswith("gemma3_text"):  # which rounds the factor first
            return h * mx.array(args.hidden_size**0.5, mx.bfloat16).astype(h.dtype)
        return h * args.hidden_size**0.5

    tied = getattr(model, "tie_word_embeddings", True)
    embedding = Embedding(body.embed_tokens, f"{prefix}model.embed_tokens", scaled)
    head, outer = outer_of(model, embedding, prefix, tied)
    if getattr(body, "hidden_size_per_layer_input", 0):
        outer.pop(embedding.path)  # inputs of every layer are made from it, too
    return chain(
        embedding,
        [
            _layer(
                names[i],
                layer,
                args,
                finish=_finish(body, embedding, i) if fourth else None,
                donor=names[donors[i]] if donors[i] != i else None,
            )
            for i, layer in enumerate(body.layers)
        ],
        LinearHead(
            _norm(body.norm, fourth),
            head,
            getattr(model, "final_logit_softcapping", None),
        ),
        getattr(args, "max_position_embeddings", None),
        outer,
    )


def tied(text: Mapping[str, Any]) -> bool:
    """Of Gemma 2 always, of Gemma 3 unless the weights have a head."""
    kind = _kind(text)
    return kind == "gemma2" or (kind == "gemma4" and text.get("tie_word_embeddings", True))


def forms(text: Mapping[str, Any], layers: Sequence[LayerHeaders]) -> list[LayerForm]:
    kind, n = _kind(text), len(layers)
    text = {**ASSUMED[kind], **text}
    shared = text.get("num_kv_shared_layers") or 0
    if not 0 <= shared < n:
        raise InputError(f"num_kv_shared_layers is {shared}, and the weights have {n} layers.")
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
    """full_attention or sliding_attention, by layer, as mlx-lm reads the configuration."""
    if kind == "gemma2":
        return ["full_attention"] * n
    if kind == "gemma4" and text.get("layer_types"):
        return list(text["layer_types"])
    pattern: int = text["sliding_window_pattern"]
    return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(n)]


def _norm(module: Any, whole: bool) -> Norm:
    """Up to Gemma 3 a weight is its distance from 1."""
    return Norm(module.weight if whole else 1.0 + module.weight, module.eps)


def _layer(
    name: str,
    layer: Any,
    args: Any,
    *,
    finish: "_Finish | None",
    donor: str | None,
) -> Layer:
    attn, whole = layer.self_attn, finish is not None
    modules = {path: found for path in PROJECTIONS if (found := at(layer, path)) is not None}
    if donor:  # an adapter has nothing to change in projections that nobody runs
        modules = {p: m for p, m in modules.items() if p[-6:] not in ("k_proj", "v_proj")}
    projections = {
        path: Projection(ops.base_of(module), f"{name}.{path}") for path, module in modules.items()
    }
    d = projections["self_attn.o_proj"].base.in_dims // attn.n_heads

    def norm(path: str) -> Norm | None:
        found = at(layer, path)
        return None if found is None else _norm(found, whole)

    def own(path: str) -> Norm | None:
        return None if donor else norm(path)

    own_input = projections.get("per_layer_input_gate")
    sliding = getattr(attn, "is_sliding", False)
    mlp: Any = Mlp(*(projections[f"mlp.{p}_proj"] for p in ("gate", "up", "down")), gelu=True)
    if getattr(layer, "enable_moe", False):
        mlp = _Experts(layer, mlp)
    return Layer(
        name=name,
        modules={f"{name}.{path}": module for path, module in modules.items()},
        attention=Attention(
            q=projections["self_attn.q_proj"],
            k=projections.get("self_attn.k_proj"),
            v=projections.get("self_attn.v_proj"),
            o=projections["self_attn.o_proj"],
            heads=attn.n_heads,
            kv_heads=attn.n_kv_heads,
            scale=attn.scale,
            rotate=rotary(attn.rope),
            window=args.sliding_window if sliding else None,
            softcap=getattr(attn, "attn_logit_softcapping", None),
            q_norm=norm("self_attn.q_norm"),
            k_norm=own("self_attn.k_norm"),
            v_norm=Norm(mx.ones(d, attn.q_norm.weight.dtype), attn.q_norm.eps)
            if whole and not donor
            else None,
        ),
        mlp=mlp,
        before_attention=norm("input_layernorm"),
        after_attention=norm("post_attention_layernorm"),
        before_mlp=norm("pre_feedforward_layernorm"),
        after_mlp=norm("post_feedforward_layernorm"),
        finish=finish and finish(layer, projections),
        own_input=own_input.base.out_dims if own_input else 0,
        donor=donor,
    )


@dataclass(frozen=True)
class _Experts:
    """The dense MLP and the experts side by side; router and experts are frozen.

    Gradients flow through the experts and the weights of the router, not through its choice, which
    mlx-lm's own router would differentiate too in some versions.
    """

    layer: Any
    dense: Mlp

    @property
    def hidden(self) -> int:
        return self.dense.hidden

    @property
    def experts(self) -> int:
        config = self.layer.router.config
        return config.top_k_experts * config.moe_intermediate_size

    def __call__(self, linears: Linears, h: mx.array, x: mx.array) -> mx.array:
        layer = self.layer
        y = _norm(layer.post_feedforward_layernorm_1, True)(self.dense(linears, h, x))
        sparse = layer.experts(
            _norm(layer.pre_feedforward_layernorm_2, True)(h), *self._route(layer.router, h)
        )
        return y + _norm(layer.post_feedforward_layernorm_2, True)(sparse)

    @staticmethod
    def _route(router: Any, h: mx.array) -> tuple[mx.array, mx.array]:
        """The experts of each row [..., K], and their weights."""
        k = router.config.top_k_experts
        x = ops.rms_norm(h, router.scale * router.config.hidden_size**-0.5, router.eps)
        scores = router.proj(x)
        chosen = mx.argpartition(mx.stop_gradient(scores), kth=-k, axis=-1)[..., -k:]
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1)
        return chosen, weights * router.per_expert_scale[chosen]


_Finish = Callable[
    [Any, dict[str, Projection]], Callable[[Linears, mx.array, mx.array | None], mx.array]
]


def _finish(body: Any, embed: Callable[[mx.array], mx.array], i: int) -> _Finish:
    """The end of a layer of Gemma 4: what its own input adds, and its scalar."""
    size = body.hidden_size_per_layer_input

    def own_input(tokens: mx.array) -> mx.array:
        """Layer i's part of the token's second embedding and of a projection of the first."""
        begin, end = i * size, (i + 1) * size
        base = ops.rows_of(ops.base_of(body.per_layer_model_projection), begin, end)
        (x,) = ops.lora_linears(embed(tokens), [ops.Linear(base)])
        norm = _norm(body.per_layer_projection_norm, True)
        x = norm(x * body.per_layer_projection_scale)
        x = x + _embedded(body.embed_tokens_per_layer, tokens, i, size) * (
            body.embed_tokens_per_layer_scale
        )
        return x * body.per_layer_input_scale

    def of_layer(layer: Any, projections: dict[str, Projection]) -> Any:
        def finish(linears: Linears, h: mx.array, tokens: mx.array | None) -> mx.array:
            if tokens is not None:
                x = own_input(tokens[:, -h.shape[1] :])
                (gate,) = linears(h, projections["per_layer_input_gate"])
                x = ops.geglu(gate, x)
                (x,) = linears(x, projections["per_layer_projection"])
                h = h + _norm(layer.post_per_layer_input_norm, True)(x)
            return h * layer.layer_scalar

        return finish

    return of_layer


def _embedded(module: Any, tokens: mx.array, i: int, size: int) -> mx.array:
    """Columns [i·size, (i + 1)·size) of the tokens' rows of an embedding, dense or quantized."""
    weight = module.weight
    if "scales" not in module:
        return weight.reshape(weight.shape[0], -1, size)[tokens, i]
    if size % module.group_size:
        return module(tokens)[..., i * size : (i + 1) * size]
    n = module.scales.shape[1] * module.group_size // size

    def part(x: mx.array) -> mx.array:
        return x.reshape(x.shape[0], n, -1)[tokens, i]

    biases = module.get("biases")
    return mx.dequantize(
        part(weight),
        part(module.scales),
        None if biases is None else part(biases),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
