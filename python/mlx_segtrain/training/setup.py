"""From a configuration to all that a run needs; every check before anything is written."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import events
from ..adapters import WEIGHTS, holds_run, read_adapter
from ..config import TrainConfig
from ..data import Dataset, Options, Pair, Prompting, Row, batches, load_dataset
from ..data.dataset import remarks, sequences
from ..errors import InputError
from ..files import clean
from ..lora import Adapter
from ..lora.ranks import asked
from ..models import Chain, adapting, chain_of, load_model, load_tokenizer
from ..models.tables import tables_of
from ..objectives import Objective
from ..objectives.preference import Dpo, Orpo, Simpo
from ..objectives.sft import Sft
from ..planning.run import RunPlan, plan_run, ways
from ..schedule import Grads
from ..streams import (
    PAIR,
    SHARED_LEAST,
    SINGLE,
    BatchShape,
    StreamShape,
    joined,
    padded,
    trim_start,
)
from .checkpoint import STATE, Checkpoint, found, newest
from .contents import check_own
from .layout import Layout
from .log import check_free
from .references import with_references


@dataclass(frozen=True)
class Setup:
    """A loaded model, its objective, where its adapter's factors stand in a vector, and the data.

    `config` has the number of steps that its epochs come to; `apart`: pairs share nothing.
    """

    config: TrainConfig
    model: Any
    chain: Chain
    objective: Objective
    scales: dict[str, float]
    layout: Layout
    train: Dataset
    valid: Dataset | None
    tokenizer: Any
    plan: RunPlan
    apart: bool = False


@dataclass(frozen=True)
class Start:
    """Where a run goes on from, if it does, and what its folder held when that was found."""

    resumed: Checkpoint | None
    seen: Any

    @staticmethod
    def trace(path: Path) -> Any:
        """What tells whether a run has been in the folder."""
        log = path / "metrics.jsonl"
        return list(found(path)), log.stat().st_size if log.exists() else 0


def check_output(config: TrainConfig, warn: Callable[[str], None]) -> Start:
    """InputError if adapter_path cannot take the run."""
    path = config.adapter_path
    if path.exists() and not path.is_dir():
        raise InputError(f"adapter_path {path} is a file: give a folder for the adapter.")
    check_free(path)
    if config.resume:
        with suppress(OSError):
            clean(path / STATE)  # a checkpoint that was about to be written anew
    seen = Start.trace(path)
    if config.resume:
        checkpoint = newest(path, warn)
        if checkpoint is not None:
            return Start(checkpoint, seen)
        if config.resume is True:
            raise InputError(
                f"adapter_path {path} holds no checkpoint to resume: leave --resume out, or give "
                "--resume auto, which then begins."
            )
    elif holds_run(path) and not config.overwrite:
        raise InputError(
            f"adapter_path {path} already holds a run: choose another folder, give --resume to go "
            "on with it, or --overwrite."
        )
    if (path / WEIGHTS).exists() and not config.overwrite:
        raise InputError(
            f"adapter_path {path} holds an adapter, but no checkpoint to resume: choose another "
            "folder, or give --overwrite."
        )
    if config.warm_start is not None:
        warm, own = config.warm_start.resolve(), path.resolve()
        if warm in (own, own / "best") or warm.parent == own / "checkpoints":
            raise InputError(
                f"warm_start {warm} lies in adapter_path {path}, which this run replaces: give "
                "another adapter_path."
            )
    check_own(path)
    return Start(None, seen)


def check_tokens(model: Any, *datasets: Dataset) -> None:
    """InputError if the tokenizer gave tokens that the loaded model has no rows for: MLX would read
    past the end of the table."""
    tables = tables_of(model)
    known = min(tables.tokens, tables.logits)
    for dataset in datasets:
        for row in (own for whole in dataset.rows for own in sequences(whole)):
            if len(row) and row.ids.max() >= known:
                raise InputError(
                    f"{row.source}: the tokenizer gives token {row.ids.max()}, and the model has "
                    f"{known}: they do not belong together."
                )


def check_length(chain: Chain, max_seq_length: int) -> None:
    """InputError if sequences could be longer than the model was made for."""
    if chain.max_length is not None and max_seq_length > chain.max_length:
        raise InputError(
            f"max_seq_length is {max_seq_length}, but the model was made for at most "
            f"{chain.max_length} tokens: lower it."
        )


def objective_of(config: TrainConfig) -> Objective:
    if config.method == "dpo":
        return Dpo(config.dpo_beta, config.dpo_loss, config.label_smoothing)
    if config.method == "orpo":
        return Orpo(config.orpo_lambda, config.sft_scope)
    if config.method == "simpo":
        return Simpo(config.simpo_beta, config.simpo_gamma)
    return Sft()


@dataclass(frozen=True)
class Inputs:
    """What is read before a model is loaded. `config` has the steps that its epochs come to."""

    config: TrainConfig
    tokenizer: Any
    train: Dataset
    valid: Dataset | None


def read_inputs(config: TrainConfig, on_event: events.OnEvent) -> Inputs:
    """InputError for data that cannot be used."""
    on_event(events.stage("load", 0.01, f"loading {config.model_dir.name}"))
    tokenizer = load_tokenizer(config.model_dir)
    raw = Prompting(config.prompt_format).is_raw(tokenizer)
    config = config.model_copy(update={"prompt_format": "raw" if raw else "chat"})
    train, valid = load_dataset(config.data_dir, tokenizer, Options.of(config))
    for option in ("early_stopping_patience", "keep_best"):
        if valid is None and getattr(config, option):
            raise InputError(
                f"{option} needs a validation loss, and {config.data_dir} has no valid.jsonl: add "
                "one, or leave the option out."
            )
    for sentence in remarks(config.data_dir, train, valid):
        on_event(events.warning(sentence))
    return Inputs(with_iters(config, train), tokenizer, train, valid)


def prepare(
    inputs: Inputs, on_event: events.OnEvent, resumed: Checkpoint | None = None
) -> tuple[Setup, mx.array]:
    """Plans, loads the model, and makes the factors of a fresh adapter, a vector.

    Pairs run as in the run that is resumed. InputError for whatever does not fit, memory included:
    before the weights are loaded.
    """
    config, train, valid = inputs.config, inputs.train, inputs.valid
    apart = resumed is not None and resumed.apart
    try:
        plan = plan_run(config, *largest_batches(_apart(train) if apart else train, config))
    except InputError as error:
        if resumed is not None or not _shares(train):
            raise
        try:  # pairs share nothing if only apart they fit
            plan, apart = plan_run(config, *largest_batches(_apart(train), config)), True
        except InputError:
            raise error from None
    train = _apart(train) if apart else train
    on_event(events.stage("setup", 0.02, str(plan)))
    setup, vector = load_setup(config, plan, train, valid, inputs.tokenizer)
    setup = replace(setup, apart=apart)
    if coarse := _coarse(setup):
        on_event(
            events.warning(
                f"stock mlx-lm 0.32 cannot load DoRA of linears with 3, 5 or 6 bits ({coarse}): "
                "only we can load this adapter."
            )
        )
    if config.method == "dpo" and not config.reference_free:
        with plan.limits():
            setup = _referenced(setup, on_event)
    on_event(events.stage("data", 0.05, f"{config.data_dir}: {train.summary}"))
    return setup, vector


def _coarse(setup: Setup) -> str | None:
    """The first linear with DoRA of which mlx-lm reckons the width wrongly."""
    names = (name.removesuffix(".m") for _, name, _ in setup.layout.entries if name.endswith(".m"))
    odd = (path for path in names if getattr(setup.chain.adaptable[path], "bits", 4) in (3, 5, 6))
    return next(odd, None)


def _apart(train: Dataset) -> Dataset:
    """With pairs that share nothing."""
    return replace(train, rows=[replace(pair, shared=0) for pair in train.rows])


def _shares(train: Dataset) -> bool:
    """Whether any batch runs what both of a pair begin with once."""
    return any(isinstance(row, Pair) and row.shared >= SHARED_LEAST for row in train.rows)


def with_iters(config: TrainConfig, train: Dataset) -> TrainConfig:
    """With the steps that the epochs come to, rounded up; InputError if the warmup takes them."""
    if config.epochs is None:
        return config
    per_step = config.batch_size * config.grad_accumulation_steps
    iters = max(1, math.ceil(config.epochs * len(train.rows) / per_step))
    if config.warmup_iters >= iters:
        raise InputError(
            f"warmup_iters = {config.warmup_iters} leaves nothing of the {iters} steps that epochs "
            f"= {config.epochs:g} are: lower it."
        )
    return config.model_copy(update={"iters": iters})


def load_setup(
    config: TrainConfig, plan: RunPlan, train: Dataset, valid: Dataset | None, tokenizer: Any
) -> tuple[Setup, mx.array]:
    """Loads the weights; the factors of a fresh adapter, or of that to go on from, as a vector."""
    model, _ = load_model(config.model_dir)
    chain = chain_of(model)
    check_length(chain, config.max_seq_length)
    check_tokens(model, train, *(() if valid is None else (valid,)))
    if config.warm_start is not None:
        adapter = read_adapter(config.warm_start, chain)
    else:
        ranks = adapting.choose_ranks(chain, **asked(config))
        kinds: dict[str, bool] = {"root": config.rs_lora, "dora": config.use_dora}
        adapter = adapting.init(chain, ranks, config.scale, config.seed, **kinds)
    chain = chain.adapting(adapter.scales)
    if any(
        plan.cuts.segments[-1] != len(batch.streams) * sum(map(len, chain.layers))
        for batch, plan in zip(plan.batches, plan.plans, strict=False)
    ):
        plan = replace(plan, plans=())  # the family takes the generic path after all
    params = adapting.stage_params(chain, adapter)
    layout = Layout.of(params)
    vector = layout.join(params)
    mx.eval(vector)
    objective = objective_of(config)
    what = (config, model, chain, objective, adapter.scales, layout)
    return Setup(*what, train, valid, tokenizer, plan), vector


def _referenced(setup: Setup, on_event: events.OnEvent) -> Setup:
    """With what the model without adapter gives for the pairs that the run will see."""
    config = setup.config
    source = batches(setup.train, config.batch_size, config.seed)
    steps = config.iters * config.grad_accumulation_steps
    epoch = len(setup.train.rows) // config.batch_size
    seen = {int(i) for _, batch in zip(range(steps), source, strict=False) for i in batch.rows}
    if steps >= 2 * epoch:
        seen = set(range(len(setup.train.rows)))
    how = (config, setup.chain, on_event)
    train = with_references(*how, setup.train, seen)
    valid = setup.valid and with_references(*how, setup.valid, range(len(setup.valid.rows)))
    return replace(setup, train=train, valid=valid)


def largest_batches(data: Dataset, config: TrainConfig) -> list[BatchShape]:
    """As large as any of the data's in every respect, one for each number of streams there is."""
    rows = config.batch_size
    how = ways(config)
    if config.method == "sft":
        # The last token is only predicted.
        length = padded(max(len(row) for row in data.rows), rows) - 1
        trained = [np.flatnonzero(row.weights[1:]) for row in data.rows]
        first = min((int(t[0]) for t in trained if t.size), default=0)
        streams = (StreamShape(SINGLE[0], length, length - trim_start(first)),)
        return [BatchShape(rows, streams, rows * max(t.size for t in trained), **how)]
    full = config.method == "orpo" and config.sft_scope == "full"
    pairs: list[Pair] = data.rows
    alike = [pair for pair in pairs if pair.shared >= SHARED_LEAST]
    # A batch of several pairs shares what all of them do: with one that does not, nothing.
    apart = [pair for pair in pairs if pair.shared < SHARED_LEAST] if rows == 1 else pairs
    if len(alike) == len(pairs):
        apart = []
    shapes = []
    if apart:
        streams = tuple(
            StreamShape(stream, *_rows([getattr(pair, stream.name) for pair in apart], rows, full))
            for stream, full in zip(PAIR, (full, False), strict=True)
        )
        shapes.append(BatchShape(rows, streams, rows * _counted(apart, full), **how))
    if alike:
        length, trimmed = _rows([pair.chosen for pair in alike], rows, full)
        least = min(pair.shared for pair in alike)
        rests = [
            padded(len(pair.rejected), rows) - 1 - (pair.shared if rows == 1 else least)
            for pair in alike
        ]
        shared, rest = max(pair.shared for pair in alike), max(rests)
        stream = StreamShape(joined(), length + rest, trimmed + rest, shared, rest)
        shapes.append(BatchShape(rows, (stream,), rows * _counted(alike, full), **how))
    return shapes


def _rows(sequences: list[Row], rows: int, full: bool) -> tuple[int, int]:
    """Most tokens that run, and most that come into question for the loss: of `full` ones all."""
    lengths = [padded(len(row), rows) - 1 for row in sequences]
    first = [0 if full else int(np.flatnonzero(row.weights)[0]) - 1 for row in sequences]
    trimmed = [n - trim_start(max(t, 0)) for n, t in zip(lengths, first, strict=True)]
    return max(lengths), max(lengths) if rows > 1 and full else max(trimmed)


def _counted(pairs: list[Pair], full: bool) -> int:
    """Most tokens of a pair that meet the head."""
    return max(
        (len(pair.chosen) - 1 if full else np.count_nonzero(pair.chosen.weights))
        + np.count_nonzero(pair.rejected.weights)
        for pair in pairs
    )


def with_params(chain: Chain, scales: Mapping[str, float], params: Grads) -> Adapter:
    """The adapter with these factors, by stage."""
    flat = {name: factor for own in params.values() for name, factor in own.items()}
    tensors = {path: (flat[f"{path}.lora_a"], flat[f"{path}.lora_b"]) for path in scales}
    magnitudes = {path: flat[f"{path}.m"] for path in scales if f"{path}.m" in flat}
    return Adapter(tensors, dict(scales), magnitudes, chain.tied_for(tensors))
