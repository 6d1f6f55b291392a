"""What a model is made of, from config.json and the headers of its weights: no weight is read."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..safetensors import SIZES, Tensors
from .snapshot import MOST_LAYERS, Snapshot, quantization_of

#: `model_type` of the fast families, and of models for text and images around them.
FAST = {
    *("granite", "llama", "ministral3", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"),
    *("xverse", "iquestcoder", "gemma2", "gemma3_text", "gemma4_text"),
    *("gemma3", "gemma4", "gemma4_unified", "mistral3", "pixtral", "llava"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
}
#: Parts of a model for text and images that are not loaded.
OTHER_TOWERS = re.compile(r"(^|\.)(vision|visual|audio|multi_modal|mm_|embed_vision|embed_audio)")
FLOATS = ("F16", "BF16")
#: What mlx-lm assumes where config.json is silent, by the beginning of `model_type`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 256, "attn_logit_softcapping": 50.0},
    "gemma3": {"head_dim": 256, "sliding_window": 512, "sliding_window_pattern": 6},
    "gemma4": {
        **{"head_dim": 256, "global_head_dim": 512, "num_kv_shared_layers": 20},
        **{"sliding_window": 512, "sliding_window_pattern": 5},
    },
}
#: Families whose modules in mlx-lm know full attention only, whatever `layer_types` says.
WITHOUT_WINDOWS = ("gemma2", "granite", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")


@dataclass(frozen=True)
class LayerShape:
    """A layer's widths, in numbers a token: q of all heads, k (or v) of all of its own."""

    path: str
    query: int
    key_value: int  #: 0: it reads another layer's
    hidden: int
    head: int  #: of one head
    window: int | None
    softcap: bool
    separate_values: bool  #: False: values are the keys
    q_norm: bool
    v_norm: bool
    after_norms: bool
    per_layer_input: int
    experts: int  #: numbers that the experts of a token hold
    donor: int | None  #: the layer whose keys and values it reads
    gives: bool  #: others read its keys and values


@dataclass(frozen=True)
class ModelShape:
    """All that memory and work depend on; `widths` are in and out of linears by path."""

    family: str
    fast: bool
    width: int
    vocabulary: int
    layers: tuple[LayerShape, ...]
    linears: tuple[tuple[str, ...], ...]  #: paths of what can be adapted, by layer
    embedding: str  #: path of the table of the tokens
    outer: tuple[str, ...]  #: what else can be adapted: the embedding, a head of its own
    widths: dict[str, tuple[int, int]]
    bits: dict[str, int]  #: of quantized linears, by path
    float_size: int  #: bytes of its floating numbers
    tensors: Tensors
    max_length: int | None

    @property
    def head(self) -> str:
        """Path of the linear that the head has: its own, or the embedding."""
        return next((path for path in self.outer if path != self.embedding), self.embedding)

    @property
    def tied(self) -> bool | None:
        """Whether the embedding is the head too; None where neither is found by its name."""
        if not self.embedding:
            return None
        if self.fast:
            return self.head == self.embedding
        return not any(path.endswith("lm_head") for path in self.widths)

    def weight_bytes(self, float32: bool) -> int:
        """Of what is loaded; `float32`: floating weights become so, as on the CPU."""
        return sum(
            math.prod(shape) * (4 if float32 and dtype in FLOATS else SIZES.get(dtype, 1))
            for dtype, shape in self.tensors.values()
        )


def read_shape(model: str | Path | Snapshot) -> ModelShape:
    """Of a model's folder; InputError if it has no config.json or no readable header."""
    snapshot = model if isinstance(model, Snapshot) else Snapshot(model)
    config, tensors = snapshot.config, snapshot.tensors
    with snapshot.consistent():
        return shape_of(config, tensors)


def shape_of(config: Mapping[str, Any], tensors: Tensors) -> ModelShape:
    """From a configuration as mlx-lm reads it, and tensors by name; InputError if layers lack."""
    family = str(config.get("model_type", "unknown"))
    assumed = next((d for name, d in DEFAULTS.items() if family.startswith(name)), {})
    inner: dict[str, Any] = config.get("text_config") or {}
    text: dict[str, Any] = {**assumed, **config, **inner}
    loaded = {name: t for name, t in tensors.items() if not OTHER_TOWERS.search(name)}
    widths, bits = _linears(config, loaded)
    numbers = sorted({int(m[2]) for name in loaded if (m := _LAYER.match(name))})
    prefixes = {m[1] for name in loaded if (m := _LAYER.match(name))}
    if len(numbers) > MOST_LAYERS:
        raise InputError(f"the weights name {len(numbers):,} layers, more than {MOST_LAYERS:,}.")
    embedding = next((path for path in widths if path.endswith("embed_tokens")), None)
    if not numbers or embedding is None:
        if family in FAST:
            raise InputError(f"the weights of a {family} model name no layers or no embed_tokens.")
        return ModelShape(family, False, 0, 0, (), (), "", (), widths, bits, 2, loaded, None)
    width, vocabulary = widths[embedding]
    fast = family in FAST and inner.get("model_type", family) in FAST and len(prefixes) == 1
    layers = _layers(text, prefixes.pop(), len(numbers), widths, loaded) if fast else ()
    # Of a format that mlx-lm converts when it loads, widths and sizes are not these.
    weights = {kind for name, (kind, _) in loaded.items() if name.endswith(".weight")}
    fast = fast and weights <= {"U32", *FLOATS, "F32"}
    fast = fast and all(layer.query > 0 < layer.hidden for layer in layers)
    fast = fast and any(layer.key_value for layer in layers)
    kinds = {
        kind
        for name, (kind, _) in loaded.items()
        if re.search(r"embed_tokens\.(scales|weight)$", name)
    }
    return ModelShape(
        family=family,
        fast=fast,
        width=width,
        vocabulary=vocabulary,
        layers=layers if fast else (),
        linears=_linears_of(layers, widths),
        embedding=embedding,
        outer=_outer(text, embedding, layers, widths),
        widths=widths,
        bits=bits,
        float_size=4 if "F32" in kinds else 2,
        tensors=loaded,
        max_length=text.get("max_position_embeddings"),
    )


_LAYER = re.compile(r"(.*\blayers\.)(\d+)\.")
_LINEAR = re.compile(r"(self_attn|mlp)\.\w+_proj|per_layer_(input_gate|projection)")


def _linears_of(
    layers: Sequence["LayerShape"], widths: Mapping[str, Any]
) -> tuple[tuple[str, ...], ...]:
    """Paths of the linears of each layer that an adapter could change."""
    found: dict[str, list[str]] = {layer.path: [] for layer in layers}
    donors = {layer.path for layer in layers if layer.donor is not None}
    for path in widths:
        if (match := _LAYER.match(path)) is None:
            continue
        layer = path[: match.end() - 1]
        reads_others = layer in donors and path.endswith(("k_proj", "v_proj"))
        if layer in found and _LINEAR.fullmatch(path[match.end() :]) and not reads_others:
            found[layer].append(path)
    return tuple(tuple(own) for own in found.values())


def _outer(
    text: Mapping[str, Any],
    embedding: str,
    layers: tuple[LayerShape, ...],
    widths: Mapping[str, Any],
) -> tuple[str, ...]:
    """What models.layer.outer_of finds in the loaded model."""
    family = str(text.get("model_type"))
    tied = text.get("tie_word_embeddings", not family.startswith("phi3"))
    # Of Gemma 2 the head is the embedding, of Gemma 3 unless the weights have one.
    tied = family.startswith("gemma2") or (tied and not family.startswith("gemma3"))
    heads = [] if tied else [path for path in widths if path.endswith("lm_head")]
    own = [] if any(layer.per_layer_input for layer in layers) else [embedding]
    return (*own, *heads)


def _linears(
    config: Mapping[str, Any], tensors: Tensors
) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """(in, out) of each matrix, and bits of the quantized ones, by path."""
    widths, bits = {}, {}
    for name, (_, shape) in tensors.items():
        path = name.removesuffix(".weight")
        if path == name or len(shape) != 2:
            continue
        out, packed = shape
        if (how := quantization_of(config, tensors, path)) is not None:
            bits[path] = how.bits
            packed = tensors[f"{path}.scales"][1][-1] * how.group_size
        widths[path] = (packed, out)
    return widths, bits


def _layers(
    text: Mapping[str, Any],
    prefix: str,
    n: int,
    widths: Mapping[str, tuple[int, int]],
    tensors: Tensors,
) -> tuple[LayerShape, ...]:
    types = _types(text, n)
    shared = text.get("num_kv_shared_layers") or 0
    donors: dict[int, int] = {}
    if not 0 <= shared < n:
        raise InputError(f"num_kv_shared_layers is {shared}, and the weights have {n} layers.")
    for i in range(n - shared, n) if shared else ():
        donors[i] = max(j for j in range(n - shared) if types[j] == types[i])
    layers = []
    for i in range(n):
        path = f"{prefix}{i}"

        def linear(name: str, path: str = path) -> tuple[int, int]:
            return widths.get(f"{path}.{name}", (0, 0))

        query = linear("self_attn.o_proj")[0]
        fused = linear("self_attn.qkv_proj")[1]
        own = (fused - query) // 2 if fused else linear("self_attn.k_proj")[1]
        q_norm = tensors.get(f"{path}.self_attn.q_norm.weight")
        head = text.get("head_dim") or query // text["num_attention_heads"]
        if types[i] == "full_attention" and text.get("global_head_dim"):
            head = text["global_head_dim"]
        moe = 0
        if text.get("enable_moe_block"):
            moe = (text.get("top_k_experts") or 0) * (text.get("moe_intermediate_size") or 0)
        layers.append(
            LayerShape(
                path=path,
                query=query,
                key_value=0 if i in donors else own,
                hidden=linear("mlp.down_proj")[0],
                head=head,
                window=text.get("sliding_window") if types[i] == "sliding_attention" else None,
                softcap=bool(text.get("attn_logit_softcapping")),
                separate_values=bool(fused or linear("self_attn.v_proj")[1]),
                q_norm=q_norm is not None,
                v_norm="gemma4" in str(text.get("model_type")) and i not in donors,
                after_norms=f"{path}.post_feedforward_layernorm.weight" in tensors,
                per_layer_input=linear("per_layer_input_gate")[1],
                experts=moe,
                donor=donors.get(i),
                gives=i in donors.values(),
            )
        )
    return tuple(layers)


def _types(text: Mapping[str, Any], n: int) -> list[str]:
    """full_attention or sliding_attention, by layer, as mlx-lm reads the configuration."""
    family, types = str(text.get("model_type")), text.get("layer_types")
    if types and not family.startswith("gemma3") and family not in WITHOUT_WINDOWS:
        return list(types)
    if not family.startswith(("gemma3", "gemma4")):
        return ["full_attention"] * n
    pattern: int = text["sliding_window_pattern"]
    return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(n)]
