"""Tests the Metal emulator: its kernel source equals MLX's, its operations are correct, and it
detects planted faults."""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from lib import oracle
from metal_emulator import (
    HERE,
    MetalError,
    costs,
    emulate,
    kernel_text,
    kernels,
    mlx_attention,
)

pytestmark = pytest.mark.acceptance

I = "const uint i = thread_position_in_grid.x;\n"  # noqa: E741


def run(source, outputs, inputs=None, threads=32, group=None, template=None, header="", **rest):
    """Runs a kernel on a one-dimensional grid. `outputs` maps each name to a number of float32
    elements, or to a shape and a dtype."""
    out = {k: x if isinstance(x, tuple) else ((x,), mx.float32) for k, x in outputs.items()}
    grid, size = (threads, 1, 1), (group or threads, 1, 1)
    return emulate("test", source, header, inputs or {}, out, template or {}, grid, size, **rest)


def values(x):
    return np.array(x.astype(mx.float32))


# ---- the source text equals MLX's


def metal_text(kernel, inputs, outputs, template, capfd):
    """Returns the source text that MLX generates for a kernel when it exports a function. Exporting
    needs no GPU."""
    function = mx.fast.metal_kernel(
        name=kernel.name,
        input_names=kernel.inputs,
        output_names=kernel.outputs,
        source=kernel.source,
        header=kernel.header,
    )

    def traced(*x):
        return function(
            inputs=list(x),
            template=list(template.items()),
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            verbose=True,
            stream=mx.gpu,
        )

    capfd.readouterr()
    mx.exporter("/dev/null", traced)(*[inputs[name] for name in kernel.inputs])
    return capfd.readouterr().out.split("```\n")[1].rstrip("\n")


@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("name", kernels.KERNELS)
def test_text_is_what_mlx_writes(name, queries, capfd):
    kernel = kernels.KERNELS[name]
    shapes = {"first": (queries,), "lse": (1, 2, queries), "delta": (1, 2, queries)}
    shapes |= dict.fromkeys(("s", "dp"), (2, queries))
    shapes |= dict.fromkeys(("gate", "up", "dy"), (queries,))
    shapes |= dict.fromkeys(("q_start", "blocks", "q0", "k0", "nq", "period", "scale", "cap"), ())
    ints = {"first", "index", "q_start", "blocks", "q0", "k0", "nq", "period"}
    inputs = {
        n: mx.zeros(shapes.get(n, (1, 2, queries, 64)), mx.int32 if n in ints else mx.float16)
        for n in kernel.inputs
    }
    outputs = [((8,), mx.bfloat16)] * len(kernel.outputs)
    template = {"T": mx.bfloat16, "D": 64, "CAP": True, "GELU": True, "ROWS": 32, "THREADS": 128}
    named = dict(zip(kernel.outputs, outputs, strict=True))
    text, _, _ = kernel_text(name, kernel.source, kernel.header, inputs, named, template)
    assert text.rstrip("\n") == metal_text(kernel, inputs, outputs, template, capfd)


# ---- another compiler


def test_a_compiler_that_hardens():
    """Ubuntu's compiler enables hardening by default. The emulator must disable it. Otherwise,
    glibc would abort the process when it jumps to a fiber."""
    script = (
        "import test_metal_emulator as own; x = own.run('simdgroup_barrier(mem_flags::mem_none);"
        " y[thread_position_in_grid.x] = 1;', {'y': 32}); assert own.values(x[0]).all()"
    )
    environment = {**os.environ, "METAL_EMULATOR_CXX": "g++ -D_FORTIFY_SOURCE=2"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


# ---- operations


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int32])
def test_types_pass_through(dtype):
    x = (mx.arange(33) - 5).astype(dtype)
    (y,) = run(f"{I}y[i] = T(x[i] + x_shape[0] + x_strides[0] + x_ndim);", {"y": ((33,), dtype)},
               {"x": x}, 33, 16, {"T": dtype})  # fmt: skip
    assert y.dtype == dtype and mx.array_equal(y, x + 35)


def test_simd_operations():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(64).astype(np.float32)
    body = """
      const uint lane = thread_index_in_simdgroup;
      sum[i] = simd_sum(x[i]); top[i] = simd_max(x[i]); low[i] = simd_min(x[i]);
      any[i] = simd_any(x[i] > 2.5f); all[i] = simd_all(x[i] < 10.0f);
      mixed[i] = simd_shuffle(x[i], ushort(31 - lane));
      flipped[i] = simd_shuffle_xor(x[i], ushort(5));
      down[i] = simd_shuffle_down(x[i], ushort(3)); up[i] = simd_shuffle_up(x[i], ushort(3));
      one[i] = simd_broadcast(x[i], ushort(7));
    """
    names = ["sum", "top", "low", "any", "all", "mixed", "flipped", "down", "up", "one"]
    got = run(I + body, dict.fromkeys(names, 64), {"x": x}, 64)
    by_simd, lane = x.reshape(2, 32), np.arange(32)
    every = lambda f: np.repeat(f(by_simd, axis=1), 32)  # noqa: E731
    want = [
        every(np.sum), every(np.max), every(np.min),
        every(lambda y, axis: (y > 2.5).any(axis)), np.ones(64),
        by_simd[:, 31 - lane], by_simd[:, lane ^ 5],
        by_simd[:, np.where(lane + 3 < 32, lane + 3, lane)],
        by_simd[:, np.where(lane >= 3, lane - 3, lane)], np.repeat(by_simd[:, 7], 32),
    ]  # fmt: skip
    for name, x, y in zip(names, got, want, strict=True):
        np.testing.assert_allclose(np.array(x), np.ravel(y), rtol=1e-6, err_msg=name)


def test_lanes_of_a_matrix():
    """A lane has two elements of row 4·bit4 + 2·bit2 + bit1, in column 4·bit3 + 2·bit0 and the next
    one, where the bits are those of the lane's index. MLX's get_coord uses the same layout."""
    body = """
      simdgroup_matrix<float, 8, 8> m;
      m.thread_elements()[0] = float(i);
      m.thread_elements()[1] = i + 0.5f;
      simdgroup_store(m, y, 8);
    """
    (y,) = run(I + body, {"y": 64})
    want = np.zeros((8, 8))
    for lane in range(32):
        bit = [lane >> b & 1 for b in range(5)]
        row, col = 4 * bit[4] + 2 * bit[2] + bit[1], 4 * bit[3] + 2 * bit[0]
        want[row, col : col + 2] = lane, lane + 0.5
    assert np.array_equal(np.array(y).reshape(8, 8), want)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_matrix_product(dtype):
    rng = np.random.default_rng(1)
    a, b = (mx.array(rng.standard_normal((8, 12)).astype(np.float32)).astype(dtype) for _ in "ab")
    body = """
      simdgroup_matrix<T, 8, 8> x, y, eye(T(1.0f));
      simdgroup_load(x, a, 12, ulong2(2, 0));
      simdgroup_load(y, b + 4, 12, ulong2(0, 0), true);
      simdgroup_float8x8 z = make_filled_simdgroup_matrix<float, 8, 8>(3.0f), w;
      simdgroup_multiply_accumulate(z, x, y, z);
      simdgroup_store(z, c, 8);
      simdgroup_store(x, d, 8, ulong2(0, 0), true);
      simdgroup_multiply(w, x, eye);
      simdgroup_store(w, e, 8);
    """
    outputs = {"c": 64, "d": ((64,), dtype), "e": 64}
    got = run(I + body, outputs, {"a": a, "b": b}, template={"T": dtype})
    c, d, e = (values(x).reshape(8, 8) for x in got)
    x, y = values(a)[:, 2:10], values(b)[:, 4:]
    np.testing.assert_allclose(c, x @ y.T + 3, rtol=1e-5, atol=1e-5)
    assert np.array_equal(d, x.T) and np.array_equal(e, x)


def test_threadgroup_memory_and_casts():
    body = """
      threadgroup float tile[64];
      const uint t = thread_position_in_threadgroup.x;
      const device float4* four = reinterpret_cast<const device float4*>(x);
      tile[t] = four[i / 4][i % 4];
      threadgroup_barrier(mem_flags::mem_threadgroup);
      y[i] = tile[63 - t] + threadgroup_position_in_grid.x;
    """
    x = np.arange(128, dtype=np.float32)
    (y,) = run(I + body, {"y": 128}, {"x": x}, 128, 64)
    assert np.array_equal(np.array(y), np.r_[x[63::-1], x[:63:-1] + 1])


def test_groups_are_cut_at_the_end_of_the_grid():
    (y,) = run(f"{I}y[i] = threads_per_threadgroup.x;", {"y": 70}, {}, 70, 32)
    assert np.array_equal(np.array(y), [32] * 64 + [6] * 6)


def test_what_a_launch_asks_of_the_hardware_is_counted():
    body = """
      threadgroup float tile[64];
      simdgroup_matrix<float, 8, 8> m(1.0f);
      simdgroup_load(m, x, 8);
      tile[i] = exp(x[i]);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      simdgroup_multiply_accumulate(m, m, m, m);
      y[i] = tile[63 - i] + tile[i];
    """
    counts = []
    run(I + body, {"y": 64}, {"x": np.zeros(64, np.float32)}, threads=64, counts=counts)
    assert counts == [
        {
            "products": 2,  # one per simdgroup
            "device_read": 64 * 4 * 3,
            "device_written": 64 * 4,
            "threadgroup_read": 64 * 4 * 2,
            "threadgroup_written": 64 * 4,
            "device_accesses": 64 * (3 + 1),
            "threadgroup_reads": 64 * 2,
            "threadgroup_writes": 64,
            "barriers": 1,
            "functions": 64,
            "conversions": 0,
        }
    ]


def test_conversions_are_counted_and_wide_reads_are_one():
    """Conversions by the emulator itself, in new matrices or bfloat products, are not counted."""
    body = """
      const device vec<bfloat, 4>* four = reinterpret_cast<const device vec<bfloat, 4>*>(x);
      const vec<bfloat, 4> own = four[i];
      simdgroup_matrix<bfloat, 8, 8> a, b;
      a.thread_elements()[0] = own[0];
      a.thread_elements()[1] = own[1];
      b.thread_elements()[0] = own[2];
      b.thread_elements()[1] = own[3];
      simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0);
      simdgroup_multiply_accumulate(sum, a, b, sum);
      y[i] = sum.thread_elements()[0] + float(own[0]) + float(bfloat(sum.thread_elements()[1]));
    """
    counts = []
    run(I + body, {"y": 32}, {"x": mx.ones((128,), mx.bfloat16)}, counts=counts)
    assert counts[0]["conversions"] == 32 * 3
    assert counts[0]["device_read"] == 32 * 8
    assert counts[0]["device_accesses"] == 32 * 2


@pytest.mark.parametrize("size", [64, 128])
def test_the_attention_of_mlx_runs_here(size):
    """The emulator can run the kernel source of the installed MLX package, so the work of MLX's
    kernel can be counted."""
    rng = np.random.default_rng(2)
    q, k, v = (mx.array(rng.standard_normal((1, 1, 64, size))).astype(mx.bfloat16) for _ in "qkv")
    o, lse, counts = mlx_attention.run(q, k, v, size**-0.5)
    wide = [np.array(x.astype(mx.float32)).astype(np.float64) for x in (q, k, v)]
    oracle.assert_close("o", values(o), oracle.attention(*wide, scale=size**-0.5), 2.0**-8)
    s = wide[0] @ wide[1].swapaxes(-1, -2) * size**-0.5
    seen = np.where(oracle.visible(64, 64), np.exp(s), 0)
    oracle.assert_close("lse", values(lse), np.log(seen.sum(-1)), 1e-6)
    assert counts["products"] == (1 + 2) * 32 * 32 * 2 * size / 512


def test_the_documentation_has_what_is_counted():
    """Checks the rows for D = 64, which are the fastest to count, and the rows of the other
    kernels."""
    page = (HERE.parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
    with mx.stream(mx.cpu):
        tables = [*costs.tables_of((64,)).values(), costs.table_of_others()]
    lines = [line for table in tables for line in table.split("\n")]
    assert len(lines) == 3 * 2 + 2 * 6 + 6 + 5
    assert [line for line in lines if line not in page.split("\n")] == []


# ---- planted faults

TILE = "threadgroup float tile[64];\nconst uint lane = thread_index_in_simdgroup;\n"
SWAP = "tile[i] = i; {} y[i] = tile[{}];"

FAULTS = {
    "read out of bounds": ("y[i] = x[i + 1];", r"read out of bounds: x\[64\] of 64"),
    "read in front": ("y[i] = x[int(i) - 1];", r"read out of bounds: x\[-1\]"),
    "write out of bounds": ("y[i + 1] = 0;", r"write out of bounds: y\[64\] of 64"),
    "shared out of bounds": ("tile[i + 1] = 0; y[i] = 0;", r"write out of bounds: tile\[64\]"),
    "misaligned cast": (
        "y[i] = reinterpret_cast<const device float4*>(x + 1)[0].x;",
        "x is cast to a misaligned pointer",
    ),
    "no barrier": (SWAP.format("", "i ^ 32"), "race: tile|tile.* before it is written"),
    "barrier of device memory only": (
        SWAP.format("threadgroup_barrier(mem_flags::mem_device);", "i ^ 1"),
        "race: tile.* is read while thread .* writes it",
    ),
    "simdgroup barrier across simdgroups": (
        SWAP.format("simdgroup_barrier(mem_flags::mem_threadgroup);", "i ^ 32"),
        "race: tile|tile.* before it is written",
    ),
    "write after read": (
        "tile[i] = i; threadgroup_barrier(mem_flags::mem_threadgroup);"
        "y[i] = tile[0]; if (i == 63) tile[0] = 0;",
        "race: tile.* is written while thread .* reads it",
    ),
    "shared read uninitialised": ("y[i] = tile[i];", r"tile\[\d+\] is read before it is written"),
    "output read uninitialised": ("y[i] = y[i] + 1;", r"y\[\d+\] is read before it is written"),
    "output not written": ("if (i != 5) y[i] = 0;", r"y\[5\] is never written"),
    "two writers": ("y[i / 2] = 0; y[i] = 1;", "is written after another thread wrote it"),
    "divergent barrier": (
        "if (i < 32) threadgroup_barrier(mem_flags::mem_none); y[i] = 0;",
        "divergent: thread .* threadgroup_barrier",
    ),
    "two barriers": (
        "if (i < 32)\nthreadgroup_barrier(mem_flags::mem_none);\nelse\n"
        "threadgroup_barrier(mem_flags::mem_none);\ny[i] = 0;",
        "divergent",
    ),
    "divergent simd_sum": ("if (lane < 16) y[i] = simd_sum(1.0f);", "divergent: .*simd_sum"),
    "two simd operations": (
        "y[i] = lane < 16 ? simd_sum(1.0f) : simd_max(1.0f);",
        "simdgroup has diverged",
    ),
    "threadgroup memory": (
        "threadgroup float more[8192]; more[i] = 0; tile[i] = 0; y[i] = 0;",
        "threadgroup memory of 33024 bytes is over the limit of 32768",
    ),
    "float64": ("double z = x[i]; y[i] = float(z * 2);", "no double"),
    "write to an input": ("x[i] = 0; y[i] = 0;", "does not compile"),
    "mixed address spaces": ("const device float* p = tile; y[i] = p[0];", "does not compile"),
    "not ASCII": ("y[i] = 0;  // ∞", "ASCII"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault):
    body, error = FAULTS[fault]
    tile = TILE if "tile" in body or "lane" in body else ""
    with pytest.raises(MetalError, match=error):
        run(I + tile + body, {"y": 64}, {"x": np.zeros(64, np.float32)}, 64)


def test_right_barriers_pass():
    for barrier, other in (("threadgroup_barrier", "i ^ 32"), ("simdgroup_barrier", "i ^ 1")):
        body = SWAP.format(f"{barrier}(mem_flags::mem_threadgroup);", other)
        (y,) = run(I + TILE + body, {"y": 64}, threads=64)
        assert np.array_equal(np.array(y), np.arange(64) ^ (32 if "32" in other else 1))


def test_orders_find_what_one_order_does_not():
    """The emulator records only two readers of each address. Here, a third reader, in the other
    simdgroup, races with the writer. Some thread orders hide this race."""
    body = """
      tile[i] = i;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (lane < 2) y[i] = tile[0]; else y[i] = 0;
      simdgroup_barrier(mem_flags::mem_threadgroup);
      if (i == 0) tile[0] = 9;
    """
    run(I + TILE + body, {"y": 64}, threads=64, orders=[1])
    with pytest.raises(MetalError, match="race"):
        run(I + TILE + body, {"y": 64}, threads=64)


def test_threadgroup_memory_belongs_to_the_kernel():
    header = "void f() {\n  threadgroup float tile[8];\n}\n"
    with pytest.raises(MetalError, match="outside the kernel"):
        run(f"{I}f(); y[i] = 0;", {"y": 32}, header=header)
