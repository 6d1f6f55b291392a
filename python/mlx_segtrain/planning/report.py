"""The report of `mlx-segtrain plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..config import ROWS, TrainConfig
from ..streams import BatchShape
from .rollouts import full_rollouts
from .run import RunPlan, plan_run
from .scaling import Scaled
from .splitting import Held, held, pipeline_runs


@dataclass(frozen=True)
class Alternative:
    """The plan for another budget. Sizes are in bytes. `slower` is the relative increase in work,
    compared with the chosen plan."""

    budget: int
    fits: bool
    plan: str
    peak: int
    slower: float
    longest: int


@dataclass(frozen=True)
class PlanReport:
    """The plan of a run. Memory is in bytes, and lengths are in tokens.

    `tokens` is the length of the rows in the planned batch, including the last token, which is a
    target but not an input. `longest` is the length of the longest row that fits, up to
    `max_length`, the context length of the model. `recomputed` is the ratio of recomputed to
    necessary work. If `predicted` is False, the planner does not know the model family, and the
    report contains only the weights and the budget. With a method that generates completions,
    `rollout_batch` completions are generated at a time, with a peak memory of `rollout_peak` bytes.
    `ranks` contains predictions for data parallelism. If `pipeline` is not empty, the other fields
    describe the rank whose peak memory is closest to its budget.
    """

    family: str
    predicted: bool
    rows: int
    tokens: int
    trained_tokens: int
    budget: int
    weights: int
    plan: str
    peak: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    recomputed: float = 0.0
    longest: int = 0
    max_length: int | None = None
    alternatives: list[Alternative] = field(default_factory=list)
    moves: list[tuple[str, int]] = field(default_factory=list)
    ranks: list[Scaled] = field(default_factory=list)
    pipeline: list[Held] = field(default_factory=list)
    rollout_batch: int | None = None
    rollout_peak: int | None = None


def planned_report(
    config: TrainConfig, batch: BatchShape, ranks: int = 1, budgets: Sequence[float] = ()
) -> tuple[PlanReport, RunPlan]:
    """Plans a run whose largest batch has this shape, on `ranks` ranks, and returns the report and
    the plan that it describes. For a pipeline, `budgets` contains the memory budget of each rank,
    in 10⁹ bytes; if it is empty, each rank has the budget of this machine's device. Raises NoRoom
    if the run does not fit into memory, and InputError if the model does not support it."""
    if config.parallel == "pipeline" and ranks > 1:
        runs = pipeline_runs(config, batch, ranks, budgets)
        run = max(runs, key=lambda run: run.planned.peak / run.budget if run.planned else 0)
        return replace(of(run), pipeline=held(runs)), run
    run = plan_run(config, batch)
    found = of(run)
    if ROWS[config.method] == "prompt":
        at_once, peak = full_rollouts(config, ranks)
        found = replace(found, rollout_batch=at_once, rollout_peak=peak)
    return found, run


def of(run: RunPlan) -> PlanReport:
    batch, chosen = run.batch, run.planned
    plain = PlanReport(
        family=run.shape.family,
        predicted=False,
        rows=batch.rows,
        tokens=batch.length + 1,
        trained_tokens=batch.loss,
        budget=run.budget,
        weights=run.shape.weight_bytes(not run.device.gpu),
        plan=str(run),
        max_length=run.shape.max_length,
    )
    if chosen is None:
        return plain

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

    return replace(
        plain,
        predicted=True,
        plan=chosen.text,
        peak=chosen.peak,
        parts=chosen.parts,
        recomputed=chosen.recomputed,
        longest=run.longest(),
        alternatives=[other(run.budget // 2), other(run.budget * 2)],
        moves=list(zip(chosen.lines, chosen.moves, strict=True)),
    )
