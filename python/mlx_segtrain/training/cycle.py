"""A step of grpo: generates completions with the current adapter, scores them, and trains on them.

Generation and updates share the weights of the base model: for generation the adapter is attached
to its linear layers. All random numbers follow from the seed of the run, the step, the prompt and
the number of the completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import ROWS, TrainConfig
from ..data import AnyBatch, Batch, Dataset, Row, eval_batches
from ..errors import InputError, NoMemory, RunError, is_out_of_memory
from ..generation.decoding import Options
from ..generation.rollouts import Completion, Monologue, Policy, Talk, complete, seed_of
from ..lora import Adapter
from ..models import Chain
from ..models.adapting import attached
from ..objectives import Grpo, value
from ..objectives.grpo import NOTHING, advantages, with_log_probs
from ..rewards import Function, Rewards, Scores
from ..rewards.environments import Conversation
from ..schedule import Grads
from .setup import with_params
from .state import Iterate, Outcome
from .step import Stepper


def rewards_of(
    config: TrainConfig,
    functions: Sequence[Function] = (),
    environment: Callable[[], Any] | None = None,
) -> Rewards | None:
    """Returns the rewards of a run; None if its rows are not prompts. Raises InputError."""
    if ROWS[config.method] == "prompt":
        return Rewards.of(config, functions, environment)
    if functions:
        raise InputError(
            "rewards has no effect unless method is grpo: leave it out.", field="rewards"
        )
    return None


@dataclass(frozen=True)
class Rollouts:
    """The completions of each prompt, and in the same order their scores and, if there is an
    environment, their conversations."""

    rows: list[Row]
    completions: list[list[Completion]]
    scores: Scores
    talks: list[Conversation]

    @property
    def flat(self) -> list[Completion]:
        return [own for group in self.completions for own in group]

    @property
    def rewards(self) -> np.ndarray:
        """The rewards, float64 [prompts, completions of each]."""
        return np.array(self.scores.total).reshape(len(self.rows), -1)

    @property
    def truncated(self) -> float:
        """The fraction of completions that reached the maximum length."""
        return float(np.mean([own.finish != "stop" for own in self.flat]))

    def means(self) -> dict[str, float]:
        """Returns the mean reward, the mean of each reward, and the mean length; for conversations
        also the mean number of turns, and the fraction of tool calls that failed."""
        found = {"reward": float(self.rewards.mean())}
        if len(self.scores.by_name) > 1:
            found |= {f"reward {k}": float(np.mean(x)) for k, x in self.scores.by_name.items()}
        found["length"] = float(np.mean([own.length for own in self.flat]))
        if self.talks:
            found["turns"] = float(np.mean([own.turns for own in self.flat]))
        if calls := sum(own.calls for own in self.talks):
            found["failed_calls"] = sum(own.failed for own in self.talks) / calls
        return found


def roll_out(
    config: TrainConfig,
    policy: Policy,
    chain: Chain,
    adapter: Adapter,
    rewards: Rewards,
    rows: list[Row],
    options: list[list[Options]],
) -> Rollouts:
    """Generates completions with a base model and an adapter, and scores them. Raises RunError."""
    assert isinstance(config.rollout_batch, int)
    talks: list[list[Talk]] = []
    for row, own in zip(rows, options, strict=True):
        if rewards.environments is None:
            talks.append([Monologue(row.ids.tolist())] * len(own))
            continue
        how = (rewards.environments, policy.tokenizer, config, row)
        talks.append([Conversation(*how, one.seed or 0) for one in own])
    options = [
        [_within(how, talk, row) for talk, how in zip(*own, strict=True)]
        for row, *own in zip(rows, talks, options, strict=True)
    ]
    # On a CPU our op takes a quarter of the time of MLX's for the head of many rows.
    whole = mx.default_device().type == mx.DeviceType.cpu
    with attached(policy.model, chain, adapter, whole=whole):
        made = complete(policy, talks, options, config.rollout_batch, config.max_turns)
    given = [row.given or {} for row, own in zip(rows, made, strict=True) for _ in own]
    flat = [own for group in made for own in group]
    held = [own for group in talks for own in group if isinstance(own, Conversation)]
    scores = rewards(given, [x.text for x in flat], [x.length for x in flat], held)
    return Rollouts(rows, made, scores, held)


def _within(options: Options, talk: Talk, row: Row) -> Options:
    """Subtracts the tokens that `reset` has added to the prompt from max_tokens. Raises RunError if
    none are left."""
    added = len(talk.prompt) - len(row)
    if added >= options.max_tokens:
        raise RunError(
            f"{row.source}: reset of the environment adds {added} tokens to the prompt, so "
            "max_completion_tokens leaves none for an answer: raise it."
        )
    return replace(options, max_tokens=options.max_tokens - added)


def options_of(config: TrainConfig, seed: int) -> Options:
    """Returns the sampling options of a completion."""
    how: dict[str, Any] = {"temperature": config.temperature, "seed": seed, "logprobs": 0}
    return Options(max_tokens=config.max_completion_tokens, **how)


@dataclass
class Cycle(Stepper):
    """Takes steps on generated data; batches provide the prompts."""

    rewards: Rewards = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        assert isinstance(self.setup.objective, Grpo)
        self.objective = self.setup.objective
        self._made: list[dict[str, Any]] = []

    @property
    def completions(self) -> list[dict[str, Any]]:
        return self._made

    def compile(self, at: Iterate, source: Iterator[AnyBatch]) -> None:
        """Does nothing: which kernels a step needs depends on its completions."""

    def __call__(
        self, at: Iterate, accumulated: list[AnyBatch], losses: Sequence[float] = ()
    ) -> tuple[Iterate, Outcome]:
        config, prompts = self.setup.config, self.setup
        indices = [int(i) for batch in accumulated for i in batch.rows]
        options = [
            [
                options_of(config, seed_of(config.seed, at.step, i, j))
                for j in range(config.group_size)
            ]
            for i in indices
        ]
        rows = [prompts.train.rows[i] for i in indices]
        params = prompts.layout.split(at.vector)
        found = self._roll_out(at.step + 1, params, rows, options)
        gains = advantages(found.rewards, config.advantage_scaling)
        data = self._trained(found, gains)
        self.setup = replace(prompts, train=data)
        try:
            batches: list[AnyBatch] = [*self._with_references(params, self._batches(data))]
            start, new, outcome = at, at, None
            for _ in range(config.updates_per_step):  # all with this step's learning rate
                new, outcome = super().__call__(replace(new, step=start.step), batches, losses)
        finally:
            self.setup = prompts
        assert outcome is not None
        self._made = list(_lines(at.step + 1, found, gains))
        metrics = {**self._metrics(found), **outcome.metrics}
        return new, replace(outcome, metrics=metrics)

    def validate(self, at: Iterate) -> tuple[float, dict[str, float]]:
        """Returns the negated mean reward of one greedy completion per prompt, and the metrics
        (Rollouts.means)."""
        setup = self.setup
        assert setup.valid is not None
        rows = list(setup.valid.rows)
        seeds = (seed_of(setup.config.seed, i) for i in range(len(rows)))
        options = [[replace(options_of(setup.config, x), temperature=0.0)] for x in seeds]
        params = setup.layout.split(at.vector)
        means = self._roll_out(at.step, params, rows, options).means()
        return -means["reward"], means

    def _roll_out(
        self, step: int, params: Grads, rows: list[Row], options: list[list[Options]]
    ) -> Rollouts:
        """Generates with these factors of the adapter, within the whole memory budget and not only
        the peak of the updates' plan. Raises NoMemory."""
        setup, plan = self.setup, self.setup.plan
        policy = Policy(setup.model, setup.tokenizer, setup.chain.max_length)
        adapter = with_params(setup.chain, setup.scales, params)
        what = (setup.config, policy, setup.chain, adapter, self.rewards, rows, options)
        before = None if plan.planned is None else mx.set_memory_limit(plan.budget)
        try:
            return roll_out(*what)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        finally:
            if before is not None:
                mx.set_memory_limit(before)
            mx.clear_cache()
            # The peak of the updates is measured separately, to compare it with their plan.
            self.rollout_peak = max(self.rollout_peak, mx.get_peak_memory())
            mx.reset_peak_memory()
        # Raised outside of the handler, because the caught exception's frames keep arrays alive.
        at_once = setup.config.rollout_batch
        raise NoMemory(
            f"step {step}: the device has no memory for generating {at_once} completions at once "
            f"({reason}): free memory and resume, perhaps with a lower rollout_batch, or start "
            "with a lower max_completion_tokens."
        )

    def _trained(self, found: Rollouts, gains: np.ndarray) -> Dataset:
        """Returns the rows of the completions on which the loss depends."""
        config, flat = self.setup.config, found.flat
        kept = np.array([own.finish == "stop" or not config.mask_truncated for own in flat])
        lengths = np.array([own.length for own in flat])
        weights = self.objective.weights(lengths, kept)
        counted = kept & ((gains.reshape(-1) != 0) | (config.grpo_beta > 0))
        if not counted.any():  # the step needs at least one row, for a gradient of zero
            shortest = int(np.argmin([len(own.tokens) for own in flat]))
            weights[shortest], counted[shortest] = NOTHING, True
        rows = []
        for i in np.flatnonzero(counted):
            own, (p, j) = flat[i], divmod(int(i), gains.shape[1])
            before = np.zeros(len(own.prompt), np.float32)

            def after(values: Any, own=own, before=before) -> np.ndarray:
                """Returns values that are 0 for tokens of context."""
                return np.concatenate([before, np.where(own.drawn, values, 0).astype(np.float32)])

            numbers = {"advantage": after(gains[p, j]), "rollout": after(own.log_p)}
            ids = np.array([*own.prompt, *own.tokens], np.int32)
            source = f"{found.rows[p].source}, completion {j + 1}"
            rows.append(Row(ids, after(weights[i]), source, numbers=numbers))
        return Dataset.of(rows, self.setup.train.pad_id)

    def _batches(self, data: Dataset) -> list[Batch]:
        """Returns the rows in packed batches of max_seq_length tokens, or in padded batches."""
        most = self.setup.config.max_seq_length
        if self.setup.config.packing:
            found: Any = eval_batches(data.in_rows_of(most), 1)
        else:
            found = eval_batches(data, self.objective.rows_in(int(data.columns.length.max())))
        return list(found)

    def _with_references(self, params: Grads, batches: list[Batch]) -> list[Batch]:
        """Adds the log-probabilities under the old policy and the reference, if the loss needs
        them."""
        setup, config = self.setup, self.setup.config
        wanted: list[tuple[str, Any, Any]] = []
        if config.updates_per_step > 1:
            wanted.append(("old", setup.scales, params))
        if config.grpo_beta:
            wanted.append(("reference", {}, {}))
        found = []
        for batch in batches:
            for name, scales, own in wanted:
                (log_p,) = value(self.objective.old, setup.chain, scales, own, batch, 1.0)
                batch = with_log_probs(batch, name, np.array(log_p))
            found.append(batch)
        return found

    def _metrics(self, found: Rollouts) -> dict[str, float]:
        spread = found.rewards.std(1)
        return {
            **found.means(),
            "reward_std": float(spread.mean()),
            "equal_groups": float(np.mean(spread == 0)),
            "truncated": found.truncated,
        }


def _lines(step: int, found: Rollouts, gains: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields the lines of a step for completions.jsonl."""
    scores = found.scores
    for i, own in enumerate(found.flat):
        p, j = divmod(i, gains.shape[1])
        line = {
            "step": step,
            "row": found.rows[p].source,
            "completion": j + 1,
            "prompt": (found.rows[p].given or {}).get("prompt"),
            "text": own.text,
            "tokens": own.length,
            "finish": own.finish,
            "reward": scores.total[i],
            "rewards": {name: values[i] for name, values in scores.by_name.items()},
            "advantage": float(gains[p, j]),
        }
        if found.talks:
            line |= {"prompt": found.talks[i].asked, "messages": found.talks[i].said}
        yield line
