"""Loads and checks everything that a run needs, before anything is written."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
from ..errors import InputError, NoRoom
from ..files import clean
from ..hub import title
from ..lora import ARRAYS, KINDS, Adapter
from ..lora.ranks import asked
from ..models import Chain, adapting, chain_of, load_model, load_tokenizer
from ..models.tables import tables_of
from ..objectives import Objective, Value, objective_of, value
from ..planning.packing import pays
from ..planning.pipeline import Part
from ..planning.rollouts import check_rollouts, completions_of, rollout_bytes, rollouts_at_once
from ..planning.run import RunPlan, first_that_fits, planned
from ..planning.splitting import Member, split_run
from ..rewards import Rewards, with_all_columns
from ..schedule import Grads
from ..streams import BatchShape
from .checkpoint import STATE, Checkpoint, found, newest
from .contents import check_own
from .layout import Layout
from .log import check_free
from .pipe import Pipe
from .ranks import ALONE, Ranks
from .record import read
from .references import with_references
from .transfers import transfers_of


@dataclass(frozen=True)
class Inputs:
    """The inputs that are read before the model is loaded. In `config`, epochs have been converted
    to steps. `remarks` are sentences about data that was left out or looks wrong."""

    config: TrainConfig
    tokenizer: Any
    train: Dataset
    valid: Dataset | None
    remarks: list[str]


@dataclass(frozen=True)
class Setup(Inputs):
    """The inputs, the loaded model, and everything else that a step needs.

    `layout` describes the vector of all factors of the adapter. `pipe` is set in a pipeline.
    `apart` is whether the two responses of a pair run as separate sequences, without sharing
    tokens. `rollout_peak` is the predicted peak memory, in bytes, of generating completions; it is
    None if the method generates none or if memory is not predicted.
    """

    plan: RunPlan
    model: Any
    chain: Chain
    objective: Objective
    scales: dict[str, float]
    layout: Layout
    pipe: Pipe | None = None
    apart: bool = False
    rollout_peak: int | None = None

    @cached_property
    def own(self) -> Layout:
        """The layout of this rank's factors."""
        return self.layout.of_owners(self.pipe.owners(self.chain)) if self.pipe else self.layout

    @property
    def value(self) -> Value:
        """The function objectives.value, or its equivalent for a pipeline."""
        return self.pipe.value if self.pipe else value


@dataclass(frozen=True)
class Start:
    """`resumed` is the checkpoint from which a run continues, or None for a new run. `seen` is the
    value that `trace` returned for the folder when the run started."""

    resumed: Checkpoint | None
    seen: Any

    @staticmethod
    def trace(path: Path) -> Any:
        """Returns a value that changes when a run writes to the folder."""
        log = path / "metrics.jsonl"
        return list(found(path)), log.stat().st_size if log.exists() else 0


def check_output(config: TrainConfig, warn: Callable[[str], None]) -> Start:
    """Checks adapter_path, and returns the checkpoint from which the run starts, if there is one.
    Raises InputError if the run cannot use this folder."""
    path = config.adapter_path
    if path.exists() and not path.is_dir():
        raise InputError(f"adapter_path {path} is a file: it must be a folder.")
    check_free(path)
    if config.resume:
        with suppress(OSError):
            clean(path / STATE)  # restores a checkpoint whose replacement was interrupted
    seen = Start.trace(path)
    if config.resume:
        checkpoint = newest(path, warn)
        if checkpoint is not None:
            return Start(checkpoint, seen)
        if config.resume is True:
            raise InputError(
                f"adapter_path {path} contains no checkpoint to resume: leave --resume out, or use "
                "--resume auto, which starts a new run if there is no checkpoint."
            )
    elif holds_run(path) and not config.overwrite:
        if not found(path):
            raise InputError(
                f"adapter_path {path} contains a run that saved no checkpoint: choose another "
                "folder, or use --overwrite to replace it."
            )
        raise InputError(
            f"adapter_path {path} already contains a run: choose another folder, use --resume to "
            "continue it, or --overwrite to replace it."
        )
    if (path / WEIGHTS).exists() and not config.overwrite:
        raise InputError(
            f"adapter_path {path} contains an adapter, but no checkpoint to resume: choose another "
            "folder, or use --overwrite to replace it."
        )
    if config.warm_start is not None:
        warm, own = config.warm_start.resolve(), path.resolve()
        if warm in (own, own / "best") or warm.parent == own / "checkpoints":
            raise InputError(
                f"warm_start {warm} is inside adapter_path {path}, which this run replaces: choose "
                "another adapter_path."
            )
    check_own(path)
    return Start(None, seen)


def accumulating(
    config: TrainConfig, ranks: Ranks, resumed: Checkpoint | None, tell: events.OnEvent
) -> TrainConfig:
    """Sets grad_accumulation_steps to the number of ranks, if the configuration does not set it,
    and returns the new configuration. A resumed run that has or had several ranks keeps its earlier
    value. If the method generates completions, the ranks divide the prompts of a batch instead, and
    the setting is not changed. Raises InputError if a rank would get no micro-batch or no
    prompt."""
    name, unit = "grad_accumulation_steps", "batch"
    if generates := ROWS[config.method] == "prompt":
        name, unit = "batch_size", "prompt"
    count = getattr(config, name)
    earlier = resumed.record if resumed else {}
    if name not in config.model_fields_set and not generates:
        if resumed and max(ranks.size, earlier.get("ranks", 1)) > 1:
            count = earlier["config"][name]
        elif ranks.size > 1 and not ranks.pipeline:
            count = ranks.size
            said = f"{name} is {count}: each of the {count} ranks runs one batch per step"
            tell(events.stage("setup", 0.0, said))
    if count < ranks.size and not ranks.pipeline:
        raise InputError(
            f"{name} = {count}, but there are {ranks.size} ranks, each of which needs a {unit} in "
            f"every step: start at most {count} ranks, or "
            + ("start a new run." if resumed else f"raise {name}."),
            field=name,
        )
    n = ranks.size
    if ranks.pipeline and ranks.first and count < 2 * n:
        said = f"{name} = {count} is too low for a pipeline of {n} ranks: each computes at most "
        said += f"{count / (count + n - 1):.0%} of the time and idles for the rest"
        tell(events.warning(f"{said}; use {2 * n} or more"))
    return config.model_copy(update={name: count})


def read_inputs(
    config: TrainConfig,
    sources: tuple[Source, Source | None],
    on_event: events.OnEvent,
    resumed: Checkpoint | None = None,
    rewards: Rewards | None = None,
    ranks: Ranks = ALONE,
) -> Inputs:
    """Reads the data, and resolves `auto` options in the configuration; a resumed run keeps its
    earlier values. `rewards` must be given if the rows are prompts. Raises InputError if the data
    cannot be used."""
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
                f"{option} needs a validation loss, but the data has no validation rows: add "
                "valid.jsonl, set val_split, or leave the option out."
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
        train, valid = with_all_columns(train, valid)
        assert train is not None
        config = with_rollouts(config, _longest(config, train, valid), resumed, ranks)
    elif config.packing:
        train, valid = (x and x.in_rows_of(config.max_seq_length) for x in (train, valid))
        assert train is not None
    return Inputs(with_iters(config, train), tokenizer, train, valid, said)


def with_rollouts(
    config: TrainConfig, tokens: int, resumed: Checkpoint | None, ranks: Ranks = ALONE
) -> TrainConfig:
    """Replaces `rollout_batch: auto` with the number of completions that every rank has enough
    memory to generate at the same time. A completion and its prompt have up to `tokens` tokens. A
    resumed run keeps its earlier number, even if it has no checkpoint, because rounding depends on
    the number. Raises NoRoom if a configured number does not fit."""
    if config.rollout_batch != "auto":
        check_rollouts(config, tokens)
        return config
    earlier = resumed.record if resumed else {}
    if not resumed and config.resume:
        with suppress(InputError):
            earlier = read(config.adapter_path)
    # Rank 0's value is used, since other ranks may have no access to the folder of the run.
    known = ranks.gather(earlier.get("config", {}).get("rollout_batch"))[0]
    if not isinstance(known, int):
        every = completions_of(config, ranks.size)
        known = min(ranks.gather(rollouts_at_once(config, tokens, every)))
    return config.model_copy(update={"rollout_batch": known})


def prepare(
    inputs: Inputs,
    on_event: events.OnEvent,
    resumed: Checkpoint | None = None,
    loaded: nn.Module | None = None,
    ranks: Ranks = ALONE,
    pick: Callable[[Dataset], Dataset] | None = None,
) -> tuple[Setup, mx.array]:
    """Plans a run and loads its model, unless the caller passes it as `loaded`. Returns the setup
    and the vector of the adapter's factors.

    If `pick` is given, the setup contains only the training rows that `pick` returns. A resumed run
    keeps the earlier choice of whether the responses of a pair share tokens. Raises InputError,
    before weights are loaded, if an input cannot be used or if there is not enough memory.
    """
    config = inputs.config
    objective = objective_of(config)
    choices = list(objective.choices(inputs.train))
    if resumed is not None:
        choices = [choices[-1 if resumed.apart else 0]]

    def fitting(choices: list[Dataset]) -> tuple[Dataset, RunPlan]:
        batches = partial(objective.batch_shapes, rows=config.batch_size)
        try:
            return first_that_fits(config, choices, batches, measures=True)
        except NoRoom as error:
            if config.parallel == "data":
                raise
            said = "`parallel: pipeline` needs several ranks, started with mlx.launch -n N"
            raise NoRoom(f"{str(error).rstrip('.')}; {said}.") from error

    if ranks.pipeline:
        shapes = [tuple(objective.batch_shapes(own, config.batch_size)) for own in choices]
        i, plan = fitting_part(config, shapes, ranks)
        train = choices[i]
    else:
        train, plan = fitting(choices)
        # The order of the rows depends on the choice, so all ranks use the choice of the rank with
        # the least memory.
        own = next(i for i, choice in enumerate(choices) if choice is train)
        if (agreed := max(ranks.gather(own))) != own:
            train, plan = fitting(choices[agreed:])
    on_event(plan_event(plan, 0.02, str(plan)))
    setup, vector = load_setup(replace(inputs, train=train), plan, loaded, ranks)
    setup = replace(setup, apart=train is not inputs.train)
    if pick is not None:
        setup = replace(setup, train=pick(train), valid=None)
    if ROWS[config.method] == "prompt":
        assert isinstance(config.rollout_batch, int)
        peak = rollout_bytes(config, _longest(config, train, inputs.valid), config.rollout_batch)
        setup = replace(setup, rollout_peak=peak)
        gb = "" if peak is None else f"; peak {peak / 1e9:.2f} GB"
        said = f"rollouts: {config.rollout_batch} completions at once{gb}"
        on_event(events.stage("setup", 0.03, said))
    if coarse := _coarse(setup):
        on_event(
            events.warning(
                "stock mlx-lm 0.32 cannot load DoRA adapters of layers with 3, 5 or 6 bits "
                f"({coarse}): only mlx_segtrain can load this adapter."
            )
        )
    if objective.reference is not None:
        with plan.limits():
            setup = _referenced(setup, on_event, ranks)
    said = f"{train.name}: {train.summary}; {described(train, config.batch_size)}"
    on_event(events.stage("data", 0.05, said))
    return setup, vector


def fitting_part(
    config: TrainConfig, choices: Sequence[tuple[BatchShape, ...]], ranks: Ranks
) -> tuple[int, RunPlan]:
    """Returns the index of the first entry of `choices` whose batches fit into the memory of the
    ranks, and the plan for this rank's layers. Rank 0 divides the layers between the ranks. Raises
    InputError if the model cannot be divided, and NoRoom if no choice fits."""
    here = planned(config, choices[0], fills=False)
    members: Any = ranks.gather([here.budget, here.device.name, here.device.size])

    def shared_out(i: int) -> list[list[int]]:
        of = planned(config, choices[i], fills=False)
        runs = split_run(of, [Member(*own) for own in members], config.grad_accumulation_steps)
        return [[run.part.begin, run.part.end] for run in runs if run.part]

    found: Any = None
    failed: InputError | None = None
    for i in range(len(choices)) if ranks.first else ():
        try:
            found = i, shared_out(i)
            break
        except InputError as error:
            failed = failed or error
    (found, said), *_ = ranks.gather([found, str(failed) if failed else ""])
    if found is None:
        raise failed or NoRoom(said)
    i, ends = found
    run = planned(config, choices[i], fills=False)
    (begin, end), batches = ends[ranks.rank], config.grad_accumulation_steps
    part = Part(ranks.rank, ranks.size, begin, end, run.shape.n_layers, batches)
    return i, run.of_part(part, run.budget, run.device)


def _coarse(setup: Setup) -> str | None:
    """Returns the path of the first layer that stock mlx-lm cannot load with DoRA, or None if it
    can load all of them."""
    names = (name.removesuffix(".m") for _, name, _ in setup.layout.entries if name.endswith(".m"))
    odd = (path for path in names if getattr(setup.chain.adaptable[path], "bits", 4) in (3, 5, 6))
    return next(odd, None)


def _longest(config: TrainConfig, *prompts: Dataset | None) -> int:
    """Returns the maximum length of a prompt with its completion, in tokens."""
    longest = max(int(own.columns.length.max()) for own in prompts if own)
    return longest + config.max_completion_tokens


def with_iters(config: TrainConfig, train: Dataset) -> TrainConfig:
    """Converts the epochs of a configuration to a number of steps, rounded up. Raises InputError if
    all of these steps would be warmup steps."""
    if config.epochs is None:
        return config
    batches = batches_in_epoch(train, config.batch_size)
    iters = max(1, math.ceil(config.epochs * batches / config.grad_accumulation_steps))
    if config.warmup_iters >= iters:
        raise InputError(
            f"warmup_iters = {config.warmup_iters} must be less than the number of steps ({iters} "
            f"for epochs = {config.epochs:g}): lower warmup_iters."
        )
    return config.model_copy(update={"iters": iters})


def plan_event(plan: RunPlan, progress: float, message: str) -> events.Event:
    peak = None if plan.planned is None else plan.planned.peak
    return events.plan(progress, message, peak, plan.budget)


def load_chain(
    config: TrainConfig,
    *datasets: Dataset | None,
    loaded: nn.Module | None = None,
    part: Part | None = None,
) -> tuple[Any, Chain]:
    """Loads the configured model, or uses the `loaded` one, and returns it with its chain. If
    `part` is given, reads only the layers of this part.

    Raises InputError if max_seq_length exceeds the model's context length, or if the model's
    embedding or head has no row for a token of the data. Without this check, MLX would read past
    the end of the weight.
    """
    reads = part.reads if part else lambda name: True
    model = load_model(config.model_dir, reads)[0] if loaded is None else loaded
    chain = chain_of(model, range(part.begin, part.end) if part else None)
    if chain.max_length is not None and config.max_seq_length > chain.max_length:
        raise InputError(
            f"max_seq_length = {config.max_seq_length} exceeds the model's context length of "
            f"{chain.max_length} tokens: lower max_seq_length."
        )
    tables = tables_of(model)
    known = min(tables.tokens, tables.logits)
    for data in filter(None, datasets):
        for i, side in np.argwhere(data.columns.top >= known)[:1]:
            row, top = sequences(data.rows[i])[side], data.columns.top[i, side]
            raise InputError(
                f"{row.source}: the tokenizer returns token {top}, but the model has only {known} "
                "tokens: use the tokenizer that belongs to the model."
            )
    return model, chain


def load_setup(
    inputs: Inputs, plan: RunPlan, loaded: nn.Module | None = None, ranks: Ranks = ALONE
) -> tuple[Setup, mx.array]:
    """Loads the weights. Returns the setup and the factors of a new adapter, or of the adapter
    `warm_start`, as a vector; in a pipeline, this vector has only the factors of this rank's
    layers."""
    config, part = inputs.config, plan.part
    model, chain = load_chain(config, inputs.train, inputs.valid, loaded=loaded, part=part)
    pipe = Pipe(ranks, part, transfers_of(ranks)) if part else None
    if config.warm_start is not None:
        adapter = read_adapter(config.warm_start, chain)
    else:
        kinds = {kind.word: getattr(config, f"use_{kind.word}") for kind in KINDS}
        here = pipe.owners(chain) if pipe else {*chain.stage_of.values()}
        how: Any = {"root": config.rs_lora, "here": lambda path: chain.stage_of[path] in here}
        own_ranks = adapting.choose_ranks(chain, **asked(config))
        adapter = adapting.init(chain, own_ranks, config.scale, config.seed, **how, **kinds)
    chain = chain.adapting(adapter.scales)
    layers = chain.layers[part.begin : part.end] if part else chain.layers
    if any(
        plan.cuts.segments[-1] != len(batch.streams) * sum(map(len, layers))
        for batch, plan in zip(plan.batches, plan.plans, strict=False)
    ):
        # The plan does not match the chain: it was made from the headers of the weight files, which
        # did not show that the model needs the generic path.
        plan = replace(plan, plans=())
    if inputs.train.packed and not chain.branches:
        raise InputError(
            f"packing is not supported for {config.model_dir.name}, because this model runs on "
            "mlx-lm's layers, which do not support packed rows: leave packing out.",
            field="packing",
        )
    params = adapting.stage_params(chain, adapter)
    if pipe and chain.tied and chain.head.path in adapter.tensors:
        raise tied_head(config, chain)
    read = (config, inputs.tokenizer, inputs.train, inputs.valid, inputs.remarks)
    made = (plan, model, chain, objective_of(config), adapter.scales, Layout.of(params), pipe)
    setup = Setup(*read, *made)
    vector = setup.own.join(params)
    mx.eval(vector)
    return setup, vector


def tied_head(config: TrainConfig, chain: Chain) -> InputError:
    """Returns the error for an adapted embedding that is also the head: in a pipeline, the
    embedding and the head are on different ranks."""
    return InputError(
        f"{chain.head.path} of {title(config.model_dir)} is both the embedding, which a pipeline "
        "runs on the first rank, and the head, which it runs on the last rank: leave this layer "
        "out of target_modules, or set parallel to data.",
        field="target_modules",
    )


def _referenced(setup: Setup, on_event: events.OnEvent, ranks: Ranks) -> Setup:
    """Adds the reference outputs to the rows that the run will use."""
    config, train = setup.config, setup.train
    source = batches(train, config.batch_size, config.seed)
    count = config.iters * config.grad_accumulation_steps
    seen = None  # two or more epochs use all rows
    if count < 2 * (len(train) // config.batch_size):
        seen = {int(i) for batch in islice(source, count) for i in batch.rows}
    what = (setup.objective, config, setup.chain)
    how: Any = {"ranks": ranks, "value": setup.value}
    train = with_references(*what, train, on_event, seen, **how)
    valid = setup.valid and with_references(*what, setup.valid, on_event, **how)
    return replace(setup, train=train, valid=valid)


def with_params(chain: Chain, scales: Mapping[str, float], params: Grads) -> Adapter:
    """Returns the adapter that has these factors. `params` groups them by stage."""
    flat = {name: factor for own in params.values() for name, factor in own.items()}
    arrays = {
        path: {name: flat[f"{path}.{name}"] for name in ARRAYS if f"{path}.{name}" in flat}
        for path in scales
    }
    return Adapter.of(arrays, scales, chain.tied_for(arrays))
