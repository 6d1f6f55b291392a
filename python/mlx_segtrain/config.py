"""The configuration of a training run, declared once.

`TrainConfig` determines the flags of the command line, the keys of a YAML file, the error messages,
the page's form, the rules for resuming, and the table in docs/configuration.md, which `python -m
mlx_segtrain.config` prints. fields.Facets contains the properties of a field other than its type.
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
#: The kinds of rows: one sequence, a pair of sequences, a sequence labelled good or bad, or a
#: prompt alone.
Rows = Literal["single", "pair", "labelled", "prompt"]
#: The kind of rows that each method trains on.
ROWS: dict[str, Rows] = {
    "sft": "single",
    "dpo": "pair",
    "orpo": "pair",
    "simpo": "pair",
    "kto": "labelled",
    "grpo": "prompt",
}
#: Formats of rows. A row's keys determine its format (data/formats.py).
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
#: Facets shared by several fields.
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
#: For fields that apply to responses in the data but not to generated ones.
GIVEN = Facets(
    holds=lambda config: config.method != "grpo",
    otherwise="with method grpo, whose completions are generated",
)
#: For `parallel`. Its value "pipeline" splits the model's layers across devices, but grpo needs all
#: layers on every device.
WHOLE = Facets(
    holds=lambda config: config.method != "grpo",
    otherwise="with method grpo, which generates with the whole model on every device",
)
CODE = "it runs code, which only the command line and Python may do"
FRESH = Facets(
    holds=lambda config: config.warm_start is None,
    otherwise="with warm_start, whose adapter determines it",
)

#: Defaults that depend on grpo_loss, taken from the papers that introduced these losses.
OF_LOSS: dict[Any, dict[str, Any]] = {
    "dr_grpo": {"advantage_scaling": "none"},
    "dapo": {"clip_high": 0.28, "mask_truncated": True},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
}


class TrainConfig(BaseModel):
    """The configuration of one training run. A bad value raises InputError, which is a
    ValueError."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    model_dir: Place = option(..., ELSEWHERE | FREE, flag="--model", values=PLACES)
    """Base model: its directory, or its name on the Hugging Face hub."""
    data_dir: Place | None = option(None, ELSEWHERE | FREE, flag="--data", values=DATA_PLACES)
    """Training data: a directory with train.jsonl and optionally valid.jsonl for validation, one
    file of training rows, or the name of a data set on the hub. CSV, Parquet and other file formats
    also work (docs/data.md). Required, unless the rows are passed to train() in Python."""
    adapter_path: Directory = option(
        ..., FIRST | FREE, title="Adapter folder", aliases=("--adapter",)
    )
    """Directory for the adapter, metrics.jsonl and the checkpoints of the run. On the command line,
    the default is ./adapters."""
    method: Method = option("sft", FIRST | ALL | CARD)
    """Training objective. sft trains on texts and chats; dpo, orpo and simpo on pairs of chosen and
    rejected responses; kto on labelled responses or on pairs; grpo on prompts."""
    rank: Int = option(8, FIRST | FRESH | SIZE, ge=2)
    """LoRA rank, before rank_scaling is applied."""
    scale: Float = option(1.0, ADAPTER | FRESH, gt=0)
    """Scale of the LoRA update: y = W x + scale * B A x."""
    rank_scaling: Literal["constant", "by_bits", "by_kl"] = option(
        "by_bits", ADAPTER | FRESH | SIZE
    )
    """How the LoRA rank of a layer is chosen: the value of rank for every layer (constant), rank *
    bits / 4 (by_bits), or according to the KL importance of the layer (by_kl)."""
    target_modules: Annotated[list[Name], Distinct] = option(
        PROJECTIONS, ADAPTER | FRESH | SIZE, title="Target modules", min_length=1
    )
    """Linear layers to adapt, named by the last part of their module path. all-linear means all
    linear layers except embed_tokens and lm_head, which must be listed explicitly."""
    num_layers: LayerCount = option(
        -1, ADAPTER | FRESH | SIZE, title="Layers", values="-1 or an integer >= 1"
    )
    """Number of layers to adapt, counting back from the last layer; -1 means all layers."""
    warm_start: Place | None = option(None, ADAPTER | SIZE | FREE, values=PLACES)
    """Adapter to start from: its directory, or its name on the hub. Adapters written by mlx-lm or
    PEFT also work. The run uses the layers, ranks and scale of this adapter."""
    iters: Int = option(
        100,
        FIRST | WARN | CARD,
        title="Steps",
        holds=lambda config: config.epochs is None,
        otherwise="when epochs is set",
        ge=1,
    )
    """Number of optimizer steps."""
    epochs: Float | None = option(None, FIRST | WARN, gt=0)
    """Number of passes over the training rows (instead of iters)."""
    optimizer: Literal["adamw", "lion", "sgd", "adafactor", "muon"] = option(
        "adamw", OPTIMIZER | CARD
    )
    """Optimizer; sgd uses a momentum of 0.9."""
    learning_rate: Float = option(
        2e-4,
        FIRST | WARN | CARD,
        gt=0,
        aliases=("--lr",),
        other_default="5e-5 for all methods except sft",
    )
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = option(
        "constant",
        OPTIMIZER | WARN | CARD,
        title="Learning rate schedule",
        other_default="cosine for all methods except sft",
    )
    """Learning rate schedule after the warmup; all schedules except constant decay to a tenth of
    the peak."""
    warmup_iters: Int = option(0, OPTIMIZER | WARN, title="Warmup steps", ge=0)
    """Number of warmup steps, during which the learning rate rises from 0 to its peak."""
    lora_plus_ratio: Float = option(1.0, OPTIMIZER, title="LoRA+ ratio", gt=0)
    """LoRA+: the learning rate of B, divided by the learning rate of all other parameters."""
    rs_lora: bool = option(False, ADAPTER | FRESH, title="rsLoRA")
    """rsLoRA: in each linear layer, divide scale by the square root of the layer's rank."""
    use_dora: bool = option(False, ADAPTER | FRESH | SIZE, title="DoRA")
    """DoRA: train the magnitude and the direction of each row of an adapted weight separately."""
    lora_dropout: Float = option(
        0.0,
        ADAPTER | SIZE | CARD,
        title="Dropout",
        holds=lambda config: config.method != "grpo",
        otherwise="with method grpo, which compares probabilities of the whole adapter",
        ge=0,
        lt=1,
    )
    """Dropout probability for the inputs of LoRA branches."""
    dpo_beta: Float = option(0.1, DPO, title="DPO beta", gt=0)
    """How strongly dpo penalizes divergence from the model without the adapter."""
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
    """Loss function of dpo (docs/preference.md)."""
    label_smoothing: Float = option(
        0.0,
        DPO,
        holds=lambda config: config.dpo_loss in ("sigmoid", "robust", "exo_pair"),
        otherwise="unless method is dpo and dpo_loss is sigmoid, robust or exo_pair",
        ge=0,
        lt=0.5,
    )
    """Assumed fraction of pairs that are mislabelled (for dpo_loss sigmoid, robust and
    exo_pair)."""
    reference_free: bool = option(False, DPO)
    """Compute the loss of dpo without a reference model."""
    kto_beta: Float = option(0.1, KTO, title="KTO beta", gt=0)
    """How strongly kto penalizes divergence from the model without the adapter."""
    kto_loss: Literal["kto", "apo_zero_unpaired"] = option("kto", KTO, title="KTO loss")
    """Variant of the kto loss; apo_zero_unpaired replaces the estimated KL divergence with 0."""
    desirable_weight: Float = option(1.0, KTO, ge=0)
    """Weight in the kto loss for rows whose label is true."""
    undesirable_weight: Float = option(1.0, KTO, ge=0)
    """Weight in the kto loss for rows whose label is false."""
    orpo_lambda: Float = option(0.1, ORPO, title="ORPO lambda", gt=0)
    """Weight of the odds-ratio term in the orpo loss."""
    sft_scope: Literal["full", "response"] = option("full", ORPO, title="ORPO cross-entropy")
    """Tokens of the chosen sequence over which orpo computes its cross-entropy term: all tokens
    (full), or only those of the response (response)."""
    simpo_beta: Float = option(2.0, SIMPO, title="SimPO beta", gt=0)
    """Scale of the rewards in the simpo loss."""
    simpo_gamma: Float = option(1.0, SIMPO, title="SimPO gamma", ge=0)
    """Target margin, in the simpo loss, between the rewards of a pair's two responses."""
    rewards: Annotated[list[Name], Distinct] = option(
        [],
        GRPO,
        affects=("loss",),
        flag="--reward",
        texts=True,
        values="checks such as exact:COLUMN, number:COLUMN, regex:PATTERN, json_schema:SCHEMA and "
        "length:TOKENS, each at most once",
    )
    """Checks that score each completion from 0 to 1 (docs/grpo.md)."""
    reward_functions: Annotated[list[Name], Distinct] = option(
        [], GRPO, affects=("loss",), refused=CODE, values="module:function or file.py:function"
    )
    """Python functions that score completions (docs/grpo.md)."""
    reward_command: Name | None = option(
        None, GRPO, affects=("loss",), refused=CODE, values="a command line"
    )
    """Command that reads completions as JSON lines and prints a score for each completion."""
    reward_model: Place | None = option(
        None, GRPO | SIZE, affects=("loss", "memory"), values=PLACES
    )
    """Model that scores completions, such as a Hugging Face `…ForSequenceClassification` model with
    one label: its directory, or its name on the hub (docs/grpo.md)."""
    reward_weights: list[Float] = option(
        [], GRPO, affects=("loss",), values="one number for each reward"
    )
    """Weights of the rewards, in this order: rewards, reward_functions, functions passed in Python,
    reward_command, reward_model, and the environment's get_reward. Each weight is 1 by default."""
    environment: Name | None = option(
        None,
        GRPO,
        affects=("loss",),
        refused=CODE,
        values="module:Class or file.py:Class",
    )
    """Python class that responds to the model's turns, either with its method `step` or with
    methods that the model calls as tools (docs/grpo.md)."""
    max_turns: Int = option(
        8,
        GRPO,
        affects=("loss",),
        holds=lambda config: config.environment is not None,
        otherwise="without environment",
        ge=1,
    )
    """Maximum number of model turns in a conversation with the environment."""
    group_size: Int = option(8, GRPO, affects=("loss",), title="Completions per prompt", ge=2)
    """Number of completions to generate for each prompt."""
    max_completion_tokens: Int = option(
        256, GRPO | ALL, title="Maximum completion length, tokens", ge=1
    )
    """Maximum number of tokens in a completion, including the environment's replies. Prompts that
    leave no room for a completion of this length within max_seq_length are dropped."""
    temperature: Float = option(1.0, GRPO, affects=("loss",), gt=0)
    """Temperature at which completions are sampled."""
    grpo_loss: Literal["grpo", "dr_grpo", "dapo", "gspo"] = option("grpo", GRPO, title="GRPO loss")
    """Variant of the grpo loss, which determines how probability ratios are clipped and how the
    loss is averaged over tokens."""
    advantage_scaling: Literal["group", "batch", "none"] = option(
        "group", GRPO, other_default="none for dr_grpo"
    )
    """Normalization of the advantages: divide them by the standard deviation of the rewards within
    each group (group) or over the whole step (batch), or do not divide them (none)."""
    clip_low: Float = option(0.2, GRPO, gt=0, lt=1, other_default="3e-4 for gspo")
    """How far the ratio of the new to the old probability may fall below 1 before it is clipped."""
    clip_high: Float = option(0.2, GRPO, gt=0, other_default="0.28 for dapo and 4e-4 for gspo")
    """How far the ratio of the new to the old probability may rise above 1 before it is clipped."""
    grpo_beta: Float = option(0.0, GRPO, title="GRPO beta", ge=0)
    """Weight, in the grpo loss, of the KL divergence from the model without the adapter. 0 skips
    the forward pass of that model."""
    mask_truncated: bool = option(
        False,
        GRPO,
        title="Leave truncated completions out of the loss",
        other_default="true for dapo",
    )
    """Exclude completions that reach max_completion_tokens from the loss."""
    updates_per_step: Int = option(1, GRPO, ge=1)
    """Number of optimizer updates per step; all of them use the same completions."""
    importance_cap: Float = option(2.0, GRPO, ge=0)
    """Upper bound for the importance weights, which correct for differences between the
    probabilities computed during generation and those computed during training; 0 turns this
    correction off."""
    rollout_batch: RolloutBatch = option(
        "auto", GRPO | SIZE | WARN, values="auto or an integer >= 1"
    )
    """Number of completions to generate in parallel; auto chooses the largest number that fits into
    memory_budget_gb."""
    collapse_patience: Int = option(0, GRPO | WARN, ge=0)
    """Stop the run when the mean reward over this many steps has lost more than half of its earlier
    gain and the drop is too large to be due to chance; 0 turns this check off."""
    max_seq_length: Int = option(
        512, FIRST | ALL | CARD, title="Maximum sequence length, tokens", ge=2
    )
    """Maximum number of tokens in a row; longer rows are truncated. With grpo, maximum number of
    tokens in one forward and backward pass; prompts and their completions are packed up to this
    limit."""
    batch_size: Int = option(
        1, FIRST | CARD, title="Batch size, rows", affects=("memory", "loss"), ge=1
    )
    """Number of rows per forward and backward pass, or, with grpo, number of prompts per step."""
    packing: Switch = option(
        False,
        DATA | SIZE | CARD,
        title="Pack rows",
        methods=("sft", "grpo"),
        values="true, false or auto",
        other_default="auto for grpo",
    )
    """Pack several rows of the data into one sequence of up to max_seq_length tokens, without
    attention between the rows. With packing, batch_size is the number of packed sequences. auto
    packs if packing is faster."""
    grad_accumulation_steps: Int = option(
        1, OPTIMIZER | SIZE | CARD | GIVEN, title="Gradient accumulation, batches", ge=1
    )
    """Number of batches whose gradients are accumulated for one optimizer step."""
    parallel: Literal["data", "pipeline"] = option(
        "data", OPTIMIZER | FREE | SIZE | WHOLE, title="Parallelism"
    )
    """How the work is split across devices. With data, each device loads the whole model and
    processes some of the batches; with pipeline, each device loads some of the layers."""
    seed: Int = option(0, OPTIMIZER | CARD, affects=("loss", "rows"), ge=0)
    """Seed for the order of rows, for the initialization of LoRA, and for the rows that val_split
    holds out."""
    deterministic: bool = option(True, OPTIMIZER | WARN | SIZE)
    """Produce bit-identical results for the same seed on the same device. On CUDA, false allows
    cuDNN attention, which is faster but not deterministic."""
    matmul_precision: Literal["float32", "bfloat16"] = option(
        "float32", OPTIMIZER | WARN | Facets(affects=("loss",))
    )
    """Precision of products with the base weights on a CPU. With bfloat16, activations, gradients
    and weights are rounded to bfloat16 before they are multiplied, and products are summed in
    float32. This is faster, but requires a CPU with AVX512-BF16 (AMD Zen 4, Intel Sapphire Rapids,
    or newer)."""
    steps_per_report: Int = option(10, EVALUATION, title="Report interval, steps", ge=1)
    """Number of steps between reports of the training metrics."""
    steps_per_eval: Int = option(50, EVALUATION | WARN, title="Evaluation interval, steps", ge=1)
    """Number of steps between evaluations on the validation rows."""
    weight_decay: Float = option(0.01, OPTIMIZER | WARN, ge=0)
    """Decoupled weight decay, applied directly to the weights instead of through the gradient."""
    grad_clip_norm: Float = option(1.0, OPTIMIZER | WARN, title="Gradient clipping norm", ge=0)
    """Maximum global L2 norm of the gradient; 0 turns clipping off."""
    grad_checkpoint: bool = option(False, MEMORY, title="Gradient checkpointing")
    """Recompute each layer in the backward pass, which uses less memory but takes longer.
    Equivalent to segment_size 1."""
    activation_offloading: bool = option(True, MEMORY, title="Activation offloading")
    """Keep activations in host memory until the backward pass if this avoids recomputation and they
    can be copied while the GPU computes. Only on NVIDIA GPUs."""
    segment_size: SegmentSize = option(
        "auto", MEMORY, title="Layers per segment", values="auto or an integer >= 0"
    )
    """Number of layers per segment of the backward pass. 0 turns segments off; auto finds the
    fastest plan that fits into memory_budget_gb."""
    memory_budget_gb: Budget = option(
        "auto", MEMORY, title="Memory budget, GB", values="auto or a finite number > 0"
    )
    """Maximum memory that the run may use, in GB (10⁹ bytes); auto means the free memory of the
    device."""
    steps_per_save: Int = option(50, EVALUATION, title="Checkpoint interval, steps", ge=0)
    """Number of steps between checkpoints, from which a run can be resumed. The adapter is saved
    together with each checkpoint. 0 writes a checkpoint only at the end of the run."""
    keep_checkpoints: Int = option(2, EVALUATION, ge=1)
    """Number of checkpoints to keep; older ones are deleted."""
    resume: Switch = option(False, ELSEWHERE | FREE, values="true, false or auto")
    """Continue from the newest checkpoint in adapter_path; auto starts a new run if there is no
    checkpoint."""
    on_spike: Literal["warn", "skip", "stop"] = option(
        "warn", OPTIMIZER | WARN, title="On a loss spike"
    )
    """What to do when the loss of a step is far above the losses of recent steps: print a warning
    (warn), skip the step (skip), or stop the run (stop)."""
    report_to: Annotated[list[Literal["tensorboard", "wandb"]], Distinct] = option(
        [], EVALUATION, title="Trackers", values="tensorboard or wandb, each at most once"
    )
    """Experiment trackers that also receive the metrics, which are always written to
    metrics.jsonl."""
    save_checkpoints: bool = option(False, EVALUATION, title="Keep every evaluation's adapter")
    """Save the adapter at every evaluation, each time in a separate, complete adapter directory."""
    early_stopping_patience: Int = option(
        0, EVALUATION | WARN, title="Early stopping patience, evaluations", ge=0
    )
    """Stop the run after this many consecutive evaluations without a new lowest validation loss; 0
    turns early stopping off."""
    keep_best: bool = option(False, EVALUATION, title="Keep the best adapter")
    """Keep the adapter with the lowest validation loss in adapter_path/best."""
    sample_prompts: Annotated[list[Name], Distinct] = option(
        [], EVALUATION, values="texts, each at most once", texts=True
    )
    """Prompts that the model answers at every evaluation; the answers are written to
    metrics.jsonl."""
    sample_tokens: Int = option(
        64,
        EVALUATION,
        holds=lambda config: bool(config.sample_prompts),
        otherwise="without sample_prompts",
        ge=1,
    )
    """Maximum number of tokens in an answer to a sample prompt."""
    eval_command: Name | None = option(
        None,
        FREE,
        refused="it runs a command, which only the command line may do",
        values="a command line",
    )
    """Command that scores the adapter at every evaluation. {adapter} stands for the directory of a
    copy of the adapter. The last line that the command prints must be a number, or a JSON object
    whose values are numbers."""
    data_format: DataFormat = option("auto", DATA, title="Row format")
    """Format of the rows; auto detects the format of each row from its columns (docs/data.md)."""
    columns: Columns = option({}, DATA, title="Columns", values="a JSON object of distinct names")
    """Mapping from the format's column names to those in the data, where they differ, such as
    {"prompt": "query", "completion": "reply"}."""
    train_on: Literal["assistant", "last"] = option(
        "assistant",
        DATA,
        title="Turns in the loss",
        methods=("sft",),
        otherwise="with preference rows, whose responses are always in the loss",
    )
    """Which assistant turns of a chat are in the loss: all of them (assistant), or only the last
    one (last)."""
    append_eos: bool = option(True, DATA | GIVEN, title="End responses with EOS")
    """Append a stop token to every response in the loss, unless the chat template or the row
    already ends the response with one."""
    prompt_format: Literal["auto", "chat", "raw"] = option(
        "auto", DATA, title="Format of plain prompts"
    )
    """Whether to apply the chat template to plain prompts (strings, not lists of messages): always
    (chat), never (raw), or only if the tokenizer has a chat template (auto)."""
    chat_template_kwargs: Variables = option(
        {},
        DATA,
        title="Template variables",
        values="a JSON object whose keys are variables of the template",
    )
    """Variables for the chat template, such as {"enable_thinking": false}; a row may override them.
    They are also used when text is generated with the adapter."""
    val_split: Share = option(
        "auto",
        DATA,
        title="Validation split",
        values="auto, a fraction below 1, or a number of rows",
    )
    """Training rows to hold out for validation if there is no validation file, as a fraction or a
    number of rows; 0 holds out none. auto holds out a twentieth of the rows (at most 500) if there
    are more than 100 rows. Which rows are held out depends on their content and on seed."""
    dedup: bool = option(False, DATA, title="Drop repeated rows")
    """Drop training rows that repeat an earlier row."""
    strict: bool = option(False, DATA | FREE, title="Refuse incomplete rows")
    """Raise an error if the chat template omits part of a row, or if a response in the loss does
    not end with a stop token. Without strict, such rows are only counted and reported."""
    overwrite: bool = option(False, EVALUATION, title="Overwrite the adapter")
    """Replace an existing adapter in adapter_path."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _fault(error, values) from None

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, values: Any) -> Any:
        """Renames aliases, and fills in the defaults that depend on the method."""
        if not isinstance(values, dict):
            return values
        if values.get("method") == "grpo":
            loss = values.get("grpo_loss")
            own = OF_LOSS.get(loss, {}) if isinstance(loss, str) else {}
            values = {"packing": "auto", **own, **values}
        values = renamed(values)
        if values.get("method", "sft") != "sft":
            values = {"learning_rate": 5e-5, "lr_schedule": "cosine", **values}
        return values

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> TrainConfig:
        for name, own in FACETS.items():
            if getattr(self, name) == type(self).model_fields[name].default or own.effective(self):
                continue
            when = own.otherwise or f"unless method is {' or '.join(own.methods)}"
            raise InputError(f"{name} has no effect {when}: leave it out", field=name)
        return self

    @model_validator(mode="after")
    def _no_contradictions(self) -> TrainConfig:
        if self.epochs is None and self.warmup_iters >= self.iters:
            raise InputError(
                f"warmup_iters = {self.warmup_iters} must be smaller than iters = {self.iters}: "
                "lower it, or the learning rate never reaches its peak",
                field="warmup_iters",
            )
        if self.dpo_loss == "exo_pair" and self.label_smoothing == 0:
            raise InputError(
                "dpo_loss exo_pair needs label_smoothing above 0, because the loss of a pair would "
                "otherwise be infinite: set label_smoothing to 0.001, for example",
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


for _field in TrainConfig.model_fields.values():  # a docstring may have several lines
    _field.description = " ".join((_field.description or "").split())
TrainConfig.model_rebuild(force=True)  # otherwise the JSON schema lacks these descriptions

#: The facets of every field.
FACETS: dict[str, Facets] = {
    name: own if isinstance(own := field.json_schema_extra, Facets) else PLAIN
    for name, field in TrainConfig.model_fields.items()
}
#: Fields whose values are paths.
PATHS = tuple(name for name, field in TrainConfig.model_fields.items() if kind(field) is Path)
#: The fields that clients of the server may not set, each with the reason.
REFUSED = {name: own.refused for name, own in FACETS.items() if own.refused}


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values with their fields' own names: with method dpo, dpo_lr_schedule and
    dpo_warmup_iters are aliases for lr_schedule and warmup_iters. Raises InputError."""
    values = dict(values)
    for name in ("lr_schedule", "warmup_iters"):
        alias = f"dpo_{name}"
        if alias not in values:
            continue
        if values.get("method") != "dpo":
            raise InputError(f"{alias} only applies to method dpo: use {name}", field=alias)
        if name in values:
            raise InputError(
                f"{alias} and {name} name the same field: set only one of them", field=alias
            )
        values[name] = values.pop(alias)
    return values


def affecting(what: Effect) -> tuple[str, ...]:
    """Returns the names of the fields that affect `what`."""
    return tuple(name for name, own in FACETS.items() if what in own.affects)


def allowed(name: str, value: Any = None) -> str:
    """Returns a description of the values that a field may have, e.g. "an integer >= 2". Errors,
    `--help` and the table in docs/configuration.md show this description.

    If `value` is an integer that exceeds MOST, the maximum for all fields, the description states
    that maximum instead.
    """
    if isinstance(value, int) and value > MOST:
        return f"an integer <= {MOST}"
    if FACETS[name].values:
        return FACETS[name].values
    field = TrainConfig.model_fields[name]
    if is_list(field):
        return "one or more names, each at most once"
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


#: For each field, its names in other trainers. If a configuration uses one of them, the error
#: message suggests the field.
ELSEWHERE_CALLED: dict[str, str] = {
    "activation_offloading": "enable_activation_offloading offload offloading",
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
    """Returns a question that suggests the most similar of `names`, or an empty string if none of
    them is similar."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def meant(name: str, names: Sequence[str], spelt: Callable[[str], str] = str) -> str:
    """Like `nearest`, but also recognizes the names that other trainers use. `spelt` converts the
    name of a field to the form that it has in `names`."""
    field = CALLED.get(name.lstrip("-").replace("-", "_").lower())
    if field is None:
        return nearest(name, names)
    return f" Did you mean {spelt(field)}?" if spelt(field) in names else ""


def load_config(
    yaml_path: Path | None,
    overrides: dict[str, Any],
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> TrainConfig:
    """Returns the configuration set by a YAML file (if one is given), `overrides` and `defaults`.
    `overrides` take precedence over the file, and `defaults` apply to fields that neither of them
    sets. Raises InputError for any bad value."""
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
    """Returns an InputError for the first error in a ValidationError, with the given value and the
    allowed values."""
    # A misspelt required field is also missing, but the error about its spelling is more useful.
    order = {"extra_forbidden": 0, "missing": 2}
    fault = min(error.errors(), key=lambda fault: order.get(fault["type"], 1))
    if not fault["loc"]:
        raised = fault.get("ctx", {}).get("error", fault["msg"])  # raised by one of our validators
        return raised if isinstance(raised, InputError) else InputError(str(raised))
    name = str(fault["loc"][0])
    if fault["type"] == "extra_forbidden":
        hint = meant(name, list(TrainConfig.model_fields))
        return InputError(f"unknown field {word(name)}.{hint}", field=name)
    if fault["type"] == "missing":
        return InputError(
            f"{name} is missing: set it in the YAML file or with {flag(name)}", field=name
        )
    value = values.get(name, fault["input"])  # it may have been set by an alias
    text = f"{name} must be {allowed(name, value)}; got {shown(value, 200)}"
    return InputError(text, field=name)


def flag(name: str) -> str:
    """Returns the command-line flag of a field."""
    return FACETS[name].flag or "--" + name.replace("_", "-")


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the mapping in a YAML file, and the line number of each key, counting from 1."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path | str) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the mapping in a YAML text, and the line number of each key, counting from 1. Error
    messages refer to the text as `path`."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except RecursionError:
        raise InputError(f"{path}: not valid YAML: it is nested too deeply") from None
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
        if key.value in lines:  # PyYAML would silently use the last value
            raise InputError(
                f"{path}, line {key.start_mark.line + 1}: {key.value} is set a second time "
                f"(first on line {lines[key.value]})"
            )
        lines[key.value] = key.start_mark.line + 1
    return values, lines


def table() -> str:
    """Returns a Markdown table with the values, the default and the meaning of each field."""
    rows = ["| Field | Values | Default | Meaning |", "|---|---|---|---|"]
    for name, field in TrainConfig.model_fields.items():
        rows.append(f"| `{name}` | {allowed(name)} | {defaults(name)} | {field.description} |")
    return "\n".join(rows)


def default(name: str) -> str:
    """Returns the default of a field as it is written in YAML and in the table."""
    field = TrainConfig.model_fields[name]
    if field.is_required():
        return "required"
    return written(field.default)


def written(value: Any) -> str:
    """Returns a value of a field as it is written in YAML and in the table."""
    if value in (None, [], {}):
        return "none"
    if isinstance(value, list):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def defaults(name: str) -> str:
    """Returns the default of a field. If the field has a different default in some cases, adds that
    default and names the cases."""
    other = FACETS[name].other_default
    return f"{default(name)}, or {other}" if other else default(name)


if __name__ == "__main__":
    print(table())
