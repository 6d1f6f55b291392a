"""What devices do in a second, roughly."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """The cost of a step besides its matrix products: host seconds per layer, and the
    operations per weight that are done once a step; also the speed of products per second."""

    layer_s: float
    unpacking: float
    work_per_s: float


#: By kind of device, from bench/LOG.md. Only their proportions matter here.
SPEEDS = {
    "cpu": Speed(0.0, 30.0, 1e11),
    "cuda": Speed(55e-3 / 24, 0.0, 3e14),
    "metal": Speed(1e-3, 0.0, 1e13),
}
