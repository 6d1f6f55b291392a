"""Runs linear layers that read the same x (q, k and v, or gate and up) and their updates in one
kernel launch. Used for decoding steps on CUDA.

The speed of such a step is limited by the time that the host needs to build and launch it, so fewer
launches make it faster.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from .adapter import ARRAYS, KINDS
from .modules import FEW, LoRALinear

#: The maximum number of adapters whose factors a group caches in the layout that the kernel needs.
MOST_KEPT = 8
#: The dtypes in which matrix multiplications with several rows use tensor cores.
HALVES = mx.bfloat16, mx.float16
#: For a quantized layer with more outputs than this, such as a head, MLX uses a kernel for many
#: rows even if there is only one row. That kernel is slower than ours (bench/LOG.md, 2026-11-30).
WIDE = 16384

_picks: dict[int, mx.array] = {}


class Together:
    """Linear layers that read the same x of this `dtype`, in the order in which they are called.

    The call of the first layer computes the outputs of all layers.
    """

    def __init__(self, modules: list[LoRALinear], dtype: mx.Dtype):
        self.modules, self.dtype = modules, dtype
        self.bases = [ops.base_of(module.linear) for module in modules]
        self.bare = ops.decode_linears(self.bases)  #: computes the layers without updates
        self.served = serves(self.bare, dtype)
        self._kept: dict[tuple[Any, ...], tuple[ops.DecodeLinears | None, Any]] = {}
        self._last: tuple[list[Any], ops.DecodeLinears | None] | None = None
        self._x: mx.array | None = None
        self._ys: list[mx.array] | None = None
        self._left = 0

    def read(self, index: int, x: mx.array) -> mx.array | None:
        """Returns the output of one layer with its update, or None if no kernel supports the
        layers."""
        if self._x is not x:
            self._x, self._ys, self._left = x, self._all(x), len(self.modules)
        ys, self._left = self._ys, self._left - 1
        if not self._left:
            self._x = self._ys = None
        return None if ys is None else ys[index]

    def with_updates(
        self,
        a: mx.array,
        b: Sequence[mx.array | None],
        gains: Sequence[mx.array | None],
    ) -> ops.DecodeLinears | None:
        """Returns the op that computes the layers with the factors a [E, R, in] and b [E, out,
        R_j], which have x's dtype. Returns None if no kernel supports them."""
        # The arrays are copied and evaluated here, once. Otherwise, the first launch for each
        # number of rows would copy and evaluate them again.
        a = mx.contiguous(a)
        mx.eval([x for x in (a, *b, *gains) if x is not None])
        op = ops.decode_linears(self.bases, a, b, gains)
        return op if serves(op, self.dtype) else None

    def forget(self) -> None:
        """Frees the cached updates."""
        self._kept.clear()
        self._last = None

    def _all(self, x: mx.array) -> list[mx.array] | None:
        if x.dtype != self.dtype:
            return None
        rows = self.modules[0].rows
        if rows is None or not rows.on:
            op, picks = self._in_place(), None
        elif rows.any:
            op, picks = rows.decoding(self.modules[0])
        else:
            op, picks = self.bare, None
        if op is None:
            return None
        return op(x, no_picks(x.size // x.shape[-1]) if picks is None else picks)

    def _in_place(self) -> ops.DecodeLinears | None:
        """Returns the op that computes the layers with their current updates, or None if no kernel
        supports this."""
        if self._last is not None:  # building lists for each token would take longer than a launch
            last, op = self._last
            for module, scale, name, x in last:
                if module.get(name) is not x or module.scale != scale:
                    break
            else:
                return op
        op = self._looked_up()
        last = [(x, x.scale, name, x.get(name)) for x in self.modules for name in ARRAYS]
        self._last = last, op
        return op

    def _looked_up(self) -> ops.DecodeLinears | None:
        if not any("lora_a" in module for module in self.modules):
            return self.bare
        arrays = [[module.get(name) for name in ARRAYS] for module in self.modules]
        key = tuple(id(x) for own in arrays for x in own), tuple(x.scale for x in self.modules)
        if key not in self._kept:
            if len(self._kept) == MOST_KEPT:
                self._kept.pop(next(iter(self._kept)))
            # The arrays are stored as well, so that their ids are not reused.
            self._kept[key] = self._made(), arrays
        return self._kept[key][0]

    def _made(self) -> ops.DecodeLinears | None:
        a, b, gains = [], [], []
        for module in self.modules:
            factors = module.factors(self.dtype) if "lora_a" in module else None
            gain = None
            for kind in KINDS:
                if kind.array in module:
                    own = module["lora_a"], module["lora_b"]
                    array = module[kind.array]
                    gain = module.gain(kind, self.dtype, own, module.scale, array)[None]
            if factors is not None:
                a.append(factors[0].T)
            b.append(None if factors is None else mx.contiguous(factors[1].T)[None])
            gains.append(gain)
        return self.with_updates(mx.concatenate(a)[None], b, gains)


def serves(op: ops.DecodeLinears, dtype: mx.Dtype) -> bool:
    """Returns whether a kernel can run this op in steps of up to FEW rows."""
    return not op.unfit(dtype, FEW)


def no_picks(rows: int) -> mx.array:
    """Returns the index of the first adapter, 0, for each row."""
    if rows not in _picks:
        picks = mx.zeros(rows, mx.uint32)
        mx.eval(picks)  # other threads may use it
        _picks[rows] = picks
    return _picks[rows]


def several(linear: nn.Module, stock: Callable[[mx.array], mx.array]) -> Callable[..., mx.array]:
    """Returns a function that computes a frozen linear layer. For a single row, the function calls
    `stock`, unless the layer is wide. For several rows, it runs our kernel, because MLX's matrix
    multiplication reads the weight once per row if x is [rows, 1, in]."""
    base = ops.base_of(linear)
    op, least = ops.decode_linears([base]), 1 if base.bits and base.out_dims > WIDE else 2
    served = {dtype for dtype in HALVES if serves(op, dtype)}
    if not served:
        return stock

    def product(x: mx.array) -> mx.array:
        rows = x.size // x.shape[-1]
        return op(x, no_picks(rows))[0] if least <= rows <= FEW and x.dtype in served else stock(x)

    return product


class _Recorder:
    """Replaces a module's `rows` to record which x each layer reads."""

    on = True

    def __init__(self) -> None:
        self.read: list[tuple[LoRALinear, mx.array]] = []

    def __call__(self, module: LoRALinear, x: mx.array, y: mx.array) -> mx.array:
        self.read.append((module, x))
        return y


def grouped(
    modules: Iterable[LoRALinear], run: Callable[[mx.array], Any]
) -> list[tuple[list[LoRALinear], mx.Dtype]]:
    """Returns the groups of linear layers that read the same x, each with the dtype of x, in the
    order of calls.

    `run` maps tokens [1, 1] to logits by a forward pass through the model. The pass is traced but
    not evaluated.
    """
    recorder = _Recorder()
    before = [(module, module.rows) for module in modules]
    for module, _ in before:
        module.rows = recorder
    try:
        run(mx.zeros((1, 1), mx.int32))
    finally:
        for module, rows in before:
            module.rows = rows
    found: dict[int, tuple[list[LoRALinear], mx.Dtype]] = {}
    seen: set[int] = set()
    for module, x in recorder.read:
        if id(module) not in seen:  # some models call a layer twice
            seen.add(id(module))
            found.setdefault(id(x), ([], x.dtype))[0].append(module)
    return list(found.values())


def put_together(modules: Sequence[LoRALinear], run: Callable[[mx.array], Any]) -> None:
    """Sets `together` and `place` of the modules that a kernel can run in one launch."""
    for module in modules:
        module.grouped, module.together = True, None
    for own, dtype in grouped(modules, run):
        together = Together(own, dtype)
        for place, module in enumerate(own):
            module.together, module.place = (together if together.served else None), place
