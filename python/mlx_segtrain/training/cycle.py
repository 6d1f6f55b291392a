"""A training step of grpo, which generates completions with the current adapter, scores them, and
trains on them.

Generation and updates share the weights of the base model: during generation, the adapter is
attached to the model's linear layers. The random numbers of a completion depend only on the seed of
the run, the step, the prompt and the index of the completion.

If there are several ranks, the prompts of a step are divided among them. Each rank generates,
scores and trains on the completions of its share of the prompts. From the other ranks, it receives
the values on which advantages, weights and metrics depend. Therefore, a step on several ranks has
the same result as a step on one rank, except for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

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
from .step import Attempt, Stepper, Update

T = TypeVar("T")


def rewards_of(
    config: TrainConfig,
    functions: Sequence[Function] = (),
    environment: Callable[[], Any] | None = None,
) -> Rewards | None:
    """Returns the rewards of a run, or None if the run's method does not train on prompts. Raises
    InputError if a reward or the environment cannot be used."""
    if ROWS[config.method] == "prompt":
        return Rewards.of(config, functions, environment)
    if functions:
        raise InputError(
            "rewards has no effect unless method is grpo: leave it out.", field="rewards"
        )
    return None


class Counts(NamedTuple):
    """The counts for an update, summed over all ranks."""

    total: float  #: the objective's total, by which the sum of the losses is divided
    run: int  #: number of tokens processed
    trained: int  #: number of tokens in the loss


@dataclass(frozen=True)
class Made:
    """The completions of each prompt as JSON values, which the ranks exchange (see
    Rollouts.made)."""

    groups: list[list[dict[str, Any]]]

    def all(self, name: str) -> list[Any]:
        """Returns each completion's value for the key `name`, prompt by prompt."""
        return [own[name] for group in self.groups for own in group]

    @property
    def rewards(self) -> np.ndarray:
        """The rewards, a float64 array of shape [prompts, completions per prompt]."""
        return np.array(self.all("reward")).reshape(len(self.groups), -1)

    @property
    def by_name(self) -> dict[str, float]:
        """The mean of each reward, keyed by the name of the reward."""
        every = self.all("rewards")
        return {name: float(np.mean([own[name] for own in every])) for name in every[0]}

    @property
    def truncated(self) -> float:
        """The fraction of completions that reached the maximum length."""
        return float(np.mean([own != "stop" for own in self.all("finish")]))

    def means(self) -> dict[str, float]:
        """Returns the means of the total reward, of each reward if there are several, and of the
        completion length. For conversations, also returns the mean number of turns and the fraction
        of tool calls that failed."""
        found = {"reward": float(self.rewards.mean())}
        if len(self.by_name) > 1:
            found |= {f"reward {name}": x for name, x in self.by_name.items()}
        found["length"] = float(np.mean(self.all("tokens")))
        if any("messages" in own for group in self.groups for own in group):
            found["turns"] = float(np.mean(self.all("turns")))
        if calls := sum(self.all("calls")):
            found["failed_calls"] = sum(self.all("failed")) / calls
        return found

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of a training step."""
        spread = self.rewards.std(1)
        return {
            **self.means(),
            "reward_std": float(spread.mean()),
            "equal_groups": float(np.mean(spread == 0)),
            "truncated": self.truncated,
        }

    def lines(self, step: int, gains: np.ndarray) -> Iterator[dict[str, Any]]:
        """Yields the lines of completions.jsonl for a step, given the advantages of its
        completions."""
        first = ("row", "completion", "prompt", "text", "tokens", "finish", "reward", "rewards")
        for group, own_gains in zip(self.groups, gains.tolist(), strict=True):
            for own, gain in zip(group, own_gains, strict=True):
                line = {"step": step, **{name: own[name] for name in first}, "advantage": gain}
                yield line | {name: own[name] for name in ("messages",) if name in own}


@dataclass(frozen=True)
class Rollouts:
    """The completions of each prompt with their scores and, if there is an environment, their
    conversations, all in the same order."""

    rows: list[Row]
    completions: list[list[Completion]]
    scores: Scores
    talks: list[Conversation]

    @property
    def made(self) -> Made:
        """The completions without the data that only this rank needs."""
        scores, talks, groups = self.scores, self.talks, list[list[dict[str, Any]]]()
        for row, group in zip(self.rows, self.completions, strict=True):
            groups.append([])
            begin = sum(map(len, groups))
            for i, own in enumerate(group, begin):
                value: dict[str, Any] = {
                    "row": row.source,
                    "completion": i - begin + 1,
                    "prompt": talks[i].asked if talks else (row.given or {}).get("prompt"),
                    "text": own.text,
                    "tokens": own.length,
                    "finish": own.finish,
                    "reward": scores.total[i],
                    "rewards": {name: values[i] for name, values in scores.by_name.items()},
                    "all_tokens": len(own.tokens),
                    "turns": own.turns,
                    "calls": talks[i].calls if talks else 0,
                    "failed": talks[i].failed if talks else 0,
                }
                groups[-1].append(value | ({"messages": talks[i].said} if talks else {}))
        return Made(groups)


def roll_out(
    config: TrainConfig,
    policy: Policy,
    chain: Chain,
    adapter: Adapter,
    rewards: Rewards,
    rows: list[Row],
    options: list[list[Options]],
) -> Rollouts:
    """Generates completions with a base model and an adapter, and scores them. Raises RunError if a
    reward or the environment fails."""
    assert isinstance(config.rollout_batch, int)
    if not rows:  # an evaluation may have fewer prompts than there are ranks
        return Rollouts([], [], Scores({}, []), [])
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
    # On a CPU, the head is replaced even if it has no adapter, because our op is four times as fast
    # as MLX's for a large vocabulary.
    whole = mx.default_device().type == mx.DeviceType.cpu
    with attached(policy.model, chain, adapter, whole=whole):
        made = complete(policy, talks, options, config.rollout_batch, config.max_turns)
    given = [row.given or {} for row, own in zip(rows, made, strict=True) for _ in own]
    flat = [own for group in made for own in group]
    held = [own for group in talks for own in group if isinstance(own, Conversation)]
    scores = rewards(given, [x.text for x in flat], [x.length for x in flat], held)
    return Rollouts(rows, made, scores, held)


def _within(options: Options, talk: Talk, row: Row) -> Options:
    """Subtracts from max_tokens the number of tokens that the environment's `reset` has added to
    the prompt. Raises RunError if none are left."""
    added = len(talk.prompt) - len(row)
    if added >= options.max_tokens:
        raise RunError(
            f"{row.source}: the environment's reset adds {added} tokens to the prompt, which "
            "leaves no room for an answer: raise max_completion_tokens."
        )
    return replace(options, max_tokens=options.max_tokens - added)


def options_of(config: TrainConfig, seed: int) -> Options:
    """Returns the sampling options for a completion with this seed."""
    how: dict[str, Any] = {"temperature": config.temperature, "seed": seed, "logprobs": 0}
    return Options(max_tokens=config.max_completion_tokens, **how)


@dataclass
class Cycle(Stepper):
    """Takes steps on generated completions; the batches provide only the prompts."""

    rewards: Rewards = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        assert isinstance(self.setup.objective, Grpo)
        self.objective = self.setup.objective
        self._lines: list[dict[str, Any]] = []
        # Values of the current step, set by take().
        self._counts: Counts
        self._own_tokens: int

    @property
    def completions(self) -> list[dict[str, Any]]:
        return self._lines

    def compile(self, at: Iterate, source: Iterator[AnyBatch]) -> None:
        """Does nothing, because the kernels that a step needs depend on its completions."""

    def take(
        self,
        at: Iterate,
        accumulated: list[AnyBatch],
        update: Update,
        attempt: Attempt,
    ) -> tuple[Iterate, Outcome]:
        """Takes a step: generates completions of the prompts, then performs optimizer updates with
        them."""
        config, prompts = self.setup.config, self.setup
        indices = self.ranks.share([int(i) for batch in accumulated for i in batch.rows])
        options = [
            [
                options_of(config, seed_of(config.seed, at.step, i, j))
                for j in range(config.group_size)
            ]
            for i in indices
        ]
        rows = [prompts.train.rows[i] for i in indices]
        params = prompts.layout.split(at.vector)
        found = attempt(lambda: self._roll_out(at.step + 1, params, rows, options))
        made = self._of_all(found)
        gains = advantages(made.rewards, config.advantage_scaling)
        data = self._trained(found, made, gains)
        batches = self._batches(data)
        run, trained = int(data.columns.run.sum()), int(data.columns.trained.sum())
        self._own_tokens = run
        every = self.ranks.gather([self.objective.total(batches), run, trained])
        self._counts = Counts(*map(sum, zip(*every, strict=True)))
        self.setup = replace(prompts, train=data)
        try:
            known = attempt(lambda: self._with_references(params, batches))
            new, outcome = at, None
            for _ in range(config.updates_per_step):  # all of them with this step's learning rate
                new, outcome = update(replace(new, step=at.step), [*known])
        finally:
            self.setup = prompts
        assert outcome is not None
        self._lines = list(made.lines(at.step + 1, gains))
        return new, replace(outcome, metrics={**made.metrics(), **outcome.metrics})

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns all micro-batches, because they contain only completions of this rank."""
        return items

    def total(self, accumulated: list[AnyBatch], baselines: Sequence[float]) -> float:
        return self._counts.total

    def counts(self, accumulated: Sequence[AnyBatch]) -> tuple[int, int]:
        return self._counts.run, self._counts.trained

    def own_tokens(self, accumulated: Sequence[AnyBatch]) -> int:
        return self._own_tokens

    def rows(self, accumulated: Sequence[AnyBatch]) -> list[str]:
        return [row for own in self.ranks.gather(super().rows(accumulated)) for row in own]

    def gradient(
        self, at: Iterate, accumulated: list[AnyBatch], total: Any = None
    ) -> tuple[list[float] | list[mx.array], mx.array]:
        if accumulated:
            return super().gradient(at, accumulated, total)
        # If none of this rank's completions affects the loss, the rank's gradient is 0.
        return [0.0] * (1 + len(self.objective.metrics)), mx.zeros_like(at.vector)

    def validate(self, at: Iterate) -> tuple[float, dict[str, float]]:
        """Returns the negated mean reward of one greedy completion per validation prompt, and the
        metrics of Made.means. Each rank generates the completions of its share of the prompts."""
        setup = self.setup
        assert setup.valid is not None
        indices = self.ranks.share(range(len(setup.valid.rows)))
        rows = [setup.valid.rows[i] for i in indices]
        seeds = (seed_of(setup.config.seed, i) for i in indices)
        options = [[replace(options_of(setup.config, x), temperature=0.0)] for x in seeds]
        params = setup.layout.split(at.vector)
        means = self._of_all(self._roll_out(at.step, params, rows, options)).means()
        return -means["reward"], means

    def _of_all(self, found: Rollouts) -> Made:
        """Returns the completions of all ranks, in the order of their prompts. Exchanging
        completions is much faster than generating them, since a token is only a few bytes of
        text."""
        return Made(self.ranks.unshared(found.made.groups))

    def _roll_out(
        self, step: int, params: Grads, rows: list[Row], options: list[list[Options]]
    ) -> Rollouts:
        """Generates completions with these factors. Generation may use the whole memory budget,
        while updates are limited to the peak of their plan. Raises NoMemory if the device runs out
        of memory."""
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
            # The peak of the updates is measured separately, so that it can be compared with their
            # plan.
            self.rollout_peak = max(self.rollout_peak, mx.get_peak_memory())
            mx.reset_peak_memory()
        # Raised outside the handler, because the frames of the caught exception keep arrays alive.
        at_once = setup.config.rollout_batch
        raise NoMemory(
            f"step {step}: the device has too little memory to generate {at_once} completions at "
            f"once ({reason}): free memory and resume, perhaps with a lower rollout_batch, or "
            "start with a lower max_completion_tokens."
        )

    def _trained(self, found: Rollouts, made: Made, gains: np.ndarray) -> Dataset:
        """Converts this rank's completions to training rows, leaving out completions that do not
        affect the loss. `made` contains the completions of all ranks, and `gains` their
        advantages."""
        config = self.setup.config
        kept = np.array([own == "stop" or not config.mask_truncated for own in made.all("finish")])
        weights = self.objective.weights(np.array(made.all("tokens")), kept)
        counted = kept & ((gains.reshape(-1) != 0) | (config.grpo_beta > 0))
        if not counted.any():  # a step needs at least one row, even if its gradient is 0
            shortest = int(np.argmin(made.all("all_tokens")))
            weights[shortest], counted[shortest] = NOTHING, True
        mine, shape = list(self.ranks.share(range(len(gains)))), gains.shape
        gains, weights, counted = (x.reshape(shape)[mine] for x in (gains, weights, counted))
        rows = []
        for p, j in np.argwhere(counted).tolist():
            own = found.completions[p][j]
            before = np.zeros(len(own.prompt), np.float32)

            def after(values: Any, own=own, before=before) -> np.ndarray:
                """Returns the values as a float32 array for the whole row, with 0 for context
                tokens."""
                return np.concatenate([before, np.where(own.drawn, values, 0).astype(np.float32)])

            numbers = {"advantage": after(gains[p, j]), "rollout": after(own.log_p)}
            ids = np.array([*own.prompt, *own.tokens], np.int32)
            source = f"{found.rows[p].source}, completion {j + 1}"
            rows.append(Row(ids, after(weights[p, j]), source, numbers=numbers))
        return Dataset.of(rows, self.setup.train.pad_id)

    def _batches(self, data: Dataset) -> list[Batch]:
        """Returns the rows as batches. If `packing` is set, they are packed into rows of
        max_seq_length tokens; otherwise, they are padded."""
        if not len(data):
            return []
        most = self.setup.config.max_seq_length
        if self.setup.config.packing:
            found: Any = eval_batches(data.in_rows_of(most), 1)
        else:
            found = eval_batches(data, self.objective.rows_in(int(data.columns.length.max())))
        return list(found)

    def _with_references(self, params: Grads, batches: list[Batch]) -> list[Batch]:
        """Adds to each batch the log-probabilities under the old policy and under the reference
        model, if the loss needs them."""
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
