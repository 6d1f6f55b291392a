"""The decoder layer of the fast families, divided into stages. Models differ only in the values of
the layer's fields.

Read `Layer.stages` first. A layer first replaces the residual stream h by h + attention(h), and
then by h + mlp(h).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..lora import KINDS, Kind
from ..ops.reference import dropped
from ..schedule import Stage
from ..streams import Stream
from .chain import NO_UPDATES, Chain, Head, Updates
from .form import LayerForm, StageForm, linked


def mlp_rows(width: int) -> int:
    """Returns the number of rows that an MLP with this intermediate size computes at a time.

    With more tokens than this, the memory of the MLP does not grow further, but its first matrix
    multiplication runs twice, even if the plan keeps all values. The number must not depend on the
    plan, because it affects the order in which rows are summed, and thus the last bits of the
    results.
    """
    return 32768 if width <= 5120 else 16384


#: Paths of the linear layers in mlx-lm's decoder layers.
PROJECTIONS = (
    *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "qkv", "o")),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "gate_up", "down")),
)

#: A function that applies rotary embeddings to x [B, n, T, D]. Its arguments are x, the position of
#: the first token in x, and the segments of the row.
Rotate = Callable[[mx.array, int, ops.Segments | None], mx.array]


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer, or the rows `part` of a fused linear layer such as qkv_proj.

    The parts share the A factor of the fused layer, and each part has its own columns of the B
    factor.
    """

    base: ops.Base
    path: str  #: the path in the model, under which its LoRA factors are stored
    part: slice | None = None
    #: Whether this is an embedding [V, H] that is used as a linear layer; if so, a is [V, R], and b
    #: is [R, H].
    embedding: bool = False
    made: dict[Kind, Any] = field(default_factory=dict, init=False, compare=False)


@dataclass(frozen=True)
class Linears:
    """Runs projections, each with its LoRA update if the stage's parameters contain one."""

    params: Mapping[str, mx.array]
    updates: Updates

    def __call__(self, x: mx.array, *projections: Projection) -> list[mx.array]:
        """Maps x [..., in] to y [..., out] for each projection."""
        linears = [self.of(projection) for projection in projections]
        if (dropout := self.updates.dropout) is None:
            ys = ops.lora_linears(x, linears)
        else:
            keys = [self.updates.key(projection.path) for projection in projections]
            ys = [
                ops.lora_linear(x, w.base)
                if w.a is None
                else ops.lora_linear(x, w.base, w.a, w.b, w.scale, dropout=dropout.rate, key=key)
                for w, key in zip(linears, keys, strict=True)
            ]
        for i, projection in enumerate(projections):
            if more := self.more(projection):
                ys[i] = more[0](ys[i], linears[i], more[1])
        return ys

    def plain(self, *projections: Projection) -> bool:
        """Returns whether the updates consist only of matrix products: LoRA without dropout."""
        return not self.updates.dropout and not any(map(self.more, projections))

    def of(self, projection: Projection) -> ops.Linear:
        """Returns the linear layer with its factors. For a kind of adapter with an additional
        array, the layer's base has no bias, because the object that applies the array adds the
        bias."""
        a = self.params.get(f"{projection.path}.lora_a")
        if a is None:
            return ops.Linear(projection.base)
        b = self.params[f"{projection.path}.lora_b"]
        b = b if projection.part is None else b[:, projection.part]
        a, b = (b.T, a.T) if projection.embedding else (a, b)
        more = self.more(projection)
        base = more[0].base if more else projection.base
        return ops.Linear(base, a, b, self.updates.scales[projection.path])

    def more(self, projection: Projection) -> tuple[Any, mx.array] | None:
        """Returns the object that applies an update's additional array, and the array itself,
        [out]. Returns None for plain LoRA, which has no such array."""
        for kind in KINDS:
            x = self.params.get(f"{projection.path}.{kind.array}")
            if x is not None:
                x = x if projection.part is None else x[projection.part]
                return kind.on(projection.base, projection.made), x
        return None


@dataclass(frozen=True)
class Norm:
    """Root mean square norm over the last axis. The weight [H] is frozen."""

    weight: mx.array
    eps: float

    @classmethod
    def of(cls, module: Any) -> "Norm":
        return cls(module.weight, module.eps)

    def __call__(self, x: mx.array) -> mx.array:
        return ops.rms_norm(x, self.weight, self.eps)

    def beside(self, h: mx.array) -> list[mx.array]:
        """Returns h and the normalized h."""
        return ops.rms_norm_beside(h, self.weight, self.eps)

    def added(self, h: mx.array, x: mx.array, factor: mx.array | None = None) -> mx.array:
        """Returns (h + norm of x)·factor."""
        return ops.add_rms_norm(h, x, self.weight, self.eps, factor)

    def of_heads(self) -> ops.HeadNorm:
        return ops.HeadNorm(self.weight, self.eps)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The causal attention of one layer, from the layer's input to its output projection."""

    q: Projection
    k: Projection | None  #: None if the layer reads the keys and values of another layer
    v: (
        Projection | None
    )  #: None, although k is given, if the values are the keys before norm and rotation
    o: Projection
    heads: int
    kv_heads: int
    scale: float
    rotate: Rotate
    window: int | None = None
    softcap: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    v_norm: Norm | None = None
    wide_norms: bool = False  #: the norms of q and k span all heads
    scale_q: Rotate | None = None  #: scales q by position

    def __call__(
        self,
        linears: Linears,
        x: mx.array,
        rows: int,
        given: Sequence[mx.array],
        saved: Sequence[mx.array],
        save: bool,
    ) -> tuple[mx.array, Sequence[mx.array], Sequence[mx.array]]:
        """Maps x [B, T, H] to the output for its last `rows` rows, [B, rows, H], and to the keys
        and values, [B, G, T, D].

        If `given` contains the keys and values of another layer, they replace those of x. Also
        returns the arrays to pass as `saved` when the output is recomputed.
        """
        own = [] if given else [p for p in (self.k, self.v) if p is not None]
        stream = linears.updates.stream
        segments = stream.segments
        if rows == x.shape[1] and not stream.branch and self._is_plain(linears, own):
            norms = [norm and norm.of_heads() for norm in (self.q_norm, self.k_norm, self.v_norm)]
            q, *keys = self.rotate.of_linears(
                x,
                [linears.of(p) for p in (self.q, *own)],
                self.heads,
                self.kv_heads,
                given[0].shape[2] - rows if given else 0,
                segments,
                norms if any(norms) else [],
            )
            keys = keys or given
            o, kept = self._attend(q, keys, saved, save, segments)
            return linears(o, self.o)[0], keys, kept
        if rows == x.shape[1]:
            q, *kv = linears(x, self.q, *own)
        else:
            (q,) = linears(x[:, -rows:], self.q)
            kv = linears(x, *own) if own else []

        def keys_values(begin: int, end: int | None, position: int) -> list[mx.array]:
            if given:
                return [y[:, :, begin:end] for y in given]
            k = self._heads(kv[0][:, begin:end], self.kv_heads, self.k_norm, self.wide_norms)
            v = self._heads(kv[-1][:, begin:end], self.kv_heads, self.v_norm)
            return [self.rotate(k, position, segments), v]

        def queries(begin: int, end: int | None, keys: mx.array) -> mx.array:
            """Returns the queries for rows `begin` to `end`. The last rows of `keys` are the keys
            of these rows."""
            own = self._heads(q[:, begin:end], self.heads, self.q_norm, self.wide_norms)
            return self.rotate(own, keys.shape[2] - own.shape[2], segments)

        shared, branch = stream.shared, stream.branch
        if not branch:
            keys = keys_values(0, None, 0)
            o, kept = self._attend(queries(0, None, keys[0]), keys, saved, save, segments)
            return linears(o, self.o)[0], keys, kept
        cut = (given[0].shape[2] if given else x.shape[1]) - branch
        main, other = keys_values(0, cut, 0), keys_values(cut, None, shared)
        seen = _joined([x[:, :, :shared] for x in main], other)
        o, kept = self._attend(queries(0, -branch, main[0]), main, saved[:2], save)
        more, more_kept = self._attend(queries(-branch, None, seen[0]), seen, saved[2:], save)
        kept = [*kept, *more_kept] if kept and more_kept else []
        o = mx.concatenate([o, more], 1)
        return linears(o, self.o)[0], _joined(main, other), kept

    def _is_plain(self, linears: Linears, own: Sequence[Projection]) -> bool:
        """Returns whether only norms and the rotation are applied between the projections of x and
        the attention heads."""
        return (
            linears.plain(self.q, *own) and not self.wide_norms and isinstance(self.rotate, Rotary)
        )

    def _attend(
        self,
        q: mx.array,
        keys_values: Sequence[mx.array],
        saved: Sequence[mx.array],
        save: bool,
        segments: ops.Segments | None = None,
    ) -> tuple[mx.array, Sequence[mx.array]]:
        """Maps q [B, H, n, D], the queries for the last n keys, to the output [B, n, ·]. Also
        returns the arrays to save."""
        keys, values = keys_values
        if self.scale_q:
            q = self.scale_q(q, keys.shape[2] - q.shape[2], segments)
        how: Any = {
            **{"scale": self.scale, "window": self.window, "softcap": self.softcap},
            "segments": segments,
        }
        if save:
            saved = ops.attention_forward(q, keys, values, **how)
        again = saved or None
        o = saved[0] if save and saved else ops.attention(q, keys, values, saved=again, **how)
        return ops.merge_heads(o), saved

    @staticmethod
    def _heads(x: mx.array, n: int, norm: Norm | None, wide: bool = False) -> mx.array:
        """Maps [B, T, n·D] to normalized heads [B, n, T, D]."""
        if norm and wide:
            x, norm = norm(x), None
        x = x.reshape(*x.shape[:2], n, -1)
        return (norm(x) if norm else x).transpose(0, 2, 1, 3)


def _joined(main: Sequence[mx.array], other: Sequence[mx.array]) -> list[mx.array]:
    """Appends the keys and values [B, G, ·, D] of a branch to those of the main sequence."""
    return [mx.concatenate([a, b], 2) for a, b in zip(main, other, strict=True)]


@dataclass(frozen=True)
class Mlp:
    """The gated MLP of a layer."""

    gate: Projection
    up: Projection
    down: Projection
    gelu: bool = False
    experts: int = 0  #: the total hidden width of the experts that process a token

    def __call__(self, linears: Linears, h: mx.array, x: mx.array) -> mx.array:
        """Returns the output of the MLP for x, the normalized h."""
        projections = (self.gate, self.up, self.down)
        if linears.plain(*projections):
            whole = map(linears.of, projections)
            rows = mlp_rows(self.down.base.in_dims)
            return ops.lora_glu_mlp(x, *whole, gelu=self.gelu, tile_rows=rows)
        gate, up = linears(x, self.gate, self.up)
        return linears((ops.geglu if self.gelu else ops.swiglu)(gate, up), self.down)[0]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A decoder layer: h + attention(h), then h + mlp(h), with norms before or after each branch.
    The result is multiplied by `factor`. If `finish` is set, this function then maps h to the
    layer's output.

    Attention and MLP are separate stages, so that they can be recomputed separately. `donor` names
    the layer whose keys and values this layer reads.
    """

    name: str
    modules: dict[str, nn.Module]  #: the layer's linear layers, by path in the model
    attention: Attention
    mlp: Mlp
    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None
    branch_scale: float = 1.0
    factor: mx.array | None = None  #: a scalar
    #: In addition to h, `finish` receives the tokens [B, T], from which it computes an input of
    #: width `own_input`.
    finish: Callable[[Linears, mx.array, mx.array], mx.array] | None = None
    own_input: int = 0
    donor: str | None = None

    @property
    def form(self) -> LayerForm:
        """The layer's form. The only link to other layers that it contains is the donor."""
        attention, wide = self.attention, self.attention.o.base.in_dims
        return LayerForm(
            name=self.name,
            query=wide,
            key_value=attention.k.base.out_dims if attention.k else 0,
            hidden=self.mlp.down.base.in_dims,
            head=wide // attention.heads,
            window=attention.window,
            softcap=bool(attention.softcap),
            separate_values=attention.v is not None,
            q_norm=attention.q_norm is not None,
            wide_norms=attention.wide_norms,
            v_norm=attention.v_norm is not None,
            after_norms=self.after_mlp is not None,
            own_input=self.own_input,
            experts=self.mlp.experts,
            donor=self.donor,
        )

    def stages(self, form: LayerForm, updates: Updates) -> list[Stage]:
        """Returns the stages for one stream. `form` is the form of this layer with its links to
        other layers."""

        def attention(
            params: Mapping[str, mx.array],
            h: mx.array,
            *more: mx.array,
            saved: Sequence[mx.array] = (),
            save: bool = False,
        ) -> tuple[mx.array, ...]:
            rows = more[0].size if form.trims else h.shape[1]
            h, x = self.before_attention.beside(h) if self.before_attention else (h, h)
            given = more[-2:] if self.donor else ()
            r, kv, kept = self.attention(Linears(params, updates), x, rows, given, saved, save)
            h = h if rows == h.shape[1] else h[:, -rows:]
            h = self._added(h, r, self.after_attention)
            return (h, *(kv if form.gives else ()), *(kept if save else ()))

        def mlp(params: Mapping[str, mx.array], h: mx.array, *more: mx.array) -> mx.array:
            linears = Linears(params, updates)
            h, x = self.before_mlp.beside(h) if self.before_mlp else (h, h)
            h = self._added(h, self.mlp(linears, h, x), self.after_mlp, self.factor)
            return self.finish(linears, h, more[0]) if self.finish else h

        of_attention, of_mlp = form.stages(updates.stream)
        return [Stage(fn=attention, **vars(of_attention)), Stage(fn=mlp, **vars(of_mlp))]

    def _added(
        self, h: mx.array, r: mx.array, after: Norm | None, factor: mx.array | None = None
    ) -> mx.array:
        """Returns (h + branch_scale·r)·factor, where r is the output of a branch. If the norm
        `after` is given, it is applied to r first."""
        if after and self.branch_scale == 1:
            return after.added(h, r, factor)
        r = after(r) if after else r
        h = h + (r if self.branch_scale == 1 else r * self.branch_scale)
        return h if factor is None else h * factor


@dataclass(frozen=True)
class Embedding:
    """Maps tokens to h: the rows of a frozen table [V, H], plus the update of these rows,
    multiplied by `factor`."""

    module: nn.Module
    path: str
    factor: float = 1.0

    def __call__(self, tokens: mx.array) -> mx.array:
        """Maps tokens [B, T] to h [B, T, H], without an update."""
        return ops.embedded_rows(ops.base_of(self.module), tokens, factor=self.factor)

    def stage(self, updates: Updates) -> Stage:
        def embed(params: Mapping[str, mx.array], tokens: mx.array) -> mx.array:
            if f"{self.path}.lora_a" not in params:
                return self(tokens)
            h = ops.embedded_rows(ops.base_of(self.module), tokens)
            z = params[f"{self.path}.lora_a"][tokens] @ params[f"{self.path}.lora_b"]
            if updates.dropout:
                z = dropped(z, updates.dropout.rate, updates.key(self.path))
            h = h + (updates.scales[self.path] * z).astype(h.dtype)
            return h if self.factor == 1 else h * self.factor

        return Stage(fn=embed, **vars(StageForm.embedding(self.path, updates.stream)))


@dataclass(frozen=True)
class LinearHead(Head):
    """A head that consists of a norm, a frozen linear layer [V, H] and a softcap. Training never
    materializes all logits."""

    norm: Norm
    projection: Projection
    softcap: float | None = None
    updates: Updates = NO_UPDATES

    @property
    def path(self) -> str:
        return self.projection.path

    def adapting(self, updates: Updates) -> "LinearHead":
        return replace(self, updates=updates)

    def as_product(
        self, params: Mapping[str, mx.array], h: mx.array, temperature: float = 1.0
    ) -> tuple[mx.array, ops.Base, float | None] | None:
        base, softcap = self.projection.base, self.softcap
        if params or (temperature != 1 and base.bias is not None):
            return None
        x = self.norm(h)
        if temperature != 1:  # c·tanh(z/c)/T is (c/T)·tanh((z/T)/(c/T)), and z is linear in x
            x = (x.astype(mx.float32) / temperature).astype(x.dtype)
            softcap = softcap and softcap / temperature
        return x, base, softcap

    def logits_of(self, params: Mapping[str, mx.array], h: mx.array, begin: int) -> mx.array:
        updates = replace(self.updates, stream=Stream(f"rows {begin}"))
        (z,) = Linears(params, updates)(self.norm(h), self.projection)
        return z if self.softcap is None else self.softcap * mx.tanh(z / self.softcap)


def chain(
    model: Any,
    prefix: str,
    embedding: Embedding,
    layers: Sequence[Layer],
    norm: Norm,
    *,
    tied: bool,
    softcap: float | None = None,
) -> Chain:
    """Returns the chain of an mlx-lm model with these layers. `norm` and `softcap` belong to the
    chain's head."""
    forms = linked([layer.form for layer in layers])
    own_inputs = any(form.own_input for form in forms)
    path, module = embedding.path, embedding.module
    # If layers have their own inputs, the embedding is not adaptable, because these inputs are also
    # computed from it, but without its update.
    outer: dict[str, nn.Module] = {} if own_inputs else {path: module}
    if not tied:
        path, module = f"{prefix}lm_head", model.lm_head
        outer[path] = module
    head = LinearHead(norm, Projection(ops.base_of(module), path, embedding=tied), softcap)
    linears: dict[str, nn.Module] = {}
    stage_of = {path: embedding.path if path == embedding.path else "head" for path in outer}
    for layer, form in zip(layers, forms, strict=True):
        linears |= layer.modules
        stage_of |= {path: form.owner_of(path) for path in layer.modules}

    def of(embeds: bool) -> Chain:
        """Returns the chain. With `embeds`, the embedding is a stage, so that it can be trained."""
        owners = [list(form.owners) for form in forms]
        if embeds:
            owners[0].insert(0, embedding.path)

        def start(tokens: mx.array) -> dict[str, mx.array]:
            values = {} if embeds else {"h": embedding(tokens)}
            return values | ({"tokens": tokens} if embeds or own_inputs else {})

        def stages_of(updates: Updates) -> list[Stage]:
            found = [embedding.stage(updates)] if embeds else []
            for layer, form in zip(layers, forms, strict=True):
                found += layer.stages(form, updates)
            return found

        return Chain(
            start=start,
            stages_of=stages_of,
            head=head,
            linears=linears,
            stage_of=stage_of,
            layers=owners,
            forms=forms,
            max_length=getattr(model.args, "max_position_embeddings", None),
            trims=True,
            branches=True,
            outer=outer,
            embedded=None if embeds else lambda: of(True),
        )

    return of(False)


def layer_of(
    name: str,
    layer: Any,
    heads: int,
    *,
    norm: Callable[[Any], Norm] = Norm.of,
    mlp: Callable[..., Mlp] = Mlp,
    paths: Sequence[str] = PROJECTIONS,
    donor: str | None = None,
    attention: Mapping[str, Any] | None = None,
    **more: Any,
) -> Layer:
    """Creates a Layer that uses the modules of an mlx-lm layer. The modules must have the names
    that are common to most model families.

    `paths` are the paths of the layer's linear layers. `attention` contains additional fields of
    the Attention, and `more` of the Layer.
    """
    attn, found = layer.self_attn, dict(layer.named_modules())
    if donor:  # projections that are never run cannot be adapted
        found = {p: m for p, m in found.items() if p[-6:] not in ("k_proj", "v_proj", "k_norm")}
    modules = {path: found[path] for path in paths if path in found}
    linears: dict[str, Any] = {
        path: Projection(ops.base_of(module), f"{name}.{path}") for path, module in modules.items()
    }

    def parts(fused: str, separate: Sequence[str], first: int) -> list[Any]:
        """Returns the projections, which may be fused in one linear layer. The first projection has
        the first `first` rows of the fused layer, and the others share the remaining rows
        equally."""
        if fused not in linears:
            return [linears.get(path) for path in separate]
        whole, others = linears[fused], len(separate) - 1
        rest = (whole.base.out_dims - first) // others
        ends = [0, *(first + i * rest for i in range(others + 1))]
        return [
            replace(whole, base=ops.rows_of(whole.base, begin, end), part=slice(begin, end))
            for begin, end in itertools.pairwise(ends)
        ]

    def normed(path: str) -> Norm | None:
        return norm(found[path]) if path in found else None

    o, down = linears["self_attn.o_proj"], linears["mlp.down_proj"]
    d = o.base.in_dims // heads
    separate = [f"self_attn.{p}_proj" for p in "qkv"]
    q, k, v = parts("self_attn.qkv_proj", separate, o.base.in_dims)
    gate, up = parts("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"], down.base.in_dims)
    q_norm = normed("self_attn.q_norm")
    before, between = normed("input_layernorm"), normed("post_attention_layernorm")
    before_mlp = normed("pre_feedforward_layernorm")
    if before and not before_mlp:  # the norm after attention is then the norm before the MLP
        before_mlp, between = between, None
    return Layer(
        name=name,
        modules={f"{name}.{path}": module for path, module in modules.items()},
        attention=Attention(
            q=q,
            k=k,
            v=v,
            o=o,
            heads=heads,
            kv_heads=k.base.out_dims // d if k else 0,
            scale=attn.scale,
            rotate=rotary(attn.rope),
            q_norm=q_norm,
            k_norm=normed("self_attn.k_norm"),
            wide_norms=q_norm is not None and q_norm.weight.size > d,
            **attention or {},
        ),
        mlp=mlp(gate, up, down),
        before_attention=before,
        after_attention=between,
        before_mlp=before_mlp,
        after_mlp=normed("post_feedforward_layernorm"),
        donor=donor,
        **more,
    )


@dataclass(frozen=True)
class Rotary:
    """Rotates heads with our own op."""

    dims: int
    options: Mapping[str, Any]

    def __call__(self, x: mx.array, offset: int, segments: ops.Segments | None) -> mx.array:
        return ops.rope(x, self.dims, offset=offset, segments=segments, **self.options)

    def of_linears(
        self,
        x: mx.array,
        linears: Sequence[ops.Linear],
        heads: int,
        groups: int,
        offset: int,
        segments: ops.Segments | None,
        norms: Sequence[ops.HeadNorm | None],
    ) -> list[mx.array]:
        """Returns the normalized and rotated heads of q and k, and v. If only the linear layer of q
        is given, returns q alone."""
        more: Any = {"offset": offset, "segments": segments, "norms": norms}
        return ops.lora_qkv(x, linears, heads, groups, self.dims, **more, **self.options)


def rotary(rope: Any) -> Rotate:
    """Returns our op with the settings of mlx-lm's rotary module. If our op does not support the
    module, returns a function that runs the module itself."""
    kind = type(rope).__name__
    if kind == "NoPE":
        return lambda x, offset, segments: x
    options: dict[str, Any]
    if kind == "RoPE":
        options = {"base": rope.base, "scale": rope.scale}
    elif kind in ("Llama3RoPE", "ProportionalRoPE") or (kind == "YarnRoPE" and rope.mscale == 1):
        options = {"freqs": rope._freqs}
    else:
        return lambda x, offset, segments: _rotated(rope, x, offset, segments)
    return Rotary(rope.dims, {"traditional": rope.traditional, **options})


def _rotated(rope: Any, x: mx.array, offset: int, segments: ops.Segments | None) -> mx.array:
    """Runs mlx-lm's rotary module on each segment separately, because the module does not support
    segments."""
    if segments is None:
        return rope(x, offset=offset)
    end = offset + x.shape[2]
    done = [
        rope(x[:, :, max(begin, offset) - offset : stop - offset], offset=max(offset - begin, 0))
        for begin, stop in ops.segment_ranges(segments, end)
        if stop > offset
    ]
    return mx.concatenate(done, 2)
