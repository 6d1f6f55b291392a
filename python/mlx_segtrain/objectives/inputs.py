"""What every objective gives the chain of a stream of tokens."""

from typing import Any

import mlx.core as mx

from ..models import Chain
from ..streams import Stream, trim_start


def stream_values(
    chain: Chain, stream: Stream, tokens: Any, first: int
) -> tuple[dict[str, mx.array], int]:
    """Inputs of a stream of tokens [B, T] whose first row that counts is `first`; rows of its h.

    `positions` are those of the rows that h has behind the layer that trims.
    """
    length = tokens.shape[1]
    start = trim_start(first) if chain.trims else 0
    inputs = {**chain.start(mx.array(tokens)), "positions": mx.arange(start, length)}
    return {stream.of(name): x for name, x in inputs.items()}, length - start
