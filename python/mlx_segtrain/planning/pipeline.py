"""Pipeline parallelism: the layers of each rank, the memory that they need, and the amount of data
that ranks send.

Rank r of N runs N − r micro-batches forward before its first backward pass; from then on it
alternates between backward and forward passes (1F1B: Narayanan et al. 2021, arXiv:2104.04473).
Therefore, it needs N − r times the memory that a micro-batch occupies between its two passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .. import _core
from ..models.headers import ModelShape, layer_number
from ..schedule import Border, border
from ..streams import BatchShape
from .costs import Device


@dataclass(frozen=True)
class Part:
    """The layers [begin, end) of a rank, in a model with `layers` layers. A step has `batches`
    micro-batches."""

    rank: int
    ranks: int
    begin: int
    end: int
    layers: int
    batches: int

    @property
    def first(self) -> bool:
        return self.begin == 0

    @property
    def last(self) -> bool:
        return self.end == self.layers

    @property
    def under_way(self) -> int:
        """The maximum number of micro-batches that have run forward on this rank but not yet
        backward."""
        return min(self.ranks - self.rank, self.batches)

    def reads(self, name: str) -> bool:
        """Returns whether a weight belongs to these layers. Returns False for weights outside all
        layers, which are read when they are needed."""
        layer = layer_number(name)
        return layer is not None and self.begin <= layer < self.end

    def __str__(self) -> str:
        return f"layers {self.begin + 1} to {self.end} of {self.layers}"


def weight_bytes(model: ModelShape, part: Part, float32: bool) -> int:
    """Returns the size, in bytes, of the weights that a rank loads. These are the weights of its
    layers, of the embedding on the first rank, and of the head on the last rank."""
    own_inputs = any(layer.own_input for layer in model.layers)

    def loads(name: str) -> bool:
        if layer_number(name) is not None:
            return part.reads(name)
        if not model.fast:
            return part.first or part.last
        if name.startswith(f"{model.embedding}."):
            return part.first or own_inputs or (part.last and model.head == model.embedding)
        return part.last or (own_inputs and not name.startswith(f"{model.head}."))

    return model.weight_bytes(float32, loads)


def costs_of_part(
    costs: _core.Costs, model: ModelShape, batch: BatchShape, device: Device, part: Part | None
) -> _core.Costs:
    """Returns the costs of the stages in a part, or the costs of the whole chain if `part` is
    None."""
    if part is None:
        return costs
    layer_of = _layers_of(costs, part)
    here = [part.begin <= layer < part.end for layer in layer_of]
    given, left = (_border(costs, part, at) for at in (part.begin, part.end))
    own = [i for i, mine in enumerate(here) if mine]
    sizes = dict(zip(costs.inputs, costs.input_bytes, strict=True))
    for i, layer in enumerate(layer_of):
        if layer < part.begin:
            sizes |= dict(zip(costs.stages[i].writes, costs.costs[i].writes, strict=True))
    received = {name: sizes[name] for name in given.values}
    head_reads = costs.head_reads if part.last else list(left.values)
    read = {name for i in own for name in costs.stages[i].reads} | set(head_reads)
    inputs = received | {n: sizes[n] for n in costs.inputs if n in read and n not in received}
    gradients = sum(costs.costs[i].gradients for i in own)
    if part.last:  # an adapted head is not a stage
        gradients += costs.update // 5 - sum(cost.gradients for cost in costs.costs)
    at_hand = sum(received.values()) + _bytes(costs, layer_of, part, left)
    ends = [i + 1 for i, stage in enumerate(own) if stage + 1 in costs.layers]
    return _core.Costs(
        stages=[costs.stages[i] for i in own],
        inputs=list(inputs),
        head_reads=head_reads,
        input_bytes=list(inputs.values()),
        incoming=list(given.differentiable),
        layers=ends,
        costs=[costs.costs[i] for i in own],
        head=costs.head if part.last else 0,
        ahead=costs.ahead if part.last else 0,
        head_work=costs.head_work if part.last else 0.0,
        # Includes the values of the next batch while they are received, and those of the previous
        # batch while they are sent.
        fixed=weight_bytes(model, part, not device.gpu)
        + (3 + batch.accumulates) * gradients
        + (12 << 20) * device.gpu
        + at_hand,
        update=5 * gradients,
        widened=costs.widened,
        under_way=part.under_way,
        host=costs.host,
        copied=costs.copied,
    )


def sent(costs: _core.Costs, part: Part) -> tuple[int, int]:
    """Returns the numbers of bytes that a rank sends, for each batch, to the next rank and to the
    previous rank."""
    layer_of = _layers_of(costs, part)
    given, left = (_border(costs, part, at) for at in (part.begin, part.end))

    def back(border: Border) -> int:
        own = Border(border.differentiable, (), frozenset())
        wide = Border(tuple(border.summed & {*border.differentiable}), (), frozenset())
        at = replace(part, end=part.begin)
        more = int((costs.widened - 1) * _bytes(costs, layer_of, at, wide))
        return _bytes(costs, layer_of, at, own) + more

    return _bytes(costs, layer_of, part, left), back(given)


def _layers_of(costs: _core.Costs, part: Part) -> list[int]:
    """Returns the index of the layer to which each stage belongs."""
    layers, found = iter(enumerate(costs.layers)), []
    number, end = next(layers)
    for i in range(len(costs.stages)):
        if i == end:
            number, end = next(layers)
        found.append(number % part.layers)
    return found


def _border(costs: _core.Costs, part: Part, at: int) -> Border:
    """Returns the values that the layers before index `at` send to the remaining layers."""
    if at in (0, part.layers):
        return Border((), (), frozenset())
    before = [layer < at for layer in _layers_of(costs, part)]
    return border(costs.stages, costs.head_reads, before)


def _bytes(costs: _core.Costs, layer_of: list[int], part: Part, left: Border) -> int:
    """Returns the size of the values that leave a part, in bytes."""
    sizes: dict[str, int] = {}
    for i, layer in enumerate(layer_of):
        if layer < part.end:
            sizes |= dict(zip(costs.stages[i].writes, costs.costs[i].writes, strict=True))
    return sum(sizes[name] for name in left.values)
