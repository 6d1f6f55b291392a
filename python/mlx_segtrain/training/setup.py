"""From a configuration to all that a run needs; every check before anything is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from .. import events, lora
from ..adapters import holds_run
from ..config import TrainConfig
from ..data import Dataset, load_dataset
from ..errors import InputError
from ..lora import Adapter
from ..models import Chain, chain_of, load_model, load_tokenizer
from ..objectives import sft
from ..planning import BatchShape
from ..planning.run import RunPlan, plan_run
from ..ranks import asked
from ..schedule import Grads, Stage
from ..stages import padded, trim_start
from .layout import Layout


@dataclass(frozen=True)
class Setup:
    """A loaded model as stages, where its adapter's factors stand in a vector, and the data."""

    chain: Chain
    scales: dict[str, float]
    stages: list[Stage]
    layout: Layout
    train: Dataset
    valid: Dataset | None
    tokenizer: Any
    plan: RunPlan


def check_output(config: TrainConfig) -> None:
    """InputError if adapter_path cannot take a new run."""
    path = config.adapter_path
    if path.exists() and not path.is_dir():
        raise InputError(f"adapter_path {path} is a file: give a folder for the adapter.")
    if holds_run(path) and not config.overwrite:
        raise InputError(
            f"adapter_path {path} already holds a run: choose another folder, or give --overwrite."
        )


def check_length(chain: Chain, max_seq_length: int) -> None:
    """InputError if sequences could be longer than the model was made for."""
    if chain.max_length is not None and max_seq_length > chain.max_length:
        raise InputError(
            f"max_seq_length is {max_seq_length}, but the model was made for at most "
            f"{chain.max_length} tokens: lower it."
        )


def prepare(config: TrainConfig, on_event: events.OnEvent) -> tuple[Setup, mx.array]:
    """Reads the data, plans, loads the model, and makes the factors of a fresh adapter, a vector.

    InputError for whatever does not fit, memory included: before the weights are loaded.
    """
    on_event(events.stage("load", 0.01, f"loading {config.model_dir.name}"))
    tokenizer = load_tokenizer(config.model_dir)
    train, valid = load_dataset(
        config.data_dir,
        tokenizer,
        max_seq_length=config.max_seq_length,
        train_on=config.train_on,
        append_eos=config.append_eos,
    )
    for option in ("early_stopping_patience", "keep_best"):
        if valid is None and getattr(config, option):
            raise InputError(
                f"{option} needs a validation loss, and {config.data_dir} has no valid.jsonl: add "
                "one, or leave the option out."
            )
    plan = plan_run(config, longest_batch(train, config))
    on_event(events.stage("setup", 0.02, str(plan)))
    setup, vector = load_setup(config, plan, train, valid, tokenizer)
    size = f"{len(train.rows)} rows, {train.tokens} tokens"
    on_event(events.stage("data", 0.05, f"{config.data_dir}: {size}"))
    return setup, vector


def load_setup(
    config: TrainConfig, plan: RunPlan, train: Dataset, valid: Dataset | None, tokenizer: Any
) -> tuple[Setup, mx.array]:
    """Loads the weights; the factors of a fresh adapter as a vector."""
    model, _ = load_model(config.model_dir)
    chain = chain_of(model)
    check_length(chain, config.max_seq_length)
    if plan.planned is not None and plan.planned.cuts.segments[-1] != sum(map(len, chain.layers)):
        plan = replace(plan, planned=None)  # the family takes the generic path after all
    ranks = lora.choose_ranks(chain, **asked(config))
    adapter = lora.init(chain, ranks, config.scale, config.seed, root=config.rs_lora)
    params = lora.stage_params(chain, adapter)
    layout = Layout.of(params)
    vector = layout.join(params)
    mx.eval(vector)
    stages = chain.stages(adapter.scales)
    return Setup(chain, adapter.scales, stages, layout, train, valid, tokenizer, plan), vector


def longest_batch(data: Dataset, config: TrainConfig) -> BatchShape:
    """One as large as any of the data's in every respect."""
    # The last token is only predicted.
    length = padded(max(len(row.ids) for row in data.rows), config.batch_size) - 1
    trained = [np.flatnonzero(row.weights[1:]) for row in data.rows]
    first = min((int(t[0]) for t in trained if t.size), default=0)
    return BatchShape(
        rows=config.batch_size,
        length=length,
        trimmed=length - trim_start(first),
        loss=config.batch_size * max(t.size for t in trained),
        accumulates=config.grad_accumulation_steps > 1,
    )


def value_and_grad(setup: Setup, plan: RunPlan, watch: Callable[[], None] | None = None) -> Any:
    """step(params, values) → ((loss,), grads) of this run's model and objective by a plan."""
    if plan.planned is not None:
        cuts = plan.planned.cuts
    else:
        cuts = setup.chain.cuts(1 if plan.size is None else plan.size)
    return sft.value_and_grad(setup.chain, setup.stages, cuts, watch)


def with_params(scales: Mapping[str, float], params: Grads) -> Adapter:
    """The adapter with these factors, by stage."""
    flat = {name: factor for own in params.values() for name, factor in own.items()}
    tensors = {path: (flat[f"{path}.lora_a"], flat[f"{path}.lora_b"]) for path in scales}
    return Adapter(tensors, dict(scales))
