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
from ..objectives import Functions, baseline_of, named, value_and_grad, with_baseline
from ..ops import compile_together
from ..schedule import Grads
from .diagnosis import Fault, first_nonfinite, rows_of, together
from .evaluation import measure
from .holding import Holding
from .optimizer import Optimizer, learning_rate
from .ranks import ALONE, Diverged, Ranks
from .setup import Setup
from .spikes import spike_bound
from .state import Iterate, Outcome


class Halted(RunError):
    """A step that cannot or must not be taken; `fault`, if any, is the report to write."""

    def __init__(self, message: str, fault: Fault | None = None):
        super().__init__(message)
        self.fault = fault


@dataclass(frozen=True)
class Found:
    """Outputs and gradient of a step; `length` of the gradient, if a rank has a part of it only."""

    outputs: Sequence[Any]
    gradient: mx.array
    length: mx.array | None = None


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
        self.optimizer = Optimizer(setup.config, setup.own)
        self.holding = Holding(setup.config, setup.layout, setup.own, self.ranks)

    def __call__(
        self,
        at: Iterate,
        accumulated: list[AnyBatch],
        losses: Sequence[float] = (),
        found: "Found | None" = None,
    ) -> tuple[Iterate, Outcome]:
        """Takes one step: the new state, and how the step was; `losses` of the steps before tell
        what a spike is. `found` is what all ranks together have come to.

        Raises Halted if the loss or the gradient is not finite, or at a spike if the configuration
        says so.
        """
        setup, config = self.setup, self.setup.config
        found = found or Found(*self.gradient(at, accumulated))
        outputs, gradient, limit = found.outputs, found.gradient, config.grad_clip_norm
        length = mx.sqrt(mx.square(gradient).sum()) if found.length is None else found.length
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
            raise _halted(at, outcome, said, *self.fault(at, accumulated, gradient))
        bound = spike_bound(losses)
        if loss > bound:
            outcome = replace(outcome, bound=bound)
            if config.on_spike == "stop":
                said = f"the loss is {loss:.4f}, above the limit of {bound:.4f} that the last "
                said += f"{len(losses)} steps set"
                raise _halted(at, outcome, said, rows, losses=losses)
            if config.on_spike == "skip":
                return replace(at, step=at.step + 1), outcome
        if bad := self.nonfinite(None if finite else new.vector):
            raise _halted(at, outcome, "the update is not finite", rows, f"the factor {bad}")
        return new, outcome

    def agree(self, outputs: Sequence[Any], gradient: mx.array) -> "Found":
        """Returns the sums over all ranks, each of which passes its part."""
        return Found(*self.ranks.add(outputs, gradient))

    def nonfinite(self, vector: mx.array | None) -> str | None:
        """Returns the first factor of a vector that is not finite, if there is one."""
        return None if vector is None else self.setup.own.names(~mx.isfinite(vector))[0]

    def fault(
        self, at: Iterate, accumulated: Sequence[AnyBatch], gradient: mx.array
    ) -> tuple[list[str], str | None]:
        """Returns where the numbers of a step first stop being finite: rows, and the tensor."""
        own = first_nonfinite(self.setup, at, self.ranks.share(accumulated), gradient)
        return together(self.ranks.gather(own))

    def keeps(self, error: Exception) -> bool:
        """Returns whether the state of the last step can be saved after this one."""
        return not isinstance(error, Diverged)

    @property
    def completions(self) -> list[dict[str, Any]]:
        """Returns the completions of the last step, if the method generates any."""
        return []

    def validate(self, at: Iterate) -> tuple[float, dict[str, float]]:
        """Returns the loss and metrics over the validation rows."""
        setup = self.setup
        assert setup.valid is not None
        params = setup.own.split(at.vector)
        what = (setup.objective, setup.chain, setup.scales, params, setup.valid)
        return measure(*what, setup.config.batch_size, self.ranks, setup.value)

    def compile(self, at: Iterate, source: Iterator[AnyBatch]) -> None:
        """Compiles the kernels for steps on batches like the first of these (CUDA)."""

        def write_down() -> None:
            batch = next(source)
            params = self.setup.own.split(at.vector)
            self._value_and_grad(params, batch, self.setup.objective.total([batch]), 0)

        compile_together(write_down)

    def baseline(self, at: Iterate, accumulated: list[AnyBatch]) -> float:
        """Returns the part of a step's baseline that is of this rank's share of micro-batches."""
        setup, params = self.setup, self.setup.own.split(at.vector)
        own, total = self.ranks.share(accumulated), setup.objective.total(accumulated)
        what = (setup.objective, setup.chain, setup.scales, params)
        return baseline_of(*what, own, total, setup.value)

    def total(self, accumulated: list[AnyBatch], baselines: Sequence[float]) -> Any:
        """Returns the divisor of the losses of a step, with the baselines of all ranks."""
        objective = self.setup.objective
        return with_baseline(objective, objective.total(accumulated), sum(baselines))

    def gradient(
        self, at: Iterate, accumulated: list[AnyBatch], total: Any = None
    ) -> tuple[list[float] | list[mx.array], mx.array]:
        """Outputs of the objective and gradient of its loss over this rank's share of the
        micro-batches, as parts of those over all. `total` is that of the step; by default of a run
        on one device.

        With a single micro-batch they may not be computed yet when this returns.
        """
        params = self.setup.own.split(at.vector)
        if total is None:
            total = self.total(accumulated, [self.baseline(at, accumulated)])
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
        return list(outputs), self.setup.own.join(grads)

    def _value_and_grad(
        self, params: Grads, batch: AnyBatch, total: Any, draw: int
    ) -> tuple[tuple[mx.array, ...], Grads]:
        return value_and_grad(
            self.functions_of(draw),
            params,
            batch,
            total,
            cuts=lambda streams: self.plan.cuts(self.setup.chain, streams),
            watch=self.watch,
        )

    def functions_of(self, draw: int) -> Functions:
        """Returns the functions of a micro-batch; with dropout each micro-batch has its own."""
        setup, config = self.setup, self.setup.config
        if not config.lora_dropout:
            return self.functions
        dropout = Dropout(config.lora_dropout, config.seed, draw)
        return Functions(setup.objective, setup.chain, setup.scales, dropout)


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
        f"step {fault.step}: {what}, {fault.place}: {kept}; check the row, or resume with a lower "
        f"learning_rate{more}.",
        fault,
    )
