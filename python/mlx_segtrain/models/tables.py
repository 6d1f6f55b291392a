"""Determines how many token ids and positions a loaded model supports.

MLX reads and writes past the end of a table without an error. Therefore, indices are compared with
the number of rows that were loaded, not with the numbers in config.json.
"""

import re
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError, named_reason

#: Match the paths of position tables, and of other tables that token ids do not index directly.
POSITIONS = re.compile(r"(^|\.)(wpe|position_embeddings|embed_positions)$")
OTHERS = re.compile(r"(per_layer|ngram_embeddings\.embedders)")


@dataclass(frozen=True)
class Tables:
    """The number of tokens in the embedding, the number of logits of the head, and the number of
    positions if the model has a table of positions."""

    tokens: int
    logits: int
    positions: int | None


def tables_of(model: nn.Module) -> Tables:
    """Returns the sizes of the tables in an mlx-lm model, without evaluating anything. Raises
    InputError if the model has no token embedding, or cannot run."""
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
        raise InputError("the model has no token embedding, so it cannot process text.")
    try:
        logits = model(mx.array([[0]])).shape[-1]  # the graph is not evaluated
    except Exception as error:
        raise InputError(f"the model cannot run: {named_reason(error)}.") from error
    return Tables(min(tokens), logits, min(positions, default=None))
