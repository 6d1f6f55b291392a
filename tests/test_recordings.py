"""Tests that later steps reuse recorded graphs: results do not change, and the stage functions are
not called again."""

import functools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from lib.chains import FAST, adapter_of, batch_of, pair_batch
from lib.runs import existing_bytes
from lib.tiny_models import build
from mlx_segtrain import _core, segmented_value_and_grad
from mlx_segtrain.models import adapting, chain_of
from mlx_segtrain.objectives import Functions, value_and_grad
from mlx_segtrain.objectives.preference import Dpo
from mlx_segtrain.objectives.sft import Sft
from mlx_segtrain.schedule import Stage

H = 16
CALLS = 3  # one call that may cache arrays, one that is recorded, and one that is compared


def bits(outputs, grads):
    arrays = [*outputs, *(g for own in grads.values() for _, g in sorted(own.items()))]
    mx.eval(arrays)
    return [np.array(x).tobytes() for x in arrays]


def counted(chain, calls):
    """Returns the chain with stages that count in `calls` how often they are called."""

    def stage_of(stage):
        def fn(*args, **more):
            calls[stage.name] = calls.get(stage.name, 0) + 1
            return stage.fn(*args, **more)

        return replace(stage, fn=fn)

    of = chain.stages_of
    return replace(chain, stages_of=lambda updates: [stage_of(s) for s in of(updates)])


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("size", [0, 2])
def test_steps_are_those_of_the_functions(name, size):
    family, overrides = FAST[name]
    model = build(family, **overrides)
    calls = {}
    chain = counted(chain_of(model), calls)
    adapter = adapter_of(chain)
    kept = Functions(Sft(), chain, adapter.scales)
    rng = np.random.default_rng(0)
    params = adapting.stage_params(chain, adapter)
    cuts = functools.partial(chain.cuts, size)
    for step in range(6):
        batch = batch_of(2)
        batch = replace(batch, tokens=rng.integers(0, 128, batch.tokens.shape).astype(np.int32))
        before = dict(calls)
        got = bits(*value_and_grad(kept, params, batch, 40.0, cuts=cuts))
        if step > CALLS:
            assert calls == before, "a function with a recorded graph was called"
        fresh = Functions(Sft(), chain, adapter.scales)
        assert got == bits(*value_and_grad(fresh, params, batch, 40.0, cuts=cuts))
        scale = 1 + 0.1 * step
        params = {
            stage: {key: x * scale for key, x in own.items()} for stage, own in params.items()
        }


def test_pairs_and_lengths_have_graphs_of_their_own():
    chain = chain_of(build("llama"))
    adapter = adapter_of(chain)
    params = adapting.stage_params(chain, adapter)
    objective = Dpo(0.1)
    kept = Functions(objective, chain, adapter.scales)
    for step in range(10):
        batch = pair_batch(9, lengths=((21, 17),) if step % 2 else ((25, 19),), seed=step)
        total = objective.total([batch])
        got = bits(*value_and_grad(kept, params, batch, total, cuts=chain_cuts(chain)))
        fresh = Functions(objective, chain, adapter.scales)
        assert got == bits(*value_and_grad(fresh, params, batch, total, cuts=chain_cuts(chain)))


def chain_cuts(chain):
    return lambda streams: chain.cuts(1, streams)


def simple(outside):
    """Returns a chain whose first function also uses the result of `outside`."""

    def fn(params, h):
        return mx.tanh(h @ params["w"]) * outside()

    stages = [Stage("a", fn), Stage("b", lambda params, h: mx.sin(h @ params["w"]))]
    params = {
        name: {"w": mx.random.normal((H, H), key=mx.random.key(i))} for i, name in enumerate("ab")
    }
    return stages, params


def head(params, h):
    return h.sum()


def test_what_changes_outside_of_the_arrays_is_seen():
    numbers = iter([2.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    kinds = {
        "a number": lambda: next(numbers),
        "an array": lambda: mx.random.normal((64, H)),
        "one that was computed": lambda: mx.ones((64, H)) * next(numbers),
    }
    for kind, outside in kinds.items():
        numbers = iter([2.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        now = []

        def read(outside=outside, now=now):
            now.append(outside())
            mx.eval(now[-1]) if isinstance(now[-1], mx.array) else None
            return now[-1]

        stages, params = simple(read)
        recordings = _core.Recordings()
        for step in range(6):
            h = mx.random.normal((64, H), key=mx.random.key(step))
            run = segmented_value_and_grad(stages, head, recordings=recordings, segment_size=0)
            got, grads = run(params, {"h": h})
            assert len(now) == step + 1, kind
            alone, _ = simple(lambda: now[-1])  # noqa: B023 - it is called at once
            want, wanted = segmented_value_and_grad(alone, head, segment_size=0)(params, {"h": h})
            assert bits(got, grads) == bits(want, wanted), kind


def test_what_a_primitive_holds_is_compared():
    """Slices with different start positions have equal inputs and shapes, but must be told
    apart."""
    starts = iter([0, 1, 2, 3, 4, 5])
    stages, params = simple(lambda: 1.0)

    def fn(params, h):
        begin = next(starts)
        return h[:, begin : begin + 4] @ params["w"][:4]

    stages[1] = replace(stages[1], fn=fn)
    recordings = _core.Recordings()
    for step in range(6):
        h = mx.random.normal((8, H), key=mx.random.key(step))
        run = segmented_value_and_grad(stages, head, recordings=recordings, segment_size=0)
        (got, *_), _ = run(params, {"h": h})
        x = mx.tanh(h @ params["a"]["w"])[:, step : step + 4]
        assert mx.allclose(got, (x @ params["b"]["w"][:4]).sum(), rtol=1e-5, atol=1e-5)


def test_nothing_of_a_step_stays():
    """No array of a step stays in memory, not even one referenced by a function with a custom
    derivative."""

    def own(params, h):
        @mx.custom_function
        def sine(x):
            return mx.sin(x)

        @sine.vjp
        def back(x, d, _):
            return d * mx.cos(h @ params["w"])

        return sine(h @ params["w"])

    stages, params = simple(lambda: 1.0)
    stages[1] = replace(stages[1], fn=own)
    recordings = _core.Recordings()
    mx.eval(params)

    def step(n):
        h = mx.random.normal((n, H), key=mx.random.key(n))
        run = segmented_value_and_grad(stages, head, recordings=recordings, segment_size=0)
        mx.eval(run(params, {"h": h}))

    step(8)
    before = existing_bytes()
    for _ in range(6):
        step(1 << 14)
    mx.synchronize()
    assert existing_bytes() - before < 1 << 16
