"""An optimizer step with pipeline parallelism: the layers of the model are divided between the
ranks."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..data import AnyBatch
from ..objectives import Functions, with_head
from ..schedule import Passes
from .diagnosis import rows_of
from .pipe import Own, Pipe
from .state import Iterate
from .step import Found, Halted, Stepper


class Pipelined(Stepper):
    """Takes steps in which each rank runs its own layers and stores only their factors.

    Rank r of N runs N − r micro-batches forward before the first backward pass; from then on it
    alternates between forward and backward passes.
    """

    @property
    def pipe(self) -> Pipe:
        assert self.setup.pipe is not None
        return self.setup.pipe

    def gradient(
        self, at: Iterate, accumulated: list[AnyBatch], total: Any = None
    ) -> tuple[list[float] | list[mx.array], mx.array]:
        setup, pipe = self.setup, self.pipe
        params = setup.own.split(at.vector)
        trainable = {stage for stage, _, _ in setup.layout.entries}
        first = at.step * setup.config.grad_accumulation_steps
        left = deque(enumerate(accumulated, first))

        def next_one() -> tuple[Own, Functions] | None:
            if not left:
                return None
            draw, batch = left.popleft()
            functions = self.functions_of(draw)
            return pipe.own(functions, batch, total, trainable), functions

        under_way = deque[tuple[Own, Passes]]()
        sums = [0.0] * (1 + len(setup.objective.metrics))
        gradient: mx.array | None = None
        following = next_one()
        while following is not None:
            (own, functions), following = following, next_one()
            values = own.values | pipe.receive(own, following[0] if following else None)
            own.values.clear()  # `passes` keeps the values while it needs them
            cuts = self.plan.cuts(setup.chain, own.streams)
            passes = pipe.passes(functions, params, own, values, cuts, self.watch)
            del values
            found = passes.forward()
            if not pipe.part.last:
                pipe.send(own, found)
            under_way.append((own, passes))
            del found, passes
            while under_way and (len(under_way) == pipe.part.under_way or following is None):
                outputs, part = self._back(*under_way.popleft())
                if outputs:  # only on the last rank
                    sums = [x + float(y) for x, y in zip(sums, outputs, strict=True)]
                gradient = part if gradient is None else gradient + part
                mx.eval(gradient)  # frees this part's memory before the next part starts
        pipe.transfers.settle()
        assert gradient is not None
        return sums, gradient

    def _back(self, own: Own, passes: Passes) -> tuple[tuple[mx.array, ...], mx.array]:
        """Runs the backward pass of a micro-batch. Returns its outputs, which are empty except on
        the last rank, and its gradient."""
        pipe = self.pipe
        outputs, grads, cotangents = passes.backward(pipe.receive_back(own))
        pipe.send_back(own, cotangents)
        return outputs, self.setup.own.join(with_head(self.functions.chain, grads))

    def agree(self, outputs: Sequence[Any], gradient: mx.array) -> Found:
        """Returns the outputs summed over all ranks, this rank's part of the gradient, and the norm
        of the whole gradient."""
        square = float(mx.square(gradient).sum())
        (*sums, square), _ = self.ranks.add([*outputs, square], mx.zeros((0,)))
        return Found(sums, gradient, mx.sqrt(mx.array(square)))

    def nonfinite(self, vector: mx.array | None) -> str | None:
        return next(filter(None, self.ranks.gather(super().nonfinite(vector))), None)

    def fault(
        self, at: Iterate, accumulated: Sequence[AnyBatch], gradient: mx.array
    ) -> tuple[list[str], str | None]:
        names = self.setup.own.names
        bad = [f"the factor {name}" for name in names(~mx.isfinite(at.vector))[:1]]
        bad += [f"the gradient of {name}" for name in names(~mx.isfinite(gradient))[:1]]
        found = [own for every in self.ranks.gather(bad) for own in every]
        return list(rows_of(self.setup, accumulated).values()), next(iter(found), None)

    def keeps(self, error: Exception) -> bool:
        """Returns whether the state can be saved after this error. It can be saved only if all
        ranks stopped at the same step."""
        return isinstance(error, Halted) and error.fault is not None

    def compile(self, at: Iterate, source: Iterator[AnyBatch]) -> None:
        """Does nothing, because the shapes of received values are unknown before the first
        batch."""
