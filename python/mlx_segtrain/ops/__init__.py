"""Differentiable ops of a transformer layer, each with a hand-written backward pass.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head size, F feed-forward
width, M rows, R LoRA rank, V vocabulary. `impl="auto"` takes the fastest implementation that
supports the device; a named one ("kernel", "blocked", "stock", "reference") raises ValueError with
the reason if it does not support the call. Wrong shapes and dtypes raise ValueError when the graph
is built.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import _core
from .._core import Base, DecodeLinears, HeadNorm, Linear, join, merge_heads
from . import reference, selfcheck
from .reference import Segments, packing, positions_of, segment_ranges
from .selfcheck import on_gpu, self_check

__all__ = [
    "Base",
    "DecodeLinears",
    "HeadNorm",
    "Linear",
    "Segments",
    "add_rms_norm",
    "attention",
    "attention_forward",
    "base_of",
    "decode_linears",
    "dequantize",
    "dropout_key",
    "embedded_rows",
    "geglu",
    "join",
    "linear_cross_entropy",
    "linear_log_probs",
    "lora_glu_mlp",
    "lora_linear",
    "lora_linears",
    "lora_qkv",
    "merge_heads",
    "own_input",
    "packing",
    "positions_of",
    "rms_norm",
    "rms_norm_beside",
    "rope",
    "rows_of",
    "segment_ranges",
    "swiglu",
    "take_rows",
    "upload",
]


P = ParamSpec("P")
T = TypeVar("T")


def base_of(module: nn.Module) -> Base:
    """Returns the frozen weight [out, in] of an nn.Linear, an nn.Embedding or a quantized one."""
    bias = module.get("bias")
    if "scales" not in module:
        return Base(module["weight"], bias=bias)
    return Base(module["weight"], module["scales"], module.get("biases"), bias, **packing(module))


def rows_of(base: Base, begin: int, end: int) -> Base:
    """Returns rows [begin, end) of a weight [out, in], as a weight."""
    arrays = (x if x is None else x[begin:end] for x in (base.scales, base.biases, base.bias))
    return Base(base.weight[begin:end], *arrays, **packing(base))


def _check_device() -> None:
    """Runs the self-check of a GPU's kernels, once per device before their first use."""
    if on_gpu():
        self_check()


def _face(
    plain: Callable[..., Any], *, without: Sequence[str] = ()
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates an op of the core: `impl="reference"` calls `plain` without these options, other
    calls run the self-check first."""

    def decorate(op: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(op)
        def call(*args: P.args, **options: P.kwargs) -> T:
            if options.get("impl") != "reference":
                _check_device()
                return op(*args, **options)
            skip = {"impl", *without}
            return plain(*args, **{key: x for key, x in options.items() if key not in skip})

        return call

    return decorate


def upload(x: np.ndarray) -> mx.array:
    """Copies an array to the device: as int32, or as float32 if its values are not integers.

    On CUDA this is faster than `mx.array` (csrc/core/upload.h); the copy may not be finished when
    this returns.
    """
    dtype = np.int32 if np.issubdtype(x.dtype, np.integer) else np.float32
    return _core.upload(np.ascontiguousarray(x, dtype))


def compile_together(write_down: Callable[[], None]) -> None:
    """Like selfcheck.compile_together, but runs the self-check first, because that evaluates
    arrays."""
    _check_device()
    selfcheck.compile_together(write_down)


@contextmanager
def repeatable(on: bool) -> Iterator[None]:
    """While it is active and `on`, `auto` takes only deterministic implementations, in the whole
    process."""
    before = _core.set_repeatable(on)
    try:
        yield
    finally:
        _core.set_repeatable(before)


def attention_options(
    k: mx.array, segments: Segments | None = None, **options: Any
) -> _core.AttentionOptions:
    """Converts options of `attention` to the core's, given the keys."""
    # k may have a wrong rank; the core raises the error.
    ranges = None if segments is None else segment_ranges(segments, k.shape[-2])
    return _core.AttentionOptions(segments=ranges, **options)


@_face(reference.attention, without=["saved"])
def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    window: int | None = None,
    segments: Segments | None = None,
    softcap: float | None = None,
    q_start: int | None = None,
    saved: Sequence[mx.array] | None = None,
    impl: str = "auto",
) -> mx.array:
    """o = softmax(scale·q·kᵀ)·v over the keys each query may see, in memory linear in T and S.

    q [B,H,T,D], k [B,G,S,D], v [B,G,S,Dv], H a multiple of G → o [B,H,T,Dv], one floating dtype.
    Query t is at position q_start + t (default S − T) and attends to keys up to its own position:
    only to the last `window` of them, and only to those in its own segment. `segments` of packed
    rows are a list of offsets, 0 … S or less, or an array [S] of integer ids, in which equal ids
    are adjacent and ids below 0 are padding. They are the same for every row of the batch, and are
    read when the graph is built, so mx.compile cannot trace them. Padding, and tokens after the
    last offset, attend to nothing and are attended to by nothing: their o and gradients are 0.
    `softcap` c replaces scores s by c·tanh(s / c). Softmax is in float32. `saved` is the result of
    `attention_forward` with the same arguments; with it, the forward pass is not run again.

    FlashAttention-2 (Dao 2023, arXiv:2307.08691); derivation in docs/attention.md.
    """
    options = attention_options(
        k, segments, scale=scale, window=window, softcap=softcap, q_start=q_start
    )
    return _core.attention(q, k, v, options, saved=saved, impl=impl)


def attention_forward(
    q: mx.array, k: mx.array, v: mx.array, *, impl: str = "auto", **options: Any
) -> list[mx.array]:
    """Returns the argument `saved` of `attention` with these options: o, and the other arrays that
    its backward pass needs.

    It has no gradient, and is empty if the chosen implementation has nothing to save
    (`stock`).
    """
    _check_device()
    return _core.attention_forward(q, k, v, attention_options(k, **options), impl=impl)


@_face(reference.swiglu)
def swiglu(gate: mx.array, up: mx.array, *, impl: str = "auto") -> mx.array:
    """y = gate·σ(gate)·up. gate, up, y [..., F] of one floating dtype, computed in float32.

    Keeps gate and up; the backward pass computes both gradients in one pass over memory.
    Shazeer 2020, arXiv:2002.05202.
    """
    return _core.swiglu(gate, up, impl=impl)


@_face(reference.geglu)
def geglu(gate: mx.array, up: mx.array, *, impl: str = "auto") -> mx.array:
    """y = gelu(gate)·up, gelu(x) = x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))), as in Gemma.

    gate, up, y [..., F] of one floating dtype, computed in float32. Keeps gate and up; the backward
    pass computes both gradients in one pass over memory. Shazeer 2020, arXiv:2002.05202; the tanh
    form is Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    return _core.geglu(gate, up, impl=impl)


@_face(reference.rms_norm)
def rms_norm(x: mx.array, weight: mx.array, eps: float, *, impl: str = "auto") -> mx.array:
    """y = x / sqrt(mean(x²) + eps)·weight. x, y [..., H]; weight [H] is frozen, without gradient.

    Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    return _core.rms_norm(x, weight, eps, impl=impl)


@_face(reference.rms_norm_beside)
def rms_norm_beside(
    h: mx.array, weight: mx.array, eps: float, *, impl: str = "auto"
) -> list[mx.array]:
    """Returns h and `rms_norm` of it, both [..., H], as at the start of a layer's branch.

    On CUDA the backward pass adds the gradients of both in the norm's own pass.
    """
    return _core.rms_norm_beside(h, weight, eps, impl=impl)


@_face(reference.add_rms_norm)
def add_rms_norm(
    h: mx.array,
    x: mx.array,
    weight: mx.array,
    eps: float,
    factor: mx.array | None = None,
    *,
    impl: str = "auto",
) -> mx.array:
    """y = (h + rms_norm(x))·factor, as at the end of a layer's branch. h, x, y [..., H], weight
    [H].

    `factor` is an array of one element; it and the weight are frozen, without gradient. On CUDA
    there is one kernel per direction.
    """
    return _core.add_rms_norm(h, x, weight, eps, factor, impl=impl)


@_face(reference.take_rows)
def take_rows(x: mx.array, index: mx.array, *, impl: str = "auto") -> mx.array:
    """Returns x[index]. x [N, …], index […] of integers 0 … N − 1 → […, …], x's dtype."""
    return _core.take_rows(x, index, impl=impl)


@_face(reference.embedded_rows)
def embedded_rows(
    table: Base,
    index: mx.array,
    *,
    begin: int = 0,
    end: int | None = None,
    factor: float = 1.0,
    impl: str = "auto",
) -> mx.array:
    """Returns rows of a frozen table [V, ·], dense or quantized, times a factor; or a range of
    their columns.

    index […] of integers 0 … V − 1 → […, end − begin], in the dtype of the table, or of its scales.
    """
    return _core.embedded_rows(table, index, begin=begin, end=end, factor=factor, impl=impl)


@_face(reference.own_input)
def own_input(
    x: mx.array,
    weight: mx.array,
    eps: float,
    table: Base,
    index: mx.array,
    begin: int,
    factors: Sequence[float],
    *,
    impl: str = "auto",
) -> mx.array:
    """y = (rms_norm(x·f0) + rows·f1)·f2, the per-layer input of Gemma 4.

    x, y [..., D], weight [D]; rows are D columns from `begin` on of the table's rows at index
    [...], as in `embedded_rows`. Has no gradients.
    """
    return _core.own_input(x, weight, eps, table, index, begin, list(factors), impl=impl)


@_face(reference.rope)
def rope(
    x: mx.array,
    dims: int,
    *,
    traditional: bool = False,
    base: float | None = None,
    scale: float = 1.0,
    offset: int = 0,
    freqs: mx.array | None = None,
    segments: Segments | None = None,
    impl: str = "auto",
) -> mx.array:
    """Rotates the first `dims` of x [B,H,T,D] by position·scale / freqs; position = offset + t.

    freqs [dims/2] are given or base^(2i/dims). `traditional` pairs neighbours, otherwise halves.
    With `segments` of the offset + T tokens, as `attention` takes them, positions count from the
    start of each. Su et al. 2021, arXiv:2104.09864; the other arguments are those of mx.fast.rope.
    """
    options: dict[str, Any] = {"base": base, "scale": scale, "offset": offset, "freqs": freqs}
    if segments is not None:
        options["segments"] = segment_ranges(segments, offset + x.shape[-2])
    return _core.rope(x, dims, traditional=traditional, impl=impl, **options)


def lora_linear(
    x: mx.array,
    base: Base,
    a: mx.array | None = None,
    b: mx.array | None = None,
    scale: float = 1.0,
    *,
    dropout: float = 0.0,
    key: mx.array | None = None,
    impl: str = "auto",
) -> mx.array:
    """y = x·Wᵀ + bias + scale·((mask∘x / (1 − dropout))·a)·b with W frozen, dense or quantized.

    x [..., in], a [in, R] and b [R, out] (float32 masters, used in x's dtype) → y [..., out]. Keeps
    x and x·a, but neither an unpacked W nor a mask. The mask, of x on the low-rank branch, is a
    function of `key` (`dropout_key`) and x's shape, so that recomputation gives the same mask; 0 ≤
    dropout < 1, and above 0 a, b and the key are needed. It has gradients for x, a and b; those of
    a and b are in their own dtype. It supports every quantization of mx.quantize; ValueError names
    mode, bits and group size if the base's arrays do not fit. Hu et al. 2021, arXiv:2106.09685.
    """
    keys = [] if key is None else [key]
    return lora_linears(x, [Linear(base, a, b, scale)], dropout=dropout, keys=keys, impl=impl)[0]


@_face(reference.lora_linears)
def lora_linears(
    x: mx.array,
    linears: Sequence[Linear],
    *,
    dropout: float = 0.0,
    keys: Sequence[mx.array] = (),
    impl: str = "auto",
) -> list[mx.array]:
    """Applies several `lora_linear`s, such as q, k and v, to one x, in one product if that is
    faster.

    x [..., in] → y [..., out] of each linear layer; with dropout, `keys` has one for each.
    """
    return _core.lora_linears(x, linears, dropout=dropout, keys=keys, impl=impl)


def decode_linears(
    bases: Sequence[Base],
    a: mx.array | None = None,
    b: Sequence[mx.array | None] = (),
    gains: Sequence[mx.array | None] = (),
) -> DecodeLinears:
    """Prepares the linear layers that read the same few rows in a step of generation.

    a [E, R, in] are the factors of E adapters, concatenated for all layers; b [E, out, R_j] those
    of each layer, whose ranks add up to R, and gains [E, out] float32 multiply its outputs. The
    result takes x [..., in] and the adapter of each row, uint32 [rows], and returns [..., out] of
    each layer in x's dtype: (x·Wᵀ + (x·aᵀ)·bᵀ)·gain + bias. It has no gradient.
    """
    _check_device()
    return DecodeLinears([*bases], a, [*b], [*gains])


@_face(reference.lora_qkv)
def lora_qkv(
    x: mx.array,
    linears: Sequence[Linear],
    heads: int,
    groups: int,
    dims: int,
    *,
    traditional: bool = False,
    base: float | None = None,
    scale: float = 1.0,
    offset: int = 0,
    freqs: mx.array | None = None,
    segments: Segments | None = None,
    norms: Sequence[HeadNorm | None] = (),
    impl: str = "auto",
) -> list[mx.array]:
    """Returns q and k, rotated as by `rope`, and v, from linear layers as in `lora_linears`.

    x [B,T,·] → q [B,heads,T,D], k and v [B,groups,T,D]. With two linear layers the second gives
    keys and values: the values are the keys before norm and rotation; with one there is only q.
    `norms` apply to each head of q, k and v, before rotation. `segments` as for `attention`, of
    offset + T rows. On CUDA one kernel computes the heads from one product, and one kernel its
    gradient from theirs, for which the product is kept if there are norms.
    """
    ranges = None if segments is None else segment_ranges(segments, offset + x.shape[1])
    how: dict[str, Any] = {"traditional": traditional, "base": base, "scale": scale}
    how |= {"offset": offset, "freqs": freqs, "segments": ranges, "norms": list(norms)}
    return _core.lora_qkv(x, linears, heads, groups, dims, impl=impl, **how)


@_face(reference.lora_glu_mlp, without=["tile_rows"])
def lora_glu_mlp(
    x: mx.array,
    gate: Linear,
    up: Linear,
    down: Linear,
    *,
    gelu: bool = False,
    tile_rows: int | None = None,
    impl: str = "auto",
) -> mx.array:
    """y = down(act(gate(x))·up(x)), act GELU's tanh form or SiLU; each layer a `lora_linear`.

    x [..., H], gate and up [F, H], down [·, F] → y [..., ·]. Keeps x, gate(x) and up(x), and
    recomputes their product in the backward pass. With `tile_rows` it keeps x only, computes that
    many rows at a time, and recomputes them in the backward pass. This takes memory of [tile_rows,
    F] instead of [rows, F], but 1.5 times as many products. Tiled MLP: Arctic Long Sequence
    Training (Bekman et al. 2025, arXiv:2506.13996).
    """
    return _core.lora_glu_mlp(x, gate, up, down, gelu=gelu, tile_rows=tile_rows, impl=impl)


def dropout_key(seed: int, step: int, module: str) -> mx.array:
    """Returns a key [2] for `lora_linear` from the run's seed, the step, and the module's path."""
    text = f"{seed}/{step}/{module}".encode()
    # Hashed, because neighbouring seeds, steps and modules must not share masks.
    return mx.random.key(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


@_face(reference.linear_cross_entropy, without=["needs_grad", "padded"])
def linear_cross_entropy(
    h: mx.array,
    head: Base,
    targets: mx.array,
    weights: mx.array | None = None,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    needs_grad: bool = True,
    padded: bool = True,
    impl: str = "auto",
) -> mx.array:
    """Σᵢ weightsᵢ·(lse(zᵢ) − zᵢ[targetsᵢ]) with z = h·Wᵀ + bias, without an array [M, V].

    h [M, H], targets [M] integers (below 0: the row is ignored), weights [M] float32 (default ones)
    → [] float32. dh is computed in the forward pass, one chunk of rows at a time;
    `needs_grad=False` skips it (evaluation). `padded=False` promises that no target is below 0;
    otherwise, on a GPU, the host waits for the targets to find such rows. `softcap` c replaces z by
    c·tanh(z / c). `label_smoothing` ε in [0, 1) replaces z[target] by (1 − ε)·z[target] + ε·mean(z)
    (Szegedy et al. 2016, arXiv:1512.00567). Cut Cross-Entropy (Wijmans et al. 2024,
    arXiv:2411.09009) for the idea of never storing z.
    """
    return _core.linear_cross_entropy(
        h,
        head,
        targets,
        weights,
        softcap=softcap,
        label_smoothing=label_smoothing,
        needs_grad=needs_grad,
        padded=padded,
        impl=impl,
    )


@_face(reference.linear_log_probs, without=["needs_grad", "padded"])
def linear_log_probs(
    h: mx.array,
    head: Base,
    targets: mx.array,
    *,
    softcap: float | None = None,
    needs_grad: bool = True,
    padded: bool = True,
    impl: str = "auto",
) -> mx.array:
    """log_p = z[targets] − lse(z) with z = h·Wᵀ + bias, without an array [M, V].

    h [M, H], targets [M] integers below V → log_p [M] float32. A row with a target below 0 gives 0
    and no gradient, and is not computed. To find such rows on a GPU, the host waits for the targets
    when the graph is built. If they are traced, or with `padded=False`, every row is computed.
    `softcap` c replaces z by c·tanh(z / c). On CUDA dh of each row is computed in the forward pass
    and kept, and `needs_grad=False` skips it; elsewhere the backward pass computes z again, one
    chunk of rows at a time. For preference losses (DPO, Rafailov et al. 2023, arXiv:2305.18290).
    """
    return _core.linear_log_probs(
        h, head, targets, softcap=softcap, needs_grad=needs_grad, padded=padded, impl=impl
    )


def dequantize(base: Base, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Returns a quantized weight as an array [out, in] of `dtype`. Equals mx.dequantize, which on
    the CPU computes in float32."""
    return _core.dequantize(base, dtype)
