"""KTO: trains on responses that are labelled as desirable or undesirable.

The reward of each response is compared with the KL divergence of the model from the model without
its adapter. The divergence is estimated over all rows of a step, by pairing their prompts with
responses of other rows (data/mismatching.py). This requires a forward pass before the first
backward pass of the step. No gradient flows through the estimate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Literal

import mlx.core as mx
import numpy as np

from .. import ops
from ..data import AnyBatch, Batch, Dataset, PairBatch
from ..data.mismatching import mismatched
from ..models import Chain
from ..streams import SINGLE, Stream
from .objective import Objective, reference_of, stream_values
from .preference import Reference

#: The range that the KTO paper (eq. 8) recommends for the ratio of desirable to undesirable rows,
#: where each count is multiplied by its weight.
ADVISED = (1.0, 4 / 3)


@dataclass(frozen=True)
class Total:
    """The number of rows, and the number of desirable rows among them. `baseline` is the estimate
    of the KL divergence, which may be negative."""

    rows: int
    wanted: int
    baseline: float = 0.0


class Responses(Objective):
    """The base class of objectives with one response per row. Subclasses define `_of_sums`."""

    unit = "per row"
    reads = ("targets", "members", "labels", "reference", "kl", "parts")

    def total(self, batches: Sequence[AnyBatch]) -> Total:
        labels = np.concatenate([_labels(_own(batch)) for batch in batches])
        return Total(len(labels), int((labels > 0).sum()))

    def streams(self, chain: Chain, batch: AnyBatch) -> tuple[Stream, ...]:
        return SINGLE

    def values(self, chain: Chain, batch: AnyBatch, total: Total) -> dict[str, mx.array]:
        """Returns the inputs of the chain and the head. M response tokens are predicted, and
        `members` [B, M] is 1 where a predicted token belongs to the response of a row.

        `labels` [B] is 1 for desirable and −1 for undesirable rows. `reference` [B] contains the
        log-probabilities under the model without its adapter. `kl` is the estimate of the KL
        divergence, or 0 if the estimate is negative. `parts` [3] contains 1/n, where n is the
        number of all rows, of desirable rows, and of undesirable rows in the step; it is NaN where
        n is 0.
        """
        own, reference = self._sides(batch)
        b, t = np.nonzero(own.weights[:, 1:])
        unwanted = total.rows - total.wanted
        parts = [1 / n if n else nan for n in (total.rows, total.wanted, unwanted)]
        # The last token of a sequence is only a target, so it is not among the inputs.
        return {
            **stream_values(chain, SINGLE[0], own.tokens[:, :-1], b, t),
            "targets": ops.upload(own.tokens[b, t + 1]),
            "members": ops.upload((np.arange(len(own.rows))[:, None] == b).astype(np.float32)),
            "labels": ops.upload(_labels(_own(batch))),
            "reference": ops.upload(reference),
            "kl": mx.array(max(total.baseline, 0.0), mx.float32),
            "parts": mx.array(parts, mx.float32),
        }

    def _outputs(self, log_p: mx.array, *reads: mx.array) -> tuple[mx.array, ...]:
        members, *own = reads
        # This is not written as a matrix multiplication, because GPUs would round its operands.
        return self._of_sums((members * log_p).sum(1), *own)

    def _sides(self, batch: AnyBatch) -> tuple[Batch, np.ndarray]:
        """Returns the sequences to run through the model, and their log-probabilities under the
        reference model."""
        own = _own(batch)
        return own, _reference(batch, self.reference is not None)[: len(own.rows)]

    def _of_sums(self, sums: mx.array, *reads: mx.array) -> tuple[mx.array, ...]:
        """Returns the outputs, given the log-probabilities [B] of the responses and the other
        values that the head reads."""
        raise NotImplementedError


def _own(batch: AnyBatch) -> Batch:
    """Returns the sequences that pair each prompt with its own response, not with that of another
    row."""
    return batch.chosen if isinstance(batch, PairBatch) else batch


def _labels(own: Batch) -> np.ndarray:
    """Returns 1 for desirable and −1 for undesirable rows, float32 [B]. The labels are the signs of
    the rows' weights."""
    return np.sign(own.weights.sum(1)).astype(np.float32)


def _reference(batch: AnyBatch, needed: bool) -> np.ndarray:
    """Returns the log-probabilities of all sequences in a batch under the reference model, as
    float32, or zeros if they are not needed."""
    sides = 2 if isinstance(batch, PairBatch) else 1
    return reference_of(batch, sides * len(batch.rows), needed)


@dataclass(frozen=True)
class Alone(Responses):
    """An objective that outputs only the log-probabilities [B] of the responses."""

    def _of_sums(self, sums: mx.array, *reads: mx.array) -> tuple[mx.array, ...]:
        return (sums,)


@dataclass(frozen=True)
class Divergence(Responses):
    """An objective that outputs only this batch's part of the estimated KL divergence. The estimate
    is the mean of log π − log ref over the rows of a step, where each prompt is paired with the
    response of another row."""

    def _sides(self, batch: AnyBatch) -> tuple[Batch, np.ndarray]:
        assert isinstance(batch, PairBatch)
        return batch.rejected, _reference(batch, needed=True)[len(batch.rows) :]

    def _of_sums(self, sums: mx.array, *reads: mx.array) -> tuple[mx.array, ...]:
        _, reference, _, parts = reads
        return ((sums - reference).sum() * parts[0],)


@dataclass(frozen=True)
class Kto(Responses):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306).

    Let r = log π − log ref, summed over the response, where π is the model with its adapter and ref
    the model without it, and let z ≥ 0 be the estimated KL divergence, which is a constant in the
    loss. The loss is λ_D·(1 − σ(β(r − z))) for a desirable row and λ_U·(1 − σ(β(z − r))) for an
    undesirable row. With z = 0, this is the loss `apo_zero_unpaired` (D'Oosterlinck et al. 2024,
    arXiv:2408.06266). The reward of a row is βr. The accuracy counts a desirable row as correct if
    its reward is above βz, and an undesirable row if its reward is below βz.
    """

    beta: float = 0.1
    kind: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable: float = 1.0
    undesirable: float = 1.0

    options = ("kto_beta", "kto_loss", "desirable_weight", "undesirable_weight")
    metrics = ("accuracy", "margin", "desirable_reward", "undesirable_reward", "kl")

    @property
    def reference(self) -> Objective:
        return Reference() if self.baseline else Alone()

    @property
    def baseline(self) -> Divergence | None:
        return Divergence() if self.kind == "kto" else None

    def prepared(self, data: Dataset, tokens: int) -> Dataset:
        return mismatched(data, tokens) if self.baseline else data

    def remarks(self, data: Dataset) -> list[str]:
        wanted = int((data.columns.sign > 0).sum())
        rows = wanted, len(data) - wanted
        if 0 in rows:
            return [f"{data.name}: the label of every row is {str(wanted > 0).lower()}"]
        weighted = self.desirable * rows[0], self.undesirable * rows[1]
        low, high = ADVISED
        if 0 in weighted or low <= weighted[0] / weighted[1] <= high:
            return []
        ends = [self.undesirable * rows[1] * end / rows[0] for end in ADVISED]
        return [
            f"{data.name}: {rows[0]:,} rows are desirable and {rows[1]:,} are not; with these "
            f"weights the ratio is {weighted[0] / weighted[1]:.2f} to 1, but KTO's paper "
            "recommends a ratio from 1 to 1.33: set desirable_weight to a value from "
            f"{ends[0]:.3g} to {ends[1]:.3g}"
        ]

    def _of_sums(self, sums: mx.array, *reads: mx.array) -> tuple[mx.array, ...]:
        labels, reference, kl, parts = reads
        wanted = labels > 0
        rewards = self.beta * (sums - reference)
        apart = labels * (rewards - self.beta * kl)
        losses = mx.where(wanted, self.desirable, self.undesirable) * mx.sigmoid(-apart)
        right = (apart > 0) + 0.5 * (apart == 0)  # a tie counts as one half
        means = [mx.where(own, rewards, 0).sum() for own in (wanted, ~wanted)]
        high, low = means[0] * parts[1], means[1] * parts[2]
        share = labels.size * parts[0]
        found = (
            right.sum() * parts[0],
            high - low,
            high,
            low,
            kl * share if self.baseline else nan,
        )
        return losses.sum() * parts[0], *(mx.stop_gradient(mx.array(x)) for x in found)
