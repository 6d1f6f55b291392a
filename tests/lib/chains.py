"""Creates models and batches in memory, and computes the loss and gradients of one step."""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from lib.checks import random_adapter
from mlx_segtrain.data import Batch, PairBatch
from mlx_segtrain.lora import Adapter
from mlx_segtrain.models import adapting
from mlx_segtrain.objectives import Functions, value_and_grad
from mlx_segtrain.objectives.sft import Sft

SCALE = 1.5


#: The test models by name: each value is a model family and its options. Test sequences are longer
#: than the sliding window of 8 tokens.
FAST = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "ministral3": ("ministral3", {}),
    "mistral3": ("mistral3", {}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {}),
    "granite": ("granite", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "gemma4-E4B": ("gemma4_text", {}),
    "gemma4-K=V": (
        "gemma4_text",
        {
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
    "gemma4-experts": (
        "gemma4_text",
        {
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
}


def batch_of(rows: int, prompt: int = 0, length: int = 21) -> Batch:
    """Returns random tokens, padded on the right. Tokens from index `prompt` onwards are in the
    loss."""
    rng = np.random.default_rng(rows)
    tokens = rng.integers(0, 128, (rows, length)).astype(np.int32)
    weights = rng.uniform(0.5, 1, tokens.shape).astype(np.float32)
    weights[:, : prompt + 1] = 0
    for i in range(rows):
        weights[i, length - 5 * i :] = 0
    return Batch(tokens, weights, np.arange(rows), length - 5 * np.arange(rows))


def adapter_of(chain) -> Adapter:
    """Returns an adapter whose linear layers have different ranks."""
    ranks = {path: 3 + i % 3 for i, path in enumerate(sorted(chain.linears))}
    return random_adapter(chain, ranks, SCALE, 0.1)


def run(chain, adapter, batch, segment_size=1, cuts=None):
    cuts = cuts or chain.cuts(segment_size)
    params = adapting.stage_params(chain, adapter)
    what = (Sft(), chain, adapter.scales, params, batch, float(batch.weights[:, 1:].sum()))
    (loss,), grads = value_and_grad(Functions(*what[:3]), *what[3:], cuts=lambda streams: cuts)
    return loss.item(), {k: g for own in grads.values() for k, g in own.items()}


def pair_batch(shared: int, prompt: int = 9, lengths=((21, 17),), seed: int = 0) -> PairBatch:
    """Returns pairs whose sequences share their first `shared` tokens. Responses start after the
    prompt."""
    rng = np.random.default_rng(seed)
    b = len(lengths)
    chosen = rng.integers(0, 128, (b, max(c for c, _ in lengths))).astype(np.int32)
    rejected = rng.integers(0, 128, (b, max(r for _, r in lengths))).astype(np.int32)
    rejected[:, :shared] = chosen[:, :shared]
    rejected[:, shared] = (chosen[:, shared] + 1) % 128

    def branch(tokens: np.ndarray, side: int) -> Batch:
        ends = np.array([pair[side] for pair in lengths])
        at = np.arange(tokens.shape[1])
        weights = ((at >= prompt) & (at < ends[:, None])).astype(np.float32)
        return Batch(tokens, weights, np.arange(b), ends)

    reference = rng.uniform(-60, -40, 2 * b).astype(np.float32)
    return PairBatch(branch(chosen, 0), branch(rejected, 1), shared, np.arange(b), reference)


def headers(model):
    """Returns the tensor headers that this model's files would contain."""
    kinds = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32"}
    return {
        name: (kinds.get(w.dtype, "F32"), tuple(w.shape))
        for name, w in tree_flatten(model.parameters())
    }
