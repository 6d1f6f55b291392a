"""How many tokens and positions a loaded model knows.

MLX reads and writes past the end of a table without a word, so a number that indexes one is
compared with the rows that were loaded, and not with what config.json says.
"""

import re
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError, reason

#: Tables that are not indexed by the model's tokens: positions, hashes of several tokens, and those
#: to which a model maps tokens itself.
POSITIONS = re.compile(r"(^|\.)(wpe|position_embeddings|embed_positions)$")
OTHERS = re.compile(r"(per_layer|ngram_embeddings\.embedders)")


@dataclass(frozen=True)
class Tables:
    """Rows of the embedding of tokens, tokens that the head gives logits of, and positions, if they
    have a table."""

    tokens: int
    logits: int
    positions: int | None


def tables_of(model: nn.Module) -> Tables:
    """The tables of mlx-lm's model; computes nothing. InputError if it has none, or cannot run."""
    tables = {
        name: module.weight.shape[0]
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
    }
    positions = [n for name, n in tables.items() if POSITIONS.search(name)]
    tokens = [
        n for name, n in tables.items() if not (POSITIONS.search(name) or OTHERS.search(name))
    ]
    if not tokens:
        raise InputError("the model has no embedding of tokens: it cannot read a text.")
    try:
        logits = model(mx.array([[0]])).shape[-1]  # a graph of which the shape alone is known
    except Exception as error:
        said = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"the model cannot run: {said}.") from error
    return Tables(min(tokens), logits, min(positions, default=None))
