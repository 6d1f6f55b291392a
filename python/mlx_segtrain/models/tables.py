"""Finds how many tokens and positions a loaded model knows.

MLX reads and writes past the end of a table without an error, so a number that indexes one is
compared with the rows that were loaded, not with config.json.
"""

import re
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError, reason

#: Tables that are not indexed by the model's tokens: positions, hashes of several tokens, and
#: tables whose index the model computes from the tokens.
POSITIONS = re.compile(r"(^|\.)(wpe|position_embeddings|embed_positions)$")
OTHERS = re.compile(r"(per_layer|ngram_embeddings\.embedders)")


@dataclass(frozen=True)
class Tables:
    """The number of rows of the token embedding, of tokens that the head gives logits for, and of
    positions, if there is a table of them."""

    tokens: int
    logits: int
    positions: int | None


def tables_of(model: nn.Module) -> Tables:
    """Returns the tables of mlx-lm's model; computes nothing. Raises InputError if it has none, or
    cannot run."""
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
        raise InputError("the model has no token embedding: it cannot read text.")
    try:
        logits = model(mx.array([[0]])).shape[-1]  # a graph of which only the shape is used
    except Exception as error:
        said = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"the model cannot run: {said}.") from error
    return Tables(min(tokens), logits, min(positions, default=None))
