"""What `mlx-segtrain plan` says of a run."""

from __future__ import annotations

from dataclasses import dataclass

from .run import RunPlan


@dataclass(frozen=True)
class Alternative:
    """What another budget would change. Bytes; `slower`: its work over this plan's, less one."""

    budget: int
    fits: bool
    plan: str
    peak: int
    slower: float
    longest: int


@dataclass(frozen=True)
class PlanReport:
    """The plan of a run and its surroundings. Bytes and tokens.

    `longest` is what fits, `max_length` what the model was made for; `recomputed` is what runs
    again over what must run. `predicted` is False for families whose memory the planner does not
    know: of these only weights and budget are said.
    """

    family: str
    predicted: bool
    rows: int
    tokens: int
    trained_tokens: int
    budget: int
    weights: int
    plan: str
    peak: int
    parts: dict[str, int]
    recomputed: float
    longest: int
    max_length: int | None
    alternatives: list[Alternative]
    moves: list[tuple[str, int]]


def of(run: RunPlan) -> PlanReport:
    batch, chosen = run.batch, run.planned
    common = {
        **{"family": run.shape.family, "rows": batch.rows, "tokens": batch.length},
        **{"trained_tokens": batch.loss, "budget": run.budget},
        "weights": run.shape.weight_bytes(not run.device.gpu),
        "max_length": run.shape.max_length,
    }
    if chosen is None:
        nothing = {"peak": 0, "parts": {}, "recomputed": 0.0, "longest": 0}
        return PlanReport(
            **common, **nothing, predicted=False, plan=str(run), alternatives=[], moves=[]
        )

    def other(budget: int) -> Alternative:
        plan = run.within(budget).planned
        assert plan is not None
        fits = plan.peak <= budget
        return Alternative(
            budget=budget,
            fits=fits,
            plan=plan.text,
            peak=plan.peak,
            slower=plan.work / chosen.work - 1,
            longest=run.longest(budget),
        )

    return PlanReport(
        **common,
        predicted=True,
        plan=chosen.text,
        peak=chosen.peak,
        parts=chosen.parts,
        recomputed=chosen.recomputed,
        longest=run.longest(),
        alternatives=[other(run.budget // 2), other(run.budget * 2)],
        moves=list(zip(chosen.lines, chosen.moves, strict=True)),
    )
