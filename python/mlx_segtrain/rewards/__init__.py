"""Scores completions with built-in checks, Python functions, a command, or a reward model.

A reward is called with all completions and returns a score for each. The total reward of a
completion is the weighted sum of its scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config import TrainConfig
from ..data.messages import Other
from ..data.prompting import Prompting
from ..errors import InputError, RunError, named_reason, shown
from .calling import by_command, function_of, takes, with_what_it_takes
from .checks import check_of, column_of
from .environments import GIVEN, Conversation, Environments
from .model import RewardModel

if TYPE_CHECKING:
    from ..data import Dataset, Row

__all__ = ["Function", "Rewards", "Scores", "check_rows", "with_all_columns"]

#: The arguments of a reward in addition to the columns of the data.
TAKEN = ("prompts", "completions", "completion_tokens")

#: A function that receives lists as (prompts, completions, **columns) and returns a score for each
#: completion.
Function = Callable[..., Sequence[float]]


@dataclass(frozen=True)
class Scores:
    """The scores of completions, keyed by the name of the reward, and their weighted sums."""

    by_name: dict[str, list[float]]
    total: list[float]


@dataclass(frozen=True)
class Rewards:
    """The rewards of a run, keyed by name, with their weights and the environments of
    conversations."""

    rewards: Mapping[str, Function]
    weights: Sequence[float]
    environments: Environments | None = None
    model: RewardModel | None = None

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        functions: Sequence[Function] = (),
        environment: Callable[[], Any] | None = None,
    ) -> Rewards:
        """Returns the rewards of a configuration. Python callers may also pass reward functions
        (`functions`) and the class of the environment (`environment`). Raises InputError if a
        reward cannot be used, or if there is no reward."""
        named = [(spec.partition(":")[0], check_of(spec)) for spec in config.rewards]
        named += [function_of(spec) for spec in config.reward_functions]
        named += [
            (getattr(own, "__name__", "function"), with_what_it_takes(own)) for own in functions
        ]
        if config.reward_command is not None:
            named.append(("command", by_command(config.reward_command)))
        model = None
        if config.reward_model is not None:
            model = RewardModel(config.reward_model)
            named.append(("reward_model", model))
        environments = Environments.of(config, environment)
        if environments is not None and environments.has_reward:
            named.append((environments.name, with_what_it_takes(_own_rewards)))
        if not named:
            raise InputError(
                "method grpo needs a reward: set rewards, reward_functions, reward_command or "
                "reward_model (docs/grpo.md).",
                field="rewards",
            )
        weights = list(config.reward_weights) or [1.0] * len(named)
        if len(weights) != len(named):
            raise InputError(
                f"reward_weights has {len(weights)} values for {len(named)} rewards: set one "
                "weight for each reward.",
                field="reward_weights",
            )
        rewards: dict[str, Function] = {}
        for name, reward in named:
            n = 1 + sum(other.partition(" ")[0] == name for other in rewards)
            rewards[name if n == 1 else f"{name} {n}"] = reward
        return cls(rewards, weights, environments, model)

    def check(self, config: TrainConfig, tokenizer: Any, rows: Sequence[Row]) -> None:
        """Raises InputError, before anything is generated, if a row or a model does not meet the
        requirements of the rewards. The configuration must contain local folders instead of names
        on the hub."""
        check_rows(config, rows)
        for row in rows:
            for name, value in (row.given or {}).items():
                if isinstance(value, Other) and self._reads(config, name):
                    raise InputError(
                        f'{row.source}: the rewards cannot read the column "{name}", because its '
                        f"type is {value.kind}: convert the column to text or numbers, or remove "
                        "it."
                    )
        if self.environments is not None:
            self.environments.check(config, tokenizer, rows)
        if self.model is not None:
            assert config.reward_model is not None
            raw = Prompting(config.prompt_format).is_raw(tokenizer)
            self.model.check(config.reward_model, raw)

    def _reads(self, config: TrainConfig, column: str) -> bool:
        """Returns whether a reward or the environment receives a column of the data."""
        written = [*self.rewards.values()][len(config.rewards) :]  # checks come first
        if self.environments is not None:
            written.append(self.environments.make().reset)
        known = [column_of(spec) for spec in config.rewards]
        return column in known or any(takes(own, column) for own in written)

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """The tools that every prompt offers to the model."""
        return self.environments.tools if self.environments else ()

    def __call__(
        self,
        rows: Sequence[Mapping[str, Any]],
        completions: Sequence[str],
        tokens: Sequence[int],
        talks: Sequence[Conversation] = (),
    ) -> Scores:
        """Scores completions, given the row and the number of tokens of each completion. If `talks`
        is not empty, it contains the conversation of each completion.

        Raises RunError if a reward fails, or if it returns anything other than a finite number for
        each completion.
        """
        keys = dict.fromkeys(key for row in rows for key in row if key != "prompt")
        columns = {key: [row.get(key) for row in rows] for key in keys}
        columns |= {"completion_tokens": list(tokens)}
        prompts = [talk.asked for talk in talks] or [row["prompt"] for row in rows]
        # These arguments are for the reward model; a column of the data with the same name must not
        # replace them.
        judged = {"system": columns.get("system"), "messages": None}
        if talks:
            judged["messages"] = columns["messages"] = [talk.said for talk in talks]
            columns["environments"] = [talk.environment for talk in talks]
        found = {}
        for name, reward in self.rewards.items():
            try:
                more = judged if reward is self.model else columns
                scores = list(reward(prompts=prompts, completions=list(completions), **more))
            except RunError:
                raise
            except Exception as error:
                raise RunError(
                    f"reward {name} failed ({named_reason(error)}): fix it and resume."
                ) from error
            found[name] = _checked(name, scores, completions)
        sums = (
            math.fsum(w * x for w, x in zip(self.weights, own, strict=True))
            for own in zip(*found.values(), strict=True)
        )
        return Scores(found, list(sums))


def _own_rewards(environments: Sequence[Any]) -> list[float]:
    """Returns the rewards that the environments compute with `get_reward`."""
    return [own.get_reward() for own in environments]


def _checked(name: str, scores: list[Any], completions: Sequence[str]) -> list[float]:
    if len(scores) != len(completions):
        raise RunError(
            f"reward {name} returned {len(scores)} scores for {len(completions)} completions; it "
            "must return one for each."
        )
    numbers = []
    for score, completion in zip(scores, completions, strict=True):
        try:
            number = float(score)
        except (TypeError, ValueError):
            number = math.nan
        except OverflowError:  # an integer may have hundreds of digits
            number = score = math.inf
        numbers.append(number)
        if not math.isfinite(number):
            raise RunError(
                f"reward {name} returned {shown(score, 60)} for the completion "
                f"{shown(completion, 80)}; it must return a finite number. Fix it and resume."
            )
    return numbers


def with_all_columns(*splits: Dataset | None) -> list[Dataset | None]:
    """Returns prompts whose rows all have the same columns. A missing value is None, so that the
    rewards receive a column even if no row of a step has a value in it."""
    rows = (row for own in splits if own for row in own.rows)
    names = dict.fromkeys(name for row in rows for name in row.given or {})

    def filled(_: int, row: Row) -> Row:
        return replace(row, given={**names, **(row.given or {})})

    return [own and own.map(filled) for own in splits]


def check_rows(config: TrainConfig, rows: Iterable[Row]) -> None:
    """Raises InputError, before anything is generated, if a row lacks a column that a check reads,
    or if it has a column with a reserved name."""
    taken = (*TAKEN, "completion") if config.reward_command is not None else TAKEN
    if config.environment is not None:
        taken = (*taken, *GIVEN)
    read = {column: spec for spec in config.rewards if (column := column_of(spec))}
    for row in rows:
        given = row.given or {}
        for column, spec in read.items():
            if column not in given:
                raise InputError(
                    f'{row.source}: the row has no column "{column}", which the reward {spec} '
                    "reads.",
                    field="rewards",
                )
        if found := [name for name in taken if name in given]:
            raise InputError(
                f'{row.source}: the row has a column "{found[0]}", but this name is reserved for '
                "another argument of the rewards: rename or remove the column."
            )
