"""Evaluation: the mean loss of a token over a whole set."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx

from .. import events, lora
from ..adapters import read_adapter
from ..data import Dataset, eval_batches, load_split
from ..data.dataset import split_paths
from ..errors import InputError
from ..lora import Adapter
from ..models import Chain, chain_of, load_base
from ..objectives import sft
from ..schedule import Stage, forward


@dataclass(frozen=True)
class EvalResult:
    """loss in nats per token over `tokens` supervised tokens of `rows` rows."""

    loss: float
    perplexity: float | None
    tokens: int
    rows: int
    truncated: int
    dropped: int


def mean_loss(
    chain: Chain,
    stages: list[Stage],
    params: Mapping[str, Mapping[str, mx.array]],
    dataset: Dataset,
    batch_size: int,
) -> float:
    """Σ weight·CE / Σ weight over all rows, forward only."""
    head = sft.head(chain, needs_grad=False)
    total = float(sum(row.weights.sum() for row in dataset.rows))
    loss = 0.0
    for batch in eval_batches(dataset, batch_size):
        scope = forward(stages, params, sft.values(chain, batch, total))
        loss += float(head({}, *(scope[name] for name in sft.HEAD_READS)))
    return loss


def evaluate(
    model_dir: Path,
    data_dir: Path,
    adapter_path: Path | None = None,
    *,
    split: Literal["valid", "train"] = "valid",
    max_seq_length: int = 512,
    batch_size: int = 1,
    train_on: str = "assistant",
    append_eos: bool = True,
) -> EvalResult:
    """Loss and perplexity of a model, with an adapter or without, on a split of a data folder.

    InputError for what cannot be read or does not fit.
    """
    from .setup import check_length

    train_file, valid_file = split_paths(Path(data_dir))
    file = train_file if split == "train" else valid_file
    if file is None:
        raise InputError(f"data_dir {data_dir} holds no valid.jsonl: add one, or evaluate train.")
    model, _, tokenizer = load_base(model_dir)
    chain = chain_of(model)
    check_length(chain, max_seq_length)
    adapter = read_adapter(adapter_path, chain) if adapter_path else Adapter({}, {})
    dataset = load_split(
        file,
        tokenizer,
        max_seq_length=max_seq_length,
        train_on=train_on,
        append_eos=append_eos,
    )
    stages = chain.stages(adapter.scales)
    params = lora.stage_params(chain, adapter)
    loss = mean_loss(chain, stages, params, dataset, batch_size)
    return EvalResult(
        loss=loss,
        perplexity=events.perplexity(loss),
        tokens=dataset.supervised_tokens,
        rows=len(dataset.rows),
        truncated=dataset.truncated,
        dropped=dataset.dropped,
    )
