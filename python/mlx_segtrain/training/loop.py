"""The training loop: batches in, an adapter out. Read `train` from top to bottom."""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import mlx.core as mx

from .. import events
from ..adapters import write_adapter
from ..config import TrainConfig
from ..data import AnyBatch, batches
from ..errors import InputError, RunError
from ..files import atomic_folder, clean, remove_folder, write_json
from ..lora import Adapter, attached
from ..planning.run import RunPlan
from . import checkpoint, record
from .clock import Clock
from .diagnosis import Fault
from .evaluation import measure
from .interrupts import Interrupts
from .judging import Score, command_score, numbers, sample
from .log import RunLog
from .memory import Memory, process_peak
from .references import references_of
from .results import TrainResult
from .setup import Setup, check_output, prepare, read_inputs, with_params
from .spikes import WINDOW
from .state import Progress, State
from .step import Halted, Stepper
from .trackers import check_installed, tracked


def train(
    config: TrainConfig,
    on_event: events.OnEvent | None = None,
    *,
    score: Score | None = None,
) -> TrainResult:
    """Trains an adapter and writes it to `config.adapter_path`.

    `on_event` receives the run's events (mlx_segtrain.events) as they happen; metrics.jsonl gets
    the same. `score(model, tokenizer)` is asked at every evaluation, of mlx-lm's model with the
    adapter attached, for a number or a dict of numbers. Ctrl-C and SIGTERM end the run after saving
    the last finished step (`interrupted`). InputError, before anything is written, for input that
    cannot be used; RunError if the run cannot go on, after saving the last good step.
    """
    tell = on_event or (lambda event: None)

    def warn(message: str) -> None:
        tell(events.warning(message))

    tell(events.started())
    try:
        check_installed(config)
        resumed = check_output(config, warn)
        inputs = read_inputs(config, tell)
        config = inputs.config
        made_of = record.Record(config, resumed.record if resumed else None)
        if resumed is not None:
            record.check_same(made_of, resumed.record, warn)
        setup, vector = prepare(inputs, tell, resumed)
        step = Stepper(config, setup)
        at = step.optimizer.start(vector)
        del vector, inputs  # or what the run began with would stay to its end
        progress = Progress()
        if resumed is not None:
            at, progress = resumed.iterate(at), resumed.progress
            made_of.resume(resumed.step)
        state = State(at, progress, Memory(progress.peak))
        del at
        first = state.step * config.grad_accumulation_steps
        source = batches(setup.train, config.batch_size, config.seed, first)
        with setup.plan.limits(), RunLog(config.adapter_path, warn) as log:
            _open_folder(config, resumed, log, made_of)
            with (
                tracked(config, made_of.values["id"], warn) as track,
                Interrupts() as interrupts,
            ):

                def record_event(event: events.Event) -> None:
                    log.write(event)
                    track(event)
                    tell(event)

                run = Run(config, setup, step, state, log, made_of, record_event, interrupts, score)
                result = run(source, resumed)
                record_event(events.done(config.adapter_path))
        return result
    except BaseException as error:
        tell(events.failed(error))
        raise


def _open_folder(
    config: TrainConfig,
    resumed: checkpoint.Checkpoint | None,
    log: RunLog,
    made_of: record.Record,
) -> None:
    """The folder as it was at the checkpoint; or without what an overwritten run has left there,
    but for its adapter, which stays until there is another. InputError if nothing can be written.
    """
    path = config.adapter_path
    try:
        for folder in (path, path / "best", path / "checkpoints", path / checkpoint.STATE):
            clean(folder)
        if resumed is None:
            for name in (checkpoint.STATE, "checkpoints", "best", "tensorboard"):
                remove_folder(path / name)
            for old in path.glob("fault-step-*.json"):
                old.unlink()
        (path / "metrics.json").unlink(missing_ok=True)
        log.begin(resumed.log_bytes if resumed else 0)
        made_of.write()
    except OSError as error:
        raise InputError(
            f"adapter_path {path} cannot be written ({error.strerror or error}): make room, give "
            "access, or choose another folder."
        ) from error
    step = resumed.step if resumed else 0
    log.write(events.meta(json.loads(config.model_dump_json()), made_of.values["id"], step))


T = TypeVar("T")
#: What MLX and its back ends say when an allocation fails.
NO_MEMORY = re.compile(r"out of memory|malloc|allocate", re.IGNORECASE)


@dataclass
class Run:
    """A run whose model is loaded and whose folder is its own.

    Signals are let in where it computes (`interrupts.allowed`), not where it changes or writes
    what it has.
    """

    config: TrainConfig
    setup: Setup
    step: Stepper
    state: State
    log: RunLog
    made_of: record.Record
    tell: events.OnEvent
    interrupts: Interrupts
    score: Score | None
    best: Adapter | None = None  #: the one that is still to be written

    def __call__(
        self, source: Iterator[AnyBatch], resumed: checkpoint.Checkpoint | None
    ) -> TrainResult:
        config, state, progress = self.config, self.state, self.state.progress
        what = f"{config.iters} steps on {len(self.setup.train.rows)} rows"
        if resumed:
            what += f", resumed behind step {resumed.step}"
        share = events.run_progress(state.step, config.iters)
        self.tell(events.stage("train", share, what, iters=config.iters, step=state.step))
        self.begin, self.before_s = time.perf_counter(), progress.wall_s
        self.saved, self.clock = state.step, Clock()
        interrupted = stopped_early = False
        try:
            # What is due behind a step comes before the next one, in a run that is resumed too.
            while True:
                self._report_if_due()
                self._evaluate_if_due()
                stopped_early = state.step < config.iters and self._has_stopped_improving()
                if state.step == config.iters or stopped_early:
                    break
                self._save_if_due()
                self._take_step(source)
        except KeyboardInterrupt:
            interrupted = True
        except Halted as error:
            self._save()
            if error.fault is not None:
                self._write_fault(error.fault)
            raise
        self._save()
        return self._result(resumed, interrupted, stopped_early)

    def _take_step(self, source: Iterator[AnyBatch]) -> None:
        config, state, progress = self.config, self.state, self.state.progress
        started = time.perf_counter()
        with self.interrupts.allowed():
            accumulated = list(islice(source, config.grad_accumulation_steps))
            at, outcome = self._in_memory(lambda: self.step(state.at, accumulated, progress.losses))
        state.at = at
        progress.last = replace(outcome, seconds=time.perf_counter() - started)
        progress.recent.append(progress.last)
        progress.losses = [*progress.losses, outcome.loss][-WINDOW:]
        progress.tokens += outcome.tokens
        progress.train_s += progress.last.seconds
        if outcome.bound is not None:
            done = "left out" if config.on_spike == "skip" else "taken"
            spike = f"loss {outcome.loss:.4f} is a spike, above {outcome.bound:.4f}"
            self._warn(f"step {state.step}: {spike}: the step was {done}")
        cheaper = self.step.plan.tightened(state.memory.measure(state.step))
        progress.peak = state.memory.peak
        if cheaper is not None:
            self._change_plan(cheaper, "over the budget")

    def _in_memory(self, take: Callable[[], T]) -> T:
        """The step, by a cheaper plan if the device has no memory for it, as long as there is one.

        A step changes nothing before its end. Halted if none is left.
        """
        while True:
            try:
                return take()
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, RunError) or not NO_MEMORY.search(str(error)):
                    raise
                cheaper, reason = self.step.plan.cheaper(), str(error)
            # Outside of the handler: the exception's frames hold arrays of the step.
            mx.clear_cache()
            if cheaper is None:
                done = self.state.step
                raise Halted(
                    f"step {done + 1}: the device has no memory for it ({reason}), and no plan "
                    f"takes less: the state of step {done} is kept; free memory and resume, or "
                    "begin with a lower max_seq_length or batch_size."
                )
            self._change_plan(cheaper, "no memory for a step")

    def _change_plan(self, plan: RunPlan, reason: str) -> None:
        self.step.plan = plan
        plan.set_limits()
        self.tell(events.stage("setup", self._share, f"{reason}, from now on {plan}"))

    @property
    def _share(self) -> float:
        return events.run_progress(self.state.step, self.config.iters)

    def _warn(self, message: str) -> None:
        self.tell(events.warning(message))

    def _report_if_due(self) -> None:
        """Means over the steps since the last report."""
        config, progress, step = self.config, self.state.progress, self.state.step
        if step == progress.reported or not (
            step in (1, config.iters) or step % config.steps_per_report == 0
        ):
            return
        recent, last = progress.recent, progress.recent[-1]
        event = events.train_metric(
            step,
            config.iters,
            loss=sum(outcome.loss for outcome in recent) / len(recent),
            metrics={
                name: sum(outcome.metrics[name] for outcome in recent) / len(recent)
                for name in last.metrics
            },
            grad_norm=last.norm,
            learning_rate=last.rate,
            tokens_per_sec=last.tokens / last.seconds,
            step_s=last.seconds,
            peak_gb=self.state.memory.peak / 1e9,
            active_gb=mx.get_active_memory() / 1e9,
        )
        progress.reported, progress.recent = step, []
        self.tell(event)
        if jumped := self.clock.jumped():
            self._warn(
                f"step {step}: the clock went {jumped:+.0f} s against the time that passed (or the "
                "machine slept): times in the log jump, and the run does not count on them"
            )

    def _evaluate_if_due(self) -> None:
        """What the adapter is like now: validation, answers, scores; and what is kept of it."""
        config, setup, state, progress = self.config, self.setup, self.state, self.state.progress
        if state.step == progress.evaluated or not (
            state.step in (0, config.iters) or state.step % config.steps_per_eval == 0
        ):
            return
        found: list[events.Event] = []
        val = None
        with self.interrupts.allowed():
            if setup.valid is not None:
                state.memory.measure()
                params = setup.layout.split(state.at.vector)
                what = (setup.objective, setup.chain, setup.scales, params, setup.valid)
                loss, metrics = measure(*what, config.batch_size)
                val = {"step": state.step, "loss": loss, **metrics}
                tokens = setup.valid.supervised_tokens
                how: Any = {"loss": loss, "tokens": tokens, "metrics": metrics}
                found.append(events.val_metric(state.step, config.iters, **how))
            if config.sample_prompts or config.eval_command or self.score:
                found += self._judged()
        state.memory.measure()  # an evaluation's memory is not the next step's
        progress.peak = state.memory.peak
        progress.evaluated = state.step
        progress.vals += [val] if val else []
        for event in found:
            self.tell(event)
        if state.step == 0:
            return
        if config.keep_best and progress.since_best == 0:
            self.best = self._adapter()
            self._write_best()
        if config.save_checkpoints:
            name = f"step-{state.step:05d}" + (f"-val{val['loss']:.4f}" if val else "")
            self.tell(events.stage("checkpoint", self._share, name))
            folder = config.adapter_path / "checkpoints" / name

            def write() -> None:
                with atomic_folder(folder) as aside:
                    write_adapter(aside, self._adapter(), config)

            self._try(folder, write)

    def _judged(self) -> Iterator[events.Event]:
        """Answers of the adapter as it is now, and what the command and the callable say of it."""
        config, setup, step, adapter = self.config, self.setup, self.state.step, self._adapter()
        with attached(setup.model, setup.chain, adapter) as model:
            for prompt in config.sample_prompts:
                text = sample(model, setup.tokenizer, prompt, config.sample_tokens)
                yield events.sample(step, prompt, text)
            if self.score:
                yield events.score(step, numbers(self.score(model, setup.tokenizer)))
        if config.eval_command:
            yield events.score(step, command_score(config, adapter))

    def _has_stopped_improving(self) -> bool:
        progress, patience = self.state.progress, self.config.early_stopping_patience
        return progress.evaluated == self.state.step and 0 < patience <= progress.since_best

    def _save_if_due(self) -> None:
        every, step = self.config.steps_per_save, self.state.step
        if every and step != self.saved and step % every == 0:
            self._write_best()
            self._try(self.config.adapter_path, self._write)
            self.saved = step
            self.made_of.check_model(step)

    def _save(self) -> None:
        """The last finished step, for good; an untouched adapter is not worth a file."""
        if self.state.step == 0:
            return
        path = self.config.adapter_path
        self.tell(events.stage("checkpoint", self._share, f"saving {path}"))
        self._write_best()
        try:
            self._write()
            self.made_of.finish(self.state.step)
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"step {self.state.step}: {path} cannot be written ({reason}): make room or give "
                "access, and resume from the last checkpoint there."
            ) from error

    def _write(self) -> None:
        """Checkpoint and adapter; OSError if the disk does not take them."""
        config, setup = self.config, self.setup
        self.state.progress.wall_s = self.before_s + time.perf_counter() - self.begin
        data = {"train": setup.train, "valid": setup.valid}
        known = {
            name: references_of(own)
            for name, own in data.items()
            if own is not None and config.method == "dpo" and not config.reference_free
        }
        checkpoint.save(
            config.adapter_path,
            self.state,
            config.keep_checkpoints,
            log_bytes=self.log.sync(),
            apart=setup.apart,
            record=self.made_of.values,
            **known,
        )
        write_adapter(config.adapter_path, self._adapter(), config)
        if not (config.adapter_path / record.NAME).exists():  # the folder had vanished
            self.made_of.write()

    def _write_best(self) -> None:
        """The best adapter, unless it is written; one that could not be is tried again."""
        best, path = self.best, self.config.adapter_path / "best"
        if best is not None and self._try(path, lambda: write_adapter(path, best, self.config)):
            self.best = None

    def _try(self, path: Any, write: Callable[[], None]) -> bool:
        """Whether a write that the run can do without succeeded; if not, it is told."""
        try:
            write()
        except OSError as error:
            reason = error.strerror or error
            self._warn(
                f"step {self.state.step}: {path} cannot be written ({reason}): the run goes on"
            )
            return False
        return True

    def _write_fault(self, fault: Fault) -> None:
        path = self.config.adapter_path / f"fault-step-{fault.step:05d}.json"
        self._try(path, lambda: write_json(path, fault.to_json()))

    def _adapter(self) -> Adapter:
        """As of the last finished step."""
        setup = self.setup
        return with_params(setup.scales, setup.layout.split(self.state.at.vector))

    def _result(
        self, resumed: checkpoint.Checkpoint | None, interrupted: bool, stopped_early: bool
    ) -> TrainResult:
        config, setup, progress = self.config, self.setup, self.state.progress
        best, vals = progress.best, progress.vals
        planned = setup.plan.planned
        result = TrainResult(
            adapter_path=config.adapter_path,
            steps=self.state.step,
            final_train_loss=progress.last.loss if progress.last else None,
            first_val_loss=vals[0]["loss"] if vals else None,
            final_val_loss=vals[-1]["loss"] if vals else None,
            best_val_loss=best["loss"] if best else None,
            best_step=int(best["step"]) if best else None,
            first_val_accuracy=vals[0].get("accuracy") if vals else None,
            final_val_accuracy=vals[-1].get("accuracy") if vals else None,
            wall_s=self.before_s + time.perf_counter() - self.begin,
            tokens_per_sec=progress.tokens / progress.train_s if progress.train_s else 0.0,
            peak_gb=self.state.memory.peak / 1e9,
            planned_gb=planned.peak / 1e9 if planned else None,
            process_gb=process_peak() / 1e9,
            applied_ranks=self._adapter().ranks,
            interrupted=interrupted,
            stopped_early=stopped_early,
            resumed_from=resumed.step if resumed else None,
        )
        if config.save_checkpoints:
            summary = {**asdict(result), "adapter_path": str(config.adapter_path)}
            values = {"config": json.loads(config.model_dump_json()), **summary, "val_losses": vals}
            file = config.adapter_path / "metrics.json"
            self._try(file, lambda: write_json(file, values))
        more = {"adapter_path": str(config.adapter_path), "applied_ranks": result.applied_ranks}
        self.tell(events.stage("done", 1.0, f"{self.state.step} steps", **more))
        return result
