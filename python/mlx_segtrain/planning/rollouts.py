"""Determines how many completions can be generated at a time, given the memory that caches and
logits need."""

from __future__ import annotations

from ..config import TrainConfig
from ..errors import NoRoom
from ..hub import title
from ..models.form import LayerForm
from ..models.headers import ModelShape, read_shape
from .budget import budget_bytes, device
from .costs import Device, parameters_of
from .run import adapter_ranks, resting_shape

#: The number of prompt tokens that are processed at a time.
PREFILL = 2048
#: mlx-lm's caches grow in steps of this many tokens.
CACHE_STEP = 256
#: The number of float32 copies of a row's logits that exist at the same time during sampling.
LOGITS = 6
#: The memory, in bytes, needed to run one token of each row through the layers, and for compiled
#: kernels.
SLACK = 64 << 20


def cache_bytes(shape: ModelShape, tokens: int, device: Device) -> int:
    """Returns the size, in bytes, of a sequence's cached keys and values, as if no layer had a
    window. A cache starts at the length of the longest prompt in its batch and grows in steps of
    CACHE_STEP, so it may be longer than `tokens`."""
    length = tokens + CACHE_STEP
    own = sum(layer.key_value for layer in shape.layers if layer.donor is None)
    return 2 * length * own * device.size


def rollout_bytes(config: TrainConfig, tokens: int, at_once: int) -> int | None:
    """Returns the peak memory, in bytes, of generating `at_once` completions at a time, if a
    completion and its prompt have up to `tokens` tokens. Returns None if memory is not
    predicted."""
    shape = resting_shape(config)
    if not shape.fast:
        return None
    fixed, row = _parts(config, shape, tokens)
    return fixed + at_once * row


def rollouts_at_once(config: TrainConfig, tokens: int, every: int) -> int:
    """Returns how many of `every` completions can be generated at a time within the budget. Raises
    NoRoom if not even one fits."""
    shape = resting_shape(config)
    if not shape.fast:
        return every
    given = config.memory_budget_gb
    budget = budget_bytes(None if given == "auto" else given)
    fixed, row = _parts(config, shape, tokens)
    most = (budget - fixed) // row
    if most < 1:
        raise NoRoom(
            f"with {title(config.model_dir)}, generating one completion (up to {tokens} tokens, "
            f"including the prompt) needs {(fixed + row) / 1e9:.2f} GB, more than the budget of "
            f"{budget / 1e9:.2f} GB: lower max_completion_tokens or raise memory_budget_gb."
        )
    return min(every, most)


def check_rollouts(config: TrainConfig, tokens: int) -> None:
    """Raises NoRoom if the configured rollout_batch does not fit into the memory budget."""
    assert isinstance(config.rollout_batch, int)
    most = rollouts_at_once(config, tokens, config.rollout_batch)
    if most < config.rollout_batch:
        raise NoRoom(
            f"rollout_batch is {config.rollout_batch}, but only {most} completions of {tokens} "
            "tokens with their prompts fit into the budget: lower rollout_batch, or raise "
            "memory_budget_gb.",
            field="rollout_batch",
        )


def completions_of(config: TrainConfig, ranks: int) -> int:
    """Returns the maximum number of completions that a rank generates in a step."""
    return -(-config.batch_size // ranks) * config.group_size


def full_rollouts(config: TrainConfig, ranks: int = 1) -> tuple[int, int | None]:
    """Returns the number of completions that a rank can generate at a time, and their peak memory
    in bytes (None if memory is not predicted). A completion and its prompt are assumed to have
    max_seq_length tokens together. Raises NoRoom if not even one fits."""
    tokens, at_once = config.max_seq_length, config.rollout_batch
    if at_once == "auto":
        at_once = rollouts_at_once(config, tokens, completions_of(config, ranks))
    return at_once, rollout_bytes(config, tokens, at_once)


def _parts(config: TrainConfig, shape: ModelShape, tokens: int) -> tuple[int, int]:
    """Returns the memory that does not depend on the number of completions, and the memory per
    completion, in bytes. Accounts for the old and the new array of a layer's cache, which both
    exist while the cache grows, and for prompts that are processed while the caches of the current
    completions are in memory."""
    on = device(config.deterministic, shape.float_size)
    # The factors, the optimizer state, and a copy of the factors in the dtype of the model.
    numbers = sum(parameters_of(shape, adapter_ranks(config, shape), dora=False).values())
    fixed = shape.weight_bytes(not on.gpu) + SLACK + 4 * 4 * numbers
    cache = cache_bytes(shape, tokens, on)
    # In a conversation, the prompt of a later turn contains all earlier turns.
    prompt = tokens - (config.max_completion_tokens if config.environment is None else 0)
    reading = _reading_bytes(shape, max(prompt, 1), on)
    if config.reward_model is not None:  # it runs after the caches of completions are freed
        judge = read_shape(config.reward_model)
        if judge.fast:
            reading = max(reading, _reading_bytes(judge, tokens, on))
    fixed += reading
    layers = sum(layer.donor is None for layer in shape.layers)
    return fixed, cache + cache // max(layers, 1) + LOGITS * 4 * shape.vocabulary


def _reading_bytes(shape: ModelShape, tokens: int, device: Device) -> int:
    """Returns the memory, in bytes, needed to process a text: the size of its cache, plus the
    maximum that a layer needs for PREFILL tokens. On a CPU, where attention is not fused, a layer
    also needs memory for the scores of all heads."""

    def numbers(layer: LayerForm) -> int:
        scores = 0 if device.gpu else layer.query // layer.head * tokens
        attention = 3 * layer.query + 2 * layer.key_value + scores
        return 3 * shape.width + max(attention, 3 * (layer.hidden + layer.experts))

    layer = min(tokens, PREFILL) * device.size * max(map(numbers, shape.layers))
    return cache_bytes(shape, tokens, device) + layer
