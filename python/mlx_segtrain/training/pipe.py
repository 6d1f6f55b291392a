"""Runs batches forward and backward through a model whose layers are divided between ranks.

A rank receives boundary values from the previous rank, runs its stages, and sends the next rank all
values that later ranks read. In the backward pass, cotangents flow in the opposite direction. Every
rank has all batches, so only values that depend on weights are sent.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..models import Chain
from ..objectives import Functions, Objective
from ..planning.pipeline import Part
from ..schedule import Border, Cuts, Params, Passes, Stage, border, forward, passes_of, specs_of
from ..streams import Stream, head_reads
from .ranks import Ranks
from .transfers import Form, Transfers


@dataclass(frozen=True)
class Own:
    """The work of one rank on a batch: its stages, and the borders to the previous and the next
    rank."""

    stages: list[Stage]
    head: Callable[..., Any] | None  #: None except on the last rank
    head_reads: tuple[str, ...]
    recordings: Any
    values: dict[str, mx.array]  #: inputs that depend only on the batch
    given: Border
    left: Border
    streams: tuple[Stream, ...]
    shapes: Any  #: equal for batches whose transfers have the same shapes and dtypes


@dataclass
class Pipe:
    """A rank's part of the layers, and its transfers to and from the previous and the next rank."""

    ranks: Ranks
    part: Part
    transfers: Transfers
    #: The shapes and dtypes of the arrays that cross a border, keyed by the border and by the
    #: shapes of a batch.
    known: dict[Any, list[Form]] = field(default_factory=dict)
    #: The arrays that receive the values of the next batch, if their transfers have started.
    posted: dict[str, mx.array] | None = None

    def owners(self, chain: Chain) -> set[str]:
        """Returns the owners of the parameters that this rank stores."""
        own = {owner for layer in chain.layers[self.part.begin : self.part.end] for owner in layer}
        return own | ({"head"} if self.part.last else set())

    def own(
        self, functions: Functions, batch: Any, total: Any, trainable: Container[str] = ()
    ) -> Own:
        """Returns this rank's work on a batch. `trainable` contains the owners that have trainable
        parameters, including owners on other ranks."""
        part, chain, objective = self.part, functions.chain, functions.objective
        streams = objective.streams(chain, batch)
        stages, head, recordings = functions(streams)
        values = objective.values(chain, batch, total)
        reads = (*head_reads(streams), *objective.reads)
        number = {owner: i for i, layer in enumerate(chain.layers) for owner in layer}
        layer_of, specs = [number[s.owner] for s in stages], specs_of(stages, trainable)
        given, left = (
            border(specs, reads, [n < at for n in layer_of]) for at in (part.begin, part.end)
        )
        mine = [s for s, n in zip(stages, layer_of, strict=True) if part.begin <= n < part.end]
        kept = reads if part.last else left.values
        read = {name for stage in mine for name in stage.reads} | set(kept)
        return Own(
            stages=mine,
            head=head if part.last else None,
            head_reads=kept,
            recordings=recordings,
            values={n: x for n, x in values.items() if n in read and n not in given.values},
            given=given,
            left=left,
            streams=streams,
            shapes=tuple((name, *x.shape) for name, x in values.items()),
        )

    def value(
        self, objective: Objective, chain: Chain, scales: Mapping[str, float], params: Params,
        batch: Any, total: Any,
    ) -> list[mx.array]:  # fmt: skip
        """Computes objectives.value in a pipeline. Only the last rank returns the outputs; the
        others return zeros."""
        own = self.own(Functions(objective, chain, scales), batch, total)
        values = own.values | self.receive(own)
        scope = forward(own.stages, params, values, keep=own.head_reads)
        if not self.part.last:
            self.transfers.settle(1)
            self.send(own, scope)
            return [mx.array(0.0)] * (1 + len(objective.metrics))
        chain = chain.adapting(scales)
        head = objective.head(chain, needs_grad=False)
        outputs = head(chain.of_head(params), *(scope[name] for name in own.head_reads))
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    def receive(self, own: Own, following: Own | None = None) -> dict[str, mx.array]:
        """Returns the values that the previous rank sends for a batch. If `following` is given,
        also starts to receive the values of that batch."""
        if self.part.first:
            return {}
        found = self.posted or self._post(own)
        self.ranks.wait_for(list(found.values()))
        self.posted = following and self._post(following)
        return found

    def send(self, own: Own, values: Mapping[str, mx.array]) -> None:
        """Sends the next rank all values that later ranks read."""
        arrays, to = [values[name] for name in own.left.values], self.part.rank + 1
        key = ("left", own.shapes)
        if key not in self.known:
            self.known[key] = [(tuple(x.shape), x.dtype) for x in arrays]
            self.transfers.send_forms(arrays, to)
        self.transfers.send(arrays, to)

    def receive_back(self, own: Own) -> list[mx.array]:
        """Receives the cotangents of the values that this rank has sent."""
        if self.part.last or not own.left.differentiable:
            return []
        forms = dict(zip(own.left.values, self.known["left", own.shapes], strict=True))
        wanted = [
            (shape, mx.float32 if name in own.left.summed else dtype)
            for name in own.left.differentiable
            for shape, dtype in [forms[name]]
        ]
        found = self.transfers.post(wanted, self.part.rank + 1)
        self.ranks.wait_for(found)
        return found

    def send_back(self, own: Own, cotangents: Mapping[str, mx.array]) -> None:
        """Sends the cotangents of the received values, in the dtypes that the other rank's
        receive_back expects."""
        if own.given.differentiable:
            forms = dict(zip(own.given.values, self.known["given", own.shapes], strict=True))
            arrays = [
                cotangents[name].astype(mx.float32 if name in own.given.summed else forms[name][1])
                for name in own.given.differentiable
            ]
            self.transfers.send(arrays, self.part.rank - 1)

    def _post(self, own: Own) -> dict[str, mx.array]:
        key, source = ("given", own.shapes), self.part.rank - 1
        if key not in self.known:
            self.known[key] = self.transfers.forms(len(own.given.values), source)
        return dict(
            zip(own.given.values, self.transfers.post(self.known[key], source), strict=True)
        )

    def passes(
        self,
        functions: Functions,
        params: Params,
        own: Own,
        values: Mapping[str, mx.array],
        cuts: Cuts,
        watch: Callable[[], None] | None,
    ) -> Passes:
        """Returns the forward and backward passes of a batch through this rank's stages."""
        chain = functions.chain
        of_head = chain.of_head(params) if self.part.last else {}
        begin = passes_of(
            own.stages,
            own.head,
            inputs=tuple(values),
            head_reads=own.head_reads,
            cuts=cuts,
            incoming=own.given.differentiable,
            watch=watch,
            recordings=own.recordings,
        )
        return begin({**params, "head": of_head}, values)
