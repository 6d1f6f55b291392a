"""For any chain and any cuts, the values that a plan's moves read are available, and every kept
value is read."""

import re
from dataclasses import dataclass, field
from itertools import pairwise

import mlx.core as mx
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.oracle import assert_close
from mlx_segtrain import Stage, _core, segmented_value_and_grad
from mlx_segtrain.schedule import Cuts

BYTES = {"h": 10, "k": 3, "v": 7}


@dataclass
class Chain:
    """A chain of stages over h, the values that its head reads, and its cuts. Some stages also read
    or write k and v."""

    stages: list[_core.StageSpec]
    head: list[str]
    cuts: Cuts

    @property
    def plan(self):
        cuts = map(list, (self.cuts.segments, self.cuts.groups, self.cuts.saves))
        how = {"offloaded": self.cuts.offloaded}
        return _core.make_plan(self.stages, ["h", "y"], self.head, *cuts, **how)

    def __repr__(self):
        stages = [(s.name, list(s.reads), list(s.writes), s.trainable) for s in self.stages]
        return f"{stages}, head {self.head}, {self.cuts}"


@st.composite
def chains(draw, most=9):
    known, stages = [], []
    n = draw(st.integers(1, most))
    for i in range(n):
        reads = draw(st.lists(st.sampled_from(known), unique=True)) if known else []
        writes = draw(st.lists(st.sampled_from(["k", "v"]), unique=True, max_size=1))
        known += [name for name in writes if name not in known]
        trainable = draw(st.booleans())
        stages.append(_core.StageSpec(f"s{i}", ["h", *reads], ["h", *writes], trainable))
    head = ["h", "y", *(draw(st.lists(st.sampled_from(known), unique=True)) if known else [])]
    inner = draw(st.sets(st.integers(1, n - 1))) if n > 1 else []
    # The last segment is allowed to be empty.
    segments = [*sorted(inner), n, *([n] if draw(st.booleans()) else [])]
    some = draw(st.sets(st.integers(1, len(segments) - 1))) if len(segments) > 1 else []
    offloaded = draw(st.sampled_from([0, n // 2, n]))
    cuts = Cuts(tuple(segments), (*sorted(some), len(segments)), offloaded=offloaded)
    return Chain(stages, head, cuts)


@dataclass
class Move:
    kind: str
    begin: int
    end: int
    reads: list[str]
    keeps: list[str] = field(default_factory=list)
    takes: list[str] = field(default_factory=list)
    gives: list[str] = field(default_factory=list)
    drops: list[str] = field(default_factory=list)
    offloads: list[str] = field(default_factory=list)
    frees: list[str] = field(default_factory=list)
    fetches: list[str] = field(default_factory=list)


def parsed(line: str) -> Move:
    first, *rest = line.split("; ")
    kind, begin, end, reads = re.fullmatch(r"(\w+) (\d+):(\d+) reads (.*)", first).groups()
    lists = {word: names.split(", ") for word, names in (part.split(" ", 1) for part in rest)}
    return Move(kind, int(begin), int(end), reads.split(", "), **lists)


def reads_of(chain: Chain, move: Move) -> set[str]:
    """Returns the values that a move reads but does not write itself. A value's name includes the
    stage that wrote the value, as in h@s0."""
    version = {"h": "h@input", "y": "y@input"}
    for stage in chain.stages[: move.begin]:
        version |= {name: f"{name}@{stage.name}" for name in stage.writes}
    found, inside = set(), set()
    for stage in chain.stages[move.begin : move.end]:
        found |= {version[name] for name in stage.reads if name not in inside}
        inside |= set(stage.writes)
    if move.kind == "head":
        found |= {version[name] for name in chain.head if name not in inside}
    return found


@settings(max_examples=300)
@given(chains())
def test_a_value_is_there_from_its_making_to_its_last_reader(chain):
    moves = [parsed(line) for line in chain.plan.describe()]
    read = {name for move in moves for name in move.reads}
    alive, cotangents, taken = {x for x in ("h@input", "y@input") if x in read}, set(), set()
    on_host, away = set(), set()
    for i, move in enumerate(moves):
        assert set(move.reads) == reads_of(chain, move)
        assert set(move.reads) <= alive
        assert set(move.fetches) <= away
        away -= set(move.fetches)
        assert not away & {*move.reads, *move.keeps}
        on_host |= set(move.offloads)
        away |= set(move.frees)
        assert away <= on_host and set(move.frees) <= {*move.reads, *move.keeps}
        on_host -= set(move.drops)
        assert set(move.takes) <= cotangents
        cotangents -= set(move.takes)
        taken |= set(move.takes)
        assert not taken & set(move.gives)  # a cotangent is complete before it is used
        cotangents |= set(move.gives)
        alive |= set(move.keeps)
        assert set(move.drops) <= alive
        alive -= set(move.drops)
        for value in alive:  # a value must be read before it is recomputed
            later = (x for x in moves[i + 1 :] if value in (*x.reads, *x.keeps))
            assert value in next(later).reads
    assert not alive and not cotangents
    for i, stage in enumerate(chain.stages):
        runs = [move.kind for move in moves if move.begin <= i < move.end]
        back = sum(kind != "forward" for kind in runs)
        assert runs and (back == 1 or not (back or stage.trainable))


@settings(max_examples=200)
@given(chains())
def test_an_estimate_holds_all_that_is_kept(chain):
    zero = dict.fromkeys(("forward", "backward", "kept", "saved", "gradients"), 0)
    work = dict.fromkeys(("forward_work", "again_work", "saved_work", "backward_work"), 1.0)
    costs = _core.Costs(
        stages=chain.stages,
        inputs=["h", "y"],
        head_reads=chain.head,
        input_bytes=[BYTES["h"], 1],
        layers=list(range(1, len(chain.stages) + 1)),
        costs=[
            _core.StageCost(writes=[BYTES[name] for name in stage.writes], **zero, **work)
            for stage in chain.stages
        ],
        widened=1.0,
        **dict.fromkeys(("head", "ahead", "fixed", "update"), 0),
        head_work=0.0,
    )
    moves = [parsed(line) for line in chain.plan.describe()]
    found = _core.estimate(chain.plan, costs)
    read = {name for move in moves for name in move.reads}
    alive, cotangents = {x for x in ("h@input", "y@input") if x in read}, set()

    def size(names):
        return sum(BYTES.get(name.split("@")[0], 1) for name in names)

    away = set()
    assert found.host == size(name for move in moves for name in move.offloads)
    for move, told in zip(moves, found.moves, strict=True):
        away -= set(move.fetches)
        assert told.values >= size(alive - away)
        away |= set(move.frees)
        assert told.cotangents >= size(cotangents)
        cotangents = (cotangents - set(move.takes)) | set(move.gives)
        alive = (alive | set(move.keeps)) - set(move.drops)
    assert found.peak >= max(told.total for told in found.moves)
    assert all(a.gradients <= b.gradients for a, b in pairwise(found.moves))


def arrays_of(chain):
    """Returns stages with functions, a head, the stages' parameters, and input arrays."""
    keys = iter(mx.random.split(mx.random.key(0), len(chain.stages) + 2))

    def stage_of(spec):
        def fn(p, h, *more):
            h = h + mx.tanh((h @ p["w"] if "w" in p else h) + sum(more))
            return (h, *(mx.sin(0.5 * h) for _ in spec.writes[1:]))

        return Stage(spec.name, fn, tuple(spec.reads), tuple(spec.writes))

    params = {
        s.name: {"w": mx.random.normal((4, 4), key=next(keys))} for s in chain.stages if s.trainable
    }
    values = {name: mx.random.normal((3, 4), key=next(keys)) for name in ("h", "y")}

    def head(p, h, y, *more):
        return ((h - y + sum(more)) ** 2).mean()

    return [stage_of(spec) for spec in chain.stages], head, params, values


@settings(max_examples=40)
@given(chains(most=6))
def test_every_cut_gives_the_gradients_of_the_whole(chain):
    stages, head, params, values = arrays_of(chain)

    def whole(params):
        scope = dict(values)
        for stage in stages:
            out = stage.fn(params.get(stage.name, {}), *(scope[name] for name in stage.reads))
            scope |= dict(zip(stage.writes, out, strict=True))
        return head({}, *(scope[name] for name in chain.head))

    step = segmented_value_and_grad(
        stages, head, inputs=("h", "y"), head_reads=tuple(chain.head), cuts=chain.cuts
    )
    (loss,), grads = step(params, values)
    assert grads.keys() == params.keys()
    expected, truth = mx.value_and_grad(whole)(params) if params else (whole(params), {})
    assert_close("loss", loss, expected, 1e-5)
    for name, own in truth.items():
        assert_close(name, grads[name]["w"], own["w"], 1e-4)
