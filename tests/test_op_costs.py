"""Compares the memory that the cost functions of ops predict with the memory measured on the
CPU."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_segtrain import _core, ops
from mlx_segtrain.planning.costs import CPU

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="GPUs are measured by bench/memory.py"
)

#: Bounds for the ratio of measured to predicted memory. The ratio may exceed 1 slightly, because
#: the cost functions ignore low-rank branches. It may be below 1 if threads do not overlap or the
#: host is not ahead of the device.
LEAST, MOST = 0.5, 1.1
#: The number of measurements per call. Their maximum is used, because the overlap of threads is
#: random.
TRIES = 3

some = settings(max_examples=8, deadline=None)
#: These sizes are large compared with each thread's memory.
rows = st.integers(900, 1100)
widths = st.sampled_from([256, 384, 512])


def array(*shape: int) -> mx.array:
    x = mx.random.normal(shape)
    mx.eval(x)
    return x


def peak(make: Callable[[], Sequence[mx.array]]) -> int:
    """Returns the peak memory of an evaluation in bytes. A memory limit of 1 byte makes MLX wait
    for each op."""
    mx.synchronize()
    before = mx.get_active_memory()
    limit = mx.set_memory_limit(1)
    try:
        mx.reset_peak_memory()
        mx.eval(make())
        return mx.get_peak_memory() - before
    finally:
        mx.set_memory_limit(limit)


def check(said: int, outputs: int, make: Callable[[], Sequence[mx.array]]) -> None:
    taken = max(peak(make) for _ in range(TRIES))
    assert LEAST < taken / (said + outputs) < MOST, (said, outputs, taken)


def linear(inputs: int, outputs: int, rank: int = 8) -> ops.Linear:
    base = ops.Base(*mx.quantize(array(outputs, inputs), 64, 4), group_size=64, bits=4)
    mx.eval(base.weight, base.scales, base.biases)
    return ops.Linear(base, array(inputs, rank), array(rank, outputs), 1.0)


@some
@given(
    batch=st.integers(1, 2),
    groups=st.integers(4, 5),
    share=st.integers(1, 3),
    head=st.sampled_from([32, 64]),
    queries=rows,
    more=st.integers(0, 300),
    softcap=st.booleans(),
)
def test_attention(batch, groups, share, head, queries, more, softcap):
    heads, keys = groups * share, queries + more
    shape = {"rows": batch, "heads": heads, "groups": groups, "head": head, "queries": queries}
    cost = _core.attention_cost(CPU, **shape, keys=keys, softcap=softcap)
    q, do = array(batch, heads, queries, head), array(batch, heads, queries, head)
    k, v = array(batch, groups, keys, head), array(batch, groups, keys, head)

    def run(q, k, v):
        return ops.attention(q, k, v, scale=0.1, softcap=30.0 if softcap else None)

    check(cost.forward, q.nbytes, lambda: [run(q, k, v)])
    # o is kept, dq is as large as q, and dk and dv are as large as k and v.
    gradients = 2 * q.nbytes + 2 * k.nbytes
    check(cost.backward, gradients, lambda: mx.vjp(run, [q, k, v], [do])[1])
    saved = ops.attention_forward(q, k, v, scale=0.1)
    assert cost.saved == sum(x.nbytes for x in saved)


@some
@given(rows=rows, inputs=widths, outputs=widths)
def test_lora_linears(rows, inputs, outputs):
    own = linear(inputs, outputs)
    cost = _core.lora_linears_cost(CPU, inputs=inputs, outputs=outputs)
    x, dy = array(rows, inputs), array(rows, outputs)

    def run(x, a, b):
        return ops.lora_linears(x, [own.with_factors(a, b)])[0]

    given = [x, own.a, own.b]
    check(cost.forward, dy.nbytes, lambda: [run(*given)])
    check(cost.backward, sum(y.nbytes for y in given), lambda: mx.vjp(run, given, [dy])[1])


@some
@given(rows=rows, inputs=widths, hidden=widths, tile=st.sampled_from([None, 512]))
def test_lora_glu_mlp(rows, inputs, hidden, tile):
    own = [linear(inputs, hidden), linear(inputs, hidden), linear(hidden, inputs)]
    shape = {"rows": rows, "inputs": inputs, "hidden": hidden, "tile_rows": tile}
    cost = _core.lora_glu_mlp_cost(CPU, **shape)
    x, dy = array(rows, inputs), array(rows, inputs)

    def run(x, *factors):
        pairs = zip(factors[::2], factors[1::2], strict=True)
        linears = [w.with_factors(*ab) for w, ab in zip(own, pairs, strict=True)]
        return ops.lora_glu_mlp(x, *linears, tile_rows=tile)

    given = [x, *(factor for w in own for factor in (w.a, w.b))]
    check(cost.forward, dy.nbytes, lambda: [run(*given)])
    check(cost.backward, sum(y.nbytes for y in given), lambda: mx.vjp(run, given, [dy])[1])


@pytest.mark.parametrize("vocabulary", [4096, 70_000, 150_000])
@pytest.mark.parametrize("rows", [20, 100, 500])
def test_head(rows, vocabulary):
    base = linear(64, vocabulary).base
    cost = _core.head_cost(CPU, rows=rows, inputs=64, vocabulary=vocabulary)
    h, targets = array(rows, 64), mx.random.randint(0, vocabulary, (rows,))
    mx.eval(targets)

    def loss(h):
        return ops.linear_cross_entropy(h, base, targets)

    def log_probs(h):
        return ops.linear_log_probs(h, base, targets).sum()

    check(cost.backward, h.nbytes, lambda: [mx.grad(loss)(h)])
    check(cost.forward, 0, lambda: [log_probs(h)])
    check(cost.backward, h.nbytes, lambda: [mx.grad(log_probs)(h)])
