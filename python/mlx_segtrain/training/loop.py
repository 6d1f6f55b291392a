"""The training loop: batches in, an adapter out. Read `train` from top to bottom."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import mlx.core as mx

from .. import events
from ..adapters import write_adapter
from ..config import TrainConfig
from ..data import Batch, Dataset, batches
from ..files import write_json
from ..lora import Adapter
from ..objectives import sft
from ..schedule import Grads
from .evaluation import mean_loss
from .memory import Memory, process_peak
from .optimizer import Optimizer
from .setup import RunPlan, Setup, check_output, prepare, value_and_grad, with_params


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. Losses in nats per token.

    In 10⁹ bytes: peak_gb of MLX's active memory, planned_gb what was predicted for it (None: a
    family that the planner does not know), process_gb of the process' main memory.
    """

    adapter_path: Path
    steps: int
    final_train_loss: float | None
    first_val_loss: float | None
    final_val_loss: float | None
    best_val_loss: float | None
    best_step: int | None
    wall_s: float
    tokens_per_sec: float
    peak_gb: float
    planned_gb: float | None
    process_gb: float
    applied_ranks: dict[str, int]
    interrupted: bool
    stopped_early: bool


@dataclass(frozen=True)
class ProbeResult:
    """Two steps on the longest rows. resting_gb: the loaded model alone."""

    step_s: float
    first_step_s: float
    peak_gb: float
    planned_gb: float | None
    resting_gb: float
    loss: float
    grad_norm: float
    finite: bool
    tokens: int


@dataclass
class State:
    """What changes during a run; the factors and `step` change together, at the end of a step."""

    vector: mx.array
    memory: Memory
    step: int = 0
    losses: list[float] = field(default_factory=list)
    vals: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    train_s: float = 0.0

    @property
    def best(self) -> dict[str, float] | None:
        """Step and loss of the evaluation with the lowest loss, the first if several have it."""
        return min(self.vals, key=lambda v: v["loss"], default=None)

    @property
    def since_best(self) -> int:
        """Evaluations behind that one."""
        best = self.best
        return 0 if best is None else len(self.vals) - 1 - self.vals.index(best)


def train(config: TrainConfig, on_event: events.OnEvent | None = None) -> TrainResult:
    """Trains an adapter and writes it to `config.adapter_path`.

    `on_event` receives the run's events (mlx_segtrain.events) as they happen; metrics.jsonl gets
    the same. Ctrl-C ends the run after saving the last finished step (`interrupted`).
    InputError, before anything is written, for input that cannot be used; FloatingPointError if
    loss or gradient is not finite, after saving the last good step.
    """
    tell = on_event or (lambda event: None)
    tell(events.started())
    try:
        check_output(config)
        setup, vector = prepare(config, tell)
        state = State(vector, Memory())
        del vector  # or the factors that the run began with would stay to its end
        source = batches(setup.train, config.batch_size, config.seed)
        with setup.plan.limits(), _metrics_file(config) as metrics:

            def record(event: events.Event) -> None:
                metrics.write(json.dumps(event, ensure_ascii=False) + "\n")
                metrics.flush()
                tell(event)

            result = _run(config, setup, state, source, record)
            record(events.done(config.adapter_path))
        return result
    except BaseException as error:
        tell(events.failed(error))
        raise


def _run(
    config: TrainConfig,
    setup: Setup,
    state: State,
    source: Iterator[Batch],
    tell: events.OnEvent,
) -> TrainResult:
    step = Stepper(config, setup)
    plan = setup.plan
    tell(events.stage("train", 0.05, f"{config.iters} steps on {len(setup.train.rows)} rows"))
    begin = time.perf_counter()
    interrupted = stopped_early = False
    try:
        _evaluate(config, setup, state, tell)
        while state.step < config.iters:
            started = time.perf_counter()
            accumulated = list(islice(source, config.grad_accumulation_steps))
            rate = step.optimizer.rate
            vector, loss, norm = step(state.vector, accumulated)
            state.vector, state.step = vector, state.step + 1
            seconds = time.perf_counter() - started
            cheaper = plan.tightened(state.memory.measure(state.step))
            if cheaper is not None:
                plan = cheaper
                step.follow(plan)
                plan.set_limits()
                progress = events.run_progress(state.step, config.iters)
                tell(events.stage("setup", progress, f"over the budget, from now on {plan}"))
            tokens = _count(setup.train, accumulated)
            _report(config, state, tell, loss, norm, rate, tokens, seconds)
            last = state.step == config.iters
            if last or state.step % config.steps_per_eval == 0:
                _evaluate(config, setup, state, tell)
                if 0 < config.early_stopping_patience <= state.since_best and not last:
                    stopped_early = True
                    break
    except KeyboardInterrupt:
        interrupted = True
    except FloatingPointError:
        _save(config, setup, state, tell)
        raise
    _save(config, setup, state, tell)

    best = state.best
    result = TrainResult(
        adapter_path=config.adapter_path,
        steps=state.step,
        final_train_loss=state.losses[-1] if state.losses else None,
        first_val_loss=state.vals[0]["loss"] if state.vals else None,
        final_val_loss=state.vals[-1]["loss"] if state.vals else None,
        best_val_loss=best["loss"] if best else None,
        best_step=int(best["step"]) if best else None,
        wall_s=time.perf_counter() - begin,
        tokens_per_sec=state.tokens / state.train_s if state.train_s else 0.0,
        peak_gb=state.memory.peak / 1e9,
        planned_gb=setup.plan.planned.peak / 1e9 if setup.plan.planned else None,
        process_gb=process_peak() / 1e9,
        applied_ranks=_adapter(setup, state).ranks,
        interrupted=interrupted,
        stopped_early=stopped_early,
    )
    if config.save_checkpoints:
        _write_metrics(config, state, result)
    more = {"adapter_path": str(config.adapter_path), "applied_ranks": result.applied_ranks}
    tell(events.stage("done", 1.0, f"{state.step} steps", **more))
    return result


class Stepper:
    """One optimizer step over the micro-batches that are accumulated for it."""

    def __init__(self, config: TrainConfig, setup: Setup, watch: Callable[[], None] | None = None):
        self.config, self.setup, self.watch = config, setup, watch
        self.follow(setup.plan)
        self.optimizer = Optimizer(config, setup.layout)

    def follow(self, plan: RunPlan) -> None:
        """Takes the next steps by this plan."""
        self.value_and_grad = value_and_grad(self.setup, plan, self.watch)

    def __call__(self, vector: mx.array, accumulated: list[Batch]) -> tuple[mx.array, float, float]:
        """The new factors, the loss of a token, and the gradient's norm before clipping."""
        loss, gradient = self.gradient(vector, accumulated)
        norm = math.sqrt(float(mx.square(gradient).sum()))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bad = self.setup.layout.names(~mx.isfinite(gradient))
            rows = sorted({int(i) for batch in accumulated for i in batch.rows})
            raise FloatingPointError(
                f"loss is {loss} and gradient norm {norm} on training rows {rows}"
                f"{' (first in ' + bad[0] + ')' if bad else ''}: lower learning_rate or scale; "
                "the adapter of the last good step is saved."
            )
        limit = self.config.grad_clip_norm
        if 0 < limit < norm:
            gradient = gradient * (limit / norm)
        return self.optimizer(gradient, vector), loss, norm

    def gradient(self, vector: mx.array, accumulated: list[Batch]) -> tuple[float, mx.array]:
        """Loss and gradient of the mean token over all micro-batches."""
        total = float(sum(batch.weights.sum() for batch in accumulated))
        params = self.setup.layout.split(vector)
        loss, gradient = self._part(params, accumulated[0], total)
        for batch in accumulated[1:]:
            part, own = self._part(params, batch, total)
            loss, gradient = loss + part, gradient + own
            mx.eval(gradient)
        return loss, gradient

    def _part(self, params: Grads, batch: Batch, total: float) -> tuple[float, mx.array]:
        values = sft.values(self.setup.chain, batch, total)
        (loss,), grads = self.value_and_grad(params, values)
        gradient = self.setup.layout.join(grads)
        mx.eval(gradient)
        return float(loss), gradient


def _count(data: Dataset, accumulated: list[Batch]) -> int:
    """Tokens that are no padding."""
    return sum(len(data.rows[i].ids) for batch in accumulated for i in batch.rows)


def _report(
    config: TrainConfig,
    state: State,
    tell: events.OnEvent,
    loss: float,
    norm: float,
    rate: float,
    tokens: int,
    seconds: float,
) -> None:
    state.losses.append(loss)
    state.tokens += tokens
    state.train_s += seconds
    if state.step != 1 and state.step % config.steps_per_report and state.step != config.iters:
        return
    since = state.step % config.steps_per_report or min(config.steps_per_report, state.step)
    tell(
        events.train_metric(
            state.step,
            config.iters,
            loss=sum(state.losses[-since:]) / since,
            grad_norm=norm,
            learning_rate=rate,
            tokens_per_sec=tokens / seconds,
            step_s=seconds,
            peak_gb=state.memory.peak / 1e9,
            active_gb=mx.get_active_memory() / 1e9,
        )
    )


def _adapter(setup: Setup, state: State) -> Adapter:
    """As of the last finished step."""
    return with_params(setup.scales, setup.layout.split(state.vector))


def _evaluate(config: TrainConfig, setup: Setup, state: State, tell: events.OnEvent) -> None:
    """Validation loss, where there is a validation set, and a checkpoint if the user keeps them."""
    loss = None
    if setup.valid is not None:
        state.memory.measure()
        params = setup.layout.split(state.vector)
        loss = mean_loss(setup.chain, setup.stages, params, setup.valid, config.batch_size)
        state.vals.append({"step": state.step, "loss": loss})
        tokens = setup.valid.supervised_tokens
        tell(events.val_metric(state.step, config.iters, loss=loss, tokens=tokens))
        state.memory.measure()  # an evaluation's memory is not the next step's
    if config.keep_best and state.step > 0 and state.since_best == 0:
        write_adapter(config.adapter_path / "best", _adapter(setup, state), config)
    if config.save_checkpoints and state.step > 0:
        name = f"step-{state.step:05d}" + (f"-val{loss:.4f}" if loss is not None else "")
        progress = events.run_progress(state.step, config.iters)
        tell(events.stage("checkpoint", progress, name))
        folder = config.adapter_path / "checkpoints" / name
        write_adapter(folder, _adapter(setup, state), config)


def _save(config: TrainConfig, setup: Setup, state: State, tell: events.OnEvent) -> None:
    """The adapter as of the last finished step; an untouched one is not worth a file."""
    if state.step == 0:
        return
    progress = events.run_progress(state.step, config.iters)
    tell(events.stage("checkpoint", progress, f"saving {config.adapter_path}"))
    write_adapter(config.adapter_path, _adapter(setup, state), config)


def _metrics_file(config: TrainConfig) -> IO[str]:
    """metrics.jsonl of the new run, after what an overwritten one left behind is gone."""
    path = config.adapter_path
    path.mkdir(parents=True, exist_ok=True)
    for folder in ("checkpoints", "best"):
        shutil.rmtree(path / folder, ignore_errors=True)
    (path / "metrics.json").unlink(missing_ok=True)
    metrics = open(path / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115
    meta = {"type": "meta", "ts": events.now(), "config": json.loads(config.model_dump_json())}
    metrics.write(json.dumps(meta, ensure_ascii=False) + "\n")
    metrics.flush()
    return metrics


def _write_metrics(config: TrainConfig, state: State, result: TrainResult) -> None:
    summary: dict[str, Any] = {**asdict(result), "adapter_path": str(result.adapter_path)}
    write_json(
        config.adapter_path / "metrics.json",
        {"config": json.loads(config.model_dump_json()), **summary, "val_losses": state.vals},
    )


def probe(config: TrainConfig, on_event: events.OnEvent | None = None) -> ProbeResult:
    """Two steps on the longest rows of the data: memory, time, and whether numbers stay finite.

    Writes nothing. InputError for input that cannot be used.
    """
    setup, vector = prepare(config, on_event or (lambda event: None))
    state = State(vector, Memory())
    del vector
    with setup.plan.limits():
        return _probe(config, setup, state)


def _probe(config: TrainConfig, setup: Setup, state: State) -> ProbeResult:
    longest = sorted(setup.train.rows, key=lambda row: -len(row.ids))
    rows = longest[: config.batch_size * config.grad_accumulation_steps]
    setup = replace(setup, train=replace(setup.train, rows=rows))
    source: Iterator[Batch] = batches(setup.train, config.batch_size, config.seed)
    step = Stepper(config, setup)
    resting = mx.get_active_memory()
    mx.reset_peak_memory()
    times, loss, norm, tokens, finite = [], math.nan, math.nan, 0, True
    for _ in range(2):
        accumulated = list(islice(source, config.grad_accumulation_steps))
        started = time.perf_counter()
        try:
            state.vector, loss, norm = step(state.vector, accumulated)
        except FloatingPointError:
            finite = False
        times.append(time.perf_counter() - started)
        tokens = _count(setup.train, accumulated)
    return ProbeResult(
        step_s=times[1],
        first_step_s=times[0],
        peak_gb=mx.get_peak_memory() / 1e9,
        planned_gb=setup.plan.planned.peak / 1e9 if setup.plan.planned else None,
        resting_gb=resting / 1e9,
        loss=loss,
        grad_norm=norm,
        finite=finite,
        tokens=tokens,
    )
