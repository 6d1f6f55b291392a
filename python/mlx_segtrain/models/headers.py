"""The structure of a model, read from config.json and the headers of the weights. No weight is
read."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..safetensors import SIZES, Tensors
from . import of_type
from .form import LayerForm, LayerHeaders, linked
from .snapshot import MOST_LAYERS, Snapshot, quantization_of

#: Matches the names of weights in the parts of a multimodal model that are not loaded.
OTHER_TOWERS = re.compile(r"(^|\.)(vision|visual|audio|multi_modal|mm_|embed_vision|embed_audio)")
FLOATS = ("F16", "BF16")


@dataclass(frozen=True)
class ModelShape:
    """The structure of a model, from which its memory use and speed are estimated. `widths` maps
    paths of linear layers to (in, out)."""

    family: str
    fast: bool
    width: int
    vocabulary: int
    layers: tuple[LayerForm, ...]
    linears: tuple[tuple[str, ...], ...]  #: paths of the adaptable linear layers of each layer
    embedding: str  #: the path of the token embedding
    outer: tuple[str, ...]  #: paths of the embedding and a separate head, if they are adaptable
    widths: dict[str, tuple[int, int]]
    bits: dict[str, int]  #: bits per weight of each quantized linear layer, by path
    float_size: int  #: the size of the weights' floating-point elements in bytes
    tensors: Tensors
    max_length: int | None

    @property
    def head(self) -> str:
        """The path of the head's linear layer. If there is no separate head, this is the path of
        the embedding."""
        return next((path for path in self.outer if path != self.embedding), self.embedding)

    @property
    def tied(self) -> bool | None:
        """Whether the embedding is also the head, or None if no weight has the name of an
        embedding."""
        if not self.embedding:
            return None
        if self.fast:
            return self.head == self.embedding
        return not any(path.endswith("lm_head") for path in self.widths)

    def weight_bytes(self, float32: bool, loads: Callable[[str], bool] = lambda name: True) -> int:
        """Returns the total size, in bytes, of the weights whose names satisfy `loads` (by default,
        all weights that mlx-lm loads). With `float32`, half-precision weights count as float32,
        because they are converted to float32 on the CPU."""
        return sum(
            math.prod(shape) * (4 if float32 and dtype in FLOATS else SIZES.get(dtype, 1))
            for name, (dtype, shape) in self.tensors.items()
            if loads(name)
        )

    @property
    def n_layers(self) -> int:
        """The number of layers. It is derived from the names of the weights, so it is known for
        every family."""
        return len({number for name in self.tensors if (number := layer_number(name)) is not None})


def read_shape(model: str | Path | Snapshot) -> ModelShape:
    """Reads the structure of the model in a folder. Raises InputError if config.json or a header
    cannot be read."""
    snapshot = model if isinstance(model, Snapshot) else Snapshot(model)
    config, tensors = snapshot.config, snapshot.tensors
    with snapshot.consistent():
        return shape_of(config, tensors)


def shape_of(config: Mapping[str, Any], tensors: Tensors) -> ModelShape:
    """Returns a model's structure. `config` is its configuration, as mlx-lm reads it, and `tensors`
    are its tensors by name. Raises InputError if there are no layers."""
    family = str(config.get("model_type", "unknown"))
    inner: dict[str, Any] = config.get("text_config") or {}
    text: dict[str, Any] = {**config, **inner}
    reader = of_type(family) and of_type(str(text.get("model_type")))
    loaded = {name: t for name, t in tensors.items() if not OTHER_TOWERS.search(name)}
    widths, bits = _linears(config, loaded)
    found = [match for name in loaded if (match := _LAYER.match(name))]
    prefixes, numbers = {match[1] for match in found}, {int(match[2]) for match in found}
    if len(numbers) > MOST_LAYERS:
        raise InputError(
            f"the weights have {len(numbers):,} layers, but at most {MOST_LAYERS:,} are supported."
        )
    embedding = next((path for path in widths if path.endswith("embed_tokens")), None)
    if not numbers or embedding is None:
        if of_type(family):
            raise InputError(
                f"the weights of this {family} model have no layers or no embed_tokens."
            )
        return ModelShape(family, False, 0, 0, (), (), "", (), widths, bits, 2, loaded, None)
    width, vocabulary = widths[embedding]
    layers: tuple[LayerForm, ...] = ()
    outer: tuple[str, ...] = ()
    # Derive the forms of layers only if mlx-lm keeps the format of the weights when it loads the
    # model; otherwise, the widths and sizes in the headers are wrong.
    weights = {kind for name, (kind, _) in loaded.items() if name.endswith(".weight")}
    if reader and len(prefixes) == 1 and weights <= {"U32", *FLOATS, "F32"}:
        (prefix,) = prefixes
        names = [f"{prefix}{i}" for i in range(len(numbers))]
        forms = reader.forms(text, [LayerHeaders(name, widths, loaded) for name in names])
        whole = all(form.query > 0 < form.hidden for form in forms)
        if whole and any(form.key_value for form in forms):
            layers = linked(forms)
            # This must match the code in models.layer.chain.
            heads = [] if reader.tied(text) else [p for p in widths if p.endswith("lm_head")]
            outer = (*(() if any(form.own_input for form in forms) else (embedding,)), *heads)
    wide = any(
        kind == "F32" and re.search(r"embed_tokens\.(scales|weight)$", name)
        for name, (kind, _) in loaded.items()
    )
    return ModelShape(
        family=family,
        fast=bool(layers),
        width=width,
        vocabulary=vocabulary,
        layers=layers,
        linears=_linears_of(layers, widths),
        embedding=embedding,
        outer=outer,
        widths=widths,
        bits=bits,
        float_size=4 if wide else 2,
        tensors=loaded,
        max_length=text.get("max_position_embeddings"),
    )


_LAYER = re.compile(r"(.*\blayers\.)(\d+)\.")


def layer_number(name: str) -> int | None:
    """Returns the number of the layer to which a weight belongs, or None if it belongs to no
    layer."""
    return int(match[2]) if (match := _LAYER.match(name)) else None


_LINEAR = re.compile(r"(self_attn|mlp)\.\w+_proj|per_layer_(input_gate|projection)")


def _linears_of(
    layers: Sequence[LayerForm], widths: Mapping[str, Any]
) -> tuple[tuple[str, ...], ...]:
    """Returns the paths of the adaptable linear layers of each layer."""
    found: dict[str, list[str]] = {layer.name: [] for layer in layers}
    readers = {layer.name for layer in layers if layer.donor is not None}
    for path in widths:
        if (match := _LAYER.match(path)) is None:
            continue
        layer = path[: match.end() - 1]
        reads_others = layer in readers and path.endswith(("k_proj", "v_proj"))
        if layer in found and _LINEAR.fullmatch(path[match.end() :]) and not reads_others:
            found[layer].append(path)
    return tuple(tuple(own) for own in found.values())


def _linears(
    config: Mapping[str, Any], tensors: Tensors
) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """Returns (in, out) of each matrix, and the bits per weight of each quantized matrix. Both
    results are keyed by path."""
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
