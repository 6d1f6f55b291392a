"""The training loop: batches in, an adapter out. Read `train` from top to bottom."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import mlx.core as mx

from .. import events
from ..adapters import write_adapter
from ..config import TrainConfig
from ..data import AnyBatch, Dataset, batches
from ..files import write_json
from ..lora import Adapter, attached
from ..models.chain import Dropout
from ..objectives import value_and_grad
from ..schedule import Grads
from .evaluation import measure
from .judging import Score, command_score, numbers, sample
from .memory import Memory, process_peak
from .optimizer import Optimizer
from .setup import Setup, check_output, claim, prepare, with_params


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. Losses in nats per token, of preference methods per pair.

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
    first_val_accuracy: float | None
    final_val_accuracy: float | None
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


@dataclass(frozen=True)
class Outcome:
    """Of a step: loss, gradient norm before clipping, and what else the objective measures."""

    loss: float
    norm: float
    metrics: dict[str, float]


@dataclass
class State:
    """What changes during a run; the factors and `step` change together, at the end of a step."""

    vector: mx.array
    memory: Memory
    step: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
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


def train(
    config: TrainConfig,
    on_event: events.OnEvent | None = None,
    *,
    score: Score | None = None,
) -> TrainResult:
    """Trains an adapter and writes it to `config.adapter_path`.

    `on_event` receives the run's events (mlx_segtrain.events) as they happen; metrics.jsonl gets
    the same. `score(model, tokenizer)` is asked at every evaluation, of mlx-lm's model with the
    adapter attached, for a number or a dict of numbers. Ctrl-C ends the run after saving the last
    finished step (`interrupted`). InputError, before anything is written, for input that cannot be
    used; FloatingPointError if loss or gradient is not finite, after saving the last good step.
    """
    tell = on_event or (lambda event: None)
    tell(events.started())
    try:
        check_output(config)
        setup, vector = prepare(config, tell)
        config = setup.config
        state = State(vector, Memory())
        del vector  # or the factors that the run began with would stay to its end
        source = batches(setup.train, config.batch_size, config.seed)
        with setup.plan.limits(), _metrics_file(config) as metrics:

            def record(event: events.Event) -> None:
                metrics.write(json.dumps(event, ensure_ascii=False) + "\n")
                metrics.flush()
                tell(event)

            result = _run(config, setup, state, source, record, score)
            record(events.done(config.adapter_path))
        return result
    except BaseException as error:
        tell(events.failed(error))
        raise


def _run(
    config: TrainConfig,
    setup: Setup,
    state: State,
    source: Iterator[AnyBatch],
    tell: events.OnEvent,
    score: Score | None,
) -> TrainResult:
    step = Stepper(config, setup)
    plan = setup.plan
    what = f"{config.iters} steps on {len(setup.train.rows)} rows"
    tell(events.stage("train", 0.05, what, iters=config.iters))
    begin = time.perf_counter()
    interrupted = stopped_early = False
    try:
        _evaluate(config, setup, state, tell, score)
        while state.step < config.iters:
            started = time.perf_counter()
            accumulated = list(islice(source, config.grad_accumulation_steps))
            rate = step.optimizer.rate
            vector, outcome = step(state.vector, accumulated)
            state.vector, state.step = vector, state.step + 1
            state.outcomes.append(outcome)
            seconds = time.perf_counter() - started
            cheaper = plan.tightened(state.memory.measure(state.step))
            if cheaper is not None:
                plan = cheaper
                step.plan = plan
                plan.set_limits()
                progress = events.run_progress(state.step, config.iters)
                tell(events.stage("setup", progress, f"over the budget, from now on {plan}"))
            tokens = _count(setup.train, accumulated)
            _report(config, state, tell, rate, tokens, seconds)
            last = state.step == config.iters
            if last or state.step % config.steps_per_eval == 0:
                _evaluate(config, setup, state, tell, score)
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
        final_train_loss=state.outcomes[-1].loss if state.outcomes else None,
        first_val_loss=state.vals[0]["loss"] if state.vals else None,
        final_val_loss=state.vals[-1]["loss"] if state.vals else None,
        best_val_loss=best["loss"] if best else None,
        best_step=int(best["step"]) if best else None,
        first_val_accuracy=state.vals[0].get("accuracy") if state.vals else None,
        final_val_accuracy=state.vals[-1].get("accuracy") if state.vals else None,
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
    """One optimizer step over the micro-batches that are accumulated for it, by a plan."""

    def __init__(self, config: TrainConfig, setup: Setup, watch: Callable[[], None] | None = None):
        self.config, self.setup, self.watch = config, setup, watch
        self.plan = setup.plan
        self.optimizer = Optimizer(config, setup.layout)

    def __call__(self, vector: mx.array, accumulated: list[AnyBatch]) -> tuple[mx.array, Outcome]:
        """The new factors, and how the step was."""
        (loss, *metrics), gradient = self.gradient(vector, accumulated)
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
        named = dict(zip(self.setup.objective.metrics, metrics, strict=True))
        return self.optimizer(gradient, vector), Outcome(loss, norm, named)

    def gradient(
        self, vector: mx.array, accumulated: list[AnyBatch]
    ) -> tuple[list[float], mx.array]:
        """Outputs of the objective and gradient of its loss over all micro-batches."""
        total = self.setup.objective.total(accumulated)
        params = self.setup.layout.split(vector)
        outputs, gradient = self._part(params, accumulated, 0, total)
        for i in range(1, len(accumulated)):
            part, own = self._part(params, accumulated, i, total)
            outputs = [x + y for x, y in zip(outputs, part, strict=True)]
            gradient = gradient + own
            mx.eval(gradient)
        return outputs, gradient

    def _part(
        self, params: Grads, accumulated: list[AnyBatch], i: int, total: Any
    ) -> tuple[list[float], mx.array]:
        """Of the i-th micro-batch."""
        setup, config = self.setup, self.config
        dropout = None
        if config.lora_dropout:
            draw = self.optimizer.step * config.grad_accumulation_steps + i
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


def _count(data: Dataset, accumulated: list[AnyBatch]) -> int:
    """Tokens that are no padding."""
    return sum(len(data.rows[i]) for batch in accumulated for i in batch.rows)


def _report(
    config: TrainConfig,
    state: State,
    tell: events.OnEvent,
    rate: float,
    tokens: int,
    seconds: float,
) -> None:
    state.tokens += tokens
    state.train_s += seconds
    if state.step != 1 and state.step % config.steps_per_report and state.step != config.iters:
        return
    since = state.step % config.steps_per_report or min(config.steps_per_report, state.step)
    recent = state.outcomes[-since:]
    names = recent[-1].metrics
    tell(
        events.train_metric(
            state.step,
            config.iters,
            loss=sum(outcome.loss for outcome in recent) / since,
            metrics={name: sum(o.metrics[name] for o in recent) / since for name in names},
            grad_norm=recent[-1].norm,
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


def _evaluate(
    config: TrainConfig,
    setup: Setup,
    state: State,
    tell: events.OnEvent,
    score: Score | None,
) -> None:
    """What the adapter is like now: validation, answers, scores; and a checkpoint if kept."""
    loss = None
    if setup.valid is not None:
        state.memory.measure()
        params = setup.layout.split(state.vector)
        what = (setup.objective, setup.chain, setup.scales, params, setup.valid, config.batch_size)
        loss, metrics = measure(*what)
        state.vals.append({"step": state.step, "loss": loss, **metrics})
        tokens = setup.valid.supervised_tokens
        tell(events.val_metric(state.step, config.iters, loss=loss, tokens=tokens, metrics=metrics))
    if config.sample_prompts or config.eval_command or score:
        for event in _judged(config, setup, state, score):
            tell(event)
    state.memory.measure()  # an evaluation's memory is not the next step's
    if config.keep_best and state.step > 0 and state.since_best == 0:
        write_adapter(config.adapter_path / "best", _adapter(setup, state), config)
    if config.save_checkpoints and state.step > 0:
        name = f"step-{state.step:05d}" + (f"-val{loss:.4f}" if loss is not None else "")
        progress = events.run_progress(state.step, config.iters)
        tell(events.stage("checkpoint", progress, name))
        folder = config.adapter_path / "checkpoints" / name
        write_adapter(folder, _adapter(setup, state), config)


def _judged(
    config: TrainConfig, setup: Setup, state: State, score: Score | None
) -> Iterator[events.Event]:
    """Answers of the adapter as it is now, and what the command and the callable say of it."""
    adapter = _adapter(setup, state)
    with attached(setup.model, setup.chain, adapter) as model:
        for prompt in config.sample_prompts:
            text = sample(model, setup.tokenizer, prompt, config.sample_tokens)
            yield events.sample(state.step, prompt, text)
        if score:
            yield events.score(state.step, numbers(score(model, setup.tokenizer)))
    if config.eval_command:
        yield events.score(state.step, command_score(config, adapter))


def _save(config: TrainConfig, setup: Setup, state: State, tell: events.OnEvent) -> None:
    """The adapter as of the last finished step; an untouched one is not worth a file."""
    if state.step == 0:
        return
    progress = events.run_progress(state.step, config.iters)
    tell(events.stage("checkpoint", progress, f"saving {config.adapter_path}"))
    write_adapter(config.adapter_path, _adapter(setup, state), config)


@contextmanager
def _metrics_file(config: TrainConfig) -> Iterator[IO[str]]:
    """metrics.jsonl of the new run, after what an overwritten one left behind is gone.

    Its lock, until it is closed, says that the folder is this run's.
    """
    path = config.adapter_path
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        claim(metrics, path)  # once more: another may have begun while this one loaded
        metrics.truncate(0)
        for folder in ("checkpoints", "best"):
            shutil.rmtree(path / folder, ignore_errors=True)
        (path / "metrics.json").unlink(missing_ok=True)
        ours = {"type": "meta", "ts": events.now(), "pid": os.getpid()}
        meta = {**ours, "config": json.loads(config.model_dump_json())}
        metrics.write(json.dumps(meta, ensure_ascii=False) + "\n")
        metrics.flush()
        yield metrics


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
    config = setup.config
    longest: list[Any] = sorted(setup.train.rows, key=lambda row: -len(row))
    rows = longest[: config.batch_size * config.grad_accumulation_steps]
    setup = replace(setup, train=replace(setup.train, rows=rows))
    source = batches(setup.train, config.batch_size, config.seed)
    step = Stepper(config, setup)
    resting = mx.get_active_memory()
    mx.reset_peak_memory()
    times, loss, norm, tokens, finite = [], math.nan, math.nan, 0, True
    for _ in range(2):
        accumulated = list(islice(source, config.grad_accumulation_steps))
        started = time.perf_counter()
        try:
            state.vector, outcome = step(state.vector, accumulated)
            loss, norm = outcome.loss, outcome.norm
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
