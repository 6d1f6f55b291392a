"""Differentiable ops for transformer layers, each with a hand-written backward pass.

Shapes use these letters: B is the batch size, H the number of query heads, G the number of
key/value heads, T the number of queries, S the number of keys, D the head size, F the width of the
feed-forward layer, M the number of rows, R the LoRA rank, and V the size of the vocabulary. `x
[B,T] → y [B]` means that x and y have these shapes. `impl="auto"` chooses the fastest
implementation that supports the call. Any other `impl` ("kernel", "blocked", "stock" or
"reference") selects that implementation, or raises ValueError with the reason if it does not
support the call. Wrong shapes and dtypes raise ValueError when the graph is built.
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
    """Returns the frozen weight [out, in] of an nn.Linear or an nn.Embedding, or of their quantized
    counterparts."""
    bias = module.get("bias")
    if "scales" not in module:
        return Base(module["weight"], bias=bias)
    return Base(module["weight"], module["scales"], module.get("biases"), bias, **packing(module))


def rows_of(base: Base, begin: int, end: int) -> Base:
    """Returns a weight that consists of rows [begin, end) of a weight [out, in]."""
    arrays = (x if x is None else x[begin:end] for x in (base.scales, base.biases, base.bias))
    return Base(base.weight[begin:end], *arrays, **packing(base))


def _check_device() -> None:
    """Runs the self-check of the kernels once per GPU, before the kernels are first used. Does
    nothing on a CPU."""
    if on_gpu():
        self_check()


def _face(
    plain: Callable[..., Any], *, without: Sequence[str] = ()
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Returns a decorator for ops of the core. Calls with `impl="reference"` are passed to `plain`,
    without the options in `without`; other calls run the self-check first."""

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
    """Copies an array to the device, as int32 if its dtype is an integer type, otherwise as
    float32.

    On CUDA this is faster than `mx.array` (see csrc/core/upload.h). On other devices, the copy may
    still be in progress when the function returns.
    """
    dtype = np.int32 if np.issubdtype(x.dtype, np.integer) else np.float32
    return _core.upload(np.ascontiguousarray(x, dtype))


def compile_together(write_down: Callable[[], None]) -> None:
    """Runs the self-check, then selfcheck.compile_together. The self-check must come first, because
    it evaluates arrays, which `write_down` must not do."""
    _check_device()
    selfcheck.compile_together(write_down)


@contextmanager
def repeatable(on: bool) -> Iterator[None]:
    """Inside this context, if `on` is true, `auto` chooses only deterministic implementations. The
    setting applies to the whole process."""
    before = _core.set_repeatable(on)
    try:
        yield
    finally:
        _core.set_repeatable(before)


@contextmanager
def bfloat16_products(on: bool) -> Iterator[None]:
    """Inside this context, if `on` is true, ops on a CPU round activations, gradients and frozen
    weights to bfloat16 before they multiply them. The setting applies to the whole process. Raises
    ValueError if the CPU does not have AVX512-BF16."""
    before = _core.set_bfloat16_products(on)
    try:
        yield
    finally:
        _core.set_bfloat16_products(before)


def attention_options(
    k: mx.array, segments: Segments | None = None, **options: Any
) -> _core.AttentionOptions:
    """Converts the options of `attention` to the form that the core expects. The number of keys is
    read from the shape of `k`."""
    # If k has the wrong number of axes, the core raises the error.
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
    """Returns o = softmax(scale·q·kᵀ)·v over the keys to which each query attends. Memory is linear
    in T and S.

    q [B,H,T,D], k [B,G,S,D], v [B,G,S,Dv] → o [B,H,T,Dv], where H is a multiple of G, and all
    arrays have the same floating-point dtype. Query t is at position q_start + t (q_start is S − T
    by default). It attends to the keys up to its own position, but only to the last `window` of
    them, and only to keys of its own segment. For packed rows, `segments` is either a list of
    offsets, which rise from 0 to at most S, or an array [S] of integer ids, in which equal ids are
    adjacent and ids below 0 mark padding. Segments are the same for every row of the batch, and
    they are read when the graph is built, so mx.compile cannot trace them. Padding and tokens after
    the last offset neither attend nor are attended to: their o and gradients are 0. With `softcap`
    c, scores s are replaced with c·tanh(s / c). The softmax is computed in float32. `saved` is the
    result of `attention_forward` with the same arguments; if it is given, the forward pass is not
    run again.

    The algorithm is FlashAttention-2 (Dao 2023, arXiv:2307.08691); docs/attention.md has the
    derivation.
    """
    options = attention_options(
        k, segments, scale=scale, window=window, softcap=softcap, q_start=q_start
    )
    return _core.attention(q, k, v, options, saved=saved, impl=impl)


def attention_forward(
    q: mx.array, k: mx.array, v: mx.array, *, impl: str = "auto", **options: Any
) -> list[mx.array]:
    """Returns the argument `saved` for `attention` with these options: o, and the other arrays that
    the backward pass needs.

    The result has no gradient. It is empty if the chosen implementation has nothing to save
    (`stock`).
    """
    _check_device()
    return _core.attention_forward(q, k, v, attention_options(k, **options), impl=impl)


@_face(reference.swiglu)
def swiglu(gate: mx.array, up: mx.array, *, impl: str = "auto") -> mx.array:
    """Returns y = gate·σ(gate)·up. gate, up, y [..., F] have the same floating-point dtype; the
    computation is in float32.

    Keeps gate and up for the backward pass, which computes both gradients in one pass over memory.
    See Shazeer 2020, arXiv:2002.05202.
    """
    return _core.swiglu(gate, up, impl=impl)


@_face(reference.geglu)
def geglu(gate: mx.array, up: mx.array, *, impl: str = "auto") -> mx.array:
    """Returns y = gelu(gate)·up as in Gemma, with gelu(x) = x/2·(1 + tanh(√(2/π)·(x +
    0.044715·x³))).

    gate, up, y [..., F] have the same floating-point dtype; the computation is in float32. Keeps
    gate and up for the backward pass, which computes both gradients in one pass over memory. See
    Shazeer 2020, arXiv:2002.05202; the approximation with tanh is from Hendrycks and Gimpel 2016,
    arXiv:1606.08415.
    """
    return _core.geglu(gate, up, impl=impl)


@_face(reference.rms_norm)
def rms_norm(x: mx.array, weight: mx.array, eps: float, *, impl: str = "auto") -> mx.array:
    """Returns y = x / sqrt(mean(x²) + eps)·weight. x, y [..., H]; weight [H] is frozen and has no
    gradient.

    See Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    return _core.rms_norm(x, weight, eps, impl=impl)


@_face(reference.rms_norm_beside)
def rms_norm_beside(
    h: mx.array, weight: mx.array, eps: float, *, impl: str = "auto"
) -> list[mx.array]:
    """Returns h and its `rms_norm`, both [..., H], which are needed together at the start of a
    residual branch.

    On CUDA the kernel for the norm's backward pass also adds the two gradients of h.
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
    """Returns y = (h + rms_norm(x))·factor, as at the end of a residual branch. h, x, y [..., H],
    weight [H].

    `factor` is an array with one element. The factor and the weight are frozen and have no
    gradients. On CUDA, the forward pass and the backward pass are one kernel each.
    """
    return _core.add_rms_norm(h, x, weight, eps, factor, impl=impl)


@_face(reference.take_rows)
def take_rows(x: mx.array, index: mx.array, *, impl: str = "auto") -> mx.array:
    """Returns x[index] in x's dtype: x [N, …], index […] → […, …]. The index contains integers from
    0 to N − 1."""
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
    """Returns rows of a frozen table [V, ·], dense or quantized, multiplied by `factor`. `begin`
    and `end` select a range of columns.

    index […] → […, end − begin], with integers from 0 to V − 1. The result has the dtype of the
    table, or of its scales if the table is quantized.
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
    """Returns y = (rms_norm(x·f0) + rows·f1)·f2, the per-layer input of Gemma 4, where f0, f1, f2
    are the `factors`.

    x, y [..., D], weight [D], index [...]. `rows` are the table's rows at these indices, restricted
    to the D columns that start at `begin`, as in `embedded_rows`. The op has no gradients.
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
    """Rotates the first `dims` elements of each head of x [B,H,T,D] by the angles position·scale /
    freqs, where position = offset + t.

    freqs [dims/2] is base^(2i/dims) unless it is given. With `traditional`, adjacent elements form
    pairs; otherwise each element of the first half is paired with the corresponding element of the
    second half. If `segments` divides the offset + T tokens into segments, in the form that
    `attention` accepts, positions count from the start of each segment. The other arguments are the
    same as in mx.fast.rope. See Su et al. 2021, arXiv:2104.09864.
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
    """Returns y = x·Wᵀ + bias + scale·((mask∘x / (1 − dropout))·a)·b, where W is frozen,
    and either dense or quantized.

    x [..., in], a [in, R], b [R, out] → y [..., out]. The factors a and b are float32 master
    weights, which are cast to x's dtype for the computation. Keeps x and x·a for the backward pass,
    but neither the dequantized W nor a mask. The mask applies to x in the low-rank branch and
    depends only on `key` (see `dropout_key`) and x's shape, so recomputation gives the same mask.
    `dropout` must be in [0, 1); if it is above 0, a, b and the key are required. Gradients are
    computed for x, a and b, each in the dtype of its argument. All quantizations of mx.quantize are
    supported. If the base's arrays do not match its mode, bits and group size, ValueError is
    raised, and its message names these parameters. See Hu et al. 2021, arXiv:2106.09685.
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
    """Applies several `lora_linear`s, such as those for q, k and v, to the same x. Uses a single
    matrix multiplication if that is faster.

    x [..., in] → a list with y [..., out] for each linear layer. With dropout, `keys` must contain
    a key for each layer.
    """
    return _core.lora_linears(x, linears, dropout=dropout, keys=keys, impl=impl)


def decode_linears(
    bases: Sequence[Base],
    a: mx.array | None = None,
    b: Sequence[mx.array | None] = (),
    gains: Sequence[mx.array | None] = (),
) -> DecodeLinears:
    """Prepares linear layers that a generation step applies to the same few rows x.

    `a` [E, R, in] contains the factors A of E adapters, concatenated over all layers. For each
    layer, `b` contains the factors B, [E, out, R_j], and `gains` contains float32 multipliers of
    its outputs, [E, out]; the ranks R_j add up to R. The result is a function of x [..., in] and of
    the index of each row's adapter, uint32 [rows]. It returns y [..., out] in x's dtype for each
    layer, with y = (x·Wᵀ + (x·aᵀ)·bᵀ)·gain + bias. It has no gradient.
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
    """Applies linear layers to x as `lora_linears` does, and returns the heads q and k, rotated as
    in `rope`, and v.

    x [B,T,·] → q [B,heads,T,D], k and v [B,groups,T,D]. If there are two linear layers, the output
    of the second is used for both keys and values: v is k without its norm and rotation. If there
    is only one, only q is returned. `norms` apply to each head of q, k and v, before rotation.
    `segments` covers offset + T tokens and has the form that `attention` accepts. On CUDA, one
    kernel computes the heads from the output of a single matrix multiplication, and another kernel
    computes the gradient of this output from the gradients of the heads. If there are norms, the
    matrix multiplication's output is kept for the second kernel.
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
    """Returns y = down(act(gate(x))·up(x)), where gate, up and down are `lora_linear`s. `act` is
    the tanh approximation of GELU if `gelu` is true, otherwise SiLU.

    x [..., H], gate and up [F, H], down [·, F] → y [..., ·]. Keeps x, gate(x) and up(x), and
    recomputes act(gate(x))·up(x) in the backward pass. With `tile_rows`, keeps only x, computes
    this many rows at a time, and recomputes everything in the backward pass. This needs memory for
    [tile_rows, F] instead of [rows, F] elements, but 1.5 times as many matrix multiplications. For
    tiled MLPs, see Arctic Long Sequence Training (Bekman et al. 2025, arXiv:2506.13996).
    """
    return _core.lora_glu_mlp(x, gate, up, down, gelu=gelu, tile_rows=tile_rows, impl=impl)


def dropout_key(seed: int, step: int, module: str) -> mx.array:
    """Derives a key [2] for `lora_linear` from the seed of the run, the step, and the path of the
    module."""
    text = f"{seed}/{step}/{module}".encode()
    # The text is hashed so that adjacent seeds, steps and modules have unrelated masks.
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
    """Returns Σᵢ weightsᵢ·(lse(zᵢ) − zᵢ[targetsᵢ]) with z = h·Wᵀ + bias, where lse is log-sum-exp,
    without storing z [M, V].

    h [M, H], integer targets [M], float32 weights [M] (1 by default) → a float32 scalar. Rows with
    a target below 0 are ignored. The gradient of h is computed in the forward pass, one chunk of
    rows at a time; `needs_grad=False` skips it, for evaluation. Pass `padded=False` if no target is
    below 0. Otherwise, on a GPU, the host must wait for the targets in order to find the rows to
    ignore. With `softcap` c, z is replaced with c·tanh(z / c). With `label_smoothing` ε in [0, 1),
    z[target] is replaced with (1 − ε)·z[target] + ε·mean(z) (Szegedy et al. 2016,
    arXiv:1512.00567). The idea of never storing z is from Cut Cross-Entropy (Wijmans et al. 2024,
    arXiv:2411.09009).
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
    """Returns log_p = z[targets] − lse(z) with z = h·Wᵀ + bias, where lse is log-sum-exp, without
    storing z [M, V].

    h [M, H], integer targets [M] below V → float32 log_p [M]. A row with a target below 0 is not
    computed; its log_p and its gradient are 0. To find such rows on a GPU, the host waits for the
    targets when the graph is built. Every row is computed if the targets are traced by mx.compile,
    or if `padded` is False. With `softcap` c, z is replaced with c·tanh(z / c). On CUDA, the
    forward pass computes and keeps the gradient of log_p with respect to h, unless
    `needs_grad=False`; on other devices the backward pass recomputes z, one chunk of rows at a
    time. The op is for preference losses (DPO, Rafailov et al. 2023, arXiv:2305.18290).
    """
    return _core.linear_log_probs(
        h, head, targets, softcap=softcap, needs_grad=needs_grad, padded=padded, impl=impl
    )


def dequantize(base: Base, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Returns a quantized weight as an array [out, in] of `dtype`. On a CPU, the values are equal
    to the float32 results of mx.dequantize, cast to `dtype`."""
    return _core.dequantize(base, dtype)
