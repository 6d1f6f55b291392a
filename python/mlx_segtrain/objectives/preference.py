"""Preference losses over pairs of responses: DPO, ORPO and SimPO.

A pair runs as two streams, one per sequence. If both sequences begin with the same tokens, the pair
can run as one stream: the chosen sequence, followed by the rest of the rejected sequence as a
branch. This does not change the results, because attention is causal: the common tokens do not
depend on the tokens after them. The head runs only on positions in the loss.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import ops
from ..data import Batch, Columns, Dataset, PairBatch
from ..models import Chain
from ..streams import PAIR, BatchShape, Stream, StreamShape, joined, padded, trim_start
from .objective import Objective, reference_of, stream_values

#: Pairs whose common prefix is shorter than this many tokens run as two streams.
SHARED_LEAST = 64
#: The lower bound on 1 − p when log-odds are computed, because they would be infinite for p = 1.
LEAST_REST = 1e-7
#: The temperature τ with which discopop blends its two losses, as in the paper (arXiv:2406.08414).
DISCOPOP_TAU = 0.05


@dataclass(frozen=True)
class Total:
    """The number of pairs, and the number of tokens of the chosen sequences in the cross-entropy
    term."""

    pairs: int
    tokens: float


@dataclass(frozen=True)
class Answers:
    """The log-probabilities of the responses in B pairs, float32 [B], with the adapter and without
    it (`ref_`), and the number of tokens of each response (`n_`).

    `likelihood` is this batch's part of the cross-entropy term, a scalar. `part` is 1/n, where n is
    the number of pairs in the step.
    """

    chosen: mx.array
    rejected: mx.array
    ref_chosen: mx.array
    ref_rejected: mx.array
    n_chosen: mx.array
    n_rejected: mx.array
    likelihood: mx.array
    part: mx.array

    @property
    def means(self) -> tuple[mx.array, mx.array]:
        """The mean log-probabilities per token of the chosen and the rejected responses, [B]
        each."""
        return self.chosen / self.n_chosen, self.rejected / self.n_rejected


#: The values computed from a batch of pairs: its part of the mean loss, the rewards [B] of the
#: chosen and the rejected responses, and the margins [B].
Compared = tuple[mx.array, tuple[mx.array, mx.array], mx.array]


class Pairs(Objective):
    """The base class of preference objectives. Subclasses define `_loss`."""

    unit = "per pair"
    metrics = ("accuracy", "margin", "chosen_reward", "rejected_reward")
    reads = ("targets", "members", "weights", "reference", "part")
    _full = False  #: whether the loss includes the chosen sequence's prompt

    def choices(self, data: Dataset) -> Iterator[Dataset]:
        """Yields the pairs in a form that computes common prefixes only once and then, if the two
        sequences of any pair share a prefix, in a form without sharing."""
        yield data
        if data.columns.shared.max() >= SHARED_LEAST:
            yield data.apart()

    def batch_shapes(self, data: Dataset, rows: int) -> list[BatchShape]:
        share = data.columns.shared >= SHARED_LEAST
        alike, apart = data.columns.take(share), data.columns.take(~share)
        # `apart` contains the pairs that do not share enough tokens. If a batch contains such a
        # pair, none of its pairs share tokens. With several rows per batch, any other pair may be
        # in such a batch, so `apart` must then contain all pairs.
        if apart.shared.size and rows > 1:
            apart = data.columns
        shapes = []
        if apart.shared.size:
            streams = tuple(
                StreamShape(stream, *_lengths(apart, side, rows, full))
                for side, (stream, full) in enumerate(zip(PAIR, (self._full, False), strict=True))
            )
            shapes.append(BatchShape(rows, streams, rows * self._counted(apart)))
        if alike.shared.size:
            length, trimmed = _lengths(alike, 0, rows, self._full)
            least = alike.shared if rows == 1 else alike.shared.min()
            rest = int((padded(alike.length[:, 1], rows) - 1 - least).max())
            shared = int(alike.shared.max())
            stream = StreamShape(joined(), length + rest, trimmed + rest, shared, rest)
            shapes.append(BatchShape(rows, (stream,), rows * self._counted(alike)))
        return shapes

    def full_shape(self, rows: int, length: int, trained: int, same: int) -> BatchShape:
        counted, rest = length if self._full else trained, length - same
        trimmed = [length - trim_start(length - n) for n in (counted, trained)]
        if same < SHARED_LEAST:
            streams = tuple(map(StreamShape, PAIR, [length] * 2, trimmed))
        else:
            streams = (StreamShape(joined(), length + rest, trimmed[0] + rest, same, rest),)
        return BatchShape(rows, streams, rows * (counted + trained))

    def total(self, batches: Sequence[PairBatch]) -> Total:
        tokens = sum(float(self._likely(batch.chosen).sum()) for batch in batches)
        return Total(sum(len(batch.rows) for batch in batches), tokens)

    def streams(self, chain: Chain, batch: PairBatch) -> tuple[Stream, ...]:
        if not chain.branches or batch.shared < SHARED_LEAST:
            return PAIR
        return (joined(batch.shared, batch.rejected.tokens.shape[1] - 1 - batch.shared),)

    def values(self, chain: Chain, batch: PairBatch, total: Total) -> dict[str, mx.array]:
        """Returns the inputs of the chain and the head. M tokens are predicted, in the order of the
        streams.

        `members` [2B, M] is 1 where a predicted token belongs to the response of a sequence; chosen
        sequences come first. `weights` [M] are the tokens' weights in the cross-entropy term.
        `reference` [2B] contains the responses' log-probabilities under the model without its
        adapter. `part` is 1/n, where n is the number of pairs in the step.
        """
        b = len(batch.rows)
        values: dict[str, mx.array] = {}
        found = []
        for stream in self.streams(chain, batch):
            tokens, rows = self._stream(batch, stream)
            values |= stream_values(chain, stream, tokens, rows["row"], rows["at"])
            found.append(rows)
        target, owner, response, weight = (
            np.concatenate([rows[name] for rows in found])
            for name in ("target", "owner", "response", "weight")
        )
        members = (np.arange(2 * b)[:, None] == owner) * response
        reference = reference_of(batch, 2 * b, self.reference is not None)
        return {
            **values,
            "targets": ops.upload(target),
            "members": ops.upload(members),
            "weights": ops.upload(weight / max(total.tokens, 1)),
            "reference": ops.upload(reference),
            "part": mx.array(1 / total.pairs, mx.float32),
        }

    def _outputs(self, log_p: mx.array, *reads: mx.array) -> tuple[mx.array, ...]:
        members, weights, reference, part = reads
        # This is not written as a matrix multiplication, because GPUs would round its operands.
        sums = ((members * log_p).sum(1), reference, members.sum(1))
        sides = [side for both in sums for side in mx.split(both, 2)]
        answers = Answers(*sides, likelihood=-(weights * log_p).sum(), part=part)
        loss, rewards, margins = self._loss(answers)
        right = (margins > 0) + 0.5 * (margins == 0)  # a tie counts as one half
        means = (right, margins, *rewards)
        return (loss, *(mx.stop_gradient(x.astype(mx.float32).sum() * part) for x in means))

    def _loss(self, answers: Answers) -> Compared:
        raise NotImplementedError

    def _likely(self, chosen: Batch) -> np.ndarray:
        """Returns the weights [B, T] of tokens in the cross-entropy term."""
        return np.zeros_like(chosen.weights)

    def _counted(self, pairs: Columns) -> int:
        """Returns the maximum number of positions in a pair on which the head runs."""
        chosen = pairs.length[:, 0] - 1 if self._full else pairs.trained[:, 0]
        return int((chosen + pairs.trained[:, 1]).max())

    def _stream(self, batch: PairBatch, stream: Stream) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the tokens [B, T] of a stream, and its positions in the loss, in the form that
        `_rows` returns."""
        sides = {"chosen": batch.chosen.tokens[:, :-1], "rejected": batch.rejected.tokens[:, :-1]}
        if not stream.branch:  # the last token of a sequence is only a target
            return sides[stream.name], self._rows(batch, stream.name)
        chosen, rejected = self._rows(batch, "chosen"), self._rows(batch, "rejected")
        shared, length = stream.shared, sides["chosen"].shape[1]
        in_branch = rejected["at"] >= shared
        rejected["at"] = rejected["at"] + np.where(in_branch, length - shared, 0)
        tokens = np.concatenate([sides["chosen"], sides["rejected"][:, shared:]], 1)
        return tokens, {name: np.concatenate([x, rejected[name]]) for name, x in chosen.items()}

    def _rows(self, batch: PairBatch, side: str) -> dict[str, np.ndarray]:
        """Finds the positions, in the sequences of one side, that predict a token in the loss. The
        returned arrays have one element per position, and contain the row in the batch, the
        position, the predicted token, the index of the sequence, whether the token belongs to a
        response, and the token's weight in the cross-entropy term."""
        chosen = side == "chosen"
        own = batch.chosen if chosen else batch.rejected
        likely = self._likely(own) if chosen else np.zeros_like(own.weights)
        b, t = np.nonzero((own.weights[:, 1:] != 0) | (likely[:, 1:] > 0))
        return {
            "row": b,
            "at": t,
            "target": own.tokens[b, t + 1],
            "owner": b + (0 if chosen else len(batch.rows)),
            "response": own.weights[b, t + 1] != 0,
            "weight": likely[b, t + 1],
        }


def _lengths(pairs: Columns, side: int, rows: int, full: bool) -> tuple[int, int]:
    """Returns the maximum number of tokens in a sequence of one side, before and after trimming. If
    `full` is true, the whole sequence is in the loss, and nothing is trimmed."""
    lengths = padded(pairs.length[:, side], rows) - 1
    first = np.maximum(pairs.first[:, side] - 1, 0) * (not full)
    trimmed, longest = lengths - trim_start(first), int(lengths.max())
    return longest, longest if rows > 1 and full else int(trimmed.max())


@dataclass(frozen=True)
class Reference(Pairs):
    """An objective that outputs only the log-probabilities [2B] of the responses."""

    metrics = ()

    def _outputs(self, log_p: mx.array, *reads: mx.array) -> tuple[mx.array, ...]:
        members, *_ = reads
        return ((members * log_p).sum(1),)


@dataclass(frozen=True)
class Rewards:
    """The arguments of dpo's losses: the rewards β·(π − ref) of the chosen and the rejected
    responses, float32 [B], the factor β, and the label smoothing ε."""

    chosen: mx.array
    rejected: mx.array
    beta: float
    smoothing: float

    @property
    def z(self) -> mx.array:
        """The margins [B] between the rewards."""
        return self.chosen - self.rejected


def _robust(r: Rewards) -> mx.array:
    eps = r.smoothing
    return ((1 - eps) * nn.softplus(-r.z) - eps * nn.softplus(r.z)) / (1 - 2 * eps)


def _exo(r: Rewards) -> mx.array:
    """Returns KL(q ‖ p) for the distributions q = (σ(z), σ(−z)) and p = (1 − ε, ε)."""
    right = mx.sigmoid(r.z) * (-nn.softplus(-r.z) - math.log1p(-r.smoothing))
    return right + mx.sigmoid(-r.z) * (-nn.softplus(r.z) - math.log(r.smoothing))


def _discopop(r: Rewards) -> mx.array:
    """Returns (1 − s)·−log σ(z) + s·exp(−z) with s = σ(z / τ). The second term is computed as one
    exponential, because exp(−z) alone may overflow."""
    other = nn.softplus(-r.z / DISCOPOP_TAU)
    return mx.sigmoid(-r.z / DISCOPOP_TAU) * nn.softplus(-r.z) + mx.exp(-r.z - other)


#: The losses of dpo, keyed by the values of config.dpo_loss. Note that −log σ(x) = softplus(−x).
LOSSES: dict[str, Callable[[Rewards], mx.array]] = {
    "sigmoid": lambda r: (1 - r.smoothing) * nn.softplus(-r.z) + r.smoothing * nn.softplus(r.z),
    "hinge": lambda r: mx.maximum(1 - r.z, 0),
    "ipo": lambda r: (r.z / r.beta - 1 / (2 * r.beta)) ** 2,
    "robust": _robust,
    "exo_pair": _exo,
    "nca_pair": lambda r: (
        nn.softplus(-r.chosen) + (nn.softplus(r.chosen) + nn.softplus(r.rejected)) / 2
    ),
    "bco_pair": lambda r: nn.softplus(-r.chosen) + nn.softplus(r.rejected),
    "sppo_hard": lambda r: ((r.chosen - 0.5) ** 2 + (r.rejected + 0.5) ** 2) / r.beta**2,
    "apo_zero": lambda r: mx.sigmoid(-r.chosen) + mx.sigmoid(r.rejected),
    "apo_down": lambda r: mx.sigmoid(r.chosen) + mx.sigmoid(-r.z),
    "discopop": _discopop,
    "sigmoid_norm": lambda r: nn.softplus(-r.z),
}
#: The losses that use means over the response instead of sums.
OF_MEANS = ("ipo", "sigmoid_norm")


@dataclass(frozen=True)
class Dpo(Pairs):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290), and methods that
    differ from it only in the loss (LOSSES).

    Let π and ref be the summed log-probabilities of a response with the adapter and without it, r =
    β·(π − ref) its reward, z = r_c − r_r the margin between the chosen and the rejected response,
    and ε the label smoothing. The losses are sigmoid, which is −(1 − ε)·log σ(z) − ε·log σ(−z)
    (conservative DPO if ε > 0); robust (Chowdhury et al. 2024, arXiv:2403.00409); hinge (Zhao et
    al. 2023, arXiv:2305.10425); ipo and sigmoid_norm, with means over the response instead of sums
    (Azar et al. 2023, arXiv:2310.12036); exo_pair (Ji et al. 2024, arXiv:2402.00856, eq. 16);
    nca_pair (Chen et al. 2024, arXiv:2402.05369); bco_pair (Jung et al. 2024, arXiv:2404.04656,
    without its shift of rewards); sppo_hard (Wu et al. 2024, arXiv:2405.00675); apo_zero and
    apo_down (D'Oosterlinck et al. 2024, arXiv:2408.06266); discopop (Lu et al. 2024,
    arXiv:2406.08414).
    """

    beta: float = 0.1
    kind: str = "sigmoid"
    label_smoothing: float = 0.0
    reference_free: bool = False

    options = ("dpo_beta", "dpo_loss", "label_smoothing", "reference_free")

    @property
    def reference(self) -> Reference | None:
        return None if self.reference_free else Reference()

    def _loss(self, answers: Answers) -> Compared:
        chosen = answers.chosen - answers.ref_chosen
        rejected = answers.rejected - answers.ref_rejected
        if self.kind in OF_MEANS:
            chosen, rejected = chosen / answers.n_chosen, rejected / answers.n_rejected
        own = Rewards(self.beta * chosen, self.beta * rejected, self.beta, self.label_smoothing)
        losses = LOSSES[self.kind](own)
        return losses.sum() * answers.part, (own.chosen, own.rejected), own.z


@dataclass(frozen=True)
class Orpo(Pairs):
    """Odds-ratio preference optimization (Hong et al. 2024, arXiv:2403.07691). It needs no
    reference model.

    The loss is NLL − λ·log σ(o) with o = log odds(p_c) − log odds(p_r), where p_c and p_r are the
    mean log-probabilities per token of the chosen and the rejected response. If `scope` is "full",
    NLL is the mean negative log-likelihood over all tokens of the chosen sequences. If it is
    "response", NLL is the mean of −p_c over the pairs. The rewards are λ·p_c and λ·p_r, and the
    margin is o.
    """

    weight: float = 0.1
    scope: Literal["full", "response"] = "full"

    options = ("orpo_lambda", "sft_scope")

    @property
    def _full(self) -> bool:
        return self.scope == "full"

    def _loss(self, answers: Answers) -> Compared:
        chosen, rejected = answers.means
        odds = chosen - rejected - (_log_rest(chosen) - _log_rest(rejected))
        likelihood = answers.likelihood if self._full else -chosen.sum() * answers.part
        loss = likelihood + self.weight * nn.softplus(-odds).sum() * answers.part
        return loss, (self.weight * chosen, self.weight * rejected), odds

    def _likely(self, chosen: Batch) -> np.ndarray:
        if not self._full:
            return super()._likely(chosen)
        position = np.arange(chosen.tokens.shape[1])
        inside = (position > 0) & (position < chosen.lengths[:, None])
        return inside.astype(np.float32)


@dataclass(frozen=True)
class Simpo(Pairs):
    """Simple preference optimization (Meng et al. 2024, arXiv:2405.14734). It needs no reference
    model.

    The loss is −log σ(β(p_c − p_r) − γ), where p_c and p_r are the mean log-probabilities per token
    of the chosen and the rejected response. The rewards are β·p_c and β·p_r, and the margin is
    their difference.
    """

    beta: float = 2.0
    gamma: float = 1.0

    options = ("simpo_beta", "simpo_gamma")

    def _loss(self, answers: Answers) -> Compared:
        chosen, rejected = (self.beta * p for p in answers.means)
        z = chosen - rejected
        return nn.softplus(self.gamma - z).sum() * answers.part, (chosen, rejected), z


def _log_rest(log_p: mx.array) -> mx.array:
    """Returns log(1 − exp(log_p))."""
    return mx.log(mx.maximum(-mx.expm1(log_p), LEAST_REST))
