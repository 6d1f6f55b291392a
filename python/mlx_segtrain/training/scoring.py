"""Computes the mean reward and pass@k of a model's completions over a whole data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import events, hub
from ..adapters import read_adapter
from ..config import TrainConfig
from ..data import Options
from ..data.dataset import Split
from ..generation.rollouts import Policy, seed_of
from ..lora import Adapter
from ..models import load_tokenizer
from ..planning.rollouts import check_rollouts, rollouts_at_once
from ..rewards import Function, Rewards, with_all_columns
from .cycle import options_of, roll_out
from .evaluation import load_rows
from .policy import run_policy
from .setup import load_chain

#: The tolerance for comparing a total reward with `passes`. It is needed because rounding may make
#: the sum of the rewards slightly too small.
ROUNDING = 1e-9


@dataclass(frozen=True)
class ScoreResult:
    """Means over `rows` prompts with `completions` completions each. `pass_at` maps k to the
    probability that at least one of k completions passes; `truncated` is the fraction of
    completions that reached the maximum length."""

    reward: float
    reward_std: float
    rewards: dict[str, float]
    pass_at: dict[int, float]
    length: float
    truncated: float
    rows: int
    completions: int


def score(
    config: TrainConfig,
    adapter_path: Path | None = None,
    *,
    split: Split = "valid",
    passes: float = 1.0,
    rewards: Sequence[Function] = (),
    environment: Callable[[], Any] | None = None,
    on_event: events.OnEvent | None = None,
) -> ScoreResult:
    """Samples group_size completions of each prompt in a split, and scores them with the configured
    rewards and with the functions in `rewards`. `environment` is a class that replaces the
    configured environment. A completion passes if its total reward is at least `passes`.

    Raises InputError if the model, the adapter or the data cannot be read, or if they are
    incompatible. Raises RunError if a reward fails.
    """
    tell = on_event or (lambda event: None)
    scoring = Rewards.of(config, rewards, environment)
    config = hub.located(config, tell)
    if adapter_path:
        adapter_path = hub.adapter(adapter_path, tell)
    with run_policy(config):
        tokenizer = load_tokenizer(config.model_dir)
        data = load_rows(config, tokenizer, Options.of(config, scoring.tools), split, on_event)
        scoring.check(config, tokenizer, data.rows)
        (data,) = with_all_columns(data)
        assert data is not None
        rows = list(data.rows)
        tokens = int(data.columns.length.max()) + config.max_completion_tokens
        if config.rollout_batch == "auto":
            most = rollouts_at_once(config, tokens, len(rows) * config.group_size)
            config = config.model_copy(update={"rollout_batch": most})
        else:
            check_rollouts(config, tokens)
        model, chain = load_chain(config, data)
        adapter = read_adapter(adapter_path, chain) if adapter_path else Adapter({}, {})
        options = [
            [options_of(config, seed_of(config.seed, i, j)) for j in range(config.group_size)]
            for i in range(len(rows))
        ]
        policy = Policy(model, tokenizer, chain.max_length)
        found = roll_out(config, policy, chain, adapter, scoring, rows, options).made
    right = (found.rewards >= passes - ROUNDING).sum(1)
    counts = [k for k in (2**e for e in range(16)) if k <= config.group_size]
    return ScoreResult(
        reward=float(found.rewards.mean()),
        reward_std=float(found.rewards.std()),
        rewards=found.by_name,
        pass_at={k: pass_at(k, config.group_size, right.tolist()) for k in counts},
        length=found.means()["length"],
        truncated=found.truncated,
        rows=len(rows),
        completions=config.group_size,
    )


def pass_at(k: int, n: int, right: Sequence[int]) -> float:
    """Estimates the probability that at least one of k completions passes (Chen et al. 2021,
    arXiv:2107.03374), and returns its mean over all prompts. `right` contains, for each prompt, the
    number of its n completions that passed."""
    return float(np.mean([1 - math.comb(n - c, k) / math.comb(n, k) for c in right]))
