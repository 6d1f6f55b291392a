"""The base class of objectives, and functions that compute the inputs common to all objectives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .. import ops
from ..config import TrainConfig
from ..data import Batch, Dataset
from ..models import Chain
from ..streams import SINGLE, BatchShape, Stream, padded, trim_start


class Objective:
    """Computes the outputs of the head for a batch: the loss, followed by the `metrics`. Each
    output is a scalar.

    All outputs are already divided by the total of the step, so the outputs of several batches can
    be summed. A metric is NaN if no row of the batches contributes to it.
    """

    options: tuple[str, ...] = ()  #: the objective's options in the configuration, in field order
    unit: str  #: the unit of the loss, in words
    metrics: tuple[str, ...] = ()  #: names of the outputs after the loss
    reads: tuple[str, ...]  #: names of values that the head reads after each stream's h and rows
    temperature = 1.0  #: divides all logits

    @classmethod
    def of(cls, config: TrainConfig) -> "Objective":
        """Creates the objective with the options that are set in a configuration."""
        return cls(*(getattr(config, name) for name in cls.options))

    @property
    def reference(self) -> "Objective | None":
        """The objective that computes the values of the reference model, which is the model without
        its adapter; None if the loss does not need them."""
        return None

    @property
    def baseline(self) -> "Objective | None":
        """The objective that computes the baseline of the loss; None if the loss has no baseline.
        The baseline is computed for all batches of a step, without a backward pass, before the loss
        of the first batch. The sum of its outputs becomes the field `baseline` of the total, and is
        a constant in the loss."""
        return None

    def prepared(self, data: Dataset, tokens: int) -> Dataset:
        """Returns the data in the form that the run trains on. Rows have at most `tokens` tokens.
        Raises InputError if the data cannot be used."""
        return data

    def remarks(self, data: Dataset) -> list[str]:
        """Returns notes on the training data that the user should read before a run."""
        return []

    def choices(self, data: Dataset) -> Iterator[Dataset]:
        """Yields the data in every form that a run can use. The run uses the first form that fits
        into memory."""
        yield data

    def total(self, batches: Sequence[Any]) -> Any:
        """Returns the total by which the losses of these batches are divided."""
        raise NotImplementedError

    def batch_shapes(self, data: Dataset, rows: int) -> list[BatchShape]:
        """Returns the shapes of the largest batches with `rows` rows, one for each number of
        streams that a batch can have. By default rows are padded and there is one stream."""
        columns = data.columns  # for pairs, `length` is that of the longer sequence
        length = padded(int(columns.length.max()), rows) - 1  # the last token is only a target
        first, most = int(columns.first.min()) - 1, int(columns.trained.max())
        return [BatchShape.single(rows, length, length - trim_start(first), rows * most)]

    def full_shape(self, rows: int, length: int, trained: int, same: int) -> BatchShape:
        """Returns the shape of a batch whose rows have `length` tokens, of which the last `trained`
        are in the loss. In pairs, the two sequences share the first `same` tokens."""
        trimmed = length - trim_start(length - trained)
        return BatchShape.single(rows, length, trimmed, rows * trained)

    def streams(self, chain: Chain, batch: Any) -> tuple[Stream, ...]:
        """Returns the streams into which a batch is divided. By default there is one stream of
        single sequences, padded or packed."""
        if not batch.packed:
            return SINGLE
        # The last token of a sequence is not an input, and the first token is never a target.
        return (Stream(parts=tuple(map(int, batch.lengths - 1))),)

    def values(self, chain: Chain, batch: Any, total: Any) -> dict[str, mx.array]:
        """Returns the inputs of the chain and the head for a batch, keyed by name."""
        raise NotImplementedError

    def head(self, chain: Chain, *, needs_grad: bool = True) -> Callable[..., Any]:
        """Returns the function that computes the outputs from the parameters and the values that
        the head reads. By default the first of these values is `targets`, and `_outputs` receives
        the targets' log-probabilities."""

        def outputs(params: Mapping[str, mx.array], *reads: mx.array) -> tuple[mx.array, ...]:
            of_streams, (targets, *own) = reads[: -len(self.reads)], reads[-len(self.reads) :]
            pairs = zip(of_streams[::2], of_streams[1::2], strict=True)
            h = mx.concatenate([ops.take_rows(h.reshape(-1, h.shape[-1]), at) for h, at in pairs])
            how: Any = {"temperature": self.temperature, "needs_grad": needs_grad}
            return self._outputs(chain.head.log_probs(params, h, targets, **how), *own)

        return outputs

    def _outputs(self, log_p: mx.array, *reads: mx.array) -> tuple[mx.array, ...]:
        """Returns the outputs, given the log-probabilities [M] of the targets and the other values
        that the head reads."""
        raise NotImplementedError


def predictions(
    batch: Batch,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Returns the input tokens [B, T]; the rows and the positions, int64 [M], of tokens whose next
    token is in the loss; and the indices of these next tokens in the arrays of the batch."""
    run = np.ones(batch.tokens.shape[1], bool)
    run[np.cumsum(batch.lengths) - 1 if batch.packed else -1] = False
    after = np.flatnonzero(run) + 1
    b, t = np.nonzero(batch.weights[:, after])
    return batch.tokens[:, run], b, t, (b, after[t])


def reference_of(batch: Any, n: int, needed: bool) -> np.ndarray:
    """Returns the reference values of a batch, float32 [n], or zeros if they are not needed. Raises
    ValueError if they are needed, but have not been computed."""
    if batch.reference is not None:
        return batch.reference
    if needed:
        raise ValueError("the reference values of a row in the batch have not been computed")
    return np.zeros(n, np.float32)


def stream_values(
    chain: Chain, stream: Stream, tokens: np.ndarray, b: np.ndarray, t: np.ndarray
) -> dict[str, mx.array]:
    """Returns the inputs of a stream with tokens [B, T]. The tokens in rows b [M] at positions t
    [M] each predict a token in the loss.

    `positions` [N] are the positions that remain after the layer that trims the sequences, and
    `rows` [M] are indices into h [B·N, H].
    """
    length = tokens.shape[1]
    start = trim_start(int(t.min()) if t.size else 0) if chain.trims else 0
    inputs = {
        **chain.start(ops.upload(tokens)),
        "positions": mx.arange(start, length),
        "rows": ops.upload(b * (length - start) + t - start),
    }
    return {stream.of(name): x for name, x in inputs.items()}
