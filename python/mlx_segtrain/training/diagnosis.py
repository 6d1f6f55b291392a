"""Finds the row and the tensor in which values first become non-finite."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..data import AnyBatch, one_row
from ..objectives import total_of, value
from ..schedule import Stage
from .setup import Setup
from .state import Iterate


@dataclass(frozen=True)
class Fault:
    """A report on a step that was not taken. `step` counts from 1, and each row is written as
    "file:line".

    `tensor` names the first non-finite tensor: a factor of the adapter, the output of a layer, or
    the gradient of a factor. If the step was a spike, `losses` are the losses of the steps before
    it.
    """

    kind: str  #: "nonfinite" or "spike"
    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    rows: list[str]
    tensor: str | None
    losses: list[float]

    @property
    def place(self) -> str:
        """The rows and the tensor as a phrase for an error message."""
        more = f" and {len(self.rows) - 3} more" if len(self.rows) > 3 else ""
        where = f" (first in {self.tensor})" if self.tensor else ""
        return f"on {', '.join(self.rows[:3])}{more}{where}"


def rows_of(setup: Setup, accumulated: Sequence[AnyBatch]) -> dict[int, str]:
    """Returns the sources ("file:line") of the rows in these batches, keyed by row index."""
    indices = sorted({int(i) for batch in accumulated for i in batch.rows})
    return {i: setup.train.rows[i].source for i in indices}


def first_nonfinite(
    setup: Setup, at: Iterate, accumulated: Sequence[AnyBatch], gradient: mx.array
) -> tuple[list[str], str | None]:
    """Returns the row and the tensor in which values first become non-finite.

    Runs a separate forward pass for each row. Returns all rows if no single row produces non-finite
    values, or if there is not enough memory.
    """
    rows, names = rows_of(setup, accumulated), setup.layout.names
    if bad := names(~mx.isfinite(at.vector)):
        return list(rows.values()), f"the factor {bad[0]}"
    for i, source in rows.items():
        try:
            tensor = _first_bad(setup, at, one_row(setup.train, i))
        except RuntimeError:
            break
        if tensor is not None:
            return [source], tensor
    bad = names(~mx.isfinite(gradient))
    return list(rows.values()), f"the gradient of {bad[0]}" if bad else None


def together(found: Sequence[tuple[list[str], str | None]]) -> tuple[list[str], str | None]:
    """Combines the results of several ranks. If a rank has found a row and a tensor in a forward
    pass, returns them. Otherwise, returns the rows of all ranks and the tensor of rank 0."""
    for rows, tensor in found:
        if tensor is not None and not tensor.startswith(("the factor", "the gradient")):
            return rows, tensor
    return [row for rows, _ in found for row in rows], found[0][1]


def _first_bad(setup: Setup, at: Iterate, batch: AnyBatch) -> str | None:
    """Returns the name of the first stage output that is not finite (the loss is the last one), or
    None if all are finite."""
    found: list[str] = []

    def watched(stage: Stage) -> Stage:
        def fn(*args: Any, **kwargs: Any) -> Any:
            out = stage.fn(*args, **kwargs)
            outs = out if isinstance(out, tuple | list) else (out,)
            for name, x in zip(stage.writes, outs, strict=False):
                if not mx.isfinite(x).all():
                    found.append(f"{name} after {stage.name}")
            return out

        return replace(stage, fn=fn)

    stages_of = setup.chain.stages_of
    chain = replace(setup.chain, stages_of=lambda updates: [watched(s) for s in stages_of(updates)])
    params = setup.layout.split(at.vector)
    what = (setup.objective, chain, setup.scales, params)
    loss, *_ = value(*what, batch, total_of(*what, [batch]))
    sound = math.isfinite(float(loss))
    if found:
        return found[0]
    return None if sound else "the loss"
