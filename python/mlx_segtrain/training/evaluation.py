"""Computes the mean loss per token, pair or row over a whole data set."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import events, hub
from ..adapters import read_adapter
from ..config import ROWS, TrainConfig
from ..data import Dataset, Options, eval_batches, load_split
from ..data.dataset import Split
from ..data.template import Tokenizer
from ..errors import InputError
from ..lora import Adapter
from ..models import Chain, adapting, load_tokenizer
from ..objectives import Objective, Value, baseline_of, named, objective_of, value, with_baseline
from ..schedule import Params
from .policy import run_policy
from .ranks import ALONE, Ranks
from .references import with_references
from .setup import load_chain

#: The interval between progress events, in seconds.
TELL_S = 0.5


@dataclass(frozen=True)
class EvalResult:
    """The mean loss, in nats per token, over `rows` rows with `tokens` tokens in the loss.

    With preference methods the loss is per pair or row, and `metrics` contains the accuracy, the
    margin, the rewards and, for kto, the KL divergence.
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
    value: Value = value,
    tell: events.OnEvent | None = None,
) -> tuple[float, dict[str, float]]:
    """Returns the loss and the metrics of an objective over all rows, without a backward pass. Each
    rank runs its share of the batches. `tell` receives progress events."""
    every = list(eval_batches(dataset, batch_size))
    batches, total = ranks.share(every), objective.total(every)
    own = baseline_of(objective, chain, scales, params, batches, total, value)
    total = with_baseline(objective, total, sum(ranks.gather(own)))
    sums = [0.0] * (1 + len(objective.metrics))
    begin = told = time.monotonic()
    for n, batch in enumerate(batches, 1):
        outputs = value(objective, chain, scales, params, batch, total)
        sums = [x + float(y) for x, y in zip(sums, outputs, strict=True)]
        now = time.monotonic()
        if tell is not None and now >= told + TELL_S:
            told = now
            tell(events.evaluating(n, len(batches), (now - begin) / n * (len(batches) - n)))
    sums = [sum(parts) for parts in zip(*ranks.gather(sums), strict=True)]
    return sums[0], named(objective, sums[1:])


def load_rows(
    config: TrainConfig,
    tokenizer: Tokenizer,
    options: Options,
    split: Split,
    on_event: events.OnEvent | None,
) -> Dataset:
    """Reads a split of the configured data. Raises InputError if the split has no rows."""
    found = load_split(config.data_dir, tokenizer, options, split, config.model_dir, on_event)
    if found is None:
        raise InputError(
            f"data_dir {config.data_dir} has no validation rows: evaluate on the training rows "
            "with --split train, add a file valid.jsonl, or set val_split."
        )
    return found


def evaluate(
    config: TrainConfig,
    adapter_path: Path | None = None,
    *,
    split: Split = "valid",
    on_event: events.OnEvent | None = None,
) -> EvalResult:
    """Computes the loss and the metrics of a model, with or without an adapter, on a split of the
    configured data.

    `on_event` receives the progress of downloads and of the evaluation. Raises InputError if the
    model, the adapter or the data cannot be read, or if they do not fit together.
    """
    if ROWS[config.method] == "prompt":
        raise InputError(
            f"method {config.method} has no loss per row: call score() to measure rewards instead."
        )
    tell = on_event or (lambda event: None)
    config = hub.located(config, tell)
    if adapter_path:
        adapter_path = hub.adapter(adapter_path, tell)
    with run_policy(config):
        tokenizer = load_tokenizer(config.model_dir)
        dataset = load_rows(config, tokenizer, Options.of(config), split, on_event)
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
