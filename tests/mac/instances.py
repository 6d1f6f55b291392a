"""Lists the kernels in metal/ with all template arguments that the host may use, and generates the
same source text for them as MLX does."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx

from metal_emulator import kernel_text
from metal_emulator.kernels import KERNELS

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
#: The head sizes in csrc/ops/attention/kernel.cpp.
HEADS = (64, 80, 96, 128, 192, 256)
SCALARS = {"q_start", "blocks", "q0", "k0", "nq", "period", "scale", "cap"}
#: Inputs that are integers for every dtype T.
INTS = {"first", "index", "positions", "at", "q_start", "blocks", "q0", "k0", "nq", "period"}
#: Inputs that are float32 for every dtype T.
FLOATS = {"s", "dp", "lse", "delta", "freqs", "args", "scale", "cap"}
#: Arrays that always have at least 8 elements, and arrays that always have fewer than 8.
LONG, SHORT = {"first", "index", "positions"}, {"at", "args"}


@dataclass(frozen=True)
class Instance:
    """A kernel with its arguments. If `small` is set, every array that can have fewer than 8
    elements does have fewer, so MLX passes it in constant memory."""

    kernel: str
    arguments: dict[str, Any]
    small: bool

    def __str__(self) -> str:
        values = " ".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.kernel} {values}{' small' * self.small}"

    def text(self) -> str:
        kernel = KERNELS[self.kernel]
        name = kernel.name
        rows = name.startswith("softmax")
        long_ = 1 if self.small else 300

        sums = self.arguments.get("SUM", self.arguments["T"])
        scores = mx.float32 if self.arguments["T"] == mx.float16 else self.arguments["T"]
        dtypes = {"lse": mx.float32, "dk": sums, "dv": sums}
        if name.startswith("attention"):
            dtypes["ds"] = scores

        def array(key: str) -> mx.array:
            dtype = dtypes.get(key, self.arguments["T"])
            dtype = mx.int32 if key in INTS else mx.float32 if key in FLOATS else dtype
            if key in SCALARS:
                return mx.array(0, dtype)
            if key in SHORT:
                return mx.zeros(5 if key == "at" else 1, dtype)
            if key in LONG:
                return mx.zeros(max(long_, 8), dtype)
            if key in ("gate", "up", "dy", "freqs"):
                return mx.zeros(long_, dtype)
            if rows and key in ("s", "dp"):
                return mx.zeros((1, long_), dtype)
            if rows and key in ("lse", "delta"):
                return mx.zeros(long_, dtype)
            shape = (1, 1, long_, self.arguments.get("D", 64))
            return mx.zeros(shape[:3] if key in ("lse", "delta") else shape, dtype)

        outputs = {key: ((8,), dtypes.get(key, self.arguments["T"])) for key in kernel.outputs}
        inputs = {key: array(key) for key in kernel.inputs}
        return kernel_text(name, kernel.source, kernel.header, inputs, outputs, self.arguments)[0]


def instances() -> Iterator[Instance]:
    both = (False, True)
    for dtype, small in product(DTYPES, both):
        for d, cap in product(HEADS, both):
            own = {"T": dtype, "D": d, "CAP": cap}
            rows = 64 if d <= 64 else 32
            yield Instance("attention", own | {"ROWS": rows, "THREADS": 128}, small)
            for sums in {dtype, mx.float32}:
                of_keys = own | {"ROWS": 32, "SUM": sums, "THREADS": 256}
                yield Instance("attention_vjp_kv_ds", of_keys, small)
        for d in HEADS:
            rows = 128 if d <= 64 else 64 if d <= 128 else 32
            own = {"T": dtype, "D": d, "ROWS": rows, "THREADS": 128}
            yield Instance("attention_vjp_q_ds", own, small)
        for cap, name in product(both, ("softmax_rows", "softmax_vjp_rows")):
            yield Instance(name, {"S": mx.float32, "T": dtype, "CAP": cap, "THREADS": 256}, small)
        for gelu, name in product(both, ("glu", "glu_vjp")):
            yield Instance(name, {"T": dtype, "GELU": gelu, "PER": 4, "THREADS": 256}, small)
        for pairs, back in product(both, both):
            own = {"T": dtype, "TRADITIONAL": pairs, "BACK": back, "THREADS": 256}
            yield Instance("rope", own, small)
