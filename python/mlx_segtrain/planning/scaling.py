"""Predicts the speedup of data parallelism from the times for computing gradients and for summing
them.

A ring of N ranks sums B bytes in 2(N − 1) rounds (Patarasuk & Yuan 2009). In each round, every rank
sends B/N bytes; the round takes the time of this transfer plus one latency. In total, each rank
sends 2(N − 1)/N·B bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from .costs import parameters_of
from .run import RunPlan
from .speeds import SPEEDS

#: The numbers of ranks that the table lists in addition to the requested number.
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
#: The assumed latency between two ranks, in seconds, which is typical of two machines connected by
#: Ethernet.
LATENCY = 50e-6
#: The default bandwidth of the network, in 10⁹ bytes per second. It corresponds to 10 Gbit/s
#: Ethernet.
LINK = 1.25


@dataclass(frozen=True)
class Scaled:
    """A step in which each rank runs one batch: the number of bytes that a rank sends, the times
    for computing and for summing gradients in seconds, and the speedup over one rank."""

    ranks: int
    sent: int
    compute_s: float
    add_s: float
    speedup: float


def scaled(run: RunPlan, ranks: int, link_gb_s: float, batch_s: float | None) -> list[Scaled]:
    """Predicts the time of a step on 2 to 256 ranks, and on `ranks` ranks. Their links are assumed
    to transfer `link_gb_s` · 10⁹ bytes per second.

    `batch_s` is the time of a batch on one rank in seconds; by default it is predicted (speeds.py).
    Raises InputError if the size of the model's adapter and the work of a step cannot be predicted.
    """
    if run.planned is None:
        raise InputError(
            f"--ranks is not supported for {run.shape.family}, whose adapter size and amount of "
            "computation are unknown before a run: leave --ranks out."
        )
    if batch_s is None:
        speed = SPEEDS[run.device.name]
        batch_s = run.planned.work / speed.work_per_s + speed.layer_s * len(run.shape.layers)
    gradient = 4 * sum(parameters_of(run.shape, run.ranks, run.batch.dora).values())
    sizes = sorted({ranks, *SIZES} - {1})
    return [_scaled(n, gradient, link_gb_s * 1e9, batch_s) for n in sizes]


def _scaled(n: int, size: int, link: float, batch_s: float) -> Scaled:
    sent = 2 * (n - 1) * size / n
    add_s = sent / link + 2 * (n - 1) * LATENCY
    return Scaled(n, round(sent), batch_s, add_s, n * batch_s / (batch_s + add_s))
