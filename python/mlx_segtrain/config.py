"""The configuration of a training run, declared once.

From `TrainConfig` come the flags of the command line, the keys of a YAML file, every error message,
the page's form, what a resumed run may change, and the table in docs/configuration.md (`python -m
mlx_segtrain.config` prints it): fields.Facets has all that is known of a field besides its type.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mlx_segtrain.errors import InputError, either, shown, word
from mlx_segtrain.fields import (
    MOST,
    PLAIN,
    Budget,
    Columns,
    Directory,
    Distinct,
    Effect,
    Facets,
    Float,
    Int,
    LayerCount,
    Name,
    Place,
    RolloutBatch,
    SegmentSize,
    Share,
    Switch,
    Variables,
    choices,
    is_list,
    kind,
    option,
)

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Method = Literal["sft", "dpo", "orpo", "simpo", "kto", "grpo"]
#: What a row is: a sequence, a pair of them, a sequence that is wanted or not, or a prompt alone;
#: and for each method what it trains.
Rows = Literal["single", "pair", "labelled", "prompt"]
ROWS: dict[str, Rows] = {
    "sft": "single",
    "dpo": "pair",
    "orpo": "pair",
    "simpo": "pair",
    "kto": "labelled",
    "grpo": "prompt",
}
#: The forms that rows come in (data/formats.py), which are told apart by their keys.
DataFormat = Literal[
    "auto",
    "preference",
    "kto",
    "kto-messages",
    "kto-sharegpt",
    "messages",
    "sharegpt",
    "prompt-completion",
    "alpaca",
    "instruction-response",
    "question-answer",
    "prompt-response",
    "input-output",
    "text",
    "prompt",
]

PLACES = "a path, or org/name or org/name@revision on the hub"
DATA_PLACES = "a path, or org/name, org/name/configuration or org/name:split on the hub"
#: Facets that several fields have in common.
FREE, WARN, CARD = Facets(on_resume="free"), Facets(on_resume="warn"), Facets(on_card=True)
SIZE, ALL = Facets(affects=("memory",)), Facets(affects=("memory", "loss", "rows"))
FIRST, ELSEWHERE, ADAPTER = Facets(group=""), Facets(group=None), Facets(group="Adapter")
OPTIMIZER, MEMORY = Facets(group="Optimizer"), SIZE | FREE | Facets(group="Memory")
DATA = Facets(group="Data", affects=("loss", "rows"))
EVALUATION = FREE | Facets(group="Evaluation and checkpoints")
DPO, ORPO, SIMPO, KTO = (
    Facets(group="Preference", affects=("loss",), methods=(method,))
    for method in ("dpo", "orpo", "simpo", "kto")
)
GRPO = Facets(group="GRPO", methods=("grpo",))
#: Of responses that rows have, and not of those that a run generates.
GIVEN = Facets(
    holds=lambda config: config.method != "grpo",
    otherwise="with method grpo, whose completions are generated",
)
CODE = "it runs code, which the command line and Python alone may"
FRESH = Facets(
    holds=lambda config: config.warm_start is None,
    otherwise="with warm_start, whose adapter has its own",
)


#: Defaults of grpo's losses, as their papers have them.
OF_LOSS: dict[Any, dict[str, Any]] = {
    "dr_grpo": {"advantage_scaling": "none"},
    "dapo": {"clip_high": 0.28, "mask_truncated": True},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
}


class TrainConfig(BaseModel):
    """One training run; InputError, which is a ValueError, for a bad value."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    model_dir: Place = option(..., ELSEWHERE | FREE, flag="--model", values=PLACES)
    """Base model: its directory, or its name on the Hugging Face hub."""
    data_dir: Place | None = option(None, ELSEWHERE | FREE, flag="--data", values=DATA_PLACES)
    """Training data: a directory with train.jsonl and, for validation, valid.jsonl (or CSV, Parquet
    and others, see docs/data.md); one file of training rows; or a data set's name on the hub.
    Required unless Python gives the rows."""
    adapter_path: Directory = option(
        ..., FIRST | FREE, title="Adapter folder", aliases=("--adapter",)
    )
    """Directory of the adapter; a run also writes metrics.jsonl and checkpoints to it. Default of
    the command line: adapters."""
    method: Method = option("sft", FIRST | ALL | CARD)
    """Training objective: sft takes texts and chats, dpo, orpo and simpo take chosen and rejected
    responses, kto responses with a label or pairs, grpo prompts."""
    rank: Int = option(8, FIRST | FRESH | SIZE, ge=2)
    """LoRA rank, before rank_scaling."""
    scale: Float = option(1.0, ADAPTER | FRESH, gt=0)
    """Factor of the LoRA update, y = W x + scale * B A x."""
    rank_scaling: Literal["constant", "by_bits", "by_kl"] = option(
        "by_bits", ADAPTER | FRESH | SIZE
    )
    """Rank per layer: the same everywhere, rank * bits / 4, or by KL importance."""
    target_modules: Annotated[list[Name], Distinct] = option(
        PROJECTIONS, ADAPTER | FRESH | SIZE, title="Linears", min_length=1
    )
    """Linears that get an adapter, by the end of their path; or all-linear. embed_tokens and
    lm_head too, if they are named."""
    num_layers: LayerCount = option(
        -1, ADAPTER | FRESH | SIZE, title="Layers", values="-1 or an integer >= 1"
    )
    """Layers that get adapters, counted from the last one; -1 is all."""
    warm_start: Place | None = option(None, ADAPTER | SIZE | FREE, values=PLACES)
    """An adapter to go on from, ours, mlx-lm's or PEFT's: its directory, or its name on the hub.
    Its linears, ranks and scale are taken."""
    iters: Int = option(
        100,
        FIRST | WARN | CARD,
        title="Steps",
        holds=lambda config: config.epochs is None,
        otherwise="beside epochs",
        ge=1,
    )
    """Number of optimizer steps."""
    epochs: Float | None = option(None, FIRST | WARN, gt=0)
    """Number of passes over the training rows (instead of iters)."""
    optimizer: Literal["adamw", "lion", "sgd", "adafactor", "muon"] = option(
        "adamw", OPTIMIZER | CARD
    )
    """Optimizer; sgd has a momentum of 0.9."""
    learning_rate: Float = option(2e-4, FIRST | WARN | CARD, gt=0, aliases=("--lr",))
    """Peak learning rate; the default of all methods but sft is 5e-5."""
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = option(
        "constant", OPTIMIZER | WARN | CARD, title="Learning rate schedule"
    )
    """Learning rate behind the warmup; all but constant end at a tenth of it. Of all but sft cosine
    by default."""
    warmup_iters: Int = option(0, OPTIMIZER | WARN, title="Warmup, steps", ge=0)
    """First steps, with a rising learning rate."""
    lora_plus_ratio: Float = option(1.0, OPTIMIZER, title="LoRA+ ratio", gt=0)
    """Learning rate of B over that of the others (LoRA+)."""
    rs_lora: bool = option(False, ADAPTER | FRESH, title="rsLoRA")
    """Divide scale by the root of the rank (rsLoRA), linear by linear."""
    use_dora: bool = option(False, ADAPTER | FRESH | SIZE, title="DoRA")
    """Train the lengths of the adapted weights' rows apart (DoRA)."""
    lora_dropout: Float = option(
        0.0,
        ADAPTER | SIZE | CARD,
        title="Dropout",
        holds=lambda config: config.method != "grpo",
        otherwise="with method grpo, which compares probabilities of the whole adapter",
        ge=0,
        lt=1,
    )
    """Part of a LoRA branch's inputs that each step leaves out."""
    dpo_beta: Float = option(0.1, DPO, title="DPO beta", gt=0)
    """Strength with which dpo stays near the model without adapter."""
    dpo_loss: Literal[
        "sigmoid",
        "hinge",
        "ipo",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "discopop",
        "sigmoid_norm",
    ] = option("sigmoid", DPO, title="DPO loss")
    """Loss of dpo (docs/preference.md)."""
    label_smoothing: Float = option(
        0.0,
        DPO,
        holds=lambda config: config.dpo_loss in ("sigmoid", "robust", "exo_pair"),
        otherwise="outside of method dpo with dpo_loss sigmoid, robust or exo_pair",
        ge=0,
        lt=0.5,
    )
    """Part of pairs taken to be mislabelled (sigmoid, robust, exo_pair)."""
    reference_free: bool = option(False, DPO)
    """Leave the model without adapter out of dpo's loss."""
    kto_beta: Float = option(0.1, KTO, title="KTO beta", gt=0)
    """Strength with which kto stays near the model without adapter."""
    kto_loss: Literal["kto", "apo_zero_unpaired"] = option("kto", KTO, title="KTO loss")
    """Loss of kto; apo_zero_unpaired compares with 0 in the place of a KL divergence."""
    desirable_weight: Float = option(1.0, KTO, ge=0)
    """Weight of kto's loss of rows whose label is true."""
    undesirable_weight: Float = option(1.0, KTO, ge=0)
    """Weight of kto's loss of rows whose label is false."""
    orpo_lambda: Float = option(0.1, ORPO, title="ORPO lambda", gt=0)
    """Weight of orpo's odds-ratio term."""
    sft_scope: Literal["full", "response"] = option("full", ORPO, title="ORPO cross-entropy")
    """Tokens of the chosen sequence that orpo's cross-entropy counts."""
    simpo_beta: Float = option(2.0, SIMPO, title="SimPO beta", gt=0)
    """Factor of simpo's rewards."""
    simpo_gamma: Float = option(1.0, SIMPO, title="SimPO gamma", ge=0)
    """Margin that simpo wants between the rewards of a pair."""
    rewards: Annotated[list[Name], Distinct] = option(
        [],
        GRPO,
        affects=("loss",),
        flag="--reward",
        texts=True,
        values="checks such as exact:COLUMN, number:COLUMN, regex:PATTERN, json_schema:SCHEMA or "
        "length:TOKENS, each once",
    )
    """Checks that score completions from 0 to 1 (docs/grpo.md)."""
    reward_functions: Annotated[list[Name], Distinct] = option(
        [], GRPO, affects=("loss",), refused=CODE, values="module:function or file.py:function"
    )
    """Python functions that score completions (docs/grpo.md)."""
    reward_command: Name | None = option(
        None, GRPO, affects=("loss",), refused=CODE, values="a command line"
    )
    """Command that reads completions as JSON lines and prints a score for each."""
    reward_model: Place | None = option(
        None, GRPO | SIZE, affects=("loss", "memory"), values=PLACES
    )
    """A model that scores completions: its directory, or its name on the hub, with one score as
    Hugging Face's models for sequence classification have it (docs/grpo.md)."""
    reward_weights: list[Float] = option(
        [], GRPO, affects=("loss",), values="numbers, one for each reward"
    )
    """Weights of the rewards, in the order rewards, reward_functions, functions given in Python,
    reward_command, reward_model, get_reward of the environment. All 1 by default."""
    environment: Name | None = option(
        None,
        GRPO,
        affects=("loss",),
        refused=CODE,
        values="module:Class or file.py:Class",
    )
    """Python class that answers the model's turns with `step`, or whose methods are its tools
    (docs/grpo.md)."""
    max_turns: Int = option(
        8,
        GRPO,
        affects=("loss",),
        holds=lambda config: config.environment is not None,
        otherwise="without environment",
        ge=1,
    )
    """Turns that the model may have in a conversation with the environment."""
    group_size: Int = option(8, GRPO, affects=("loss",), title="Completions per prompt", ge=2)
    """Completions that each prompt gets."""
    max_completion_tokens: Int = option(256, GRPO | ALL, title="Longest completion, tokens", ge=1)
    """Tokens that a completion may have, with those of an environment. Prompts that leave no room
    for it within max_seq_length are left out."""
    temperature: Float = option(1.0, GRPO, affects=("loss",), gt=0)
    """Temperature at which completions are sampled."""
    grpo_loss: Literal["grpo", "dr_grpo", "dapo", "gspo"] = option("grpo", GRPO, title="GRPO loss")
    """Loss of grpo: how ratios are clipped and how tokens are averaged."""
    advantage_scaling: Literal["group", "batch", "none"] = option("group", GRPO)
    """Divide advantages by the standard deviation of rewards within each group or over the whole
    step, or leave them. dr_grpo: none by default."""
    clip_low: Float = option(0.2, GRPO, gt=0, lt=1)
    """How far the ratio of new to old probability may fall below 1. gspo: 3e-4 by default."""
    clip_high: Float = option(0.2, GRPO, gt=0)
    """How far it may rise above 1. dapo: 0.28 by default; gspo: 4e-4."""
    grpo_beta: Float = option(0.0, GRPO, title="GRPO beta", ge=0)
    """Weight of the KL divergence from the model without adapter; 0 saves its forward pass."""
    mask_truncated: bool = option(False, GRPO, title="Leave truncated completions out of the loss")
    """Leave completions that reached max_completion_tokens out of the loss. dapo: true by
    default."""
    updates_per_step: Int = option(1, GRPO, ge=1)
    """Optimizer updates on the completions of each step."""
    importance_cap: Float = option(2.0, GRPO, ge=0)
    """Upper bound of the importance weights that correct for differences between the probabilities
    of generation and training; 0 is no correction."""
    rollout_batch: RolloutBatch = option(
        "auto", GRPO | SIZE | WARN, values="auto or an integer >= 1"
    )
    """Completions that are generated at once; auto: as many as memory_budget_gb has room for."""
    collapse_patience: Int = option(0, GRPO | WARN, ge=0)
    """End the run when the mean reward of so many steps has lost half of its gain, beyond what
    chance explains; 0 is never."""
    max_seq_length: Int = option(512, FIRST | ALL | CARD, title="Longest row, tokens", ge=2)
    """Maximum tokens of a row; longer rows are truncated. With grpo, tokens of a forward and
    backward pass, into which as many completions with their prompts are packed as fit."""
    batch_size: Int = option(
        1, FIRST | CARD, title="Batch size, rows", affects=("memory", "loss"), ge=1
    )
    """Rows per forward and backward pass; with grpo, prompts per step."""
    packing: Switch = option(
        False,
        DATA | SIZE | CARD,
        title="Pack rows",
        methods=("sft", "grpo"),
        values="true, false or auto",
    )
    """Fill each row with as many rows of the data as max_seq_length has room for; none sees the
    others. batch_size then counts filled rows. auto does so where it is faster; default of grpo."""
    grad_accumulation_steps: Int = option(
        1, OPTIMIZER | SIZE | CARD | GIVEN, title="Gradient accumulation, batches", ge=1
    )
    """Batches whose gradients are summed into an optimizer step."""
    seed: Int = option(0, OPTIMIZER | CARD, affects=("loss", "rows"), ge=0)
    """Seed of the row order, of the LoRA initialization, and of the rows that val_split takes."""
    deterministic: bool = option(True, OPTIMIZER | WARN | SIZE)
    """Same seed, same device: same bytes. false lets attention on CUDA be cuDNN's, which is faster
    and adds up in any order."""
    steps_per_report: Int = option(10, EVALUATION, title="Report every, steps", ge=1)
    """Steps between training metrics."""
    steps_per_eval: Int = option(50, EVALUATION | WARN, title="Evaluate every, steps", ge=1)
    """Steps between evaluations on valid.jsonl."""
    weight_decay: Float = option(0.01, OPTIMIZER | WARN, ge=0)
    """Weight decay, apart from the gradient."""
    grad_clip_norm: Float = option(1.0, OPTIMIZER | WARN, title="Gradient clipping, norm", ge=0)
    """Largest global L2 norm of the gradient; 0 is no clipping."""
    grad_checkpoint: bool = option(False, MEMORY, title="Checkpoint every layer")
    """Recompute each layer in the backward pass: less memory, more time."""
    segment_size: SegmentSize = option(
        "auto", MEMORY, title="Segment, layers", values="auto or an integer >= 0"
    )
    """Layers per segment of the backward pass; 0 is off, auto chooses what fits."""
    memory_budget_gb: Budget = option(
        "auto", MEMORY, title="Memory budget, GB", values="auto or a finite number > 0"
    )
    """Memory that a run may take, in 10⁹ bytes; auto is what the device has free."""
    steps_per_save: Int = option(50, EVALUATION, title="Checkpoint every, steps", ge=0)
    """Steps between checkpoints, from which a run can be resumed; 0 is none but at its end. The
    adapter is written with each."""
    keep_checkpoints: Int = option(2, EVALUATION, ge=1)
    """Newest of these checkpoints to keep."""
    resume: Switch = option(False, ELSEWHERE | FREE, values="true, false or auto")
    """Continue from the newest checkpoint in adapter_path; auto starts anew if there is none."""
    on_spike: Literal["warn", "skip", "stop"] = option(
        "warn", OPTIMIZER | WARN, title="At a loss spike"
    )
    """What to do at a loss far above those of the steps before."""
    report_to: Annotated[list[Literal["tensorboard", "wandb"]], Distinct] = option(
        [], EVALUATION, title="Trackers", values="tensorboard or wandb, each once"
    )
    """Trackers that get the metrics, besides metrics.jsonl."""
    save_checkpoints: bool = option(False, EVALUATION, title="Keep every evaluation's adapter")
    """Keep a complete adapter directory of every evaluation."""
    early_stopping_patience: Int = option(
        0, EVALUATION | WARN, title="Stop early after, evaluations", ge=0
    )
    """Evaluations without a lower loss that end the run; 0 is never."""
    keep_best: bool = option(False, EVALUATION, title="Keep the best adapter")
    """Keep the adapter of the lowest validation loss in adapter_path/best."""
    sample_prompts: Annotated[list[Name], Distinct] = option(
        [], EVALUATION, values="texts, each once", texts=True
    )
    """Prompts that every evaluation answers, for the log."""
    sample_tokens: Int = option(
        64,
        EVALUATION,
        holds=lambda config: bool(config.sample_prompts),
        otherwise="without sample_prompts",
        ge=1,
    )
    """Most tokens of such an answer."""
    eval_command: Name | None = option(
        None,
        FREE,
        refused="it runs a command, which the command line alone may",
        values="a command line",
    )
    """Command that scores every evaluation's adapter: {adapter} in it is a copy's directory, and
    the last line it prints a number or a JSON object of numbers."""
    data_format: DataFormat = option("auto", DATA, title="Format of the rows")
    """Form of the rows; auto tells it for each row by its columns (docs/data.md)."""
    columns: Columns = option(
        {}, DATA, title="Columns", values="a JSON object of names, none of which is given twice"
    )
    """Columns of the data by what they are here, such as {"prompt": "query", "completion":
    "reply"}."""
    train_on: Literal["assistant", "last"] = option(
        "assistant",
        DATA,
        title="Trained turns",
        methods=("sft",),
        otherwise="with preference rows, whose responses are trained",
    )
    """Turns of a chat that are trained: every assistant turn or the last one."""
    append_eos: bool = option(True, DATA | GIVEN, title="End responses with EOS")
    """End every trained response with a token that stops generation, where the chat template or the
    row does not."""
    prompt_format: Literal["auto", "chat", "raw"] = option("auto", DATA, title="Plain prompts")
    """Whether plain prompts (prompt with completion, chosen or rejected as strings) go through the
    chat template; auto: if the tokenizer has one."""
    chat_template_kwargs: Variables = option(
        {},
        DATA,
        title="Template variables",
        values="a JSON object whose keys are variables of the template",
    )
    """Variables of the chat template, such as {"enable_thinking": false}; a row may have its own.
    Generation with the adapter uses them too."""
    val_split: Share = option(
        "auto",
        DATA,
        title="Held out for validation",
        values="auto, a share below 1, or a number of rows",
    )
    """Training rows that are held out for validation where there is no file for it, by their
    content; 0 is none, auto a twentieth of more than 100 rows, at most 500."""
    dedup: bool = option(False, DATA, title="Leave out repeated rows")
    """Leave out training rows that are equal to an earlier one."""
    strict: bool = option(False, DATA | FREE, title="Refuse incomplete rows")
    """Refuse data of which the chat template loses a part, or leaves a trained turn without a token
    that stops generation; otherwise such rows are counted and reported."""
    overwrite: bool = option(False, EVALUATION, title="Overwrite the adapter folder")
    """Replace an adapter that adapter_path holds."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _fault(error, values) from None

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, values: Any) -> Any:
        """What depends on the method: some defaults, and DPO's names of two fields."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if values.get("method") == "grpo":
            loss = values.get("grpo_loss")
            own = OF_LOSS.get(loss, {}) if isinstance(loss, str) else {}
            values = {"packing": "auto", **own, **values}
        for name in ("lr_schedule", "warmup_iters"):
            if f"dpo_{name}" not in values:
                continue
            if values.get("method") != "dpo":
                raise ValueError(f"dpo_{name} is for method dpo: give {name}")
            if name in values:
                raise ValueError(f"dpo_{name} and {name} are the same: give one of them")
            values[name] = values.pop(f"dpo_{name}")
        if values.get("method", "sft") != "sft":
            values = {"learning_rate": 5e-5, "lr_schedule": "cosine", **values}
        return values

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> TrainConfig:
        for name, own in FACETS.items():
            if getattr(self, name) == type(self).model_fields[name].default or own.effective(self):
                continue
            when = own.otherwise or f"outside of method {' or '.join(own.methods)}"
            raise InputError(f"{name} has no effect {when}: leave it out", field=name)
        return self

    @model_validator(mode="after")
    def _no_contradictions(self) -> TrainConfig:
        if self.epochs is None and self.warmup_iters >= self.iters:
            raise InputError(
                f"warmup_iters = {self.warmup_iters} leaves nothing of iters = {self.iters}: "
                "the learning rate would never be reached, so lower it",
                field="warmup_iters",
            )
        if self.dpo_loss == "exo_pair" and self.label_smoothing == 0:
            raise InputError(
                "dpo_loss exo_pair needs label_smoothing above 0, or the loss of a pair is "
                "infinite: set it, to 0.001 for instance",
                field="label_smoothing",
            )
        if self.method == "grpo" and self.max_completion_tokens >= self.max_seq_length - 1:
            raise InputError(
                f"max_completion_tokens = {self.max_completion_tokens} leaves no room for a prompt "
                f"in max_seq_length = {self.max_seq_length}: raise max_seq_length",
                field="max_completion_tokens",
            )
        if self.resume and self.overwrite:
            raise InputError(
                "resume and overwrite contradict each other: set only one of the two",
                field="resume",
            )
        if self.grad_checkpoint and isinstance(self.segment_size, int) and self.segment_size > 0:
            raise InputError(
                f"grad_checkpoint and segment_size = {self.segment_size} contradict each other: "
                "segments already recompute their layers, so set only one of the two",
                field="grad_checkpoint",
            )
        return self


for _field in TrainConfig.model_fields.values():  # a docstring may go over two lines
    _field.description = " ".join((_field.description or "").split())
TrainConfig.model_rebuild(force=True)  # for its JSON schema

#: The facets of every field.
FACETS: dict[str, Facets] = {
    name: own if isinstance(own := field.json_schema_extra, Facets) else PLAIN
    for name, field in TrainConfig.model_fields.items()
}
#: Fields that are paths.
PATHS = tuple(name for name, field in TrainConfig.model_fields.items() if kind(field) is Path)
#: Fields that clients of the server may not set, and why.
REFUSED = {name: own.refused for name, own in FACETS.items() if own.refused}


def affecting(what: Effect) -> tuple[str, ...]:
    """Fields that memory, an adapter's loss or the rows that are read depend on."""
    return tuple(name for name, own in FACETS.items() if what in own.affects)


def allowed(name: str, value: Any = None) -> str:
    """The values of a field in words, e.g. "an integer >= 2"; for errors, --help and the table.

    For a `value` that only the bound of all integers forbids, that bound.
    """
    if isinstance(value, int) and value > MOST:
        return f"an integer <= {MOST}"
    if FACETS[name].values:
        return FACETS[name].values
    field = TrainConfig.model_fields[name]
    if is_list(field):
        return "one or more names, each once"
    if words := choices(field):
        return either(words)
    kinds = {Path: "a path", bool: "true or false", int: "an integer", float: "a finite number"}
    signs = {"ge": ">=", "gt": ">", "lt": "<"}
    bounds = [
        f"{sign} {getattr(item, key)}"
        for item in field.metadata
        for key, sign in signs.items()
        if hasattr(item, key)
    ]
    return " ".join([kinds[kind(field)], " and ".join(bounds)]).strip()


#: What other trainers call a field, for those who write it here.
ELSEWHERE_CALLED: dict[str, str] = {
    "adapter_path": "adapter output output_dir out out_dir save_path",
    "batch_size": "bs micro_batch_size per_device_train_batch_size train_batch_size",
    "data_dir": "data dataset dataset_name dataset_path train_file training_data",
    "early_stopping_patience": "early_stopping patience",
    "epochs": "epoch n_epochs num_epochs num_train_epochs",
    "eval_command": "metric compute_metrics",
    "grad_accumulation_steps": "accumulate_grad_batches grad_accum gradient_accumulation_steps",
    "grad_checkpoint": "activation_checkpointing gradient_checkpointing",
    "grad_clip_norm": "clip_grad grad_clip gradient_clipping max_grad_norm",
    "iters": "iterations max_iters max_steps num_steps steps total_steps",
    "keep_best": "load_best_model_at_end save_best",
    "keep_checkpoints": "save_total_limit",
    "learning_rate": "lr peak_lr",
    "lora_dropout": "dropout",
    "lr_schedule": "lr_scheduler lr_scheduler_type schedule scheduler scheduler_type",
    "max_seq_length": "block_size context context_length ctx cutoff_len max_len max_length "
    "max_tokens seq_len seq_length sequence_length",
    "memory_budget_gb": "max_memory memory memory_gb memory_limit vram",
    "method": "algorithm objective stage trainer train_type",
    "model_dir": "base base_model model model_id model_name model_name_or_path model_path",
    "num_layers": "layers lora_layers",
    "optimizer": "optim",
    "rank": "lora_r lora_rank r",
    "report_to": "log_with tensorboard tracker wandb",
    "resume": "continue resume_from resume_from_checkpoint",
    "rs_lora": "use_rslora rslora",
    "sample_prompts": "prompts",
    "save_checkpoints": "save_adapters",
    "scale": "alpha lora_alpha lora_scale",
    "seed": "random_seed random_state",
    "steps_per_eval": "eval_every eval_steps val_check_interval",
    "steps_per_report": "log_every logging_steps",
    "steps_per_save": "checkpoint_every save_every save_steps",
    "target_modules": "keys lora_keys lora_modules lora_target modules targets",
    "train_on": "assistant_only_loss completion_only_loss mask_prompt train_on_inputs",
    "use_dora": "dora",
    "val_split": "eval_split test_size test_split val_set_size val_size validation_split",
    "warm_start": "init_from resume_adapter resume_adapter_file",
    "warmup_iters": "num_warmup_steps warmup warmup_steps",
}
CALLED = {word: name for name, words in ELSEWHERE_CALLED.items() for word in words.split()}


def nearest(name: str, names: Sequence[str]) -> str:
    """The question whether the closest of names was meant, or an empty string."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def meant(name: str, names: Sequence[str], spelt: Callable[[str], str] = str) -> str:
    """The same, but for words of other trainers, which are asked for by meaning; `spelt` is how a
    field is written among the names."""
    field = CALLED.get(name.lstrip("-").replace("-", "_").lower())
    if field is None:
        return nearest(name, names)
    return f" Did you mean {spelt(field)}?" if spelt(field) in names else ""


def load_config(
    yaml_path: Path | None,
    overrides: dict[str, Any],
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> TrainConfig:
    """Read a YAML file (or none), replace the fields in overrides, and add those in defaults that
    are not set; InputError on any bad value."""
    values, lines = _read_yaml(yaml_path) if yaml_path else ({}, {})
    where = {
        key: f"{yaml_path}, line {line}: " for key, line in lines.items() if key not in overrides
    }
    values = {**defaults, **values, **overrides}
    try:
        return TrainConfig(**values)
    except InputError as error:
        raise InputError(where.get(error.field or "", "") + str(error), field=error.field) from None


def _fault(error: ValidationError, values: dict[str, Any]) -> InputError:
    """The first fault of a ValidationError, with the value and what is allowed."""
    order = {"extra_forbidden": 0, "missing": 2}  # a misspelt field is also a missing one
    fault = min(error.errors(), key=lambda fault: order.get(fault["type"], 1))
    if not fault["loc"]:
        raised = fault.get("ctx", {}).get("error", fault["msg"])  # by a validator of ours
        return raised if isinstance(raised, InputError) else InputError(str(raised))
    name = str(fault["loc"][0])
    if fault["type"] == "extra_forbidden":
        hint = meant(name, list(TrainConfig.model_fields))
        return InputError(f"unknown field {word(name)}.{hint}", field=name)
    if fault["type"] == "missing":
        return InputError(
            f"{name} is missing: set it in the YAML file or with {flag(name)}", field=name
        )
    value = values[name]
    text = f"{name} must be {allowed(name, value)}; got {shown(value, 200)}"
    return InputError(text, field=name)


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return FACETS[name].flag or "--" + name.replace("_", "-")


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file and the line (from 1) of each key."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path}: expected lines of the form `field: value`")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.value in lines:  # PyYAML would keep the last one without a word
            raise InputError(
                f"{path}, line {key.start_mark.line + 1}: {key.value} is set a second time "
                f"(first on line {lines[key.value]})"
            )
        lines[key.value] = key.start_mark.line + 1
    return values, lines


def table() -> str:
    """The Markdown table of every field: flag, values, default, meaning."""
    rows = ["| Field | Values | Default | Meaning |", "|---|---|---|---|"]
    for name, field in TrainConfig.model_fields.items():
        rows.append(f"| `{name}` | {allowed(name)} | {default(name)} | {field.description} |")
    return "\n".join(rows)


def default(name: str) -> str:
    """The default of a field as YAML and the table show it."""
    field = TrainConfig.model_fields[name]
    if field.is_required():
        return "required"
    if field.default in (None, [], {}):
        return "none"
    if isinstance(field.default, list):
        return ", ".join(field.default)
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


if __name__ == "__main__":
    print(table())
