"""What devices do in a second, roughly."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """What a step takes besides its products: seconds of the host for each layer, and of that what
    is done once a step for each number of the weights, in operations; products a second."""

    layer_s: float
    unpacking: float
    work_per_s: float


#: By kind of device, as bench/LOG.md has them. Only their proportions matter here.
SPEEDS = {
    "cpu": Speed(0.0, 30.0, 1e11),
    "cuda": Speed(55e-3 / 24, 0.0, 3e14),
    "metal": Speed(1e-3, 0.0, 1e13),
}
