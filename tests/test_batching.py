"""Tests generation with several adapters in one forward pass, in which each row gets only its own
adapter's update."""

import asyncio
import gc
import random
import statistics
import time
import weakref
from dataclasses import replace
from io import StringIO

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import BatchKVCache
from mlx_lm.utils import load

from lib.checks import random_adapter
from lib.engines import END, Alone, mounted, write_adapters, write_lively
from mlx_segtrain import lora
from mlx_segtrain.errors import RunError
from mlx_segtrain.generation import batching
from mlx_segtrain.generation.batching import Batch
from mlx_segtrain.generation.decoding import Options
from mlx_segtrain.lora.rows import Rows
from mlx_segtrain.models import adapting
from mlx_segtrain.serving.confined.parent import Confined
from mlx_segtrain.serving.generation import engine as module
from mlx_segtrain.serving.generation.engine import Engine, NoMemory
from mlx_segtrain.serving.generation.mounting import Linears, Selected, read_base, read_mounted

pytestmark = pytest.mark.acceptance

GOES_ON = {END: -100.0}
PROMPT = list(b"The adapter says")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("batching")


@pytest.fixture(scope="module")
def model(folder):
    return write_lively(folder / "model")


@pytest.fixture(scope="module")
def adapters(folder, model):
    return write_adapters(folder, model)


@pytest.fixture(scope="module")
def said(model, adapters):
    return Alone(model, adapters)


@pytest.fixture(scope="module")
def shared(model, adapters):
    engine = mounted(model, adapters)
    yield engine
    engine.close()


@pytest.mark.parametrize("kind", ["rows", "in place", "DoRA in place"])
def test_the_twin_of_few_rows_gives_the_same_bits(model, monkeypatch, kind):
    """The twin (the model's copy for steps of a few tokens) also applies adapters that are attached
    after the twin is created. The model runs as if it were on a GPU."""
    for own in (lora, lora.modules):
        monkeypatch.setattr(own, "few", lambda rows: True)
    base = read_base(model, Confined(model))
    try:
        tokens = mx.array([[65], [66], [67]])
        bare = base.model(tokens)
        twin = lora.twin_of(base.model)
        assert mx.array_equal(twin(tokens), bare)
        ranks = dict.fromkeys(base.chain.linears, 4)
        adapters = {i: random_adapter(base.chain, ranks, 2.0, 0.1 * i) for i in (1, 2)}
        if kind == "DoRA in place":
            fresh = adapting.init(base.chain, ranks, 2.0, 0, dora=True)
            longer = {path: 1.1 * m for path, m in fresh.magnitudes.items()}
            adapters[1] = replace(adapters[1], magnitudes=longer)
        if kind == "rows":
            rows = Rows(base.modules, base.model)
            rows.put_in([1, 2, None], adapters)
            with rows.running():
                found, wanted = twin(tokens), base.model(tokens)
            assert mx.array_equal(wanted[2], bare[2])
        else:
            for path, module in base.modules.items():
                module.put_in(adapters[1].arrays(path), adapters[1].scales[path])
            found, wanted = twin(tokens), base.model(tokens)
        assert mx.array_equal(found, wanted) and not mx.allclose(wanted[:2], bare[:2])
    finally:
        base.confined.close()


@pytest.mark.parametrize("kind", ["rows", "one of rows", "in place", "DoRA in place", "none"])
def test_the_twin_computes_readers_of_the_same_together(model, monkeypatch, kind):
    """If a kernel supports the q, k and v projections, one call computes all three, and the results
    equal the model's."""
    for own in (lora, lora.modules):
        monkeypatch.setattr(own, "few", lambda rows: True)
    monkeypatch.setattr(lora.together, "serves", lambda op, dtype: True)
    calls = []
    monkeypatch.setattr(lora.together.Together, "_all", counted(lora.together.Together._all, calls))
    base = read_base(model, Confined(model))
    try:
        tokens = mx.array([[65], [66], [67]])
        twin = lora.twin_of(base.model)
        assert isinstance(twin.lm_head, lora.twin._Frozen)  # the twin's head also uses our kernel
        ranks = dict.fromkeys([path for path in base.chain.linears if "up_proj" not in path], 4)
        adapters = {i: random_adapter(base.chain, ranks, 2.0, 0.1 * i) for i in (1, 2)}
        if kind == "DoRA in place":
            fresh = adapting.init(base.chain, ranks, 2.0, 0, dora=True)
            longer = {path: 1.1 * m for path, m in fresh.magnitudes.items()}
            adapters[1] = replace(adapters[1], magnitudes=longer)
        if "rows" in kind:
            rows = Rows(base.modules, base.model)
            rows.put_in([1, 2, None] if kind == "rows" else [2, 2, 2], adapters)
            with rows.running():
                found, wanted = twin(tokens), base.model(tokens)
        else:
            for own in (1, 2) if kind == "in place" else (1,) if kind != "none" else ():
                for path, module in base.modules.items():
                    if path in ranks:
                        module.put_in(adapters[own].arrays(path), adapters[own].scales[path])
                found, wanted = twin(tokens), base.model(tokens)
                assert mx.allclose(found, wanted, atol=1e-5)
            found, wanted = twin(tokens), base.model(tokens)
        assert mx.allclose(found, wanted, atol=1e-5)
        layers = len(base.model.layers)
        assert len(calls) % (4 * layers) == 0
        assert max(len(own) for own in calls if own) == 3
    finally:
        base.confined.close()


@pytest.mark.parametrize(
    ("outs", "rows", "ours"),
    [(64, 1, False), (64, 2, True), (16448, 1, True), (16448, 16, True), (16448, 17, False)],
)
def test_which_rows_of_a_frozen_layer_our_kernel_computes(monkeypatch, outs, rows, ours):
    monkeypatch.setattr(lora.together, "serves", lambda op, dtype: True)
    linear = nn.QuantizedLinear(64, outs, bias=False)
    linear.set_dtype(mx.bfloat16)
    stock = []
    product = lora.together.several(linear, lambda x: stock.append(x) or linear(x))
    x = mx.random.normal((rows, 1, 64)).astype(mx.bfloat16)
    found = product(x)
    linear.set_dtype(mx.float32)
    wanted = linear(x.astype(mx.float32))
    assert mx.abs(found - wanted).max() < 0.05 * mx.abs(wanted).max()
    assert bool(stock) != ours


def test_layers_that_are_put_in_later_are_found_too(model, monkeypatch):
    """If layers are added after the twin is created, the next call to `twin_of` groups them too."""
    monkeypatch.setattr(lora.together, "serves", lambda op, dtype: True)
    base = read_base(model, Confined(model))
    try:
        lora.twin_of(base.model)
        gone = [module for path, module in base.modules.items() if path.endswith("k_proj")]
        for module in gone:
            module.grouped, module.together = False, None
        lora.twin_of(base.model)
        assert gone and all(len(module.together.modules) == 3 for module in gone)
    finally:
        base.confined.close()


def counted(run, calls):
    """Wraps `run` so that each call records the outputs of the layers that it computes."""

    def call(self, x):
        ys = run(self, x)
        calls.append([] if ys is None else ys)
        return ys

    return call


async def ask(engine, adapter="none", prompt=PROMPT, n=12, **options):
    """Generates a response and returns its text and pieces."""
    chosen, pieces = engine.select(adapter), []
    async for piece in engine.generate(list(prompt), chosen, Options(max_tokens=n, **options)):
        pieces.append(piece)
    return "".join(piece.text for piece in pieces), pieces


# Rows


class Base:
    """A base model with named adapters. `check` compares the results of a batch with those of each
    row alone."""

    def __init__(self, model, mounted):
        self.base = read_base(model, Confined(model))
        self.adapters = mounted(self.base)
        self.linears = Linears()
        self.rows = Rows(self.base.modules, self.base.model)

    def check(self, names, bound=1e-5):
        tokens = [[3 * i + j for j in range(1, 4)] for i in range(len(names))]
        wanted = []
        for name, own in zip(names, tokens, strict=True):
            mounted = (Mounted(name, self.adapters[name]),) if name else ()
            self.linears.put_in(Selected(self.base, mounted))
            wanted.append(self.base.model(mx.array([own])))
        wanted = mx.concatenate(wanted)
        self.rows.put_in(names, {name: self.adapters[name] for name in names if name})
        with self.rows.running():
            got = self.base.model(mx.array(tokens))
        assert mx.abs(got - wanted).max() < bound * mx.abs(wanted).max(), names
        return got, wanted


class Mounted:
    """Provides the attributes of a mounted adapter that `Linears` reads."""

    def __init__(self, name, adapter):
        self.id, self.adapter, self.serial = name, adapter, hash(name)


@pytest.fixture(scope="module")
def base(model, adapters):
    def mounted(base):
        return {name: read_mounted(name, x, base).adapter for name, x in adapters.items()}

    return Base(model, mounted)


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b", "c", "dora", None],
        ["a"] * 4,
        ["dora"] * 3,
        [None] * 3,
        ["ab", None, "ab"],
        [None, "c", "c"],
        ["a"],
    ],
    ids=str,
)
def test_each_row_gets_its_own_update(base, names):
    base.check(names)


def test_ranks_are_padded_in_groups(model):
    """A small-rank adapter must not be padded to a large rank."""

    def mounted(base):
        made = {}
        for i, rank in enumerate((1, 3, 16, 17, 64)):
            ranks = dict.fromkeys(list(base.chain.linears)[i % 2 :], rank)
            made[rank] = random_adapter(base.chain, ranks, 1.0 + i, 0.1)
        ranks = dict.fromkeys(base.chain.linears, 20)
        dora = adapting.init(base.chain, ranks, 2.0, seed=1, dora=True)
        longer = {path: 1.1 * m for path, m in dora.magnitudes.items()}
        tensors = random_adapter(base.chain, ranks, 2.0, 0.1).tensors
        made["dora"] = lora.Adapter(tensors, dora.scales, longer)
        return made

    base = Base(model, mounted)
    base.check([64, 1, None, 17, 3, 16, "dora", 64, "dora"])
    sizes = {size: stack.groups[0].a.shape[-1] for size, stack in base.rows._stacks.items()}
    assert sizes == {16: 3 * 16, 32: 3 * 20, 64: 3 * 64}
    stacks = dict(base.rows._stacks)
    base.check([1, 16, 1])  # these adapters are already stacked
    assert base.rows._stacks[16] is stacks[16] and set(base.rows._stacks) == {16}
    base.rows.forget()
    assert not base.rows._stacks and not base.rows.holds([1, 16, 1])


def test_linears_that_read_the_same_share_a_product(base, monkeypatch):
    groups = [readers.paths for readers in base.rows._readers]
    ends = [[path.rsplit(".", 1)[-1] for path in group] for group in groups]
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert ends[:4] == layer and {p for g in groups for p in g} == base.rows.known
    calls = []
    plain = mx.gather_mm
    monkeypatch.setattr(mx, "gather_mm", lambda *a, **how: calls.append(0) or plain(*a, **how))
    base.check(["a", "b"])
    layers = len(base.base.model.layers)
    assert len(calls) == (4 + 7) * layers


def test_numbers_that_are_none_stay_in_their_row(model):
    """NaN values in an untrusted or badly trained adapter affect only the rows that use the
    adapter."""

    def mounted(base):
        good = random_adapter(base.chain, dict.fromkeys(base.chain.linears, 4), 1.0, 0.1)
        bad = {path: (a, b * mx.nan) for path, (a, b) in good.tensors.items()}
        return {"good": good, "bad": lora.Adapter(bad, good.scales)}

    base = Base(model, mounted)
    names = ["good", "bad", None, "good"]
    base.rows.put_in(names, base.adapters)
    with base.rows.running():
        got = base.base.model(mx.array([[5, 6]] * 4))
    assert mx.isnan(got[1]).all() and not mx.isnan(got[mx.array([0, 2, 3])]).any()


def test_what_rows_cannot_have(base):
    assert not base.rows.can(base.adapters["outer"]) and base.rows.can(base.adapters["dora"])


# Batches


NAMES = [None, "a", "b", "c", "dora", "outer", "ab"]


def test_no_request_s_adapter_reaches_another(shared, said):
    """Sends 400 requests with random adapters and response lengths, in waves of random
    size."""
    rng = random.Random(0)
    prompts = [list(f"{'x' * (i % 3 * 11)}Prompt {i}".encode()) for i in range(12)]
    asked = [(rng.choice(NAMES), rng.randrange(12), rng.randrange(1, 9)) for _ in range(400)]
    kinds, steps = [], []
    plain = Batch.step

    def step(batch):
        kinds.append(len({request.selected.key for request in batch.answers}))
        steps.append(len(batch.answers))
        return plain(batch)

    async def one(name, i, n, after):
        await asyncio.sleep(after)
        text, _ = await ask(shared, name or "none", prompts[i], n)
        return text

    async def main():
        answers = []
        while len(answers) < len(asked):
            wave = asked[len(answers) : len(answers) + rng.randrange(20, 120)]
            jobs = [one(*job, rng.random() * 0.05) for job in wave]
            answers += await asyncio.gather(*jobs)
        return answers

    Batch.step = step
    try:
        answers = asyncio.run(main())
    finally:
        Batch.step = plain
    for name, i, n in sorted(asked, key=lambda own: -own[2]):
        said.tokens(prompts[i], name, n)  # longest first, because shorter responses are prefixes
    tokens = different = 0
    for (name, i, n), text in zip(asked, answers, strict=True):
        wanted = said(prompts[i], name, n)
        tokens += len(wanted)
        if text != wanted:  # allowed only if two tokens were equally likely up to rounding
            at = next(k for k, (x, y) in enumerate(zip(text, wanted, strict=False)) if x != y)
            begun = [*prompts[i], *said.tokens(prompts[i], name, n)[:at]]
            best = mx.sort(said.models[name](mx.array([begun]))[0, -1])[-2:]
            assert best[1] - best[0] < 1e-4, (name, i, n)
            different += len(wanted) - at
    assert different < 0.01 * tokens
    assert max(kinds) == 6 and max(steps) > 30, "no requests were decoded together"


def test_logprobs_are_the_model_s(shared, said):
    """The log-probabilities of chosen and most likely tokens equal the model's up to rounding. Each
    request in a batch gets as many of the most likely tokens as it asked for."""

    async def main():
        crowd = [ask(shared, name, logprobs=i) for i, name in enumerate(["b", "none", "dora"])]
        return await asyncio.gather(ask(shared, "a", n=8, logprobs=4), *crowd)

    (_, pieces), *others = asyncio.run(main())
    told = [x for piece in pieces for x in piece.told]
    tokens = said.tokens(PROMPT, "a", 8)
    assert [token for token, _ in told] == tokens and END not in tokens
    model = said.models["a"]
    logits = model(mx.array([[*PROMPT, *tokens]]))[0, len(PROMPT) - 1 :]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for i, (token, (taken, best)) in enumerate(told):
        order = mx.argsort(-logprobs[i])[:4].tolist()
        assert list(best) == order and order[0] == token
        for other, value in {token: taken, **best}.items():
            assert abs(value - logprobs[i, other].item()) < 1e-3
    for n, (_, pieces) in enumerate(others):
        assert all(len(best) == n for piece in pieces for _, (_, best) in piece.told)
    assert all(not piece.told for piece in asyncio.run(ask(shared, "a"))[1])


def test_deterministic_answers_are_bit_for_bit_those_alone(shared):
    """A deterministic response depends neither on concurrent requests nor on cached prompts."""
    long = [97 + (7 * i) % 26 for i in range(300)]

    def bits(pieces):
        return [x for piece in pieces for x in piece.told]

    async def one(name, **how):
        how = {"deterministic": True, "logprobs": 3, "n": 16} | how
        return bits((await ask(shared, name, long, **how))[1])

    async def crowded(name):
        others = [ask(shared, x, long[: 40 + 20 * i], 24) for i, x in enumerate("abcab")]
        answers = await asyncio.gather(one(name), one(name, seed=1, temperature=1.0), *others)
        return answers[:2]

    alone, found, batched = {}, {}, {}
    for name in ("a", "dora", "none", "outer"):
        alone[name] = [
            asyncio.run(one(name)),
            asyncio.run(one(name, seed=1, temperature=1.0)),
        ]
        batched[name] = asyncio.run(one(name, deterministic=False))
        found[name] = asyncio.run(crowded(name))
    assert found == alone
    tokens = {name: [token for token, _ in own] for name, own in batched.items()}
    assert tokens == {name: [token for token, _ in own[0]] for name, own in alone.items()}
    assert any(batched[name] != alone[name][0] for name in batched), (
        "deterministic=False changes nothing"
    )


def test_caches_go_with_their_batch():
    """Caches are freed immediately, without waiting for the garbage collector."""
    batch = Batch(None)
    batch._cache = [BatchKVCache([0, 0])]
    batch._leave_masks_out()
    assert batch._cache[0].make_mask(1) is None
    assert batch._cache[0].make_mask(2, return_array=True) is not None
    layer = weakref.ref(batch._cache[0])
    gc.disable()
    try:
        batch._cache = []
        assert layer() is None
    finally:
        gc.enable()


def test_a_lone_request_costs_no_more_than_with_mlx_lm(model, shared, monkeypatch):
    """On a GPU, the speed of a single request is limited by the number of ops that the host
    launches per token. That number must not exceed mlx-lm's, both before another request joins the
    batch and after that request has left it."""
    for own in (lora, lora.modules):
        monkeypatch.setattr(own, "few", lambda rows: True)
    monkeypatch.setattr(batching, "few", lambda rows: True)
    monkeypatch.setattr(shared.base.tokenizer, "eos_token_ids", set())
    steps, waits, evaluate, wait = [], [], mx.async_eval, mx.eval

    def counted(*arrays):
        graph = StringIO()
        mx.export_to_dot(graph, *arrays)
        steps.append((arrays[0].size, graph.getvalue().count("shape=rectangle")))
        return evaluate(*arrays)

    monkeypatch.setattr(mx, "async_eval", counted)
    monkeypatch.setattr(mx, "eval", lambda *arrays: (waits.append(len(steps)), wait(*arrays)))
    stock, _ = load(str(model))
    list(generate_step(mx.array(PROMPT), stock, max_tokens=20))
    most = statistics.mode(nodes for _, nodes in steps)
    steps.clear()

    async def main():
        long, joins = asyncio.create_task(ask(shared, n=60)), None
        while not long.done():
            await asyncio.sleep(0.001)
            if joins is None and len(steps) > 10:
                joins = asyncio.create_task(ask(shared, prompt=PROMPT[:9], n=8))
        await joins

    waits.clear()
    asyncio.run(main())
    monkeypatch.undo()
    rows = [rows for rows, _ in steps]
    assert rows[0] == rows[-1] == 1 and 2 in rows
    growth = 2 * len(stock.layers) * 4  # a longer cache is allocated every 256 tokens
    for alone in (steps[: rows.index(2)], steps[len(rows) - rows[::-1].index(2) :]):
        counts = [nodes for _, nodes in alone[2:]]
        assert counts and max(counts) <= most + growth, (counts, most)
        assert statistics.mode(counts) <= most, (counts, most)
    assert len(waits) <= 8, "steps wait for the device too often"


def test_seeds_in_a_crowd(shared):
    how = {"n": 20, "temperature": 1.0, "logit_bias": GOES_ON}

    async def crowd():
        jobs = [ask(shared, name, seed=i, **how) for i in range(3) for name in ("a", "none", "b")]
        return [text for text, _ in await asyncio.gather(*jobs)]

    together = asyncio.run(crowd())
    alone = [
        asyncio.run(ask(shared, name, seed=i, **how))[0]
        for i in range(3)
        for name in ("a", "none", "b")
    ]
    assert together == alone and len(set(alone)) == 9


def test_lengths_that_differ_much_are_batches_of_their_own(shared, said, monkeypatch):
    monkeypatch.setattr(batching, "LEAST_PADDING", 0)
    seen = set()
    plain = Batch.step

    def step(batch):
        lengths = [request.length for request in batch.answers]
        seen.add(len(shared._batches))
        assert max(lengths) <= 2 * min(lengths) + 40  # lengths grow after the batch is formed
        return plain(batch)

    monkeypatch.setattr(Batch, "step", step)
    prompts = [[97 + i % 26 for i in range(n)] for n in (10, 12, 200, 210, 900)]

    async def main():
        jobs = [ask(shared, "a", prompt, 20, logit_bias=GOES_ON) for prompt in prompts]
        return [text for text, _ in await asyncio.gather(*jobs)]

    assert asyncio.run(main()) == [said(prompt, "a", 20, goes_on=True) for prompt in prompts]
    assert max(seen) == 3


def test_a_long_prompt_lets_streams_go_on(model, monkeypatch):
    """Each stream gets a token between two chunks of the prompt. The chunk size adapts to the
    measured time per chunk."""
    monkeypatch.setattr(module, "PROMPTS_S", 0.0)
    engine = Engine()
    asyncio.run(engine.load(model))
    parts = []
    plain = Engine._read_part

    def part(self, request):
        before = request.done
        done = plain(self, request)
        parts.append(request.done - before)
        return done

    async def main():
        options = Options(max_tokens=15_000, logit_bias=GOES_ON)
        stream = engine.generate(PROMPT, engine.select("none"), options)
        await anext(stream)
        monkeypatch.setattr(Engine, "_read_part", part)
        engine._rate = 1e9
        other = engine.generate([97] * 3000, engine.select("none"), Options(max_tokens=1))
        task = asyncio.ensure_future(anext(other))
        tokens = 0
        while not task.done():
            tokens = (await anext(stream)).tokens
        await stream.aclose()
        return tokens

    tokens = asyncio.run(main())
    read = [n for n in parts if n]
    assert sum(read) == 2999 and len(read) > 5 and max(read) <= module.PREFILL
    assert tokens >= len(read) - 1
    engine.close()


def failing(monkeypatch, error, when):
    """Makes `Batch.step` raise `error` at its end if `when(batch)` is true."""
    plain = Batch.step

    def step(batch):
        found = plain(batch)
        if when(batch):
            raise error
        return found

    monkeypatch.setattr(Batch, "step", step)


def test_where_memory_lacks_the_longest_fails(shared, said, monkeypatch):
    error = RuntimeError("[malloc] Unable to allocate 123 bytes.")
    failing(monkeypatch, error, lambda batch: any(x.length > 30 for x in batch.answers))

    async def main():
        jobs = [ask(shared, "a", n=10), ask(shared, "b", n=10), ask(shared, "c", [97] * 26, 10)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    *others, longest = asyncio.run(main())
    assert isinstance(longest, NoMemory)
    assert [text for text, _ in others] == [said(PROMPT, "a", 10), said(PROMPT, "b", 10)]
    assert not shared._active and not shared._batches


def test_who_breaks_a_batch_fails_alone(shared, said, monkeypatch):
    """The request that caused the error is unknown, so each request is continued alone, after the
    tokens that it has generated so far."""
    failing(
        monkeypatch,
        ValueError("a bug"),
        lambda batch: any(x.options.seed == 1 and len(x.made) > 4 for x in batch.answers),
    )

    async def main():
        jobs = [ask(shared, "a", n=14), ask(shared, "b", n=14, seed=1), ask(shared, "dora", n=14)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    first, bad, last = asyncio.run(main())
    assert isinstance(bad, RunError) and "ValueError: a bug" in str(bad)
    assert (first[0], last[0]) == (said(PROMPT, "a", 14), said(PROMPT, "dora", 14))
    assert [piece.tokens for piece in first[1]][-1] == len(said.tokens(PROMPT, "a", 14))


def test_two_hundred_who_break_off_leave_nothing(model, adapters):
    engine = Engine(cache_bytes=0)
    names = ["none", "a", "b", "dora"]

    async def begin():
        await engine.load(model)
        for name in names[1:]:
            await engine.mount(name, adapters[name])

    async def wave(n):
        options = Options(max_tokens=5000, logit_bias=GOES_ON)
        runs = [
            engine.generate([97 + i % 26] * (5 + i % 40), engine.select(names[i % 4]), options)
            for i in range(n)
        ]
        for i, run in enumerate(runs[:40]):
            if i % 2:
                await anext(run)
        for i, run in enumerate(runs):
            if i % 3:
                await run.aclose()
        del run, runs  # deletes all references
        end = time.monotonic() + 60
        while engine._active or engine._waiting or engine._batches:
            assert time.monotonic() < end, "a request continues after its client has gone"
            await asyncio.sleep(0.01)
        return await engine.call(lambda: (gc.collect(), mx.clear_cache(), mx.get_active_memory()))

    async def main():
        await begin()
        return [(await wave(n))[-1] for n in (50, 200, 200)]

    sizes = asyncio.run(main())
    engine.close()
    # The loop's variables may still reference a few values of the last batch. A leak of 4 bytes per
    # request would add 800 bytes.
    assert sizes[-1] <= sizes[0] + 256, sizes
