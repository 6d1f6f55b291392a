"""Runs the source of cuda/decode.cu on the CPU (lib/cuda_on_cpu.h) and checks the results."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from lib.checks import f64, rand
from lib.linears import base_of

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(
        sys.platform != "linux" or COMPILER is None, reason="needs Linux and a compiler"
    ),
]

ROOT = Path(__file__).parents[1]
ADAPTERS, THREADS = 3, 256
NAMES = {mx.bfloat16: "bfloat16", mx.float16: "half", mx.float32: "float"}
#: Each case: bits (0 for dense), group size, dtype, the kernel's rows and tiles, and the call's
#: rows, output widths, input width and ranks.
CASES = [
    (4, 64, mx.bfloat16, 16, 1, 13, (72, 8), 320, (16, 3)),
    (4, 128, mx.bfloat16, 8, 2, 5, (40,), 1280, (8,)),
    (2, 32, mx.float16, 16, 1, 9, (24, 16, 8), 160, (0, 8, 8)),
    (8, 64, mx.float16, 8, 1, 8, (24,), 128, (5,)),
    (0, 32, mx.bfloat16, 16, 1, 16, (24, 8), 48, (8, 0)),
    (4, 64, mx.float32, 4, 0, 3, (24, 8), 128, (8, 3)),
]


def source(text):
    """Returns C++ code with one function for each case in CASES, generated from the kernel
    `decode_linears`."""
    head, *kernels = re.split(r"^//: ", text, flags=re.MULTILINE)
    line, body = next(x for x in kernels if x.startswith("decode_linears:")).split("\n", 1)
    inputs = line.partition(": ")[2].partition(" -> ")[0].split()
    code = f'#include "cuda_on_cpu.h"\n{head}\nusing namespace segtrain;\n'
    for i, (bits, group, dtype, rows, tiles, *_) in enumerate(CASES):
        own = {"w": "unsigned" if bits else NAMES[dtype], "scales": "float" if bits else None}
        own |= {"biases": own["scales"], "gain": "float", "z": "float", "picks": "unsigned"}
        own |= {"at": "int", "rows": "int"}
        code += f'extern "C" void run{i}(int blocks, void* const* p) {{\n'
        for j, name in enumerate(inputs):
            kind = own.get(name.rstrip("012")) or NAMES[dtype]
            code += f"auto {name} = static_cast<const {kind}*>(p[{j}]);\n"
        code += f"auto outs = static_cast<{NAMES[dtype]}*>(p[{len(inputs)}]);\n"
        code += f"constexpr int BITS = {bits}, GROUP = {group}, ROWS = {rows}, TILES = {tiles};\n"
        code += f"launch(blocks, {THREADS}, [&] {{ {body} }});\n}}\n"
    return code


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    text = source((ROOT / "cuda" / "decode.cu").read_text(encoding="utf-8"))
    (folder / "kernels.cpp").write_text(text, encoding="utf-8")
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-I{ROOT / 'tests' / 'lib'}"]
    command = [COMPILER, *flags, "kernels.cpp", "-o", "kernels.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


def numbers(x):
    """Converts an array to NumPy. A bfloat16 array becomes its bit patterns in uint16."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_products_of_rows_with_their_updates(library, case):
    bits, group, dtype, _, tiles, m, outs, k, ranks = CASES[case]
    rng = np.random.default_rng(case)
    x, a = rand(rng, m, k)[0].astype(dtype), rand(rng, ADAPTERS, sum(ranks), k)[0].astype(dtype)
    picks = np.arange(m, dtype=np.uint32) * 2 % ADAPTERS
    z = np.einsum("mk,mrk->mr", f64(x), f64(a)[picks]).astype(np.float32)
    arrays, at, begin, blocks, wanted = [numbers(x)], [k, sum(ranks), 1], 0, 0, []
    for i, (out, rank) in enumerate(zip(outs, ranks, strict=True)):
        base, weight = base_of(rng, out, k, ("affine", bits, group) if bits else None)
        stored = base.weight if bits else base.weight.astype(dtype)
        weight = weight if bits else f64(stored)
        b, bias = (rand(rng, *s)[0].astype(dtype) for s in ((ADAPTERS, out, rank or 1), (out,)))
        gain = rand(rng, ADAPTERS, out)[0]
        scales = (base.scales, base.biases) if bits else (stored, stored)
        arrays += [numbers(y) for y in (stored, *scales, b, gain, bias)]
        own = -(-out // (16 * tiles or 16))
        at += [own, out, rank, begin, i > 0, i == 0]
        y = f64(x) @ weight.T
        if rank:
            y += np.einsum("mr,mor->mo", z[:, begin : begin + rank], f64(b)[picks])
        wanted.append(y + f64(bias) if i else y * f64(gain)[picks])
        begin, blocks = begin + rank, blocks + own
    arrays += arrays[1:7] * (3 - len(outs))
    at += [0, 1, 0, 0, 0, 0] * (3 - len(outs))
    arrays += [numbers(a), z, picks, np.array(at, np.int32), np.array([m], np.int32)]
    found = np.zeros(m * sum(outs), numbers(x).dtype)
    pointers = [np.ascontiguousarray(y).ctypes for y in arrays] + [found.ctypes]
    library[f"run{case}"](blocks, (ctypes.c_void_p * len(pointers))(*(p.data for p in pointers)))
    ys = mx.array(found)
    begin = 0
    for right in wanted:
        own = ys[begin : begin + right.size]
        own = f64(own.view(mx.bfloat16) if dtype == mx.bfloat16 else own).reshape(right.shape)
        error = np.linalg.norm(own - right) / np.linalg.norm(right)
        assert error < {mx.bfloat16: 3e-3, mx.float16: 4e-4, mx.float32: 1e-6}[dtype], error
        begin += right.size
