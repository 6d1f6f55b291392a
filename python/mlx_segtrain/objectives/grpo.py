"""Policy gradients over groups of completions: GRPO, Dr. GRPO, DAPO and GSPO.

A row is a prompt with one completion, whose tokens are in the loss. Each of these tokens has a
weight and four values that are computed before the update. The values are the token's advantage and
its log-probabilities when it was sampled (`rollout`), before the first update (`old`), and under
the model without the adapter (`reference`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx
import numpy as np

from .. import ops
from ..data import Batch, Dataset
from ..models import Chain
from ..streams import PAD_MULTIPLE, SINGLE, BatchShape, padded, trim_start
from .objective import Objective, predictions, stream_values

Loss = Literal["grpo", "dr_grpo", "dapo", "gspo"]
#: The names of the values that are stored for each token in the loss.
NUMBERS = ("advantage", "rollout", "old", "reference")
#: A weight so small that a token with this weight has a negligible effect on the loss, but still
#: counts as being in the loss.
NOTHING = 1e-30


@dataclass(frozen=True)
class Grpo(Objective):
    """loss = Σ weights·(−min(r·A, clip(r, 1 − low, 1 + high)·A)·min(old/rollout, cap) + β·KL)

    A is the advantage, and r is the ratio of the new probability of a token to its old probability
    (Shao et al. 2024, arXiv:2402.03300); for gspo, r is the geometric mean of these ratios over the
    completion (Zheng et al. 2025, arXiv:2507.18071). KL = exp(ref − p) − (ref − p) − 1, where p and
    ref are the log-probabilities with the adapter and without it. For N completions, the weight of
    each token of a completion with n tokens is 1/(N·n) for grpo and gspo, 1/(N·most) for dr_grpo
    (Liu et al. 2025, arXiv:2503.20783), and 1/Σn for dapo (Yu et al. 2025, arXiv:2503.14476). Where
    `old` was not computed (NaN), the new probability is used instead, as a constant. The property
    `reference` is None: each step has new completions, whose log-probabilities without the adapter
    cannot be computed before the run.
    """

    kind: Loss = "grpo"
    low: float = 0.2
    high: float = 0.2
    beta: float = 0.0
    cap: float = 2.0
    most: int = 256  #: maximum number of tokens of a completion
    length: int = 512  #: maximum number of tokens of a pass
    packs: bool | Literal["auto"] = True
    temperature: float = 1.0  #: sampling temperature, which divides all logits

    options = ("grpo_loss", "clip_low", "clip_high", "grpo_beta", "importance_cap")
    options += ("max_completion_tokens", "max_seq_length", "packing", "temperature")
    unit = "per completion"
    metrics = ("kl", "clipped", "mismatch")
    reads = ("targets", "weights", "members", "part", *NUMBERS)

    @property
    def old(self) -> "Objective":
        """The objective that computes the old log-probabilities of the tokens in the loss."""
        return LogProbs(**vars(self))

    def weights(self, lengths: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Returns, for each completion, the weight that each of its tokens has in the loss, float64
        [N]. The weight is 0 for completions that are not `kept`."""
        if self.kind == "dapo":
            part = np.full(len(lengths), 1 / max(int(lengths[kept].sum()), 1))
        else:
            tokens = self.most if self.kind == "dr_grpo" else np.maximum(lengths, 1)
            part = 1 / (len(lengths) * tokens * np.ones(len(lengths)))
        return part * kept

    def batch_shapes(self, data: Dataset, rows: int) -> list[BatchShape]:
        lengths = data.columns.length
        longest = min(int(lengths.max()) + self.most, self.length)
        return [self._shape(longest, int(lengths.min()))]

    def full_shape(self, rows: int, length: int, trained: int, same: int) -> BatchShape:
        return self._shape(min(length + 1, self.length), max(1, length + 1 - trained))

    def _shape(self, longest: int, shortest: int) -> BatchShape:
        """Returns the shape of the largest pass if no completion together with its prompt has more
        than `longest` tokens, and the shortest prompt has `shortest` tokens."""
        if self.packs:
            whole, rest = divmod(self.length, shortest + self.most)
            loss = whole * self.most + max(rest - shortest, 0)
            return BatchShape.packed(1, self.length - 1, longest - 1, max(loss, 1))
        passes = [(1, longest)]
        for rows in range(2, self.length // PAD_MULTIPLE + 1):
            width = min(padded(longest, rows), self.length // rows // PAD_MULTIPLE * PAD_MULTIPLE)
            if width > shortest:
                passes.append((rows, width))
        rows, width = max(passes, key=lambda own: own[0] * own[1])
        # If the loss begins late in all rows, trimming may leave more positions in a pass with a
        # few long rows than in the largest pass.
        start = trim_start(max(shortest - 1, 0))
        trimmed = max(n * (own - 1 - start) for n, own in passes)
        loss = max(n * max(1, min(self.most, own - shortest)) for n, own in passes)
        return BatchShape.single(rows, width - 1, min(width - 1, -(-trimmed // rows)), loss)

    def rows_in(self, longest: int) -> int:
        """Returns how many rows an unpacked pass can have if its longest row has `longest`
        tokens."""
        return max(1, self.length // padded(longest, 2))

    def total(self, batches: Sequence[Batch]) -> float:
        """Returns the number of tokens in the loss. Only the metrics are divided by this number:
        the weights already normalize the loss."""
        return float(sum(np.count_nonzero(batch.weights) for batch in batches))

    def values(self, chain: Chain, batch: Batch, total: float) -> dict[str, mx.array]:
        """Returns the inputs of the chain and the head for a batch. `members` [B, M] contains 1/n
        for the n tokens of each completion, and 0 elsewhere."""
        tokens, b, t, places = predictions(batch)
        if batch.packed:
            owner = np.searchsorted(np.cumsum(batch.lengths), places[1], side="right")
        else:
            owner = b
        members = (np.arange(len(batch.lengths))[:, None] == owner).astype(np.float32)
        members /= np.maximum(members.sum(1, keepdims=True), 1)
        nothing = np.full_like(batch.weights, np.nan)  # marks values that were not computed
        return {
            **stream_values(chain, SINGLE[0], tokens, b, t),
            "targets": ops.upload(batch.tokens[places]),
            "weights": ops.upload(batch.weights[places]),
            "members": ops.upload(members),
            "part": mx.array(1 / max(total, 1), mx.float32),
            **{n: ops.upload(batch.numbers.get(n, nothing)[places]) for n in NUMBERS},
        }

    def _outputs(self, log_p: mx.array, *reads: mx.array) -> tuple[mx.array, ...]:
        weights, members, part, advantage, rollout, old, reference = reads
        now = mx.stop_gradient(log_p)
        old = mx.where(mx.isnan(old), now, old)
        moved = log_p - old
        if self.kind == "gspo":
            means = (members * moved).sum(1, keepdims=True)
            moved = ((members > 0) * means).sum(0)
        ratio = mx.exp(moved)
        bounded = mx.clip(ratio, 1 - self.low, 1 + self.high)
        losses = -mx.minimum(ratio * advantage, bounded * advantage)
        apart = mx.where(mx.isnan(rollout), 0, old - rollout)
        if self.cap:
            losses = losses * mx.minimum(mx.exp(apart), self.cap)
        kl = mx.zeros_like(log_p)
        if self.beta:
            less = reference - log_p
            kl = mx.expm1(less) - less
            losses = losses + self.beta * kl
        up = (ratio > 1 + self.high) & (advantage > 0)
        clipped = ((ratio < 1 - self.low) & (advantage < 0)) | up
        means = (kl, clipped, mx.abs(apart))
        weights = mx.where(weights <= NOTHING, 0, weights)
        return (
            (weights * losses).sum(),
            *(mx.stop_gradient(x.astype(mx.float32).sum() * part) for x in means),
        )


@dataclass(frozen=True)
class LogProbs(Grpo):
    """An objective that outputs only the log-probabilities [M] of the tokens in the loss."""

    metrics = ()

    def _outputs(self, log_p: mx.array, *reads: mx.array) -> tuple[mx.array, ...]:
        return (log_p,)


def with_log_probs(batch: Batch, name: str, found: np.ndarray) -> Batch:
    """Returns the batch with the log-probabilities `found` of its tokens in the loss, float32 [M],
    stored under `name`."""
    *_, places = predictions(batch)
    own = np.zeros_like(batch.weights)
    own[places] = found
    return replace(batch, numbers={**batch.numbers, name: own})


def advantages(rewards: np.ndarray, scaling: Literal["group", "batch", "none"]) -> np.ndarray:
    """Returns the advantages, float64 [P, G], of G completions for each of P prompts. An advantage
    is the reward minus the mean reward of its group. It is then divided by a standard deviation
    plus 1e-4: that of the group's rewards if `scaling` is "group", or that of all rewards if it is
    "batch"."""
    rewards = rewards.astype(np.float64)
    equal = rewards.max(1, keepdims=True) == rewards.min(1, keepdims=True)
    centred = np.where(equal, 0, rewards - rewards.mean(1, keepdims=True))
    if scaling == "none":
        return centred
    spread = rewards.std(1, ddof=1, keepdims=True) if scaling == "group" else rewards.std(ddof=1)
    return centred / (spread + 1e-4)
