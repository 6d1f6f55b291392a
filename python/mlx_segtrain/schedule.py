"""The segmented backward pass. It computes the loss and the gradients of a chain of stages, and
keeps the intermediate values of only one segment in memory.

A model is a chain of stages, which read and write named boundary values. The forward pass keeps
only boundary values. The head computes the loss and the first cotangents. The segments are then
recomputed from the last to the first, each under `vjp` with the cotangents from the segment after
it. A plan (`csrc/schedule/plan.h`) consists of moves; each move runs some stages forward or
backward and specifies which values are kept. `csrc/schedule/schedule.cpp` runs the plan.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from . import _core

Params = Mapping[str, Mapping[str, mx.array]]
Grads = dict[str, dict[str, mx.array]]


@dataclass(frozen=True)
class Stage:
    """A step of the chain. `fn(params, *reads)` returns the value that the stage writes, or a tuple
    of values.

    `params` is the stage's dict of arrays. `reads` and `writes` contain the names of boundary
    values. A stage may overwrite a value that it reads, as layers do with the residual stream `h`.

    If `saves` is True, the function has two more parameters. With `save=True`, it also returns a
    list of arrays after the values that it writes. When the stage is recomputed for its gradient,
    the function receives this list as `saved`. Other stages can save the low-rank products of their
    linear layers (see KeptProducts in csrc/ops/linear/joint_linear.h).

    Stages with the same `owner` share the parameters that are stored under this name, and their
    gradients are added. By default the owner is the name of the stage.
    """

    name: str
    fn: Callable[..., Any]
    reads: tuple[str, ...] = ("h",)
    writes: tuple[str, ...] = ("h",)
    saves: bool = False
    owner: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "owner", self.owner or self.name)


@dataclass(frozen=True)
class Cuts:
    """The cuts of a chain into segments, which are recomputed as a whole, and into groups of
    segments, which are recomputed in two passes.

    `segments` lists the cumulative number of stages at the end of each segment; the last entry is
    the total number of stages. `groups` lists the cumulative number of segments at the end of each
    group. Values between groups are kept after the forward pass. Values between the segments of a
    group are recomputed when the backward pass reaches the group, except that the last group keeps
    these values. The last segment is never recomputed. `saves` lists the stages that keep arrays
    (for attention, its output) when they run for the last time before their gradient is computed;
    this reduces recomputation. The values that the first `offloaded` stages write, and the arrays
    that they save, are in host memory while they are not needed.
    """

    segments: tuple[int, ...]
    groups: tuple[int, ...]
    saves: tuple[int, ...] = ()
    offloaded: int = 0

    @classmethod
    def every(cls, n: int, size: int) -> "Cuts":
        """Returns cuts of n stages into segments of `size` stages, or into one segment if `size` is
        0. Each segment is its own group."""
        return cls.by_layer(range(1, n + 1), size)

    @classmethod
    def by_layer(cls, ends: Sequence[int], size: int) -> "Cuts":
        """Returns cuts into segments of `size` layers, or into one segment if `size` is 0. Each
        segment is its own group. `ends` lists the cumulative number of stages at the end of each
        layer."""
        if size < 0:
            raise ValueError(f"[schedule] segment_size must be 0 (off) or more; got {size}.")
        step = size or max(1, len(ends))
        segments = (*ends[step - 1 : len(ends) - 1 : step], *ends[-1:])
        return cls(segments, tuple(range(1, len(segments) + 1)))


def specs_of(stages: Sequence[Stage], trainable: Container[str]) -> list[_core.StageSpec]:
    """Returns descriptions of the stages for `_core.make_plan`. The owners in `trainable` have
    parameters."""
    return [
        _core.StageSpec(s.name, list(s.reads), list(s.writes), s.owner in trainable) for s in stages
    ]


def _plan(
    stages: Sequence[Stage],
    inputs: Iterable[str],
    head_reads: Iterable[str],
    cuts: Cuts,
    trainable: Container[str] = (),
    incoming: Iterable[str] = (),
) -> _core.Plan:
    """Returns the plan for a chain with these cuts. The owners in `trainable` have parameters."""
    specs = specs_of(stages, trainable)
    given = (list(inputs), list(head_reads), cuts.segments, cuts.groups, cuts.saves, list(incoming))
    return _core.make_plan(specs, *given, cuts.offloaded)


def _tuple(value: Any) -> tuple[mx.array, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def segmented_value_and_grad(
    stages: Sequence[Stage],
    head: Callable[..., Any],
    *,
    inputs: Sequence[str] = ("h",),
    head_reads: Sequence[str] = ("h",),
    segment_size: int = 1,
    cuts: Cuts | None = None,
    watch: Callable[[], None] | None = None,
    recordings: "_core.Recordings | None" = None,
) -> Callable[[Params, Mapping[str, mx.array]], tuple[tuple[mx.array, ...], Grads]]:
    """Returns a function `step(params, values) -> (outputs, grads)`, where the loss is
    `head(stages(values))`.

    `head(params, *head_reads)` returns the loss, or a tuple that begins with the loss. `params`
    maps each owner of stages, and "head", to a dict of arrays; owners without parameters may be
    absent. `values` maps the names in `inputs` to arrays, for which no gradients are computed.
    `grads` has the structure of `params`. `segment_size` is the number of stages that are
    recomputed together; 0 keeps all values and 1 needs little memory. `cuts`, if given, replaces
    `segment_size` and allows any division into segments. The gradients do not depend on the cuts.
    The returned arrays may still be unevaluated. `watch` is called after each move of the plan.
    `recordings` contains the graphs of earlier steps with the same stages and head: a function that
    has returned the same graph twice for arrays of the same shapes is not called again.

    Raises ValueError if a stage reads a value that nothing has written, or if the cuts do not fit
    the stages.
    """
    chosen = cuts or Cuts.every(len(stages), segment_size)
    begin = passes_of(
        stages, head, inputs=inputs, head_reads=head_reads, cuts=chosen, watch=watch,
        recordings=recordings,
    )  # fmt: skip

    def step(params: Params, values: Mapping[str, mx.array]) -> tuple[tuple[mx.array, ...], Grads]:
        passes = begin(params, values)
        passes.forward()
        outputs, grads, _ = passes.backward()
        return outputs, grads

    return step


@dataclass(frozen=True)
class Passes:
    """The two passes of a batch through the stages. `forward` must be called first, then
    `backward`."""

    _run: _core.Passes
    _keys: Mapping[str, list[str]]  #: names of the parameters of each owner
    _reads: tuple[str, ...]
    _incoming: tuple[str, ...]

    def forward(self) -> dict[str, mx.array]:
        """Runs the forward pass. Returns the values that the head reads, keyed by name."""
        return dict(zip(self._reads, self._run.forward(), strict=True))

    def backward(
        self, cotangents: Sequence[mx.array] = ()
    ) -> tuple[tuple[mx.array, ...], Grads, dict[str, mx.array]]:
        """Runs the backward pass. Returns the outputs of the head, the gradients of the parameters,
        and the cotangents of the incoming values.

        Without a head, `cotangents` must contain the cotangents of the differentiable values that
        `forward` has returned.
        """
        result = self._run.backward(list(cotangents))
        named = zip(self._keys.items(), [*result.grads, result.head_grads], strict=True)
        grads = {name: dict(zip(keys, grad, strict=True)) for (name, keys), grad in named if keys}
        return tuple(result.outputs), grads, dict(zip(self._incoming, result.incoming, strict=True))


def passes_of(
    stages: Sequence[Stage],
    head: Callable[..., Any] | None,
    *,
    inputs: Sequence[str],
    head_reads: Sequence[str],
    cuts: Cuts,
    incoming: Sequence[str] = (),
    watch: Callable[[], None] | None = None,
    recordings: "_core.Recordings | None" = None,
) -> Callable[[Params, Mapping[str, mx.array]], Passes]:
    """Returns a function `begin(params, values)` that returns the Passes of a batch. Together, the
    two passes compute what segmented_value_and_grad computes. The stages may be only a part of a
    chain. `incoming` lists the inputs that depend on parameters of earlier stages. If `head` is
    None, the cotangents come from later stages, which read the results of these stages."""
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names) or "head" in names:
        raise ValueError(f"[schedule] stage names must differ, and none may be 'head'; got {names}")

    owners = list(dict.fromkeys(stage.owner for stage in stages))

    def native(
        fn: Callable[..., Any], keys: list[str], saves: bool = False
    ) -> Callable[..., list[mx.array]]:
        def run(params: Any, reads: Any, saved: Any = (), save: bool = False) -> list[mx.array]:
            own = dict(zip(keys, params, strict=True))
            if saves:
                return list(_tuple(fn(own, *reads, saved=saved, save=save)))
            if not saved and not save:
                return list(_tuple(fn(own, *reads)))
            out, made = _core.keeping_products(saved, lambda: list(_tuple(fn(own, *reads))))
            return [*out, *made]

        return run

    def begin(params: Params, values: Mapping[str, mx.array]) -> Passes:
        if unknown := set(params) - {*owners, "head"}:
            raise ValueError(f"[schedule] parameters for unknown stages: {sorted(unknown)}")
        keys = {name: sorted(params.get(name, {})) for name in [*owners, "head"]}
        trainable = {s.owner for s in stages if keys[s.owner]}
        plan = _plan(stages, inputs, head_reads, cuts, trainable, incoming)

        def arrays(name: str) -> list[mx.array]:
            return [params[name][key] for key in keys[name]]

        run = _core.passes_of(
            plan,
            [native(s.fn, keys[s.owner], s.saves) for s in stages],
            head and native(head, keys["head"]),
            [arrays(name) for name in owners],
            [owners.index(s.owner) for s in stages],
            arrays("head"),
            [values[name] for name in inputs],
            watch,
            recordings,
        )
        return Passes(run, keys, tuple(head_reads), tuple(n for n in inputs if n in incoming))

    return begin


@dataclass(frozen=True)
class Border:
    """The boundary values that a device sends to the next device. In return, it receives cotangents
    for the `differentiable` values. The cotangents of the `summed` values are float32, since
    several stages add to them."""

    values: tuple[str, ...]
    differentiable: tuple[str, ...]
    summed: frozenset[str]


def border(
    stages: Sequence[_core.StageSpec], head_reads: Sequence[str], before: Sequence[bool]
) -> Border:
    """Returns the border between the stages for which `before` is True and the stages after
    them."""
    depends: dict[str, bool] = {}
    for stage, here in zip(stages, before, strict=True):
        if here:
            own = stage.trainable or any(depends.get(name, False) for name in stage.reads)
            depends |= dict.fromkeys(stage.writes, own)
    readers = dict.fromkeys(depends, 0)
    rewritten: set[str] = set()

    def read(names: Sequence[str]) -> None:
        for name in names:
            if name in readers and name not in rewritten:
                readers[name] += 1

    for stage, here in zip(stages, before, strict=True):
        if not here:
            read(stage.reads)
            rewritten.update(stage.writes)
    read(head_reads)
    values = tuple(name for name, n in readers.items() if n)
    differentiable = tuple(name for name in values if depends[name])
    return Border(values, differentiable, frozenset(n for n in values if readers[n] > 1))


def forward(
    stages: Sequence[Stage],
    params: Params,
    values: Mapping[str, mx.array],
    keep: Sequence[str] = ("h",),
) -> dict[str, mx.array]:
    """Runs the chain without gradients, and evaluates the values after every stage. Returns the
    values in `keep`.

    Other values are freed once no later stage reads them.
    """
    n = len(stages)
    plan = _plan(stages, values, keep, Cuts((n,), (1,)))
    scope = dict(enumerate(values.values()))
    for i, (stage, at) in enumerate(zip(stages, plan.stages, strict=True)):
        out = stage.fn(params.get(stage.owner, {}), *(scope[value] for value in at.reads))
        scope.update(zip(at.writes, _tuple(out), strict=True))
        for value in {*at.reads, *at.writes}:
            if not plan.readers(value, i + 1, n + 1):
                del scope[value]
        mx.eval([scope[value] for value in at.writes if value in scope])
    return dict(zip(keep, (scope[value] for value in plan.head_reads), strict=True))
