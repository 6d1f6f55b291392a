"""From a configuration to all that a run needs, with every check before anything is written."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import events
from ..adapters import WEIGHTS, holds_run, read_adapter
from ..config import ROWS, TrainConfig
from ..data import Dataset, Options, Prompting, batches, batches_in_epoch, load_dataset
from ..data.batching import described
from ..data.dataset import remarks
from ..data.encoding import sequences
from ..data.sources import Source
from ..errors import InputError
from ..files import clean
from ..hub import title
from ..lora import ARRAYS, KINDS, Adapter
from ..lora.ranks import asked
from ..models import Chain, adapting, chain_of, load_model, load_tokenizer
from ..models.tables import tables_of
from ..objectives import Objective, objective_of
from ..planning.packing import pays
from ..planning.rollouts import check_rollouts, rollout_bytes, rollouts_at_once
from ..planning.run import RunPlan, first_that_fits
from ..rewards import Rewards
from ..schedule import Grads
from .checkpoint import STATE, Checkpoint, found, newest
from .contents import check_own
from .layout import Layout
from .log import check_free
from .ranks import ALONE, Ranks
from .record import read
from .references import with_references


@dataclass(frozen=True)
class Inputs:
    """What is read before a model is loaded. `config` has the steps that its epochs come to;
    `remarks` say in sentences what of the data is left out or wrong."""

    config: TrainConfig
    tokenizer: Any
    train: Dataset
    valid: Dataset | None
    remarks: list[str]


@dataclass(frozen=True)
class Setup(Inputs):
    """And a loaded model, its objective, the scales of its adapter, and where the adapter's factors
    stand in a vector; `apart`: pairs share nothing. `rollout_peak` are the bytes that generating
    completions takes, if the method does that and memory is predicted."""

    plan: RunPlan
    model: Any
    chain: Chain
    objective: Objective
    scales: dict[str, float]
    layout: Layout
    apart: bool = False
    rollout_peak: int | None = None


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


def accumulating(
    config: TrainConfig, ranks: Ranks, resumed: Checkpoint | None, tell: events.OnEvent
) -> TrainConfig:
    """With micro-batches for every rank: those of a step are shared out. A run that was on several
    keeps its number, on however many it goes on. InputError for fewer than ranks."""
    name, count = "grad_accumulation_steps", config.grad_accumulation_steps
    earlier = resumed.record if resumed else {}
    if name not in config.model_fields_set:
        if resumed and max(ranks.size, earlier.get("ranks", 1)) > 1:
            count = earlier["config"][name]
        elif ranks.size > 1:
            count = ranks.size
            said = f"{name} is {count}: a step has one batch for each of the {count} ranks"
            tell(events.stage("setup", 0.0, said))
    if count < ranks.size:
        raise InputError(
            f"{name} is {count}, and there are {ranks.size} ranks, each of which needs a batch of "
            f"every step: start {count} or fewer, or "
            + ("begin another run." if resumed else "raise it."),
            field=name,
        )
    return config.model_copy(update={name: count})


def read_inputs(
    config: TrainConfig,
    sources: tuple[Source, Source | None],
    on_event: events.OnEvent,
    resumed: Checkpoint | None = None,
    rewards: Rewards | None = None,
) -> Inputs:
    """InputError for data that cannot be used. What `auto` leaves open is decided, as it was in the
    run that is resumed. A run on prompts has rewards."""
    on_event(events.stage("load", 0.01, f"loading {title(config.model_dir)}"))
    tokenizer = load_tokenizer(config.model_dir)
    raw = Prompting(config.prompt_format).is_raw(tokenizer)
    config = config.model_copy(update={"prompt_format": "raw" if raw else "chat"})
    tools = rewards.tools if rewards else ()
    how = (tokenizer, Options.of(config, tools), config.model_dir, on_event)
    train, valid = load_dataset(sources, *how)
    for option in ("early_stopping_patience", "keep_best"):
        if valid is None and getattr(config, option):
            raise InputError(
                f"{option} needs a validation loss, and the data has no validation rows: add a "
                "file valid.jsonl, set val_split, or leave the option out."
            )
    objective = objective_of(config)
    said = [*remarks(config.data_dir, train, valid, *sources), *objective.remarks(train)]
    train, valid = (x and objective.prepared(x, config.max_seq_length) for x in (train, valid))
    assert train is not None
    for sentence in said:
        on_event(events.warning(sentence))
    if config.packing == "auto":
        packs = resumed.record["config"].get("packing") if resumed else pays(config, train)
        config = config.model_copy(update={"packing": packs})
    if ROWS[config.method] == "prompt":
        for data in filter(None, (train, valid)):
            if rewards is not None:
                rewards.check(config, tokenizer, data.rows)
        config = with_rollouts(config, _longest(config, train, valid), resumed)
    elif config.packing:
        train, valid = (x and x.in_rows_of(config.max_seq_length) for x in (train, valid))
        assert train is not None
    return Inputs(with_iters(config, train), tokenizer, train, valid, said)


def with_rollouts(config: TrainConfig, tokens: int, resumed: Checkpoint | None) -> TrainConfig:
    """With the completions that are generated at once, of up to so many tokens with their prompts:
    as many as fit. A run that is resumed keeps its number, since sums over other batches round
    differently; one that ended before its first checkpoint, too. NoRoom if it was given, and
    so many do not fit."""
    if config.rollout_batch != "auto":
        check_rollouts(config, tokens)
        return config
    earlier = resumed.record if resumed else {}
    if not resumed and config.resume:
        with suppress(InputError):
            earlier = read(config.adapter_path)
    known = earlier.get("config", {}).get("rollout_batch")
    if not isinstance(known, int):
        known = rollouts_at_once(config, tokens, config.batch_size * config.group_size)
    return config.model_copy(update={"rollout_batch": known})


def prepare(
    inputs: Inputs,
    on_event: events.OnEvent,
    resumed: Checkpoint | None = None,
    loaded: nn.Module | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Setup, mx.array]:
    """Plans a run, loads its model unless that is done, and makes its adapter's factors, a vector.

    Pairs run as in the run that is resumed. InputError for whatever does not fit, memory included:
    before the weights are loaded.
    """
    config = inputs.config
    objective = objective_of(config)
    choices = list(objective.choices(inputs.train))
    if resumed is not None:
        choices = [choices[-1 if resumed.apart else 0]]

    def fitting(choices: list[Dataset]) -> tuple[Dataset, RunPlan]:
        batches = partial(objective.batch_shapes, rows=config.batch_size)
        return first_that_fits(config, choices, batches, measures=True)

    train, plan = fitting(choices)
    # The order of rows follows from the choice: all ranks run what the one with least memory can.
    own = next(i for i, choice in enumerate(choices) if choice is train)
    if (agreed := max(ranks.gather(own))) != own:
        train, plan = fitting(choices[agreed:])
    on_event(plan_event(plan, 0.02, str(plan)))
    setup, vector = load_setup(replace(inputs, train=train), plan, loaded)
    setup = replace(setup, apart=train is not inputs.train)
    if ROWS[config.method] == "prompt":
        assert isinstance(config.rollout_batch, int)
        peak = rollout_bytes(config, _longest(config, train, inputs.valid), config.rollout_batch)
        setup = replace(setup, rollout_peak=peak)
        gb = "" if peak is None else f"; {peak / 1e9:.2f} GB at most"
        said = f"rollouts: {config.rollout_batch} completions at once{gb}"
        on_event(events.stage("setup", 0.03, said))
    if coarse := _coarse(setup):
        on_event(
            events.warning(
                f"stock mlx-lm 0.32 cannot load DoRA of linears with 3, 5 or 6 bits ({coarse}): "
                "only we can load this adapter."
            )
        )
    if objective.reference is not None:
        with plan.limits():
            setup = _referenced(setup, on_event, ranks)
    said = f"{train.name}: {train.summary}; {described(train, config.batch_size)}"
    on_event(events.stage("data", 0.05, said))
    return setup, vector


def _coarse(setup: Setup) -> str | None:
    """The first linear with DoRA whose width mlx-lm computes wrongly."""
    names = (name.removesuffix(".m") for _, name, _ in setup.layout.entries if name.endswith(".m"))
    odd = (path for path in names if getattr(setup.chain.adaptable[path], "bits", 4) in (3, 5, 6))
    return next(odd, None)


def _longest(config: TrainConfig, *prompts: Dataset | None) -> int:
    """Tokens of the longest prompt with the longest completion."""
    longest = max(int(own.columns.length.max()) for own in prompts if own)
    return longest + config.max_completion_tokens


def with_iters(config: TrainConfig, train: Dataset) -> TrainConfig:
    """With the steps that the epochs come to, rounded up; InputError if the warmup takes them."""
    if config.epochs is None:
        return config
    batches = batches_in_epoch(train, config.batch_size)
    iters = max(1, math.ceil(config.epochs * batches / config.grad_accumulation_steps))
    if config.warmup_iters >= iters:
        raise InputError(
            f"warmup_iters = {config.warmup_iters} leaves nothing of the {iters} steps that epochs "
            f"= {config.epochs:g} are: lower it."
        )
    return config.model_copy(update={"iters": iters})


def plan_event(plan: RunPlan, progress: float, message: str) -> events.Event:
    peak = None if plan.planned is None else plan.planned.peak
    return events.plan(progress, message, peak, plan.budget)


def load_chain(
    config: TrainConfig, *datasets: Dataset | None, loaded: nn.Module | None = None
) -> tuple[Any, Chain]:
    """The model of a configuration, loaded if it is not yet, and its chain.

    InputError if sequences could be longer than it was made for, or a token of the data has no row
    in its tables: MLX would read past their end.
    """
    model = load_model(config.model_dir)[0] if loaded is None else loaded
    chain = chain_of(model)
    if chain.max_length is not None and config.max_seq_length > chain.max_length:
        raise InputError(
            f"max_seq_length is {config.max_seq_length}, but the model was made for at most "
            f"{chain.max_length} tokens: lower it."
        )
    tables = tables_of(model)
    known = min(tables.tokens, tables.logits)
    for data in filter(None, datasets):
        for i, side in np.argwhere(data.columns.top >= known)[:1]:
            row, top = sequences(data.rows[i])[side], data.columns.top[i, side]
            raise InputError(
                f"{row.source}: the tokenizer gives token {top}, and the model has "
                f"{known}: they do not belong together."
            )
    return model, chain


def load_setup(
    inputs: Inputs, plan: RunPlan, loaded: nn.Module | None = None
) -> tuple[Setup, mx.array]:
    """Loads the weights; the factors of a fresh adapter, or of that to go on from, as a vector."""
    config = inputs.config
    model, chain = load_chain(config, inputs.train, inputs.valid, loaded=loaded)
    if config.warm_start is not None:
        adapter = read_adapter(config.warm_start, chain)
    else:
        ranks = adapting.choose_ranks(chain, **asked(config))
        kinds = {kind.word: getattr(config, f"use_{kind.word}") for kind in KINDS}
        how = {"root": config.rs_lora, **kinds}
        adapter = adapting.init(chain, ranks, config.scale, config.seed, **how)
    chain = chain.adapting(adapter.scales)
    if any(
        plan.cuts.segments[-1] != len(batch.streams) * sum(map(len, chain.layers))
        for batch, plan in zip(plan.batches, plan.plans, strict=False)
    ):
        plan = replace(plan, plans=())  # the family takes the generic path after all
    if inputs.train.packed and not chain.branches:
        raise InputError(
            f"packing is not for {config.model_dir.name}, whose layers are mlx-lm's own and know "
            "no packed rows: leave it out.",
            field="packing",
        )
    params = adapting.stage_params(chain, adapter)
    layout = Layout.of(params)
    vector = layout.join(params)
    mx.eval(vector)
    read = (config, inputs.tokenizer, inputs.train, inputs.valid, inputs.remarks)
    made = (plan, model, chain, objective_of(config), adapter.scales, layout)
    return Setup(*read, *made), vector


def _referenced(setup: Setup, on_event: events.OnEvent, ranks: Ranks) -> Setup:
    """With what the model without adapter gives for the rows that the run will see."""
    config, train = setup.config, setup.train
    source = batches(train, config.batch_size, config.seed)
    count = config.iters * config.grad_accumulation_steps
    seen = None  # all, at the latest in the second epoch
    if count < 2 * (len(train) // config.batch_size):
        seen = {int(i) for batch in islice(source, count) for i in batch.rows}
    what = (setup.objective, config, setup.chain)
    train = with_references(*what, train, on_event, seen, ranks)
    valid = setup.valid and with_references(*what, setup.valid, on_event, ranks=ranks)
    return replace(setup, train=train, valid=valid)


def with_params(chain: Chain, scales: Mapping[str, float], params: Grads) -> Adapter:
    """The adapter with these factors, by stage."""
    flat = {name: factor for own in params.values() for name, factor in own.items()}
    arrays = {
        path: {name: flat[f"{path}.{name}"] for name in ARRAYS if f"{path}.{name}" in flat}
        for path in scales
    }
    return Adapter.of(arrays, scales, chain.tied_for(arrays))
