"""The form of a layer, used to plan memory and to create stages.

The form of a loaded layer is `Layer.form`. A form can also be derived from the headers of the
layer's weights (`LayerHeaders`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..safetensors import Tensors
from ..streams import Stream


@dataclass(frozen=True)
class StageForm:
    """The arguments of a Stage for one stream, except its function."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    owner: str
    saves: bool = False

    @classmethod
    def embedding(cls, path: str, stream: Stream) -> "StageForm":
        return cls(stream.of(path), (stream.of("tokens"),), (stream.of("h"),), path)


@dataclass(frozen=True, kw_only=True)
class LayerForm:
    """The form of one layer. `query` is the total width of all heads of q, and `key_value` is the
    total width of all heads of k (or v) that the layer computes itself."""

    name: str  #: the layer's path in the model
    query: int
    key_value: int  #: 0 if the layer reads the keys of another layer
    hidden: int
    head: int  #: the width of one head
    window: int | None = None
    softcap: bool = False
    separate_values: bool = True  #: if False, the values are the keys
    q_norm: bool = False
    wide_norms: bool = False  #: the norms of q and k span all heads
    v_norm: bool = False
    after_norms: bool = False
    own_input: int = 0  #: the width of an input computed from the tokens for this layer only
    experts: int = 0  #: the total hidden width of the experts that process a token
    donor: str | None = None  #: the layer whose keys and values this layer reads
    gives: bool = False  #: whether other layers read this layer's keys and values (set by `linked`)
    trims: bool = False  #: whether it drops rows before the first row with a loss (set by `linked`)

    @property
    def owners(self) -> tuple[str, str]:
        """The names under which the parameters of the layer's attention stage and MLP stage are
        stored."""
        return f"{self.name}.self_attn", f"{self.name}.mlp"

    def owner_of(self, path: str) -> str:
        """Returns the one of `owners` to which the linear layer at `path` belongs."""
        return self.owners[".self_attn." not in path]

    def stages(self, stream: Stream) -> tuple[StageForm, StageForm]:
        """Returns the stages for attention and MLP."""
        of, h = stream.of, (stream.of("h"),)
        attention, mlp = self.owners
        positions = (of("positions"),) if self.trims else ()
        given = _keys_values(self.donor, stream) if self.donor else ()
        written = _keys_values(self.name, stream) if self.gives else ()
        tokens = (of("tokens"),) if self.own_input else ()
        return (
            StageForm(of(attention), (*h, *positions, *given), (*h, *written), attention, True),
            StageForm(of(mlp), (*h, *tokens), h, mlp),
        )


def _keys_values(layer: str, stream: Stream) -> tuple[str, str]:
    return stream.of(f"keys of {layer}"), stream.of(f"values of {layer}")


@dataclass(frozen=True)
class LayerHeaders:
    """A layer as described by the headers of its weights."""

    name: str
    widths: Mapping[str, tuple[int, int]]  #: (in, out) of each matrix in the model, by path
    tensors: Tensors

    def linear(self, path: str) -> tuple[int, int]:
        return self.widths.get(f"{self.name}.{path}", (0, 0))

    def form(self, text: Mapping[str, Any], **more: Any) -> LayerForm:
        """Returns the layer's form. `text` is the configuration, and `more` contains the values of
        fields that are specific to the model family."""
        query, hidden = self.linear("self_attn.o_proj")[0], self.linear("mlp.down_proj")[0]
        fused = self.linear("self_attn.qkv_proj")[1]
        own = (fused - query) // 2 if fused else self.linear("self_attn.k_proj")[1]
        own = 0 if more.get("donor") else own
        head = text.get("head_dim") or query // text["num_attention_heads"]
        norm = self.tensors.get(f"{self.name}.self_attn.q_norm.weight")
        return LayerForm(
            **{
                "name": self.name,
                "query": query,
                "key_value": own,
                "hidden": hidden,
                "head": head,
                "separate_values": own > 0 and bool(fused or self.linear("self_attn.v_proj")[1]),
                "q_norm": norm is not None,
                "wide_norms": norm is not None and norm[1][0] > (more.get("head") or head),
                "after_norms": self._has("post_feedforward_layernorm"),
                "own_input": self.linear("per_layer_input_gate")[1],
            }
            | more
        )

    def _has(self, norm: str) -> bool:
        return f"{self.name}.{norm}.weight" in self.tensors


def linked(forms: Sequence[LayerForm]) -> tuple[LayerForm, ...]:
    """Sets `gives` and `trims`, the fields that link layers, and returns the new forms of all
    layers."""
    donors = {form.donor for form in forms}
    # After the last layer that has its own keys, the rows before the first row with a loss are not
    # needed.
    last = max(i for i, form in enumerate(forms) if form.key_value)
    return tuple(
        replace(form, gives=form.name in donors, trims=i == last) for i, form in enumerate(forms)
    )
