"""Runs the kernels in metal/ as the host launches them, but in the emulator instead of on a
device."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from . import ORDERS, emulate

METAL = Path(__file__).parents[2] / "metal"


@dataclass(frozen=True)
class Kernel:
    name: str
    inputs: list[str]
    outputs: list[str]
    header: str
    source: str


def load(file: Path) -> dict[str, Kernel]:
    """Splits a file into its header and its kernel bodies. A line `//: name: inputs -> outputs`
    precedes each body."""
    header, *bodies = re.split(r"^//: ", file.read_text(), flags=re.M)
    kernels = {}
    for body in bodies:
        line, source = body.split("\n", 1)
        name, inputs, outputs = re.split(": | -> ", line)
        kernels[name] = Kernel(name, inputs.split(), outputs.split(), header, source)
    return kernels


KERNELS = {
    name: kernel for file in sorted(METAL.glob("*.metal")) for name, kernel in load(file).items()
}


@dataclass(frozen=True)
class Change:
    """A fault that a test must detect. It replaces occurrence `at` of `old` in a kernel with
    `new`."""

    kernel: str
    old: str
    new: str
    at: int = 0

    def of(self, text: str) -> str:
        parts = text.split(self.old)
        assert len(parts) > self.at + 1, f"{self.kernel} does not contain {self.old!r}"
        at = self.at + 1
        return self.old.join(parts[:at]) + self.new + self.old.join(parts[at:])


@contextmanager
def emulated(
    *changes: Change,
    orders: Sequence[int] = ORDERS,
    counts: list[dict[str, int]] | None = None,
) -> Iterator[list]:
    """While this context is active, ops choose implementations as on Metal, and their kernels run
    in the emulator.

    Yields a list to which every launch is added. Raises an error if a change does not apply to the
    text, or if `make mac` does not compile the kernel with these template arguments. Appends the
    work of each launch to `counts`.
    """
    from mac.instances import instances
    from mlx_segtrain import _core

    launches = []
    compiled = {(x.kernel, tuple(x.arguments.items())) for x in instances()}

    def run(launch: _core.MetalLaunch) -> list[mx.array]:
        launches.append(launch)
        arguments = dict(launch.arguments)
        assert (launch.name, tuple(arguments.items())) in compiled, (launch.name, arguments)
        header, source = launch.header, launch.source
        for change in changes:
            if change.kernel == launch.name:
                whole = change.of(header + "\0" + source)
                header, source = whole.split("\0")
        return emulate(
            launch.name,
            source,
            header,
            dict(launch.inputs),
            {name: (shape, dtype) for name, shape, dtype in launch.outputs},
            arguments,
            launch.grid,
            launch.threadgroup,
            orders,
            counts,
        )

    _core.emulate_metal(run)
    try:
        yield launches
    finally:
        _core.emulate_metal(None)


@contextmanager
def launched() -> Iterator[list]:
    """While this context is active, ops choose implementations as on Metal, but launches only
    return zeros."""
    from mlx_segtrain import _core

    launches = []

    def run(launch: _core.MetalLaunch) -> list[mx.array]:
        launches.append(launch)
        return [mx.zeros(shape, dtype) for _, shape, dtype in launch.outputs]

    _core.emulate_metal(run)
    try:
        yield launches
    finally:
        _core.emulate_metal(None)
