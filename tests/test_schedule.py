"""Compares the segmented backward pass with MLX's gradient of the whole chain."""

import gc
import signal
import time
from dataclasses import replace
from functools import partial

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from lib.checks import ON_GPU
from lib.oracle import errors
from mlx_segtrain import Stage, _core, segmented_value_and_grad
from mlx_segtrain.schedule import Cuts, _plan, forward

N, H = 7, 16


def shared_kv_chain(dtype=mx.float32):
    """Returns a chain of layers over h, with its head, parameters and inputs. Layer 1 also writes
    kv for layers 3, 4 and 6 and the head."""
    keys = iter(mx.random.split(mx.random.key(0), 40))

    def array(*shape):
        return (0.3 * mx.random.normal(shape, key=next(keys))).astype(dtype)

    def plain(p, h):
        return h + mx.tanh(h @ p["w"])

    def donor(p, h):
        return h + mx.tanh(h @ p["w"]), mx.sin(h @ p["v"])

    def reader(p, h, kv):
        return h + mx.tanh(h @ p["w"]) * kv

    stages, params = [], {}
    for i in range(N):
        name = f"layer.{i}"
        params[name] = {"w": array(H, H)}
        if i == 1:
            params[name]["v"] = array(H, H)
            stages.append(Stage(name, donor, writes=("h", "kv")))
        elif i in (3, 4, 6):
            stages.append(Stage(name, reader, reads=("h", "kv")))
        else:
            stages.append(Stage(name, plain))
    params["head"] = {"out": array(H, 3)}

    def head(p, h, kv, y):
        loss = ((h @ p["out"] + kv.sum(-1, keepdims=True) - y) ** 2).astype(mx.float32).mean()
        return loss, h.astype(mx.float32).mean()

    values = {"h": array(2, 5, H), "y": array(2, 5, 3)}
    return stages, head, params, values


def whole(stages, head, params, values):
    def loss(params):
        scope = dict(values)
        for s in stages:
            out = s.fn(params[s.name], *(scope[r] for r in s.reads))
            scope.update(zip(s.writes, out if isinstance(out, tuple) else (out,), strict=True))
        return head(params["head"], scope["h"], scope["kv"], scope["y"])[0]

    return mx.value_and_grad(loss)(params)


def run(size, dtype=mx.float32):
    stages, head, params, values = shared_kv_chain(dtype)
    step = segmented_value_and_grad(
        stages, head, inputs=("h", "y"), head_reads=("h", "kv", "y"), segment_size=size
    )
    return step(params, values)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 7, 20])
def test_gradients_equal_the_whole_model(size):
    stages, head, params, values = shared_kv_chain()
    loss, grads = whole(stages, head, params, values)
    (segmented, mean_h), got = run(size)
    assert mx.allclose(loss, segmented, rtol=1e-6)
    assert mx.allclose(mean_h, forward(stages, params, values)["h"].mean(), rtol=1e-5)
    truth = dict(tree_flatten(grads))
    assert dict(tree_flatten(got)).keys() == truth.keys()
    for name, grad in tree_flatten(got):
        l2, _ = errors(grad, truth[name])
        assert mx.abs(truth[name]).max() > 1e-4 and l2 < 1e-6, name


def test_a_group_uses_what_its_stages_have_saved():
    """A stage saves arrays in the last forward pass before its backward pass. For l0, this is the
    second forward pass of its group; l1 then goes back without another forward pass."""
    calls = []

    def layer(name, p, h, saved, save):
        calls.append((name, "saves" if save else "uses" if saved else "runs"))
        out = h + mx.tanh(h @ p["w"])
        return (out, out) if save else out

    stages = [Stage(f"l{i}", partial(layer, f"l{i}"), saves=True) for i in range(4)]
    params = {s.name: {"w": mx.random.normal((H, H), key=mx.random.key(0))} for s in stages}
    cuts = Cuts((1, 2, 3, 4), (2, 4), saves=(0, 1, 2))
    step = segmented_value_and_grad(stages, lambda p, h: h.mean(), cuts=cuts)
    step(params, {"h": mx.ones((5, H))})
    assert calls == [
        *[("l0", "runs"), ("l1", "saves"), ("l2", "saves"), ("l3", "runs")],
        *[("l2", "uses"), ("l0", "saves"), ("l1", "uses"), ("l0", "uses")],
    ]


@pytest.mark.parametrize("offloaded", [1, 4, 7])
def test_offloaded_arrays_change_no_bit(offloaded):
    """The values and the saved arrays of the first stages are copied to host memory and back."""
    stages, head, params, values = shared_kv_chain()

    def saving(fn):
        def run(p, *reads, saved=(), save=False):
            out = fn(p, *reads)
            if saved:  # its value is used, so a wrong copy would be noticed
                h = saved[0] + 0 * (out[0] if isinstance(out, tuple) else out)
                out = (h, *out[1:]) if isinstance(out, tuple) else h
            kept = out[0] if isinstance(out, tuple) else out
            return (*(out if isinstance(out, tuple) else (out,)), kept) if save else out

        return run

    stages = [replace(s, fn=saving(s.fn), saves=True) for s in stages]
    every = tuple(range(1, N + 1))
    for cuts in (Cuts(every, every), Cuts((*every, N), (3, 8), saves=(0, 1, 2, 3, 5))):
        cuts = replace(cuts, saves=cuts.saves or (0, 2, 4))
        how = {"inputs": ("h", "y"), "head_reads": ("h", "kv", "y")}
        whole = segmented_value_and_grad(stages, head, **how, cuts=cuts)(params, values)
        moved = replace(cuts, offloaded=offloaded)
        plan = _plan(stages, ["h", "y"], how["head_reads"], moved, params)
        assert "fetches" in " ".join(plan.describe()) or offloaded == 1
        got = segmented_value_and_grad(stages, head, **how, cuts=moved)(params, values)
        for (name, x), (_, y) in zip(tree_flatten(whole), tree_flatten(got), strict=True):
            assert mx.array_equal(x, y), name
    _core.release_host_memory()


def test_sums_over_readers_are_in_float32():
    """In bfloat16, the gradient through kv's four readers is as accurate as MLX's sum."""
    _, truth = whole(*shared_kv_chain(mx.float32))
    true = truth["layer.1"]["v"]
    _, plain = whole(*shared_kv_chain(mx.bfloat16))
    plain_l2, _ = errors(plain["layer.1"]["v"].astype(mx.float32), true)
    for size in (0, 1, 3):
        _, got = run(size, mx.bfloat16)
        l2, _ = errors(got["layer.1"]["v"].astype(mx.float32), true)
        assert l2 <= 1.2 * plain_l2


def test_many_small_cotangents_are_not_lost():
    """A value is read 300 times with cotangents of 1. Their sum in bfloat16 would stop at 256."""
    n = 300
    for size in (0, 1, 7):
        stages = [
            Stage("donor", lambda p, h: (h, p["w"] * 1), writes=("h", "kv")),
            *(
                Stage(f"r{i}", lambda p, h, kv: h + kv.astype(mx.float32), reads=("h", "kv"))
                for i in range(n)
            ),
        ]
        step = segmented_value_and_grad(stages, lambda p, h: h.sum(), segment_size=size)
        params = {"donor": {"w": mx.ones(1, mx.bfloat16)}}
        (loss,), grads = step(params, {"h": mx.zeros(1)})
        assert loss.item() == n
        # The sum, 300, is converted to bfloat16 only at the end.
        assert grads["donor"]["w"].item() == mx.array(n, mx.bfloat16).item()


def test_memory_grows_with_the_segment_and_not_with_depth():
    """Each layer creates four arrays of 4 MB (64 MB on a GPU). Boundary values are a sixteenth of
    this size.

    Arrays are larger on a GPU because it reports finished kernels with a delay. If layers took only
    microseconds, the arrays of any number of layers could be in memory at the same time.
    """
    rows = 1 << (16 if ON_GPU else 12)

    def layer(p, h):
        x = h @ p["up"]
        for _ in range(3):
            x = mx.sin(x)
        return h + x @ p["down"]

    def peak(n, size):
        keys = mx.random.split(mx.random.key(0), 2)
        up = 0.1 * mx.random.normal((16, 256), key=keys[0])
        down = 0.1 * mx.random.normal((256, 16), key=keys[1])
        params = {f"l{i}": {"up": up, "down": down} for i in range(n)}
        h = mx.random.normal((rows, 16))
        mx.eval(params, h)
        stages = [Stage(f"l{i}", layer) for i in range(n)]
        step = segmented_value_and_grad(stages, lambda p, h: (h**2).mean(), segment_size=size)
        # Free the memory that earlier tests left in queues, caches and reference cycles.
        gc.collect()
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        step(params, {"h": h})
        return (mx.get_peak_memory() - before) / (rows * 256 * 4)

    shallow, deep, off = peak(4, 1), peak(16, 1), peak(16, 0)
    assert deep - shallow < 12 * 0.064 + 0.24, (shallow, deep)
    assert peak(16, 4) > 1.8 * deep
    assert off > 6 * deep, (deep, off)


def test_without_parameters_only_the_loss_comes_back():
    stages, _, _, values = shared_kv_chain()
    bare = [Stage(s.name, lambda p, h: h * 2) for s in stages[:3]]
    step = segmented_value_and_grad(bare, lambda p, h: h.sum(), segment_size=1)
    (loss,), grads = step({}, {"h": values["h"]})
    assert mx.allclose(loss, values["h"].sum() * 8, rtol=1e-5) and grads == {}


def test_an_exception_in_a_stage_arrives_and_leaves_the_runner_usable():
    def broken(p, h):
        raise KeyError("from the stage")

    step = segmented_value_and_grad([Stage("a", broken)], lambda p, h: h.sum())
    with pytest.raises(KeyError, match="from the stage"):
        step({"a": {"w": mx.ones(1)}}, {"h": mx.ones(3)})
    run(1)


def test_misuse_is_named():
    stages, head, params, values = shared_kv_chain()
    with pytest.raises(ValueError, match=r"unknown stages: \['layer\.9'\]"):
        segmented_value_and_grad(stages[:1], head)({"layer.9": {}}, values)
    with pytest.raises(ValueError, match="names must differ"):
        segmented_value_and_grad([stages[0], stages[0]], head)
    bad = Stage("two", lambda p, h: (h, h))
    with pytest.raises(ValueError, match=r"stage 'two' must return 1 arrays.*got 2"):
        segmented_value_and_grad([bad, stages[0]], lambda p, h: h.sum())(
            {"layer.0": params["layer.0"]}, {"h": values["h"]}
        )


def test_every_move_traces_what_mx_compile_would_fuse():
    """All moves, with or without a backward pass, trace functions under vjp. Outside vjp,
    mx.compile would fuse operations, and fused operations may round differently."""
    traces = []

    @mx.compile
    def inner(x):
        traces.append(x)
        return x * mx.tanh(x + x**3)

    stages = [Stage(f"layer.{i}", lambda p, h: h + inner(h @ p["w"])) for i in range(4)]
    params = {s.name: {"w": mx.random.normal((H, H), key=mx.random.key(0))} for s in stages}
    step = segmented_value_and_grad(stages, lambda p, h: (h**2).mean(), segment_size=1)
    step(params, {"h": mx.ones((5, H))})
    assert len(traces) == 3 + 1 + 3


@pytest.mark.skipif(ON_GPU, reason="a GPU is too fast to be interrupted")
def test_a_step_is_interrupted_between_layers():
    """Interruption works while the CPU computes and Python waits, because only a small part of the
    step is pending at any time."""
    x = mx.random.normal((140, 140), key=mx.random.key(0)) / 12

    def layer(p, h):
        for _ in range(6):
            h = mx.tanh(h @ p["w"])
        return h

    stages = [Stage(f"layer.{i}", layer) for i in range(16)]
    params = {stage.name: {"w": x} for stage in stages}
    step = segmented_value_and_grad(stages, lambda p, h: h.mean(), segment_size=0)

    def timed():
        begun = time.perf_counter()
        try:
            step(params, {"h": x})
        finally:
            # Wait for the work launched on the CPU, as saving does.
            mx.eval(mx.array(1) + 1)
            took.append(time.perf_counter() - begun)

    took = []
    timed()
    timed()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, took[-1] / 2)
        with pytest.raises(KeyboardInterrupt):
            timed()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert took[-1] < 0.8 * took[-2]
