"""An optimizer step: computes the gradients of its micro-batches, checks them, and updates the
factors."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

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

T = TypeVar("T")
#: A function that performs an optimizer update with the given batches, together with the other
#: ranks.
Update = Callable[[Iterate, list[AnyBatch]], tuple[Iterate, Outcome]]


class Attempt(Protocol):
    """A function that runs a part of a step, and repeats it with a cheaper plan if the device runs
    out of memory."""

    def __call__(self, part: Callable[[], T], /) -> T: ...


class Halted(RunError):
    """The step cannot be taken, or on_spike forbids it. `fault` is the report to write, or None if
    there is none."""

    def __init__(self, message: str, fault: Fault | None = None):
        super().__init__(message)
        self.fault = fault


@dataclass(frozen=True)
class Found:
    """The outputs and the gradient of a step. In a pipeline, a rank has only a part of the
    gradient, and `length` is the norm of the whole gradient."""

    outputs: Sequence[Any]
    gradient: mx.array
    length: mx.array | None = None


@dataclass
class Stepper:
    """Takes optimizer steps according to a memory plan. `watch` is called after each move of the
    plan (see schedule.py)."""

    setup: Setup
    watch: Callable[[], None] | None = None
    ranks: Ranks = ALONE
    #: The peak memory in bytes while completions were generated; 0 if the method generates none.
    rollout_peak: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        setup = self.setup
        self.plan = setup.plan
        self.functions = Functions(setup.objective, setup.chain, setup.scales)
        self.optimizer = Optimizer(setup.config, setup.own)
        self.holding = Holding(setup.config, setup.layout, setup.own, self.ranks)

    def take(
        self,
        at: Iterate,
        accumulated: list[AnyBatch],
        update: Update,
        attempt: Attempt,
    ) -> tuple[Iterate, Outcome]:
        """Takes a whole step, which in this class is a single update."""
        return update(at, accumulated)

    def __call__(
        self,
        at: Iterate,
        accumulated: list[AnyBatch],
        losses: Sequence[float] = (),
        found: "Found | None" = None,
    ) -> tuple[Iterate, Outcome]:
        """Performs an optimizer update, and returns the new state and the outcome. What counts as a
        spike depends on `losses`, the losses of earlier steps. If there are several ranks, `found`
        contains the sums over all of them.

        Raises Halted if the loss, the gradient or the new factors are not finite. If on_spike is
        `stop`, also raises it for a spike.
        """
        setup, config = self.setup, self.setup.config
        found = found or Found(*self.gradient(at, accumulated))
        outputs, gradient, limit = found.outputs, found.gradient, config.grad_clip_norm
        length = mx.sqrt(mx.square(gradient).sum()) if found.length is None else found.length
        clipped = gradient * mx.minimum(limit / length, 1.0) if limit > 0 else gradient
        # The whole step is queued on the device before the host waits for any of its values.
        new = self.optimizer(clipped, at)
        finite = mx.isfinite(new.vector).all()
        mx.eval(outputs, length, finite, new.vector, new.moments)
        loss, metrics = float(outputs[0]), named(setup.objective, outputs[1:])
        norm = float(length)
        tokens, supervised = self.counts(accumulated)
        outcome = Outcome(
            loss=loss,
            norm=norm,
            metrics=metrics,
            rate=learning_rate(config, at.step),
            tokens=tokens,
            supervised=supervised,
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            said = f"the loss is {loss} and the gradient norm is {norm}"
            raise _halted(at, outcome, said, *self.fault(at, accumulated, gradient))
        bound = spike_bound(losses)
        if loss > bound:
            outcome = replace(outcome, bound=bound)
            if config.on_spike == "stop":
                said = f"the loss is {loss:.4f}, above the limit of {bound:.4f} set by the last "
                said += f"{len(losses)} steps"
                raise _halted(at, outcome, said, self.rows(accumulated), losses=losses)
            if config.on_spike == "skip":
                return replace(at, step=at.step + 1), outcome
        if bad := self.nonfinite(None if finite else new.vector):
            # If results differ between the devices, this rank may be the only one to reach this
            # line, so it must not wait for the others.
            rows = list(rows_of(self.setup, accumulated).values())
            raise _halted(at, outcome, "the update is not finite", rows, f"the factor {bad}")
        return new, outcome

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this rank's share of the micro-batches of an update."""
        return self.ranks.share(items)

    def counts(self, accumulated: Sequence[AnyBatch]) -> tuple[int, int]:
        """Returns how many tokens all ranks process in an update, and how many of these tokens are
        in the loss."""
        return self._counted(accumulated)

    def own_tokens(self, accumulated: Sequence[AnyBatch]) -> int:
        """Returns the number of tokens that this rank processes in an update."""
        return self._counted(self.share(accumulated))[0]

    def _counted(self, batches: Sequence[AnyBatch]) -> tuple[int, int]:
        rows = np.concatenate([batch.rows for batch in batches])
        columns = self.setup.train.columns.take(rows)
        return int(columns.run.sum()), int(columns.trained.sum())

    def rows(self, accumulated: Sequence[AnyBatch]) -> list[str]:
        """Returns the sources ("file:line") of all ranks' rows in an update."""
        return list(rows_of(self.setup, accumulated).values())

    def agree(self, outputs: Sequence[Any], gradient: mx.array) -> "Found":
        """Sums the outputs and the gradient over all ranks."""
        return Found(*self.ranks.add(outputs, gradient))

    def nonfinite(self, vector: mx.array | None) -> str | None:
        """Returns the name of the first non-finite factor in `vector`, or None if `vector` is None.
        If `vector` is given, it must contain a non-finite factor."""
        return None if vector is None else self.setup.own.names(~mx.isfinite(vector))[0]

    def fault(
        self, at: Iterate, accumulated: Sequence[AnyBatch], gradient: mx.array
    ) -> tuple[list[str], str | None]:
        """Returns the rows and the tensor in which values first become non-finite."""
        own = first_nonfinite(self.setup, at, self.share(accumulated), gradient)
        return together(self.ranks.gather(own))

    def keeps(self, error: Exception) -> bool:
        """Returns whether the state of the last finished step can be saved after this error."""
        return not isinstance(error, Diverged)

    @property
    def completions(self) -> list[dict[str, Any]]:
        """The completions of the last step; empty if the method generates none."""
        return []

    def validate(self, at: Iterate) -> tuple[float, dict[str, float]]:
        """Returns the loss and the metrics over the validation rows."""
        setup = self.setup
        assert setup.valid is not None
        params = setup.own.split(at.vector)
        what = (setup.objective, setup.chain, setup.scales, params, setup.valid)
        return measure(*what, setup.config.batch_size, self.ranks, setup.value)

    def compile(self, at: Iterate, source: Iterator[AnyBatch]) -> None:
        """On CUDA, compiles the kernels that a step on the first batch of `source` needs."""

        def write_down() -> None:
            batch = next(source)
            params = self.setup.own.split(at.vector)
            self._part(params, batch, self.setup.objective.total([batch]), 0)

        compile_together(write_down)

    def baseline(self, at: Iterate, accumulated: list[AnyBatch]) -> float:
        """Returns the contribution of this rank's micro-batches to the baseline of a step."""
        setup, params = self.setup, self.setup.own.split(at.vector)
        own, total = self.share(accumulated), setup.objective.total(accumulated)
        what = (setup.objective, setup.chain, setup.scales, params)
        return baseline_of(*what, own, total, setup.value)

    def total(self, accumulated: list[AnyBatch], baselines: Sequence[float]) -> Any:
        """Returns the total by which the losses of a step are divided, including the baseline,
        which is the sum of `baselines`."""
        objective = self.setup.objective
        return with_baseline(objective, objective.total(accumulated), sum(baselines))

    def gradient(
        self, at: Iterate, accumulated: list[AnyBatch], total: Any = None
    ) -> tuple[list[float] | list[mx.array], mx.array]:
        """Returns the contribution of this rank's micro-batches to the outputs and the gradient of
        a step. If there is only one micro-batch, the result may not be evaluated yet. `total` is
        the total of the step; if it is None, it is computed as if there were only one rank."""
        params = self.setup.own.split(at.vector)
        if total is None:
            total = self.total(accumulated, [self.baseline(at, accumulated)])
        first = at.step * self.setup.config.grad_accumulation_steps
        (draw, batch), *more = self.share(list(enumerate(accumulated, first)))
        outputs, gradient = self._part(params, batch, total, draw)
        for draw, batch in more:
            mx.eval(gradient)  # frees this part's memory before the next part starts
            part, own = self._part(params, batch, total, draw)
            outputs = [float(x) + float(y) for x, y in zip(outputs, part, strict=True)]
            gradient = gradient + own
        return outputs, gradient

    def _part(
        self, params: Grads, batch: AnyBatch, total: Any, draw: int
    ) -> tuple[list[mx.array], mx.array]:
        """Returns the contribution of a micro-batch to the outputs and the gradient of its step.
        `draw` is the index of the micro-batch in the run."""
        outputs, grads = value_and_grad(
            self.functions_of(draw),
            params,
            batch,
            total,
            cuts=lambda streams: self.plan.cuts(self.setup.chain, streams),
            watch=self.watch,
        )
        return list(outputs), self.setup.own.join(grads)

    def functions_of(self, draw: int) -> Functions:
        """Returns the functions for a micro-batch. They depend on its index `draw` only if there is
        dropout."""
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
    """Returns the error for a step with non-finite values or, if `losses` is not empty, for a spike
    after these losses."""
    kind, more = ("spike", " or with on_spike skip") if losses else ("nonfinite", "")
    numbers = (outcome.loss, outcome.norm, outcome.rate)
    fault = Fault(kind, at.step + 1, *numbers, rows, tensor, list(losses))
    kept = f"the state of step {at.step} is saved" if at.step else "nothing has been trained yet"
    return Halted(
        f"step {fault.step}: {what}, {fault.place}: {kept}; check the row, or resume with a lower "
        f"learning_rate{more}.",
        fault,
    )
