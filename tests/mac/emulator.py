"""Compiles the emulator's C++ code for macOS, because the tests on a Mac build this code with
Apple's headers and Clang."""

from itertools import product

import mlx.core as mx

from metal_emulator import CLANG_FLAGS, FLAGS, to_cxx
from metal_emulator import HERE as EMULATOR
from metal_emulator.kernels import KERNELS

from .machine import BUILD, MACOS, Found, environment, run, zig

TARGETS = [f"{processor}-macos.{MACOS}" for processor in ("aarch64", "x86_64")]


def check() -> int:
    kernel = KERNELS["glu"]
    inputs = {name: mx.zeros((40,), mx.float16) for name in kernel.inputs}
    outputs = {name: ((40,), mx.float16) for name in kernel.outputs}
    template = {"T": mx.float16, "GELU": True, "PER": 4, "THREADS": 256}
    source = BUILD / "kernel.cpp"
    source.write_text(to_cxx("glu", kernel.source, kernel.header, inputs, outputs, template))
    parts = [(source, ["-include", EMULATOR / "emulator.h"]), (EMULATOR / "machine.cpp", [])]
    for target, (text, ahead) in product(TARGETS, parts):
        flags = [*FLAGS, *CLANG_FLAGS, "-Werror", *ahead]
        made = BUILD / f"{text.stem}.o"
        done = run(zig("c++", "-target", target, *flags, "-c", text, "-o", made), env=environment())
        if done.returncode:
            raise Found(f"the emulator does not compile for {target}\n{done.stderr[:4000]}")
    return len(TARGETS)
