"""Why a step must not be taken: which row, and where numbers first stopped being finite."""

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
    """What the report of a step that was not taken holds: `step` from 1, rows as "file:line".

    `tensor` is the first that is not finite: a factor of the adapter, what a layer gives, or the
    gradient of a factor. `losses` are those before a spike.
    """

    kind: str  #: nonfinite or spike
    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    rows: list[str]
    tensor: str | None
    losses: list[float]

    @property
    def place(self) -> str:
        """Rows and tensor in words."""
        more = f" and {len(self.rows) - 3} more" if len(self.rows) > 3 else ""
        where = f" (first in {self.tensor})" if self.tensor else ""
        return f"on {', '.join(self.rows[:3])}{more}{where}"


def rows_of(setup: Setup, accumulated: Sequence[AnyBatch]) -> dict[int, str]:
    """The rows of these batches by their index, as "file:line"."""
    indices = sorted({int(i) for batch in accumulated for i in batch.rows})
    return {i: setup.train.rows[i].source for i in indices}


def first_nonfinite(
    setup: Setup, at: Iterate, accumulated: Sequence[AnyBatch], gradient: mx.array
) -> tuple[list[str], str | None]:
    """The row, and the tensor, where numbers stop being finite.

    Runs each row alone, forward, until one is not finite. It is all rows if none is, or there is no
    memory to look.
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
    """What several ranks found in their shares of a step: what one of them saw going through a row,
    or all rows if none did."""
    for rows, tensor in found:
        if tensor is not None and not tensor.startswith(("the factor", "the gradient")):
            return rows, tensor
    return [row for rows, _ in found for row in rows], found[0][1]


def _first_bad(setup: Setup, at: Iterate, batch: AnyBatch) -> str | None:
    """What a layer or the head gives that is not finite, by name."""
    found: list[str] = []

    def watched(stage: Stage) -> Stage:
        def fn(*args: Any, **kwargs: Any) -> Any:
            out = stage.fn(*args, **kwargs)
            outs = out if isinstance(out, tuple | list) else (out,)
            for name, x in zip(stage.writes, outs, strict=False):
                if not mx.isfinite(x).all():
                    found.append(f"{name} behind {stage.name}")
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
