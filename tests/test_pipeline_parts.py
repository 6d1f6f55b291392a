"""Tests the parts of a pipeline, without starting processes: cuts, the values that cross the cuts,
and plans."""

import threading
import time
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from lib import tiny_models
from lib.chains import adapter_of, batch_of, headers, pair_batch
from lib.folders import write_llama
from lib.runs import existing_bytes
from mlx_segtrain import Stage, segmented_value_and_grad
from mlx_segtrain.errors import InputError, NoRoom
from mlx_segtrain.models import adapting, chain_of, load_model
from mlx_segtrain.objectives import Functions, total_of, value, value_and_grad
from mlx_segtrain.objectives.kto import Kto
from mlx_segtrain.objectives.preference import Dpo
from mlx_segtrain.objectives.sft import Sft
from mlx_segtrain.planning import shape_of
from mlx_segtrain.planning.costs import CPU, CUDA, costs_of
from mlx_segtrain.planning.pipeline import Part, costs_of_part, weight_bytes
from mlx_segtrain.planning.run import RunPlan
from mlx_segtrain.planning.splitting import Member, held, split, split_run
from mlx_segtrain.schedule import border, specs_of
from mlx_segtrain.streams import BatchShape
from mlx_segtrain.training.layout import Layout
from mlx_segtrain.training.pipe import Pipe
from mlx_segtrain.training.ranks import Ranks
from mlx_segtrain.training.state import Iterate
from mlx_segtrain.training.step import Stepper


class Post:
    """Simulates transfers between pipes in one process. Sent arrays are stored in boxes until
    received."""

    def __init__(self, rank, boxes):
        self.rank, self.boxes = rank, boxes

    def send(self, arrays, to):
        self.boxes[self.rank, to] = [*self.boxes.get((self.rank, to), []), list(arrays)]

    def send_forms(self, arrays, to):
        self.send([(tuple(x.shape), x.dtype) for x in arrays], to)

    def post(self, forms, source):
        (found, *rest) = self.boxes[source, self.rank]
        self.boxes[source, self.rank] = rest
        assert [(tuple(x.shape), x.dtype) for x in found] == list(forms)
        return found

    def forms(self, count, source):
        (found, *rest) = self.boxes[source, self.rank]
        self.boxes[source, self.rank] = rest
        assert len(found) == count
        return found

    def settle(self, left=0):
        pass


class Alone(Ranks):
    """A rank of a group that runs in one process and therefore never waits for other ranks."""

    def wait_for(self, arrays):
        mx.eval(arrays)


def pipes_of(ends, layers, batches=1):
    boxes, begins = {}, [0, *ends[:-1]]
    parts = [
        Part(r, len(ends), begin, end, layers, batches)
        for r, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ]
    return [Pipe(Alone(r, len(ends)), part, Post(r, boxes)) for r, part in enumerate(parts)]


def through(pipes, objective, chain, adapter, batch, size):
    """Runs a batch through all pipes in segments of `size`. Returns the outputs and gradients."""
    params = adapting.stage_params(chain, adapter)
    total = objective.total([batch])
    functions = Functions(objective, chain, adapter.scales)
    passes, outputs, grads = [], (), {}
    for pipe in pipes:
        own = pipe.own(functions, batch, total, set(params))
        values = own.values | pipe.receive(own)
        mine = {name: x for name, x in params.items() if name in pipe.owners(chain)}
        layers = slice(pipe.part.begin, pipe.part.end)
        cuts = chain.cuts(size, own.streams, layers)
        passes.append((own, pipe.passes(functions, mine, own, values, cuts, None)))
        found = passes[-1][1].forward()
        if not pipe.part.last:
            pipe.send(own, found)
    for pipe, (own, one) in zip(reversed(pipes), reversed(passes), strict=True):
        some, more, cotangents = one.backward(pipe.receive_back(own))
        pipe.send_back(own, cotangents)
        outputs = outputs or some
        grads |= {name: x for part in more.values() for name, x in part.items()}
    return outputs, grads


@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize(
    ("family", "ends"),
    [("llama", [1, 4]), ("gemma4_text", [2, 4, 6]), ("gemma4_text", [1, 5, 6]), ("glm4", [1, 2])],
)
def test_ranks_of_a_pipeline_have_the_gradients_of_the_whole(family, ends, size):
    changes = {"num_hidden_layers": 4} if family == "llama" else {}
    chain = chain_of(tiny_models.build(family, **changes))
    adapter = adapter_of(chain)
    objective, batch = (
        (Sft(), batch_of(2, prompt=9)) if size else (Dpo(), pair_batch(0, lengths=((21, 17),)))
    )
    params = adapting.stage_params(chain, adapter)
    outputs, expected = value_and_grad(
        Functions(objective, chain, adapter.scales),
        params,
        batch,
        objective.total([batch]),
        cuts=lambda streams: chain.cuts(size, streams),
    )
    expected = {name: x for own in expected.values() for name, x in own.items()}
    found, grads = through(pipes_of(ends, ends[-1]), objective, chain, adapter, batch, size)
    assert grads.keys() == expected.keys()
    for name, x in expected.items():
        assert mx.array_equal(grads[name], x), name
        assert mx.abs(x).max() > 0
    assert [float(x) for x in found] == [float(x) for x in outputs]


def test_what_crosses_a_cut_is_what_later_stages_read():
    chain = chain_of(tiny_models.build("gemma4_text"))
    stages = chain.stages({})
    number = {owner: i for i, layer in enumerate(chain.layers) for owner in layer}
    specs = specs_of(stages, {s.owner for s in stages if number[s.owner] == 1})
    reads = ("h", "rows")

    def at(layer):
        return border(specs, reads, [number[s.owner] < layer for s in stages])

    first = at(1)
    # None of the earlier layers has an adapter.
    assert first.values == ("h",) and first.differentiable == ()
    given = [f"{kind} of model.layers.{i}" for i in (1, 2) for kind in ("keys", "values")]
    third = at(3)
    assert third.values == ("h", *given) and third.differentiable == third.values
    # The windowed layers 3 and 4 read layer 1's keys, and layer 5 reads layer 2's.
    assert third.summed == {*given[:2]}
    assert at(5).values == ("h", *given[2:]) and not at(5).summed


def test_layers_go_to_ranks_by_memory_and_by_speed():
    def parts(ranks, room, speed, layers=24):
        found = split(
            layers,
            ranks,
            4,
            lambda p: p.end - p.begin <= room[p.rank],
            lambda p: (p.end - p.begin) / speed[p.rank],
        )
        assert [p.begin for p in found] == [0, *(p.end for p in found[:-1])]
        assert found[-1].end == layers
        return [p.end - p.begin for p in found]

    assert parts(3, [24] * 3, [1] * 3) == [8, 8, 8]
    assert parts(3, [24] * 3, [1, 2, 1]) == [6, 12, 6]
    assert parts(3, [24, 24, 4], [1] * 3) == [10, 10, 4]
    assert parts(2, [3, 24], [5, 1]) == [3, 21]
    with pytest.raises(NoRoom, match="rank 2 does not have enough memory for layers 20 to 24"):
        parts(3, [16, 3, 2], [1] * 3)
    with pytest.raises(NoRoom, match="rank 1 does not have enough memory for layer 17 of 24"):
        parts(3, [16, 0, 9], [1] * 3)
    with pytest.raises(InputError, match="there are 5 ranks for 4 layers: start at most 4 ranks"):
        parts(5, [9] * 5, [1] * 5, layers=4)


@pytest.mark.parametrize("family", ["llama", "gemma4_text"])
def test_parts_of_a_plan_hold_their_layers(family):
    changes = {"num_hidden_layers": 6, "tie_word_embeddings": True}
    model = tiny_models.build(family, **changes)
    shape = shape_of(tiny_models.config(family, **changes), headers(model))
    ranks = dict.fromkeys((path for own in shape.linears for path in own), 4)
    batch = BatchShape.single(1, 40, 40, 40, accumulates=True)
    costs = costs_of(shape, batch, ranks, CPU)
    whole = Part(0, 1, 0, 6, 6, 1)
    assert costs_of_part(costs, shape, batch, CPU, whole).fixed == costs.fixed
    own = [Part(r, 3, 2 * r, 2 * r + 2, 6, 8) for r in range(3)]
    assert [p.under_way for p in own] == [3, 2, 1]
    parts = [costs_of_part(costs, shape, batch, CPU, p) for p in own]
    assert [len(p.stages) for p in parts] == [4, 4, 4] and [p.layers for p in parts] == [[2, 4]] * 3
    assert sum(p.update for p in parts) == costs.update
    assert parts[0].head == parts[1].head == 0 and parts[2].head == costs.head
    assert parts[0].incoming == [] and parts[1].incoming[0] == "h"
    doubled = sum(weight_bytes(shape, p, True) for p in own) - shape.weight_bytes(True)
    once = sum(4 * np.prod(s) for name, (_, s) in shape.tensors.items() if "layers." not in name)
    table = 4 * np.prod(shape.tensors["model.embed_tokens.weight"][1])
    # Gemma 4's tensors outside the layers are on all three ranks. Llama's embedding, which is also
    # its head, is on two.
    assert doubled == (2 * once if family == "gemma4_text" else table)


def test_a_part_waits_with_what_its_batches_keep():
    """Each additional batch that waits for its backward pass needs memory for its saved values."""
    model = tiny_models.build("llama", num_hidden_layers=4)
    shape = shape_of(tiny_models.config("llama", num_hidden_layers=4), headers(model))
    ranks = dict.fromkeys((path for own in shape.linears for path in own), 4)
    batch = BatchShape.single(1, 64, 64, 64, accumulates=True)
    run = RunPlan(shape, (batch,), ranks, CPU, 10**12, 1, ())
    one, two, three = (
        run.of_part(Part(0, 3, 0, 2, 4, n), 10**12, CPU).planned.peak for n in (1, 2, 3)
    )
    h = 64 * shape.width * 4
    # Each batch saves its input, the values between the two layers, and all intermediate arrays of
    # the second layer.
    assert three - two == two - one > 2 * h
    last = [run.of_part(Part(2, 3, 2, 4, 4, n), 10**12, CPU).planned.peak for n in (1, 3)]
    assert last[0] == last[1]  # no batch waits on the last rank


def test_a_plan_says_what_each_rank_holds():
    model = tiny_models.build("llama", num_hidden_layers=8)
    shape = shape_of(tiny_models.config("llama", num_hidden_layers=8), headers(model))
    ranks = dict.fromkeys((path for own in shape.linears for path in own), 4)
    batch = BatchShape.single(1, 64, 64, 64, accumulates=True)
    run = RunPlan(shape, (batch,), ranks, CUDA, 10**9, None, ())
    found = held(split_run(run, [Member(10**9, "cuda", 2), Member(10**9, "cpu", 4)], 3))
    # In such a small model, kernel launches dominate the time on CUDA. A CPU has no kernel
    # launches, so more layers are assigned to the CPU.
    assert found[0].layers.startswith("1-") and found[1].layers.endswith("-8")
    count = [int(own.layers.split("-")[1]) - int(own.layers.split("-")[0]) + 1 for own in found]
    assert count == [1, 7]
    size = 64 * shape.width * 2
    assert found[0].sent == (size, 0) and found[1].sent == (0, 2 * size)
    assert max(own.busy for own in found) == pytest.approx(3 / 4)
    assert all(own.peak and own.peak <= own.budget for own in found)


def test_only_the_layers_of_a_rank_are_read(tmp_path):
    folder = write_llama(tmp_path / "m", layers=4, tied=False, intermediate_size=1024)
    part = Part(1, 2, 2, 4, 4, 1)
    before = existing_bytes()
    model, _ = load_model(folder, part.reads)
    layer = sum(x.nbytes for _, x in tree_flatten(model.layers[0].parameters()))
    assert mx.get_active_memory() - before == pytest.approx(2 * layer, rel=0.05)
    chain_of(model, range(2, 4))
    assert mx.get_active_memory() - before == pytest.approx(2 * layer, rel=0.05)


def skips(self, inputs, cache=None):
    """The forward pass of a model whose third layer also reads the first layer's output."""
    h = self.embed_tokens(inputs)
    given = []
    for layer in self.layers:
        h = layer(h + 0.5 * given[0] if len(given) == 2 else h, "causal", None)
        given.append(h)
    return self.norm(h)


def test_a_rank_finds_that_its_layers_read_more_than_h(monkeypatch):
    model = tiny_models.build("glm4", num_hidden_layers=3)
    for layers in (range(0, 1), range(1, 3), range(2, 3)):
        assert len(chain_of(model, layers).layers) == 3
    monkeypatch.setattr(type(model.model), "__call__", skips)
    assert len(chain_of(model, range(0, 2)).layers) == 3  # only layer 2 reads the extra value
    for layers in (range(1, 3), range(2, 3)):
        with pytest.raises(
            InputError, match="run layer by layer, it returns different hidden states"
        ):
            chain_of(model, layers)


def test_ranks_add_up_the_baseline_of_their_own_batches():
    """KTO's mismatched responses are divided among the ranks, so that each is run on only one
    rank."""
    chain = chain_of(tiny_models.build("llama"))
    adapter, objective = adapter_of(chain), Kto()
    params = adapting.stage_params(chain, adapter)
    batches, seen = [pair_batch(0, seed=i) for i in range(4)], []

    def noted(objective, chain, scales, params, batch, total):
        seen.append(next(i for i, own in enumerate(batches) if own is batch))
        return value(objective, chain, scales, params, batch, total)

    layout = Layout.of(params)
    what = {"objective": objective, "chain": chain, "scales": adapter.scales, "value": noted}
    setup = SimpleNamespace(own=layout, **what)
    found = []
    for rank in range(2):
        step = Stepper.__new__(Stepper)
        step.setup, step.ranks = setup, Ranks(rank, 2)
        found.append(step.baseline(Iterate(layout.join(params), []), batches))
    assert seen == [0, 2, 1, 3]
    whole = total_of(objective, chain, adapter.scales, params, batches)
    assert whole.baseline == pytest.approx(sum(found), rel=1e-6) and whole.baseline != 0
    assert step.total(batches, found).baseline == pytest.approx(whole.baseline, rel=1e-6)


def test_other_threads_run_while_a_step_is_given_to_the_device():
    """If memory is insufficient, MLX waits in async_eval. This must not delay other threads, such
    as the one that sends the rank's heartbeats."""
    w = mx.random.normal((200, 200)) / 14

    def stage(params, h):
        for _ in range(15):
            h = mx.tanh(h @ params["w"])
        return h

    step = segmented_value_and_grad([Stage("s", stage)], lambda p, h: h.sum())
    ticks, over = [], threading.Event()

    def tick():
        while not over.wait(0.001):
            ticks.append(time.monotonic())

    before = mx.set_memory_limit(1)
    other = threading.Thread(target=tick)
    try:
        mx.eval(w)
        other.start()
        begin = time.monotonic()
        outputs, _ = step({"s": {"w": w}}, {"h": w})
        mx.eval(outputs)
        end = time.monotonic()
    finally:
        mx.set_memory_limit(before)
        over.set()
        other.join()
    gaps = np.diff([begin, *(t for t in ticks if begin < t < end), end])
    assert gaps.max() < 0.4 * (end - begin), (gaps.max(), end - begin)
