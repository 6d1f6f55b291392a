"""Rough speeds of each kind of device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """The speed of matrix multiplications in FLOP/s, and the other costs of a step: the host's time
    per layer in seconds, and the number of operations to unpack each weight."""

    layer_s: float
    unpacking: float
    work_per_s: float


#: Speeds, keyed by the kind of device, from bench/LOG.md. Usually only the ratios between them
#: matter.
SPEEDS = {
    "cpu": Speed(0.0, 30.0, 1e11),
    "cuda": Speed(55e-3 / 24, 0.0, 3e14),
    "metal": Speed(1e-3, 0.0, 1e13),
}
