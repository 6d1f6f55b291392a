"""From a configuration to all that a run needs; every check before anything is written."""

from dataclasses import dataclass, replace
from typing import Any

from .. import events, lora
from ..adapters import holds_run
from ..config import TrainConfig
from ..data import Dataset, load_dataset
from ..errors import InputError
from ..lora import Adapter
from ..models import Chain, chain_of, load_base
from ..schedule import Grads, Stage


@dataclass(frozen=True)
class Setup:
    """A loaded model as stages, its adapter as it starts, and the data."""

    chain: Chain
    adapter: Adapter
    stages: list[Stage]
    train: Dataset
    valid: Dataset | None
    tokenizer: Any


def segment_size(config: TrainConfig) -> int:
    """Layers per segment; `auto`, and grad_checkpoint, mean one until a planner chooses."""
    if config.segment_size == "auto" or config.grad_checkpoint:
        return 1
    return config.segment_size


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


def prepare(config: TrainConfig, on_event: events.OnEvent) -> Setup:
    """Loads model and data and attaches a fresh adapter. InputError for whatever does not fit."""
    on_event(events.stage("load", 0.01, f"loading {config.model_dir.name}"))
    model, _, tokenizer = load_base(config.model_dir)
    on_event(events.stage("setup", 0.02, "choosing ranks"))
    chain = chain_of(model)
    check_length(chain, config.max_seq_length)
    ranks = lora.choose_ranks(
        chain,
        rank=config.rank,
        rank_scaling=config.rank_scaling,
        target_modules=config.target_modules,
        num_layers=config.num_layers,
        model_dir=config.model_dir,
    )
    adapter = lora.init(chain, ranks, config.scale, config.seed)
    on_event(events.stage("data", 0.05, f"reading {config.data_dir}"))
    train, valid = load_dataset(
        config.data_dir,
        tokenizer,
        max_seq_length=config.max_seq_length,
        train_on=config.train_on,
        append_eos=config.append_eos,
    )
    return Setup(chain, adapter, chain.stages(adapter.scales), train, valid, tokenizer)


def value_and_grad(setup: Setup, config: TrainConfig) -> Any:
    """step(params, values) → ((loss,), grads) of this run's model and objective."""
    from ..objectives import sft

    cuts = setup.chain.cuts(segment_size(config))
    return sft.value_and_grad(setup.chain, setup.stages, cuts)


def with_params(adapter: Adapter, params: Grads) -> Adapter:
    """The adapter with its factors taken from the stages' parameters."""
    flat = {name: factor for own in params.values() for name, factor in own.items()}
    tensors = {path: (flat[f"{path}.lora_a"], flat[f"{path}.lora_b"]) for path in adapter.tensors}
    return replace(adapter, tensors=tensors)
