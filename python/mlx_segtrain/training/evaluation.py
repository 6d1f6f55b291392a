"""Evaluation: the mean loss of a token, a pair or a row, over a whole set."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import events, hub
from ..adapters import read_adapter
from ..config import ROWS, TrainConfig
from ..data import Dataset, Options, eval_batches, load_split
from ..data.dataset import Split
from ..errors import InputError
from ..lora import Adapter
from ..models import Chain, adapting, load_tokenizer
from ..objectives import Objective, named, objective_of, total_of, value
from ..schedule import Params
from .policy import run_policy
from .ranks import ALONE, Ranks
from .references import with_references
from .setup import load_chain

#: Seconds between two events that say how far an evaluation is.
TELL_S = 0.5


@dataclass(frozen=True)
class EvalResult:
    """loss in nats per token over `tokens` supervised tokens of `rows` rows.

    Of preference methods the loss is a pair's or a row's, and `metrics` are accuracy, margin,
    rewards and, of kto, kl.
    """

    loss: float
    perplexity: float | None
    metrics: dict[str, float]
    tokens: int
    rows: int
    truncated: int
    dropped: int


def measure(
    objective: Objective,
    chain: Chain,
    scales: Mapping[str, float],
    params: Params,
    dataset: Dataset,
    batch_size: int,
    ranks: Ranks = ALONE,
    tell: events.OnEvent | None = None,
) -> tuple[float, dict[str, float]]:
    """Loss and metrics of an objective over all rows, forward only, of which each rank runs its
    share. `tell` learns now and then how far this is."""
    batches = list(eval_batches(dataset, batch_size))
    total = total_of(objective, chain, scales, params, batches)
    sums = [0.0] * (1 + len(objective.metrics))
    begin = told = time.monotonic()
    for n, batch in enumerate(ranks.share(batches), 1):
        outputs = value(objective, chain, scales, params, batch, total)
        sums = [x + float(y) for x, y in zip(sums, outputs, strict=True)]
        now = time.monotonic()
        if tell is not None and now >= told + TELL_S:
            told = now
            tell(events.evaluating(n, len(batches), (now - begin) / n * (len(batches) - n)))
    sums = [sum(parts) for parts in zip(*ranks.gather(sums), strict=True)]
    return sums[0], named(objective, sums[1:])


def evaluate(
    config: TrainConfig,
    adapter_path: Path | None = None,
    *,
    split: Split = "valid",
    on_event: events.OnEvent | None = None,
) -> EvalResult:
    """Loss of a model, with an adapter or without, on a split of the configuration's data.

    `on_event` is told what is downloaded, and how far the evaluation is. InputError for what cannot
    be read or does not fit.
    """
    if ROWS[config.method] == "prompt":
        raise InputError(f"method {config.method} has no loss of rows: call score for its rewards.")
    tell = on_event or (lambda event: None)
    config = hub.located(config, tell)
    if adapter_path:
        adapter_path = hub.adapter(adapter_path, tell)
    with run_policy(config):
        how = (load_tokenizer(config.model_dir), Options.of(config), split, config.model_dir)
        dataset = load_split(config.data_dir, *how, on_event)
        if dataset is None:
            raise InputError(
                f"data_dir {config.data_dir} has no validation rows: measure on the training rows "
                "with --split train, add a file valid.jsonl, or set val_split."
            )
        _, chain = load_chain(config, dataset)
        adapter = read_adapter(adapter_path, chain) if adapter_path else Adapter({}, {})
        objective = objective_of(config)
        dataset = objective.prepared(dataset, config.max_seq_length)
        dataset = with_references(objective, config, chain, dataset)
        params = adapting.stage_params(chain, adapter)
        what = (objective, chain, adapter.scales, params, dataset)
        loss, metrics = measure(*what, config.batch_size, tell=tell)
    return EvalResult(
        loss=loss,
        perplexity=None if metrics else events.perplexity(loss),
        metrics=metrics,
        tokens=dataset.supervised_tokens,
        rows=len(dataset),
        truncated=dataset.truncated,
        dropped=dataset.dropped,
    )
