"""One optimizer step: gradients of its micro-batches, guards, update."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..config import TrainConfig
from ..data import AnyBatch, Dataset
from ..errors import RunError
from ..models.chain import Dropout
from ..objectives import value_and_grad
from ..schedule import Grads
from .diagnosis import Fault, diagnose, rows_of
from .optimizer import Optimizer, learning_rate
from .setup import Setup
from .spikes import spike_bound
from .state import Iterate, Outcome


class Halted(RunError):
    """A step that cannot or must not be taken; `fault`, if any, is the report to write of it."""

    def __init__(self, message: str, fault: Fault | None = None):
        super().__init__(message)
        self.fault = fault


@dataclass
class Stepper:
    """Takes steps by a plan. `watch` is called when a move of it is through."""

    config: TrainConfig
    setup: Setup
    watch: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.plan = self.setup.plan
        self.optimizer = Optimizer(self.config, self.setup.layout)

    def __call__(
        self, at: Iterate, accumulated: list[AnyBatch], losses: Sequence[float] = ()
    ) -> tuple[Iterate, Outcome]:
        """Behind the step, and how it was; `losses` of the steps before tell what a spike is.

        Halted if loss or gradient is not finite, or at a spike if the configuration says so.
        """
        (loss, *metrics), gradient = self.gradient(at, accumulated)
        norm = math.sqrt(float(mx.square(gradient).sum()))
        outcome = Outcome(
            loss=loss,
            norm=norm,
            metrics=dict(zip(self.setup.objective.metrics, metrics, strict=True)),
            rate=learning_rate(self.config, at.step),
            tokens=count(self.setup.train, accumulated),
        )
        kept = f"the state of step {at.step} is kept" if at.step else "nothing has been trained yet"
        mend = "look at the row, or go on with a lower learning_rate"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            fault = diagnose(self.setup, at, accumulated, outcome, gradient)
            raise Halted(
                f"step {at.step + 1}: loss is {loss} and gradient norm {norm}, {fault.place}: "
                f"{kept}; {mend}.",
                fault,
            )
        bound = spike_bound(losses)
        if loss > bound:
            outcome = replace(outcome, bound=bound)
            if self.config.on_spike == "stop":
                rows = rows_of(self.setup.train, accumulated)
                fault = Fault.of("spike", at, outcome, rows, list(losses))
                raise Halted(
                    f"step {at.step + 1}: loss is {loss:.4f}, where {bound:.4f} is the most that "
                    f"the last {len(losses)} steps let expect, {fault.place}: {kept}; {mend} or "
                    "with on_spike skip.",
                    fault,
                )
            if self.config.on_spike == "skip":
                return replace(at, step=at.step + 1), outcome
        limit = self.config.grad_clip_norm
        if 0 < limit < norm:
            gradient = gradient * (limit / norm)
        new = self.optimizer(gradient, at)
        if not mx.isfinite(new.vector).all():
            bad = self.setup.layout.names(~mx.isfinite(new.vector))
            rows = rows_of(self.setup.train, accumulated)
            fault = Fault.of("nonfinite", at, outcome, rows, [], f"the factor {bad[0]}")
            raise Halted(
                f"step {at.step + 1}: the update is not finite, {fault.place}: {kept}; {mend}.",
                fault,
            )
        return new, outcome

    def gradient(self, at: Iterate, accumulated: list[AnyBatch]) -> tuple[list[float], mx.array]:
        """Outputs of the objective and gradient of its loss over all micro-batches."""
        total = self.setup.objective.total(accumulated)
        params = self.setup.layout.split(at.vector)
        outputs, gradient = self._part(params, at.step, accumulated, 0, total)
        for i in range(1, len(accumulated)):
            part, own = self._part(params, at.step, accumulated, i, total)
            outputs = [x + y for x, y in zip(outputs, part, strict=True)]
            gradient = gradient + own
            mx.eval(gradient)
        return outputs, gradient

    def _part(
        self, params: Grads, step: int, accumulated: list[AnyBatch], i: int, total: Any
    ) -> tuple[list[float], mx.array]:
        """Of the i-th micro-batch."""
        setup, config = self.setup, self.config
        dropout = None
        if config.lora_dropout:
            draw = step * config.grad_accumulation_steps + i
            dropout = Dropout(config.lora_dropout, config.seed, draw)
        outputs, grads = value_and_grad(
            setup.objective,
            setup.chain,
            setup.scales,
            params,
            accumulated[i],
            total,
            cuts=lambda streams: self.plan.cuts(setup.chain, streams),
            dropout=dropout,
            watch=self.watch,
        )
        gradient = setup.layout.join(grads)
        del grads
        mx.eval(gradient)
        return [float(x) for x in outputs], gradient


def count(data: Dataset, accumulated: list[AnyBatch]) -> int:
    """Tokens that are no padding."""
    return sum(len(data.rows[i]) for batch in accumulated for i in batch.rows)
