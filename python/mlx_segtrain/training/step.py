"""One optimizer step: the gradients of its micro-batches, the checks, the update."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..data import AnyBatch
from ..errors import RunError
from ..models.chain import Dropout
from ..objectives import Functions, named, total_of, value_and_grad
from ..ops import compile_together
from ..schedule import Grads
from .diagnosis import Fault, first_nonfinite, rows_of, together
from .evaluation import measure
from .optimizer import Optimizer, learning_rate
from .ranks import ALONE, Ranks
from .setup import Setup
from .spikes import spike_bound
from .state import Iterate, Outcome


class Halted(RunError):
    """A step that cannot or must not be taken; `fault`, if any, is the report to write."""

    def __init__(self, message: str, fault: Fault | None = None):
        super().__init__(message)
        self.fault = fault


@dataclass
class Stepper:
    """Takes steps by a plan. `watch` is called after each move of the plan."""

    setup: Setup
    watch: Callable[[], None] | None = None
    ranks: Ranks = ALONE
    #: Bytes that generating has taken, if the method generates.
    rollout_peak: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        setup = self.setup
        self.plan = setup.plan
        self.functions = Functions(setup.objective, setup.chain, setup.scales)
        self.optimizer = Optimizer(self.setup.config, self.setup.layout)

    def __call__(
        self,
        at: Iterate,
        accumulated: list[AnyBatch],
        losses: Sequence[float] = (),
        found: tuple[Sequence[Any], mx.array] | None = None,
    ) -> tuple[Iterate, Outcome]:
        """Takes one step; returns the new state and the outcome. The `losses` of recent steps
        define what a spike is. `found` is the result of `gradient`, summed over all ranks.

        Raises Halted if the loss or the gradient is not finite, or at a spike if the configuration
        says so.
        """
        setup, config = self.setup, self.setup.config
        outputs, gradient = found or self.gradient(at, accumulated)
        length, limit = mx.sqrt(mx.square(gradient).sum()), config.grad_clip_norm
        clipped = gradient * mx.minimum(limit / length, 1.0) if limit > 0 else gradient
        # The whole step is queued on the device before the first of its numbers is waited for.
        new = self.optimizer(clipped, at)
        finite = mx.isfinite(new.vector).all()
        mx.eval(outputs, length, finite, new.vector, new.moments)
        loss, metrics = float(outputs[0]), named(setup.objective, outputs[1:])
        norm = float(length)
        columns = setup.train.columns.take(np.concatenate([batch.rows for batch in accumulated]))
        outcome = Outcome(
            loss=loss,
            norm=norm,
            metrics=metrics,
            rate=learning_rate(config, at.step),
            tokens=int(columns.run.sum()),
            supervised=int(columns.trained.sum()),
        )
        rows = list(rows_of(setup, accumulated).values())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            said = f"the loss is {loss} and the gradient norm {norm}"
            own = first_nonfinite(setup, at, self.ranks.share(accumulated), gradient)
            raise _halted(at, outcome, said, *together(self.ranks.gather(own)))
        bound = spike_bound(losses)
        if loss > bound:
            outcome = replace(outcome, bound=bound)
            if config.on_spike == "stop":
                said = f"the loss is {loss:.4f}, above the limit of {bound:.4f} that the last "
                said += f"{len(losses)} steps set"
                raise _halted(at, outcome, said, rows, losses=losses)
            if config.on_spike == "skip":
                return replace(at, step=at.step + 1), outcome
        if not finite:
            bad = setup.layout.names(~mx.isfinite(new.vector))
            raise _halted(at, outcome, "the update is not finite", rows, f"the factor {bad[0]}")
        return new, outcome

    @property
    def completions(self) -> list[dict[str, Any]]:
        """What the last step generated, if the method generates (for completions.jsonl)."""
        return []

    def validate(self, at: Iterate) -> tuple[float, dict[str, float]]:
        """Returns the loss and metrics over the validation rows."""
        setup = self.setup
        assert setup.valid is not None
        params = setup.layout.split(at.vector)
        what = (setup.objective, setup.chain, setup.scales, params, setup.valid)
        return measure(*what, setup.config.batch_size, self.ranks)

    def compile(self, at: Iterate, source: Iterator[AnyBatch]) -> None:
        """Compiles the kernels for steps on batches like the first of these (CUDA)."""

        def write_down() -> None:
            batch = next(source)
            params = self.setup.layout.split(at.vector)
            self._value_and_grad(params, batch, self.setup.objective.total([batch]), 0)

        compile_together(write_down)

    def gradient(
        self, at: Iterate, accumulated: list[AnyBatch]
    ) -> tuple[list[float] | list[mx.array], mx.array]:
        """Returns the outputs of the objective and the gradient of its loss over this rank's
        micro-batches, as parts of those over all ranks.

        With a single micro-batch they may not be computed yet when this returns.
        """
        setup, params = self.setup, self.setup.layout.split(at.vector)
        total = total_of(setup.objective, setup.chain, setup.scales, params, accumulated)
        first = at.step * self.setup.config.grad_accumulation_steps
        (draw, batch), *more = self.ranks.share(list(enumerate(accumulated, first)))
        outputs, gradient = self._part(params, batch, total, draw)
        for draw, batch in more:
            mx.eval(gradient)  # otherwise the next one would start before this one's memory is free
            part, own = self._part(params, batch, total, draw)
            outputs = [float(x) + float(y) for x, y in zip(outputs, part, strict=True)]
            gradient = gradient + own
        return outputs, gradient

    def _part(
        self, params: Grads, batch: AnyBatch, total: Any, draw: int
    ) -> tuple[list[mx.array], mx.array]:
        """Returns the part of one micro-batch; `draw` is its number in the run."""
        outputs, grads = self._value_and_grad(params, batch, total, draw)
        return list(outputs), self.setup.layout.join(grads)

    def _value_and_grad(
        self, params: Grads, batch: AnyBatch, total: Any, draw: int
    ) -> tuple[tuple[mx.array, ...], Grads]:
        setup, config = self.setup, self.setup.config
        functions = self.functions
        if config.lora_dropout:
            dropout = Dropout(config.lora_dropout, config.seed, draw)
            functions = Functions(setup.objective, setup.chain, setup.scales, dropout)
        return value_and_grad(
            functions,
            params,
            batch,
            total,
            cuts=lambda streams: self.plan.cuts(setup.chain, streams),
            watch=self.watch,
        )


def _halted(
    at: Iterate,
    outcome: Outcome,
    what: str,
    rows: list[str],
    tensor: str | None = None,
    losses: Sequence[float] = (),
) -> Halted:
    """Returns the error that ends a run at a step whose numbers are not finite, or that is a spike
    after `losses`."""
    kind, more = ("spike", " or with on_spike skip") if losses else ("nonfinite", "")
    numbers = (outcome.loss, outcome.norm, outcome.rate)
    fault = Fault(kind, at.step + 1, *numbers, rows, tensor, list(losses))
    kept = f"the state of step {at.step} is kept" if at.step else "nothing has been trained yet"
    return Halted(
        f"step {fault.step}: {what}, {fault.place}: {kept}; look at the row, or go on with a lower "
        f"learning_rate{more}.",
        fault,
    )
