"""Rough speeds of the kinds of devices."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """The speed of matrix products in FLOPs per second; and the cost of a step besides them: host
    seconds per layer, and operations per weight."""

    layer_s: float
    unpacking: float
    work_per_s: float


#: The speeds by kind of device, from bench/LOG.md. Usually only their ratios matter.
SPEEDS = {
    "cpu": Speed(0.0, 30.0, 1e11),
    "cuda": Speed(55e-3 / 24, 0.0, 3e14),
    "metal": Speed(1e-3, 0.0, 1e13),
}
