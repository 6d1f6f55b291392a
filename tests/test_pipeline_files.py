"""Tests the files of a pipeline run, without starting processes: rank 0 gathers all ranks'
factors."""

from contextlib import nullcontext
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from lib.runs import config_of
from mlx_segtrain.errors import RunError
from mlx_segtrain.training.checkpoint import Checkpoint
from mlx_segtrain.training.holding import Holding
from mlx_segtrain.training.keeping import Keeper
from mlx_segtrain.training.layout import Layout
from mlx_segtrain.training.loop import Run
from mlx_segtrain.training.memory import Memory
from mlx_segtrain.training.optimizer import Optimizer
from mlx_segtrain.training.ranks import Ranks
from mlx_segtrain.training.setup import Start
from mlx_segtrain.training.state import Iterate, Progress, State


def gathered(holdings, iterates, monkeypatch, **how):
    """Returns the factors gathered by rank 0, and the contents sent by each rank."""
    sent = [[] for _ in holdings]
    monkeypatch.setattr(Ranks, "every", lambda self, x: sent[self.rank].append(x) or [x])
    for holding, here in list(zip(holdings, iterates, strict=True))[1:]:
        assert holding.together(here, **how).vector is here.vector  # this rank writes no files
    others = [iter(own) for own in sent[1:]]
    monkeypatch.setattr(Ranks, "every", lambda self, x: [x, *map(next, others)])
    found = holdings[0].together(iterates[0], **how)
    assert all(next(own, None) is None for own in others)
    return found, sent


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_factors_come_apart_and_together(optimizer, ratio, tmp_path, monkeypatch):
    config = config_of(tmp_path, tmp_path, tmp_path, optimizer=optimizer, lora_plus_ratio=ratio)
    params = {
        f"layers.{i}": {f"layers.{i}.q.lora_{x}": mx.random.normal((3, 2 + i)) for x in "ab"}
        for i in (0, 10, 2)
    }
    whole = Layout.of(params)
    optimize, vector = Optimizer(config, whole), whole.join(params)
    at = optimize(mx.random.normal(vector.shape), optimize.start(vector))
    owners = [{"layers.0", "layers.2"}, {"layers.10"}]
    own = [
        Holding(config, whole, whole.of_owners(x), Ranks(r, 2, pipeline=True))
        for r, x in enumerate(owners)
    ]
    mine = [holding.apart(at) for holding in own]
    assert [x.vector.size for x in mine] == [2 * 3 * (2 + 4), 2 * 3 * 12]
    # Together, the ranks' steps equal a step on one device, because factors are updated
    # independently.
    gradient = mx.random.normal(vector.shape)
    new = [
        Optimizer(config, x.own)(x.own.join(whole.split(gradient)), here)
        for x, here in zip(own, mine, strict=True)
    ]
    found, sent = gathered(own, new, monkeypatch)
    expected = optimize(gradient, at)
    assert mx.array_equal(found.vector, expected.vector) and found.step == expected.step
    a, b = (dict(tree_flatten(x.moments)) for x in (found, expected))
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[name], b[name]) for name in a)
    found, less = gathered(own, new, monkeypatch, moments=False)
    assert mx.array_equal(found.vector, expected.vector) and found.moments == []
    assert len(sent[1]) > 1 == len(less[1])


def test_a_rank_that_has_all_factors_sends_them(tmp_path, monkeypatch):
    config = config_of(tmp_path, tmp_path, tmp_path)
    whole = Layout.of({"layers.1": {"layers.1.q.lora_a": mx.ones((3, 2))}})
    layouts = [whole.of_owners(set()), whole]
    own = [Holding(config, whole, x, Ranks(r, 2, pipeline=True)) for r, x in enumerate(layouts)]
    vector = mx.random.normal((6,))
    iterates = [Optimizer(config, x).start(vector[: x.size]) for x in layouts]
    found, _ = gathered(own, iterates, monkeypatch)
    assert mx.array_equal(found.vector, vector)


def test_the_best_adapter_of_all_ranks_comes_back_when_a_changed_run_is_resumed(tmp_path):
    params = {f"l.{i}": {f"l.{i}.q.lora_{x}": mx.ones((2, 2)) for x in "ab"} for i in range(2)}
    whole = Layout.of(params)
    best = Progress(vals=[{"step": 2, "loss": 1.0}])
    factors = mx.arange(whole.size).astype(mx.float32)
    resumed = Checkpoint(tmp_path, {"factors": factors}, 2, best, {}, 0, False)
    part = Iterate(mx.ones((whole.size // 2,)), [], 2)
    keeper = Keeper.__new__(Keeper)
    keeper.setup = SimpleNamespace(
        config=SimpleNamespace(adapter_path=tmp_path, keep_best=True),
        chain=SimpleNamespace(tied_for=lambda arrays: {}),
        scales={"l.0.q": 1.0, "l.1.q": 1.0},
        layout=whole,
    )
    keeper.log = SimpleNamespace(begin=lambda at: None, write=lambda event: None)
    keeper.completions = SimpleNamespace(begin=lambda step: None)
    values = {"config": {}, "id": ""}
    keeper.made_of = SimpleNamespace(write=lambda: None, values=values)
    keeper._about = lambda state: None
    state = State(part, best, Memory())
    keeper.open(state, Start(resumed, Start.trace(tmp_path)), same=False)
    adapter, _ = keeper.unwritten
    for stage, own in whole.split(factors).items():
        assert mx.array_equal(adapter.tensors[f"{stage}.q"][0], own[f"{stage}.q.lora_a"])
        assert mx.array_equal(adapter.tensors[f"{stage}.q"][1], own[f"{stage}.q.lora_b"])


def test_the_memory_of_files_is_not_that_of_the_next_step():
    run = Run.__new__(Run)
    run.config = SimpleNamespace(grad_accumulation_steps=1)
    run.state = State(Iterate(mx.ones((2,)), []), Progress(), Memory())
    run.ranks, run.step = Ranks(), SimpleNamespace(rollout_peak=0)
    run.interrupts = SimpleNamespace(allowed=nullcontext)

    def step(*args):
        raise RunError("a step")

    run._next = step
    gathered = mx.ones((5_000_000,))
    mx.eval(gathered)
    del gathered
    mx.clear_cache()
    with pytest.raises(RunError, match="a step"):
        run._take_step(iter([]))
    assert mx.get_peak_memory() < 20e6 <= run.state.memory.peak
