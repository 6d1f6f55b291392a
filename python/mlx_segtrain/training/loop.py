"""The training loop: `train` sets up a run, and `Run` performs its training steps."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import _core, events
from ..config import TrainConfig
from ..data import AnyBatch, Prompting, batches
from ..data.repository import pinned
from ..data.sources import sources_of
from ..errors import InputError, NoMemory, RunError, is_out_of_memory
from ..hub import located
from ..models.adapting import attached
from ..planning.run import RunPlan, short_buffers
from ..rewards import Function
from .checkpoint import shared
from .clock import Clock
from .collapse import collapsed
from .contents import evaluated_name
from .cycle import Cycle, rewards_of
from .interrupts import Interrupts
from .judging import Score, command_score, numbers
from .keeping import Bystander, Keeper
from .log import NoLog, RunLog
from .memory import Memory, process_peak
from .pace import Pace, Work, due
from .pipelined import Pipelined
from .policy import run_policy
from .ranks import LostRank, Ranks, check_ranks, joined, launched
from .record import Record, check_same
from .results import TrainResult
from .setup import Setup, Start, accumulating, check_output, plan_event, prepare, read_inputs
from .spikes import MOST_SKIPPED, WINDOW
from .state import Iterate, Outcome, Progress, State
from .step import Halted, Stepper
from .trackers import check_installed, tracked

#: A function that receives metrics. If it returns True, the run ends.
Callback = Callable[[events.Event], Any]
T = TypeVar("T")


def train(
    config: TrainConfig,
    on_event: events.OnEvent | None = None,
    *,
    train_data: Any = None,
    valid_data: Any = None,
    score: Score | None = None,
    on_step: Callback | None = None,
    on_eval: Callback | None = None,
    model: nn.Module | None = None,
    rewards: Sequence[Function] = (),
    environment: Callable[[], Any] | None = None,
) -> TrainResult:
    """Trains an adapter and writes it to `config.adapter_path`.

    `train_data` contains the training rows if they do not come from `config.data_dir`: a list or an
    iterator of dicts, a `datasets.Dataset` or `DatasetDict`, an Arrow table, or a path.
    `valid_data` contains the validation rows in any of these forms. `on_event` receives the run's
    events (mlx_segtrain.events) as they happen; the events are also written to metrics.jsonl.
    `score(model, tokenizer)` is called at every evaluation with the mlx-lm model, to which the
    adapter is attached; it must return a number or a dict of numbers. `rewards` are functions that
    score the completions of method grpo (docs/grpo.md), in addition to the configured rewards;
    `environment` is a class that replaces the configured environment. `on_step` receives the
    metrics of every training step, and `on_eval` the metrics of every evaluation; if one of them
    returns True, the run saves its state and ends (`stopped_early`). A caller that has already
    loaded the model of `config.model_dir` can pass it as `model`; the model must not have an
    adapter. After Ctrl-C, SIGTERM or SIGHUP, the run saves its last finished step and ends
    (`interrupted`). Raises InputError, before anything is written, if an input cannot be used.
    Raises RunError, after saving the last good step, if the run cannot continue.
    """
    tell = on_event or (lambda event: None)
    if launched():
        tell = warnings_only(tell)
    tell(events.started())
    if sys.platform == "darwin":
        short_buffers(config.max_seq_length)
    try:
        with joined(tell) as ranks, run_policy(config):
            if train_data is not None and config.data_dir is not None:
                raise InputError("data_dir and train_data are both given: leave one of them out.")
            data = config.data_dir if train_data is None else train_data
            calls = Calls(tell, score, on_step, on_eval, rewards, environment)
            return _train(config, data, valid_data, calls, model, ranks)
    except BaseException as error:
        tell(events.failed(error))
        raise


def _train(
    config: TrainConfig,
    data: Any,
    valid_data: Any,
    calls: Calls,
    model: nn.Module | None,
    ranks: Ranks,
) -> TrainResult:
    tell = calls.on_event

    def warn(message: str) -> None:
        tell(events.warning(message))

    trackers = config if ranks.first else config.model_copy(update={"report_to": []})
    check_installed(trackers)
    scoring = rewards_of(config, calls.rewards, calls.environment)
    ranks.pipeline = ranks.size > 1 and config.parallel == "pipeline"
    check_ranks(config, ranks, calls.score is not None)
    start = check_output(config, warn) if ranks.first else Start(None, None)
    resumed, same = shared(start.resumed, ranks), True
    config = accumulating(config, ranks, resumed, tell)
    earlier = resumed.record["folders"] if resumed else {}
    sources = sources_of(pinned(data, earlier.get("data")), valid_data, tell)
    config = located(config, tell, earlier)
    inputs = read_inputs(config, sources, tell, resumed, scoring, ranks)
    config = inputs.config
    made_of = Record(config, sources, resumed.record if resumed else None, ranks)
    if resumed is not None:
        same = check_same(made_of, resumed.record, warn)
        if resumed.step > config.iters:
            raise InputError(
                f"iters = {config.iters}, but the run in {config.adapter_path} has already "
                f"finished step {resumed.step}: raise iters to at least this step, or start a new "
                "run."
            )
    setup, vector = prepare(inputs, tell, resumed, model, ranks)
    kind = Pipelined if setup.pipe else Stepper
    how: Any = {"ranks": ranks}
    step = Cycle(setup, rewards=scoring, **how) if scoring else kind(setup, **how)
    at, progress, resumed_from = step.optimizer.start(vector), Progress(), None
    if resumed is not None:
        at = step.holding.apart(resumed.iterate(step.holding.fresh()))
        progress, resumed_from = resumed.progress, resumed.step
        made_of.resume(resumed_from)
    state = State(at, progress, Memory(progress.peak))
    first = state.step * config.grad_accumulation_steps
    source = batches(setup.train, config.batch_size, config.seed, first)
    log: Any = RunLog(config.adapter_path, warn) if ranks.first else NoLog()
    with closing(log), setup.plan.limits():
        keeper = (Keeper if ranks.first else Bystander)(setup, log, made_of, warn)
        keeper.open(state, start, same)
        step.compile(at, batches(setup.train, config.batch_size, config.seed, first))
        # Frees the initial values, which are no longer needed.
        del at, vector, inputs, resumed, start
        tracking = tracked(trackers, made_of.values["id"], warn)
        with tracking as track, Interrupts(ranks) as interrupts:

            def record(event: events.Event) -> None:
                log.write(event)
                track(event)
                tell(event)

            keeper.warn = lambda message: record(events.warning(message))
            run = Run(config, setup, step, state, keeper, record, interrupts, calls, ranks)
            try:
                result = run(source, resumed_from)
                record(events.done(config.adapter_path))
            except BaseException as error:
                log.write(events.failed(error))
                raise
    return result


@dataclass(frozen=True)
class Calls:
    """The callbacks of a run; see `train`."""

    on_event: events.OnEvent
    score: Score | None = None
    on_step: Callback | None = None
    on_eval: Callback | None = None
    rewards: Sequence[Function] = ()
    environment: Callable[[], Any] | None = None


def warnings_only(tell: events.OnEvent) -> events.OnEvent:
    """Returns a callback that forwards only warnings to `tell`, for use on ranks other than 0."""

    def some(event: events.Event) -> None:
        if event["type"] == "warning":
            tell(events.warning(f"rank {launched()}: {event['message']}"))

    return some


@dataclass
class Run:
    """A run whose model is loaded and whose folder is locked. Signals may end it while it is
    computing (`interrupts.allowed`), but not while it is changing its state or writing."""

    config: TrainConfig
    setup: Setup
    step: Stepper
    state: State
    keeper: Keeper
    tell: events.OnEvent
    interrupts: Interrupts
    calls: Calls
    ranks: Ranks

    def __post_init__(self) -> None:
        self.pace, self.work = Pace(), Work()
        # The first value is whether a callback on this rank has asked to stop the run. The second
        # is whether a callback on any rank has done so; all ranks learn this when they next sum
        # their results.
        self.wants_to_stop = self.asked_to_stop = False

    def __call__(self, source: Iterator[AnyBatch], resumed_from: int | None) -> TrainResult:
        config, state = self.config, self.state
        what = f"{config.iters} steps on {len(self.setup.train)} rows"
        if resumed_from is not None:
            what += f", resumed after step {resumed_from}"
        self.tell(events.stage("train", self._share, what, iters=config.iters, step=state.step))
        self.looked, self.clock = time.perf_counter(), Clock()
        self.saved, self.owed = state.step, False  # step of the last checkpoint; whether one is due
        self.ending = 0.0  # number of ranks that have received a signal to end
        interrupted = stopped_early = False
        try:
            # Due reports, evaluations and checkpoints are handled before the next step rather than
            # right after the step itself, so that a resumed run makes up for any that are missing.
            while True:
                self._report_if_due()
                self._evaluate_if_due()
                stopped_early = state.step < config.iters and (
                    self.asked_to_stop or self._has_stopped_improving() or self._has_collapsed()
                )
                if state.step >= config.iters or stopped_early:
                    break
                self._save_if_due()
                self._take_step(source)
                if self.ending > 0:  # a single rank's signal handler has already raised this
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            interrupted = True
        except Exception as error:
            if isinstance(error, Halted) and error.fault is not None:
                self.keeper.fault(error.fault)
            if self.step.keeps(error):
                self._save()  # safe, because an error never leaves a step half done
            if isinstance(error, LostRank):
                raise self._kept(error) from error
            raise
        self._check_factors()
        self._save()
        result = self._result(resumed_from, interrupted, stopped_early)
        self.keeper.result(result, state.progress.vals)
        more = {"adapter_path": str(config.adapter_path), "applied_ranks": result.applied_ranks}
        share = self._share if interrupted else 1.0
        self.tell(events.stage("done", share, f"{state.step} steps", **more))
        return result

    def _take_step(self, source: Iterator[AnyBatch]) -> None:
        config, state, progress = self.config, self.state, self.state.progress
        self._measure()  # excludes the memory that was used to gather factors
        started, self.ranks.waited = time.perf_counter(), 0.0
        losses = progress.losses if progress.skipped < MOST_SKIPPED else []
        with self.interrupts.allowed():
            accumulated = list(islice(source, config.grad_accumulation_steps))
            at, outcome = self._next(accumulated, losses)
        state.at = at
        if self.step.completions:
            self.keeper.generated(self.step.completions)
            own = [line["reward"] for line in self.step.completions]
            progress.rewards = [*progress.rewards, math.fsum(own) / len(own)]
        progress.last = replace(outcome, seconds=time.perf_counter() - started)
        progress.recent = [*progress.recent, progress.last][-config.steps_per_report :]
        self.pace.add("step", progress.last.seconds)
        if self.ranks.size > 1:
            tokens = self.step.own_tokens(accumulated)
            self.work.add(progress.last.seconds, self.ranks.waited, tokens)
        left_out = outcome.bound is not None and config.on_spike == "skip"
        progress.skipped = progress.skipped + 1 if left_out else 0
        if not left_out:
            progress.losses = [*progress.losses, outcome.loss][-WINDOW:]
        progress.tokens += outcome.tokens
        progress.supervised += outcome.supervised
        progress.train_s += progress.last.seconds
        if outcome.bound is not None:
            done = "skipped" if left_out else "taken"
            spike = f"the loss {outcome.loss:.4f} is a spike, above {outcome.bound:.4f}"
            self._warn(f"step {state.step}: {spike}: the step was {done}")
        cheaper = self.step.plan.tightened(self._measure(state.step))
        if cheaper is not None:
            self._change_plan(cheaper, "over the budget")
        if self.calls.on_step:
            self._ask(self.calls.on_step, self._metric())

    def _measure(self, step: int | None = None) -> int:
        """Returns the peak memory in bytes since the last call. Excludes the generation of
        completions, which is included only in the peak of the whole run."""
        memory = self.state.memory
        memory.peak = max(memory.peak, self.step.rollout_peak)
        return memory.measure(step)

    def _ask(self, callback: Callback, event: events.Event) -> None:
        found = callback(event)
        self.wants_to_stop |= isinstance(found, bool | np.bool_) and bool(found)
        if self.ranks.size == 1:
            self.asked_to_stop = self.wants_to_stop

    def _next(self, accumulated: list[AnyBatch], losses: list[float]) -> tuple[Iterate, Outcome]:
        """Takes the next step. Returns the new state and the outcome of the step."""
        update = partial(self._update, losses=losses)
        return self.step.take(self.state.at, accumulated, update, self._in_memory)

    def _update(
        self, at: Iterate, accumulated: list[AnyBatch], losses: list[float]
    ) -> tuple[Iterate, Outcome]:
        """Performs an optimizer update. Returns the new state and the outcome of the update. The
        ranks sum all results in a single operation, so each rank can retry its work before or after
        this operation."""
        step = self.step
        if self.ranks.size == 1:
            return self._in_memory(lambda: step(at, accumulated, losses))

        baselines = [0.0]
        if self.setup.objective.baseline is not None:
            own = self._in_memory(lambda: step.baseline(at, accumulated))
            baselines = self.ranks.gather(own)
        total = step.total(accumulated, baselines)

        def gradients() -> tuple[Any, mx.array]:
            outputs, gradient = step.gradient(at, accumulated, total)
            mx.eval(outputs, gradient)
            return outputs, gradient

        outputs, gradient = self._in_memory(gradients)
        asked = [float(self.interrupts.asked is not None), float(self.wants_to_stop)]
        found = step.agree([*outputs, *asked], gradient)
        *outputs, self.ending, stop = found.outputs
        self.asked_to_stop = stop > 0
        found = replace(found, outputs=outputs)
        return self._in_memory(lambda: step(at, accumulated, losses, found))

    def _in_memory(self, what: Callable[[], T]) -> T:
        """Runs a part of the step. If the device runs out of memory, retries with plans that need
        less memory. Retrying is safe, because a step does not modify the state until its last part
        is finished. Raises NoMemory if no such plan is left."""
        while True:
            try:
                return what()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    if said := _core.explain_failure(str(error)):
                        raise Halted(f"step {self.state.step + 1}: {said}") from error
                    raise
                # In a pipeline, the part cannot be repeated, because other ranks are waiting for
                # its transfers.
                alone = not self.ranks.pipeline
                cheaper, reason = self.step.plan.cheaper() if alone else None, str(error)
            # The retry is outside the handler, because the exception's traceback keeps arrays of
            # the step alive.
            mx.clear_cache()
            if cheaper is None:
                raise NoMemory(
                    f"step {self.state.step + 1}: the device is out of memory ({reason}), and "
                    "no plan needs less: free memory and resume, or start with a lower "
                    "max_seq_length or batch_size."
                )
            self._change_plan(cheaper, "out of memory in a step")

    def _change_plan(self, plan: RunPlan, reason: str) -> None:
        self.step.plan = plan
        plan.set_limits()
        self.tell(plan_event(plan, self._share, f"{reason}; new {plan}"))

    @property
    def _share(self) -> float:
        return events.run_progress(self.state.step, self.config.iters)

    def _warn(self, message: str) -> None:
        self.tell(events.warning(message))

    def _is_due(self, every: int, first: int) -> bool:
        step = self.state.step
        return step in (first, self.config.iters) or step % every == 0

    def _report_if_due(self) -> None:
        progress, step = self.state.progress, self.state.step
        if step == progress.reported or not self._is_due(self.config.steps_per_report, 1):
            return
        progress.reported = step
        metric = self._metric()
        if self.work.steps:  # true on all ranks or on none
            metric = events.with_ranks(metric, self.ranks.gather(self._own_figures()))
            self.work = Work()
        self.tell(metric)
        if jumped := self.clock.jumped():
            self._warn(
                f"step {step}: the clock jumped by {jumped:+.0f} s, or the machine slept: the "
                "times in the log jump as well, but the run is not affected"
            )

    def _own_figures(self) -> dict[str, float]:
        """Returns this rank's figures for a report: times in seconds, tokens per second, and memory
        in GB."""
        return {
            **self.work.figures(),
            "peak_gb": self.state.memory.peak / 1e9,
            "active_gb": mx.get_active_memory() / 1e9,
        }

    def _metric(self) -> events.Event:
        """Returns the training metrics after the last step."""
        progress, last = self.state.progress, self.state.progress.last
        assert last is not None and progress.loss is not None  # at least one step is finished
        return events.train_metric(
            self.state.step,
            self.config.iters,
            loss=progress.loss,
            metrics=progress.metrics,
            grad_norm=last.norm,
            learning_rate=last.rate,
            tokens_per_sec=last.tokens / last.seconds,
            supervised_tokens_per_sec=last.supervised / last.seconds,
            step_s=last.seconds,
            peak_gb=self.state.memory.peak / 1e9,
            active_gb=mx.get_active_memory() / 1e9,
            left_s=self._left_s(),
        )

    def _left_s(self) -> float:
        config, step, last = self.config, self.state.step, self.config.iters
        evaluations = 0
        if self.setup.valid or self._judges:
            evaluations = due(self.state.progress.evaluated, last, config.steps_per_eval)
        checkpoints = due(self.saved, last, config.steps_per_save)
        return self.pace.left(last - step, evaluations, checkpoints)

    def _evaluate_if_due(self) -> None:
        """If an evaluation is due, computes the validation loss and, depending on the
        configuration, samples answers, computes scores and saves the adapter."""
        config, setup, state, progress = self.config, self.setup, self.state, self.state.progress
        if state.step == progress.evaluated or not self._is_due(config.steps_per_eval, 0):
            return
        found: list[events.Event] = []
        val = None
        with self.interrupts.allowed(), self.pace.timed("evaluation"):
            if setup.valid is not None:
                self._measure()
                loss, metrics = self.step.validate(state.at)
                val = {"step": state.step, "loss": loss, **metrics}
                how: Any = {"tokens": setup.valid.supervised_tokens, "metrics": metrics}
                found.append(events.val_metric(state.step, config.iters, loss=loss, **how))
            if self._judges:
                whole = self._whole(moments=False)
                found += self._judged(whole) if self.ranks.first else ()
        self._measure()  # so that the next step's peak excludes the evaluation
        progress.evaluated = state.step
        progress.vals += [val] if val else []
        for event in found:
            self.tell(event)
            if self.calls.on_eval and event.get("kind") == "val":
                self._ask(self.calls.on_eval, event)
        if state.step == 0:
            return
        if config.keep_best and progress.since_best == 0:
            self.keeper.best(self._whole(moments=False))
            self.owed = True
        if config.save_checkpoints:
            self.owed = True
            name = evaluated_name(state.step, val["loss"] if val else None)
            self.tell(events.stage("checkpoint", self._share, name))
            self.keeper.evaluated(self._whole(moments=False), name)

    @property
    def _judges(self) -> bool:
        """Whether evaluations also sample answers or compute scores."""
        config = self.config
        return bool(config.sample_prompts or config.eval_command or self.calls.score)

    def _judged(self, state: State) -> Iterator[events.Event]:
        """Yields events with the adapter's answers to `sample_prompts`, and with its scores from
        `score` and `eval_command`."""
        from mlx_lm.generate import generate

        config, setup, step = self.config, self.setup, state.step
        adapter = self.keeper.adapter(state)
        with attached(setup.model, setup.chain, adapter) as model:
            prompting = Prompting(config.prompt_format, config.chat_template_kwargs)
            for prompt in config.sample_prompts:
                ids = prompting.ids(setup.tokenizer, prompt)
                text = generate(model, setup.tokenizer, ids, max_tokens=config.sample_tokens)
                yield events.sample(step, prompt, text)
            if score := self.calls.score:
                yield events.score(step, numbers(score(model, setup.tokenizer)))
        if config.eval_command:
            yield events.score(step, command_score(config, adapter))

    def _has_stopped_improving(self) -> bool:
        progress, patience = self.state.progress, self.config.early_stopping_patience
        return progress.evaluated == self.state.step and 0 < patience <= progress.since_best

    def _has_collapsed(self) -> bool:
        found = collapsed(self.state.progress.rewards, self.config.collapse_patience)
        if found is not None:
            self._warn(f"step {self.state.step}: {found}: the run stops here")
        return found is not None

    def _save_if_due(self) -> None:
        """Writes a checkpoint at the configured interval, and after an evaluation that saved an
        adapter."""
        every, step = self.config.steps_per_save, self.state.step
        if step != self.saved and (self.owed or (every and step % every == 0)):
            self.saved, self.owed = step, False
            self._check_factors()
            self._count()
            with self.pace.timed("checkpoint"):
                self.keeper.checkpoint(self._whole())

    def _save(self) -> None:
        """Writes the final state if at least one step is finished."""
        if self.state.step == 0:
            return
        self._count()
        whole = self._whole()
        self.ranks.saving = True
        try:
            self.keeper.last(whole)
        finally:
            self.ranks.saving = False
        self.tell(events.stage("checkpoint", self._share, f"saved {self.config.adapter_path}"))

    def _check_factors(self) -> None:
        """Raises Diverged if the factors differ between the ranks."""
        if self.ranks.size > 1 and not self.ranks.pipeline:
            factors = np.array(self.state.at.vector).tobytes()
            self.ranks.check_factors(self.state.step, hashlib.sha256(factors).hexdigest())

    def _whole(self, moments: bool = True) -> State:
        """Returns the state; on rank 0, it contains the factors of all ranks. All ranks must call
        this method. Unless `moments` is set, the result may lack the optimizer state."""
        return replace(self.state, at=self.step.holding.together(self.state.at, moments))

    def _kept(self, error: LostRank) -> RunError:
        """Returns the error that ends the run when a rank is lost. Its message says which step is
        saved."""
        step, kept = self.state.step, "nothing has been trained yet"
        if step and self.ranks.pipeline:
            kept = "its factors are lost, so the run resumes from the last checkpoint"
        elif step:
            kept = f"the state of step {step} is saved"
            if not self.ranks.first:
                kept = "rank 0 saves its last step if it can"
                if (lost := self.ranks.links and self.ranks.links.lost) and lost.rank == 0:
                    kept = "rank 0 cannot save, so the run resumes from the last checkpoint"
        return LostRank(f"step {step + 1}: {error}: {kept}; start all ranks again with --resume.")

    def _count(self) -> None:
        """Adds the elapsed time to the progress, and updates the peak memory."""
        self.state.progress.peak = self.state.memory.peak
        before, self.looked = self.looked, time.perf_counter()
        self.state.progress.wall_s += self.looked - before

    def _result(
        self, resumed_from: int | None, interrupted: bool, stopped_early: bool
    ) -> TrainResult:
        progress, planned = self.state.progress, self.setup.plan.planned
        best, vals = progress.best, progress.vals
        peaks = (planned and planned.peak, self.setup.rollout_peak)
        self._count()
        return TrainResult(
            adapter_path=self.config.adapter_path,
            steps=self.state.step,
            final_train_loss=progress.loss,
            first_val_loss=vals[0]["loss"] if vals else None,
            final_val_loss=vals[-1]["loss"] if vals else None,
            best_val_loss=best["loss"] if best else None,
            best_step=int(best["step"]) if best else None,
            first_val_accuracy=vals[0].get("accuracy") if vals else None,
            final_val_accuracy=vals[-1].get("accuracy") if vals else None,
            wall_s=progress.wall_s,
            tokens_per_sec=progress.per_s(progress.tokens),
            supervised_tokens_per_sec=progress.per_s(progress.supervised),
            peak_gb=self.state.memory.peak / 1e9,
            planned_gb=max((n for n in peaks if n), default=0) / 1e9 or None,
            process_gb=process_peak() / 1e9,
            applied_ranks=self.keeper.ranks,
            interrupted=interrupted,
            stopped_early=stopped_early,
            resumed_from=resumed_from,
        )
