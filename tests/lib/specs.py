"""Test shapes for all implementations of an op: aligned sizes and sizes that are off by one, tiny
sizes, grouped heads, T < S (fewer queries than keys), and padding."""

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Attention:
    B: int
    H: int
    G: int
    T: int
    S: int
    D: int
    Dv: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        options = "-".join(f"{key}{_text(value)}" for key, value in self.options.items())
        shape = f"B{self.B}-H{self.H}-G{self.G}-T{self.T}-S{self.S}-D{self.D}"
        return f"{shape}-{options}".rstrip("-").replace(" ", "")


def ids(*runs: int) -> np.ndarray:
    """Returns a segment id for each key. `runs` are the segments' lengths in order; a negative
    length means padding."""
    return np.repeat([np.sign(n) * (9 - i) for i, n in enumerate(runs)], np.abs(runs))


def _text(option: Any) -> str:
    if not isinstance(option, np.ndarray):
        return str(option)
    runs = [(i, len(list(run))) for i, run in groupby(option.tolist())]
    return "ids" + ",".join(f"{n}{'pad' * (i < 0)}" for i, n in runs)


ATTENTION = [
    Attention(1, 1, 1, 1, 1, 8),
    Attention(1, 2, 1, 7, 7, 16),
    Attention(2, 4, 2, 128, 128, 64),
    Attention(1, 3, 1, 129, 129, 64),
    Attention(1, 3, 3, 255, 300, 24),
    Attention(1, 4, 2, 257, 257, 80),
    Attention(1, 2, 1, 127, 127, 96),
    Attention(1, 2, 1, 65, 193, 192, options={"window": 65}),
    Attention(2, 2, 1, 128, 128, 256),
    Attention(1, 2, 1, 129, 140, 512),
    Attention(1, 6, 2, 40, 300, 80, Dv=48),
    Attention(1, 2, 1, 140, 300, 32, options={"q_start": 100}),
    Attention(1, 2, 1, 300, 300, 128, options={"window": 2}),
    Attention(1, 2, 1, 300, 300, 128, options={"window": 8}),
    Attention(1, 4, 2, 300, 300, 32, options={"window": 64}),
    Attention(2, 2, 1, 260, 300, 256, options={"window": 257}),
    Attention(1, 4, 2, 300, 300, 32, options={"segments": [0, 1, 130, 256, 300]}),
    Attention(1, 2, 1, 200, 300, 32, options={"segments": [0, 150, 300], "window": 40}),
    Attention(1, 2, 1, 200, 200, 32, options={"softcap": 2.0}),
    Attention(1, 2, 2, 260, 260, 512, options={"softcap": 5.0, "window": 100}),
    # In this order: padding in the middle that is longer than a tile, padding with a window,
    # padding after the last offset, and queries that are all padding.
    Attention(2, 4, 2, 420, 420, 64, options={"segments": ids(50, -3, 90, -200, 60, -17)}),
    Attention(1, 2, 1, 290, 300, 128, options={"segments": ids(-30, 100, -40, 130), "window": 60}),
    Attention(1, 2, 1, 280, 300, 96, options={"segments": [0, 100, 130], "softcap": 3.0}),
    Attention(1, 2, 2, 1, 4, 64, options={"segments": ids(3, -1)}),
]
ATTENTION_TINY = [
    Attention(1, 2, 1, 3, 5, 4, Dv=3),
    Attention(1, 2, 1, 5, 5, 4, options={"window": 2, "softcap": 1.5}),
    Attention(1, 1, 1, 5, 6, 4, options={"segments": [0, 2, 6]}),
    Attention(1, 2, 1, 5, 6, 4, options={"segments": [0, 2, 4], "softcap": 1.5}),
    Attention(1, 2, 1, 7, 7, 4, options={"segments": ids(-1, 2, -2, 2)}),
]

#: Shapes for gated linear units: whole threadgroups, one element more, and different numbers of
#: axes. GLU_TINY has so few elements that the plain code may happen to have no error.
GLU = [(2, 5, 129), (2, 1024), (2049,), (1, 2, 3, 343), (40, 1536)]
GLU_TINY = [(), (1, 1), (7,), (8,), (3, 3)]

#: All quantizations supported by MLX, as (mode, bits, group size).
QUANTIZATIONS = [
    *[("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)],
    ("mxfp4", 4, 32),
    ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
]
#: None means a dense base. In the tests, the widths of the layers are not multiples of the kernels'
#: tile sizes.
BASES = [None, *QUANTIZATIONS]
DTYPES = ["float32", "float16", "bfloat16"]
