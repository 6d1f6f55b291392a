"""Applies several adapters in one batch, in which each row has its own adapter.

Adapters are treated like the experts of a layer. The factors of all adapters in a batch are
stacked, and each row uses the factors of its adapter from the stack:

    y_i = W x_i + (x_i a_e) b_e        e is the adapter of row i; DoRA's gains multiply y_i

Some linear layers read the same x: q, k and v, or gate and up. Their factors `a` are concatenated,
so that one matrix multiplication computes x a for all of these layers. Adapters of similar ranks
share a stack, in which they are padded to the largest rank; adapters with very different ranks are
in different stacks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from .adapter import DORA, Adapter
from .modules import LoRALinear
from .together import Together, grouped

#: Adapters up to this rank share a stack. Above it, ranks are rounded up to a power of two, and
#: there is one stack per power.
SMALL_RANK = 16


@dataclass(frozen=True, eq=False)
class _Factors:
    """The updates of one linear layer from all adapters of a stack. b [E, ΣR, out] includes the
    multipliers, and is 0 outside the slice `own` of the rank axis. gains [E, out] are float32, and
    are None unless an update uses DoRA."""

    b: mx.array
    gains: mx.array | None
    own: slice


@dataclass(frozen=True, eq=False)
class _Group:
    """The updates of linear layers that read the same x: the concatenated a [E, in, ΣR], and the
    other factors of each layer, keyed by path."""

    a: mx.array
    factors: dict[str, _Factors]


@dataclass(frozen=True, eq=False)
class _Stack:
    """Adapters of similar ranks. `places` maps the key of each adapter to its index in the arrays.
    The arrays have an additional last index, which contains zeros, for rows without an adapter."""

    places: dict[Any, int]
    groups: list[_Group | None]
    #: The ops.DecodeLinears of each group, keyed by the group's index and created on demand.
    together: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Use:
    """The rows of a batch that use a stack, or all rows if `rows` is None. If `picks` is None, all
    of these rows have the same adapter, and `groups` contains only the arrays of this adapter,
    without the axis E."""

    stack: _Stack
    places: mx.array  #: uint32 [rows], each row's index in the stack
    groups: list[_Group | None]
    picks: mx.array | None  #: the same as `places`, or None
    rows: mx.array | None  #: uint32, the indices of the rows


@dataclass(eq=False)
class _Readers:
    """Linear layers that read the same x, in the order in which they are called."""

    paths: list[str]
    dtype: mx.Dtype
    x: mx.array | None = None
    zs: list[mx.array | None] = field(default_factory=list)
    left: int = 0

    def read(self, x: mx.array, index: int, uses: Sequence[_Use]) -> list[mx.array | None]:
        """Returns the product x a for each use. The first layer that reads x computes the products
        for all layers."""
        if self.x is not x:
            self.x, self.left = x, len(self.paths)
            self.zs = [_first(x, use, use.groups[index]) for use in uses]
        zs, self.left = self.zs, self.left - 1
        if not self.left:
            self.x, self.zs = None, []
        return zs


def _first(x: mx.array, use: _Use, group: _Group | None) -> mx.array | None:
    if group is None:
        return None
    own = x if use.rows is None else x[use.rows]
    if use.picks is None:
        return own @ group.a
    return mx.gather_mm(own, group.a, rhs_indices=use.picks)


class Rows:
    """Updates for the rows of batches that run through one base model. They apply inside the
    context `running()`.

    `run` maps tokens [1, 1] to logits by a forward pass through the base model. It is called once,
    to determine which linear layers read the same x.
    """

    def __init__(self, modules: Mapping[str, LoRALinear], run: Callable[[mx.array], Any]):
        self.on = False
        self._read = False  # whether `_readers` may refer to arrays
        self._modules = {path: x for path, x in modules.items() if type(x) is LoRALinear}
        paths = {id(module): path for path, module in self._modules.items()}
        found = grouped(self._modules.values(), run)
        self._readers = [_Readers([paths[id(x)] for x in own], dtype) for own, dtype in found]
        self._stacks: dict[int, _Stack] = {}
        self._uses: list[_Use] = []
        self._key: Any = None
        #: The index of a module's group and the module's path, keyed by the id of the module.
        self._places: dict[int, tuple[int, str]] = {}
        for i, readers in enumerate(self._readers):
            for path in readers.paths:
                self._modules[path].rows = self
                self._places[id(self._modules[path])] = i, path
        self.known = {path for _, path in self._places.values()}

    def can(self, adapter: Adapter) -> bool:
        """Returns whether rows can use this adapter. Adapters that update an embedding or experts
        are not supported."""
        return adapter.tensors.keys() <= self.known

    def put_in(self, keys: Sequence[Any], adapters: Mapping[Any, Adapter]) -> None:
        """Assigns the adapter with the key keys[i], if there is one, to row i of a batch.

        `adapters` may include the adapters of other batches that run alternately with this batch.
        All these batches then share the same stacks.
        """
        self._key = None
        sizes = {name: _size(adapter) for name, adapter in adapters.items()}
        wanted = {sizes[name] for name in keys if name in sizes}
        self._stacks = {size: x for size, x in self._stacks.items() if size in sizes.values()}
        self._uses = []
        for size in sorted(wanted):
            own = {name: x for name, x in adapters.items() if sizes[name] == size}
            stack = self._stacks.get(size)
            if stack is None or not own.keys() <= stack.places.keys():
                stack = self._stacks[size] = self._stacked(own)
            self._uses.append(_use(stack, keys, len(wanted) == 1))
        self._key = tuple(keys)

    @property
    def any(self) -> bool:
        """Whether any row of the batch has an update."""
        return bool(self._uses)

    def decoding(self, module: LoRALinear) -> tuple[Any, mx.array | None]:
        """Returns the op that computes a module's group in a decoding step, and the index of each
        row's adapter. The op is None if the layers must be computed one by one."""
        use, (index, _) = self._uses[0], self._places[id(module)]
        if use.rows is not None:
            return None, None
        made = use.stack.together
        if index not in made:
            made[index] = self._together(index, use.stack.groups[index], module.together)
        return made[index], use.places

    def _together(self, index: int, group: _Group | None, together: Together) -> Any:
        paths = self._readers[index].paths
        known = [id(x) for x in together.modules]
        if known != [id(self._modules[path]) for path in paths]:
            return None  # some layers were added later
        if group is None:
            return together.bare
        b, gains = [], []
        for path in paths:
            own = group.factors.get(path)
            b.append(own and mx.contiguous(own.b[:, own.own].swapaxes(1, 2)))
            gains.append(own and own.gains)
        return together.with_updates(mx.contiguous(group.a.swapaxes(1, 2)), b, gains)

    def holds(self, keys: Sequence[Any]) -> bool:
        """Returns whether the rows currently have exactly these adapters."""
        return self._key == tuple(keys)

    def forget(self) -> None:
        """Frees all stacks. The next `put_in` creates them again."""
        self._stacks, self._uses, self._key = {}, [], None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside this context, linear layers use these updates instead of their own."""
        self.on = True
        try:
            yield
        finally:
            self.on = False
            if self._read:
                self._read = False
                for readers in self._readers:
                    readers.x, readers.zs = None, []

    def _stacked(self, adapters: dict[Any, Adapter]) -> _Stack:
        own = list(adapters.values())
        groups = [self._group(readers, own) for readers in self._readers]
        mx.eval([x for group in groups if group for x in _arrays(group)])
        return _Stack({key: i for i, key in enumerate(adapters)}, groups)

    def _group(self, readers: _Readers, adapters: list[Adapter]) -> _Group | None:
        """Returns the updates of these layers from all adapters, with zeros at the last index, or
        None if no adapter updates the layers."""
        dtype = readers.dtype
        parts, found = [], {}
        for path in readers.paths:
            pairs = [adapter.tensors[path] for adapter in adapters if path in adapter.tensors]
            if not pairs:
                continue
            rank = max(a.shape[1] for a, _ in pairs)
            (width, _), (_, out) = (x.shape for x in pairs[0])
            a, b, gains = [], [], []
            for adapter in [*adapters, None]:
                if adapter is None or path not in adapter.tensors:
                    a.append(mx.zeros((width, rank), dtype))
                    b.append(mx.zeros((rank, out), dtype))
                    gains.append(None)
                    continue
                pair = adapter.tensors[path]
                more = rank - pair[0].shape[1]
                a.append(mx.pad(pair[0].astype(dtype), [(0, 0), (0, more)]))
                scaled = (adapter.scales[path] * pair[1]).astype(dtype)
                b.append(mx.pad(scaled, [(0, more), (0, 0)]))
                gains.append(self._gain(path, adapter, dtype))
            ones, gain = mx.ones(out), None
            if any(x is not None for x in gains):
                gain = mx.stack([ones if x is None else x for x in gains])
            parts.append(mx.stack(a))
            found[path] = mx.stack(b), gain
        if not parts:
            return None
        # Each b spans the whole rank axis, because slicing x·a instead would need another launch
        # per layer.
        whole, begin, factors = mx.concatenate(parts, axis=-1), 0, {}
        for path, (b, gain) in found.items():
            end = begin + b.shape[1]
            b = mx.pad(b, [(0, 0), (begin, whole.shape[-1] - end), (0, 0)])
            factors[path], begin = _Factors(b, gain, slice(begin, end)), end
        return _Group(whole, factors)

    def _gain(self, path: str, adapter: Adapter, dtype: mx.Dtype) -> mx.array | None:
        """Returns the multipliers by which DoRA scales a linear layer's outputs, or None if the
        layer has no DoRA."""
        if path not in adapter.magnitudes:
            return None
        own = dtype, adapter.tensors[path], adapter.scales[path], adapter.magnitudes[path]
        return self._modules[path].gain(DORA, *own)

    def __call__(self, module: LoRALinear, x: mx.array, y: mx.array) -> mx.array:
        """Adds each row's update to y [B, T, out], the output of a module's frozen linear layer,
        and returns the sum."""
        if not self._uses:
            return y
        (index, path), bias = self._places[id(module)], module.linear.get("bias")
        self._read = True
        zs = self._readers[index].read(x, index, self._uses)
        for use, z in zip(self._uses, zs, strict=True):
            group = use.groups[index]
            if group is None or z is None or path not in group.factors:
                continue
            own, picks = group.factors[path], use.picks
            part = y if use.rows is None else y[use.rows]
            if picks is None:
                part = mx.addmm(part, z, own.b)
                gain = own.gains
            else:
                part = part + mx.gather_mm(z, own.b, rhs_indices=picks)
                gain = None if own.gains is None else own.gains[picks][:, None]
            if gain is not None:  # bfloat16 is too coarse for a gain near 1 (see dora.py)
                bare = part if bias is None else part - bias
                part = part + bare * (gain - 1).astype(bare.dtype)
            if use.rows is None:
                y = part
            else:
                y[use.rows] = part
        return y


def _use(stack: _Stack, keys: Sequence[Any], all_rows: bool) -> _Use:
    rows = None
    if not all_rows:
        picked = [i for i, key in enumerate(keys) if key in stack.places]
        rows, keys = mx.array(picked, mx.uint32), [keys[i] for i in picked]
    none = len(stack.places)
    found = [stack.places.get(key, none) for key in keys]
    places = mx.array(found, mx.uint32)
    if len(set(found)) > 1:
        return _Use(stack, places, stack.groups, places, rows)
    groups = [group and _of_one(group, found[0]) for group in stack.groups]
    return _Use(stack, places, groups, None, rows)


def _of_one(group: _Group, place: int) -> _Group:
    """Returns the updates of the adapter at index `place` of the stack, as views."""

    def own(x: _Factors) -> _Factors:
        return replace(x, b=x.b[place], gains=None if x.gains is None else x.gains[place])

    return _Group(group.a[place], {path: own(x) for path, x in group.factors.items()})


def _size(adapter: Adapter) -> int:
    """Returns the key of the stack to which an adapter belongs: its largest rank, rounded up to a
    power of two."""
    return max(SMALL_RANK, 1 << (max(adapter.ranks.values()) - 1).bit_length())


def _arrays(group: _Group) -> list[mx.array]:
    more = [x for own in group.factors.values() for x in (own.b, own.gains) if x is not None]
    return [group.a, *more]
