"""Compares the engine's output with mlx-lm's, including while adapters change during requests."""

import asyncio
import shutil
import subprocess
import sys
import threading
import time

import mlx.core as mx
import numpy as np
import pytest

from lib.engines import END, Alone, mounted, write_adapters, write_lively
from mlx_segtrain import InputError, lora
from mlx_segtrain.errors import RunError
from mlx_segtrain.generation import batching, decoding
from mlx_segtrain.generation.decoding import Options
from mlx_segtrain.serving.confined.parent import Confined
from mlx_segtrain.serving.generation import engine as module
from mlx_segtrain.serving.generation.engine import Busy, Engine, NoMemory
from mlx_segtrain.serving.generation.mounting import read_base
from mlx_segtrain.serving.service import Service

pytestmark = pytest.mark.acceptance

GOES_ON = {END: -100.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("serving")


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


@pytest.fixture
def fresh(model):
    engine = Engine()
    asyncio.run(engine.load(model))
    yield engine
    engine.close()


PROMPT = list(b"The adapter says")


async def ask(engine, adapter="none", prompt=PROMPT, n=12, **options):
    pieces = []
    async for piece in engine.generate(
        list(prompt), engine.select(adapter), Options(max_tokens=n, **options)
    ):
        pieces.append(piece)
    return "".join(piece.text for piece in pieces), pieces[-1]


def text_of(engine, *args, **options):
    return asyncio.run(ask(engine, *args, **options))[0]


NAMES = [None, "a", "b", "c", "dora", "outer", "ab"]


def test_the_adapters_of_these_tests_differ(said):
    assert len({said(PROMPT, name) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]])
def test_each_adapter_answers_as_if_it_were_alone(shared, said, order):
    for name in [*order, *order[1:]]:
        assert text_of(shared, name or "none") == said(PROMPT, name), name


def test_an_embedding_is_the_plain_one_for_all_others(shared):
    """Requests whose adapter does not update the embedding are unaffected by other requests'
    updates. On a GPU they use the model's own embedding; on a CPU they use our op, which is faster
    for the head."""
    outer = shared.base.chain.outer["model.embed_tokens"]
    for name, plain in (("none", True), ("outer", False), ("a", True), ("outer", False)):
        text_of(shared, name)
        embedding = shared.base.model.model.embed_tokens
        assert ("lora_a" not in embedding) == plain
        assert (embedding is outer) == (plain and lora.few(1))


def test_interleaved_sequences_do_not_meet(shared, said):
    prompts = [list(f"Prompt {i}, of its own".encode()) for i in range(5)]
    wanted = {(i, name): said(p, name, 20) for i, p in enumerate(prompts) for name in NAMES}
    assert len(set(wanted.values())) > 25

    async def all_at_once():
        keys = list(wanted)
        answers = await asyncio.gather(
            *[ask(shared, name or "none", prompts[i], 20) for i, name in keys]
        )
        return {key: text for key, (text, _) in zip(keys, answers, strict=True)}

    assert asyncio.run(all_at_once()) == wanted


def test_a_stack_is_the_exact_sum(shared, said):
    wanted = said(PROMPT, "ab", 20)
    for stack in ("a+b", "a,b", " a , b "):
        assert text_of(shared, stack, n=20) == wanted
    assert shared.select("a+b").id == "a+b"
    assert wanted != said(PROMPT, "a", 20) != said(PROMPT, "b", 20)


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ("nobody", "'nobody' is not mounted"),
        ("a+nobody", "'nobody' is not mounted"),
        ("a+", "'' is not mounted"),
        ("a+b+a", "'a' is named twice"),
        ("a+dora", "'dora' is a DoRA adapter"),
    ],
)
def test_what_cannot_be_selected(shared, adapter, says):
    with pytest.raises(InputError, match=says.replace("+", r"\+")):
        shared.select(adapter)


def test_the_default_is_for_those_who_name_none(fresh, adapters, said):
    asyncio.run(fresh.mount("a", adapters["a"]))
    fresh.default = "a"
    assert text_of(fresh, None) == said(PROMPT, "a")
    assert text_of(fresh, "") == text_of(fresh, "none") == said(PROMPT)
    asyncio.run(fresh.unmount("a"))
    assert fresh.default is None and text_of(fresh, None) == said(PROMPT)


# The prompt cache


def test_a_cached_begin_gives_what_a_cold_one_gives(fresh, said):
    """Responses do not depend on the cache when a prompt that is longer than a prefill step is
    repeated, extended, shortened, or given another ending."""
    long = [97 + (7 * i) % 26 for i in range(700)]
    made = said.tokens(long)
    prompts = [
        (long, 0),
        (long, 698),
        ([*long, *made, *b" and more"], 700 + len(made)),
        (long[:400], 398),
        ([*long[:300], *b" something else"], 300),
        (long[:1], 0),
        (list(b"nothing alike"), 0),
    ]
    for prompt, cached in prompts:
        text, last = asyncio.run(ask(fresh, prompt=prompt))
        assert text == said(prompt), cached
        assert last.cached == cached


def test_no_adapter_gets_the_prompts_of_another(shared, fresh, adapters, said):
    """Adapters do not share cached prompts, even if one replaces another under the same id."""
    prompt = list(b"An id is a name and no more")
    for name in ("a", "b"):
        asyncio.run(fresh.mount("x", adapters[name]))
        assert text_of(fresh, "x", prompt) == said(prompt, name)
        again, last = asyncio.run(ask(fresh, "x", prompt))
        assert again == said(prompt, name) and last.cached == len(prompt) - 2
        assert asyncio.run(ask(fresh, "none", prompt))[0] == said(prompt)
        asyncio.run(fresh.unmount("x"))
    assert said(prompt, "a") != said(prompt, "b") != said(prompt)


def test_the_cache_is_bounded(model):
    engine = Engine(cache_bytes=300_000)
    asyncio.run(engine.load(model))
    for i in range(8):
        text_of(engine, prompt=list(f"{i} is the begin".encode()), n=2)
        assert engine._prompts.nbytes <= 300_000
    assert 0 < len(engine._prompts) < 8
    engine.close()


def test_prompts_make_room_for_a_job(fresh):
    async def main():
        await ask(fresh)
        kept = [fresh._kept_bytes()]
        for short in (True, False):
            await fresh.spare(short)
            kept.append(fresh._kept_bytes())
            await ask(fresh)
            kept.append(fresh._kept_bytes())
        return kept

    first, *none, last_empty, last = asyncio.run(main())
    assert first > 0 and none == [0, 0] and last_empty == 0 and last > 0


def test_a_job_gets_most_of_the_device_s_time(fresh, monkeypatch):
    """The engine pauses after each round, but only while a job is computing."""
    monkeypatch.setattr(module, "REST", 1e6)
    monkeypatch.setattr(module, "LONGEST_REST_S", 0.1)

    async def timed(job):
        await fresh.spare(job)
        begun = time.monotonic()
        await ask(fresh, n=8)
        return time.monotonic() - begun

    async def main():
        return [await timed(job) for job in (False, True, False)]

    before, during, after = asyncio.run(main())
    assert during >= 0.8 > max(before, after)


def test_prompts_make_room_as_soon_as_a_job_begins(caplog):
    """Cached prompts are freed as soon as a job begins, instead of at the next check. If this
    fails, the error is logged, and checking continues."""

    class Fake:
        training, calls = True, 0

        async def spare(self, short):
            self.calls += 1
            if self.calls == 1:
                raise ValueError("once")
            self.spared.set()

    async def main():
        fake = Fake()
        fake.changed, fake.spared = asyncio.Event(), asyncio.Event()
        service = Service.__new__(Service)
        service.jobs = service.engine = fake
        task = asyncio.create_task(service._tidy())
        for _ in range(2):
            fake.changed.set()
            while fake.changed.is_set():
                await asyncio.sleep(0.01)
        await fake.spared.wait()
        task.cancel()

    asyncio.run(asyncio.wait_for(main(), 10))
    assert "memory could not be freed" in caplog.text


# Counters, and replacing the model


def test_no_adapter_is_counted_that_is_not_mounted(model, fresh, adapters):
    async def main():
        await fresh.mount("x", adapters["a"])
        options = Options(max_tokens=8, logit_bias=GOES_ON)
        run = fresh.generate(PROMPT, fresh.select("x"), options)
        await anext(run)
        await fresh.unmount("x")
        async for _ in run:
            pass
        await fresh.mount("y", adapters["a"])
        await ask(fresh, "y")
        texts = [await fresh.call(lambda: fresh.metrics.text().decode())]
        await fresh.load(model)
        return [*texts, fresh.metrics.text().decode()]

    before, after = asyncio.run(main())
    assert 'adapter="x"' not in before and 'requests_total{adapter="unmounted"' in before
    assert 'requests_total{adapter="y"' in before and 'adapter="y"' not in after


def test_a_model_that_cannot_be_loaded_leaves_the_other_whole(
    model, fresh, adapters, said, monkeypatch
):
    async def main():
        await fresh.mount("a", adapters["a"])
        with monkeypatch.context() as patched:
            patched.setattr(module, "can_merge", lambda cache: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await fresh.load(model)
        assert fresh.base.encode("Hello") and "a" in fresh.adapters
        return await asyncio.gather(ask(fresh, "a"), ask(fresh))

    answers = asyncio.run(main())
    assert [text for text, _ in answers] == [said(PROMPT, "a"), said(PROMPT)]


# Mounting


def test_who_stops_waiting_for_a_model_holds_up_nobody(model, monkeypatch):
    """A client that cancels loading does not wait for the tokenizer, which takes seconds to load.
    Only the thread that closes the tokenizer waits for it."""
    loads, goes_on = threading.Event(), threading.Event()

    def start(confined):
        with confined._lock:
            loads.set()
            assert goes_on.wait(20)

    monkeypatch.setattr(Confined, "start", start)
    engine = Engine()

    async def main():
        task = asyncio.create_task(engine.load(model))
        await asyncio.to_thread(loads.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not goes_on.is_set()

    timer = threading.Timer(5, goes_on.set)
    timer.start()
    asyncio.run(main())
    goes_on.set()
    timer.cancel()
    engine.close()


def test_an_unmounted_adapter_ends_what_it_began(fresh, adapters, said):
    async def main():
        await fresh.mount("x", adapters["a"])
        running = fresh.generate(
            PROMPT, fresh.select("x"), Options(max_tokens=150, logit_bias=GOES_ON)
        )
        text = (await anext(running)).text
        assert await fresh.unmount("x") == len(fresh.base.chain.linears)
        with pytest.raises(InputError, match="adapter x is not mounted"):
            await fresh.unmount("x")
        await fresh.mount("x", adapters["b"])
        assert len(fresh._active) == 1  # otherwise the test would be meaningless
        other, _ = await ask(fresh, "x")
        text += "".join([piece.text async for piece in running])
        return text, other

    text, other = asyncio.run(main())
    assert text == said(PROMPT, "a", 150, goes_on=True)
    assert other == said(PROMPT, "b")


def test_an_id_that_is_mounted_stays(shared, adapters):
    before = shared.adapters["a"]
    assert asyncio.run(shared.mount("a", adapters["b"])) is before
    assert before.rank == 2 and before.scale == 1.0
    assert before.mounted_layers == len(before.adapter.tensors)
    assert before.size_bytes == sum(x.nbytes + y.nbytes for x, y in before.adapter.tensors.values())


@pytest.mark.parametrize(
    "id", ["", " ", ".", "..", "a+b", "a,b", "a/b", "None", "Stack", "a\n", " a", "\0"]
)
def test_ids_that_cannot_be(shared, adapters, id):
    with pytest.raises(InputError, match="is not a valid adapter id"):
        asyncio.run(shared.mount(id, adapters["a"]))


def _tensors(change):
    def spoil(folder):
        file = folder / "adapters.safetensors"
        tensors = change(mx.load(str(file)))
        mx.eval(tensors)
        file.unlink()
        mx.save_safetensors(str(file), tensors)

    return spoil


Q = "model.layers.0.self_attn.q_proj"
FAULTS = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no weights": (lambda x: (x / "adapters.safetensors").unlink(), "contains neither"),
    "no config": (
        lambda x: (x / "adapter_config.json").unlink(),
        "contains no adapter_config.json",
    ),
    "one side": (
        _tensors(lambda t: {k: x for k, x in t.items() if k != f"{Q}.lora_b"}),
        "has lora_a but no lora_b",
    ),
    "shape": (_tensors(lambda t: t | {f"{Q}.lora_a": mx.ones((63, 2))}), "the model needs"),
    "nothing": (_tensors(lambda t: {}), "contains no lora_a"),
    "another": (
        _tensors(lambda t: {k.replace("layers", "blocks"): x for k, x in t.items()}),
        "is not a layer of this model",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_will_not_do_changes_nothing(shared, adapters, said, fault, tmp_path):
    spoil, says = FAULTS[fault]
    folder = tmp_path / "bad"
    shutil.copytree(adapters["a"], folder)
    spoil(folder)
    before = shared.adapters
    with pytest.raises(InputError, match=says):
        asyncio.run(shared.mount("bad", folder))
    assert shared.adapters is before
    assert text_of(shared, "a") == said(PROMPT, "a")


def test_another_base(fresh, adapters, said, llama, folder, model):
    async def main():
        await fresh.mount("a", adapters["a"])
        running = fresh.generate(PROMPT, fresh.select("a"), Options(60, logit_bias=GOES_ON))
        await anext(running)
        old = fresh.select("a")
        loading = asyncio.create_task(fresh.load(llama))
        while not fresh._commands:  # the tokenizer loads first, while requests continue
            await asyncio.sleep(0.01)
        with pytest.raises(Busy, match="being replaced"):
            fresh.generate(PROMPT, old, Options())
        base = await loading
        assert [piece async for piece in running][-1].tokens == 60  # the response was not truncated
        assert fresh.base is base and fresh.adapters == {} and len(fresh._prompts) == 0
        with pytest.raises(Busy, match="being replaced"):
            fresh.generate(PROMPT, old, Options())
        with pytest.raises(InputError, match=r"config\.json"):
            await fresh.load(folder)
        assert fresh.base is base
        hub = folder / "models--ORG--Some-Model" / "snapshots" / "0a1b"
        shutil.copytree(model, hub)
        assert (await fresh.load(hub)).id == "ORG/Some-Model"
        return await ask(fresh)

    assert asyncio.run(main())[0] == said(PROMPT)


def test_a_base_that_was_replaced_is_freed(fresh, adapters):
    async def main():
        sizes = []
        for _ in range(4):
            await fresh.load(fresh.base.path)
            await fresh.mount("a", adapters["a"])
            await ask(fresh, "a")
            sizes.append(await fresh.call(mx.get_active_memory))
        return sizes

    sizes = asyncio.run(main())
    assert max(sizes[1:]) - sizes[0] < 100_000, sizes  # the model needs 700 kB


# Limits of prompts and sequences


def test_prompts_that_cannot_be(llama):
    engine = Engine()
    with pytest.raises(InputError, match="no model is loaded"):
        engine.select(None)
    asyncio.run(engine.load(llama))
    for prompt, options, says in [
        ([], {}, "has no tokens"),
        ([5] * 129, {}, "129 tokens, but the context length of llama is 128"),
        ([5, 300], {}, "prompt: 300 is not a token id of llama: use 0 to 299"),
        ([5, -1], {}, "-1 is not a token"),
        ([5], {"logit_bias": {300: 1.0}}, "logit_bias: 300 is not a token"),
    ]:
        with pytest.raises(InputError, match=says):
            asyncio.run(ask(engine, prompt=prompt, **options))
    # The context length limits the response to 8 tokens.
    _, last = asyncio.run(ask(engine, prompt=[5] * 120, n=50, logit_bias=GOES_ON))
    assert (last.tokens, last.finish) == (8, "length")
    _, last = asyncio.run(ask(engine, prompt=[5] * 128, n=50, logit_bias=GOES_ON))
    assert last.tokens == 1
    engine.close()


def test_eos_and_length_end_an_answer(shared, said):
    text, last = asyncio.run(ask(shared, n=7, logit_bias=GOES_ON))
    assert (last.finish, last.tokens) == ("length", 7)
    text, last = asyncio.run(ask(shared, logit_bias={END: 100.0}))
    assert (text, last.finish, last.tokens) == ("", "stop", 1)


def test_stop_strings_over_borders_of_tokens(shared, said):
    """This model's tokens are bytes, so every stop string spans several tokens."""
    whole = said(PROMPT, "a", 60, goes_on=True)
    for at, n in ((10, 4), (20, 2), (25, 7)):
        stop = whole[at : at + n]
        assert len(stop) == n
        never = whole[at : at + n - 1] + "no"  # starts with the same text
        text, last = asyncio.run(ask(shared, "a", n=60, stop=(never, stop), logit_bias=GOES_ON))
        assert text == whole[: whole.find(stop)]
        assert last.finish == "stop" and last.tokens < 60
    # Text withheld as the possible start of a stop string is not lost.
    text, last = asyncio.run(ask(shared, "a", n=60, stop=(whole[-1] + "no",), logit_bias=GOES_ON))
    assert (text, last.finish) == (whole, "length")


def test_text_is_whole_characters(shared):
    """Bytes are added one by one. Returned text never changes and never contains part of a stop
    string."""
    tokenizer = shared.base.tokenizer
    said = "naïve 🙂 – ありがとう, 한국어\n\n é"
    bytes_ = tokenizer.encode(said, add_special_tokens=False)
    assert len(bytes_) == len(said.encode())
    for context in ([], tokenizer.encode("so ", add_special_tokens=False)):
        text = decoding.Text(tokenizer, context, ())
        pieces = [text.add(token) for token in bytes_]
        assert "".join(pieces) + text.end() == said
        assert [p for p in pieces if p] == list(said)
        text = decoding.Text(tokenizer, context, ("うそ", "う, 한"))
        out = ""
        for token in bytes_:
            out += text.add(token)
            if text.stopped:
                break
        assert out == "naïve 🙂 – ありがと"
    half = decoding.Text(tokenizer, [], ())
    assert half.add(bytes_[7]) == ""  # first of four bytes
    assert half.end() == "\ufffd"


def test_a_space_between_prompt_and_answer(shared):
    """Some decoders drop a text's first space, but the space between prompt and response must be
    kept."""

    class Sentencepiece:
        def decode(self, tokens, **_):
            return "".join(tokens).replace("▁", " ").removeprefix(" ")

    texts = {
        bool(context): "".join(map(text.add, ["▁Paris", "▁is"]))
        for context in ([], ["▁capital"])
        if (text := decoding.Text(Sentencepiece(), context, ()))
    }
    assert texts == {False: "Paris is", True: " Paris is"}


# Sampling


def test_seeds_under_load(shared):
    how = {"n": 20, "temperature": 1.0, "logit_bias": GOES_ON}
    one, other = (text_of(shared, "a", seed=seed, **how) for seed in (7, -8))
    assert one != other
    assert text_of(shared, "a", seed=7, **how) == one
    assert text_of(shared, "a", **how) != text_of(shared, "a", **how)

    async def crowd():
        others = [ask(shared, name, seed=i, **how) for i, name in enumerate(["b", "none"] * 4)]
        results = await asyncio.gather(ask(shared, "a", seed=7, **how), *others)
        return results[0][0]

    assert asyncio.run(crowd()) == one


@pytest.mark.parametrize(
    "how",
    [
        {"top_p": 0.6},
        {"top_p": 0.0},
        {"top_k": 3},
        {"top_k": 10**6},
        {"min_p": 0.2},
        {"top_p": 0.8, "top_k": 4, "min_p": 0.02},
    ],
    ids=str,
)
def test_what_may_be_drawn(how):
    p = np.random.default_rng(0).dirichlet(np.full(24, 0.3))
    falling = np.argsort(-p)
    kept = set(range(24))
    if "top_p" in how:
        n = max(1, int(np.searchsorted(np.cumsum(p[falling]), how["top_p"])) + 1)
        kept &= set(falling[: n if how["top_p"] else 1].tolist())
    if "top_k" in how:
        kept &= set(falling[: how["top_k"]].tolist())
    if "min_p" in how:
        kept &= set(np.flatnonzero(p >= how["min_p"] * p.max()).tolist())
    sampler = choice(Options(temperature=3.0, seed=1, **how))
    logprobs = mx.log(mx.array(p.astype(np.float32)))[None]
    drawn = {sampler(logprobs).item() for _ in range(600)}
    likely = {i for i in kept if p[i] > 1e-4}
    assert drawn <= kept and drawn >= likely


def choice(*options):
    return decoding.Choice(options, [decoding.first_key(own) for own in options])


def test_rows_draw_as_if_they_were_alone():
    """Each row of a batch uses its own options, even after other rows leave or join."""
    options = [
        Options(temperature=1.0, seed=1),
        Options(),
        Options(temperature=0.7, seed=2, top_p=0.9),
        Options(temperature=1.3, seed=3, top_k=5),
        Options(temperature=2.0, seed=4, min_p=0.05),
        Options(temperature=1.0, seed=1),
    ]
    logits = mx.random.normal((40, 6, 50), key=mx.random.key(0))
    alone = [choice(own) for own in options]
    wanted = [[c(x[i : i + 1]).item() for i, c in enumerate(alone)] for x in logits]
    together = choice(*options)
    assert [together(x).tolist() for x in logits[:20]] == wanted[:20]
    keys, left = together.next_keys(), [5, 1, 3]
    later = decoding.Choice([options[i] for i in left], [keys[i] for i in left])
    for x, row in zip(logits[20:], wanted[20:], strict=True):
        assert later(x[mx.array(left)]).tolist() == [row[i] for i in left]


def test_frequencies_of_what_is_drawn():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    for temperature in (1.0, 0.5):
        sampler = choice(Options(temperature=temperature, seed=2))
        drawn = [sampler(mx.log(mx.array(p, mx.float32))[None]).item() for _ in range(1200)]
        wanted = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
        assert np.abs(np.bincount(drawn, minlength=4) / 1200 - wanted).max() < 0.05


def test_penalties():
    rng = np.random.default_rng(1)
    prompt, made, bias = [3, 3, 5], [5, 7, 7, 7], {2: 1.5, 7: -0.5}
    options = Options(
        repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.4, logit_bias=bias
    )
    process = decoding.processor(options, prompt)
    for n in range(len(made) + 1):
        logits = rng.normal(size=10)
        wanted = logits.copy()
        for token in {*prompt, *made[:n]}:
            wanted[token] = wanted[token] / 1.3 if wanted[token] > 0 else wanted[token] * 1.3
        for token in set(made[:n]):
            wanted[token] -= 0.7 + 0.4 * made[:n].count(token)
        for token, value in bias.items():
            wanted[token] += value
        last = mx.array([prompt[-1], *made[:n]][-1:])
        got = process(last, mx.array(logits.astype(np.float32))[None])
        assert np.abs(np.array(got[0]) - wanted).max() < 1e-5
        # Re-create the processor from the tokens so far.
        again = decoding.processor(options, prompt, made[:n])
        assert mx.allclose(got, again(last, mx.array(logits.astype(np.float32))[None]))
    assert decoding.processor(Options(), prompt) is None


def test_penalties_do_not_depend_on_the_cache(fresh):
    how = {"n": 20, "repetition_penalty": 1.5, "frequency_penalty": 0.5}
    cold, first = asyncio.run(ask(fresh, **how))
    warm, last = asyncio.run(ask(fresh, **how))
    assert cold == warm and first.cached == 0 < last.cached
    assert cold != text_of(fresh, n=20)


# Load


def test_how_many_run_and_wait(fresh, monkeypatch):
    monkeypatch.setattr(module, "MOST_ACTIVE", 2)
    monkeypatch.setattr(module, "MOST_WAITING", 3)

    async def main():
        begun = time.perf_counter()
        options = Options(max_tokens=15_000, logit_bias=GOES_ON)
        running = [fresh.generate(PROMPT, fresh.select("none"), options) for _ in range(2)]
        for generation in running:
            await anext(generation)
        waiting = [fresh.generate(PROMPT, fresh.select("none"), Options(3)) for _ in range(3)]
        with pytest.raises(Busy, match="3 requests are already waiting"):
            fresh.generate(PROMPT, fresh.select("none"), Options(3))
        assert len(fresh._active) == 2
        await waiting[0].aclose()  # frees a slot
        again = fresh.generate(PROMPT, fresh.select("none"), Options(3))
        del waiting[1]  # the client drops this request
        await running[0].aclose()
        text = [piece.text async for piece in waiting[1]]
        assert text == [piece.text async for piece in again]
        assert [piece async for piece in waiting[0]] == []
        del running, generation  # the last requests are dropped, too
        while fresh._active or fresh._waiting:
            await asyncio.sleep(0.01)
        assert time.perf_counter() - begun < 10

    asyncio.run(main())


def test_what_fails_fails_alone(fresh, said, monkeypatch):

    def processor(options, *_):
        def process(token, logits):
            if options.seed == 1:
                raise ValueError("a bug\nof two lines")
            if options.seed == 2:
                raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
            if options.seed == 3:
                raise MemoryError
            return logits

        return process

    monkeypatch.setattr(batching, "processor", processor)
    asyncio.run(ask(fresh))

    async def main():
        return await asyncio.gather(
            *[ask(fresh, seed=seed, n=20) for seed in (0, 1, 2, 3, 0)], return_exceptions=True
        )

    first, bug, full, none, last = asyncio.run(main())
    assert first[0] == last[0] == said(PROMPT, n=20)
    assert str(bug) == "the generation failed: ValueError: a bug of two lines"
    assert isinstance(bug, RunError) and not isinstance(bug, NoMemory)
    for error in (full, none):
        assert isinstance(error, NoMemory) and "too little memory" in str(error)
    assert text_of(fresh) == said(PROMPT)


def test_calls_run_between_rounds_and_pass_errors_on(shared):
    async def main():
        assert await shared.call(lambda: mx.ones(3).sum().item()) == 3
        with pytest.raises(ZeroDivisionError):
            await shared.call(lambda: 1 // 0)
        return await ask(shared)

    asyncio.run(main())


def test_closing_ends_what_runs(model):
    engine = Engine()

    async def main():
        await engine.load(model)
        running = engine.generate(
            PROMPT, engine.select(None), Options(max_tokens=15_000, logit_bias=GOES_ON)
        )
        await anext(running)
        await asyncio.to_thread(engine.close)
        with pytest.raises(Busy):
            async for _ in running:
                pass
        with pytest.raises(Busy):
            await engine.load(model)

    asyncio.run(main())
    assert engine.base is None and not engine._active


def test_the_process_ends_well(model, adapters):
    """A process exits cleanly after closing the engine. If the engine's thread ended just before
    the process, freeing MLX's compiled functions could abort the process."""
    code = f"""
import asyncio
from pathlib import Path
from mlx_segtrain.torchless import hide_torch
hide_torch()
from mlx_segtrain.generation.decoding import Options
from mlx_segtrain.serving.generation.engine import Engine

async def main():
    engine = Engine()
    await engine.load(Path({str(model)!r}))
    await engine.mount("dora", Path({str(adapters["dora"])!r}))
    running = engine.generate([1, 2], engine.select("dora"), Options(temperature=1.0))
    await anext(running)
    engine.close()

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_rows_of_a_generation_on_a_gpu_take_the_same_update(llama4, tmp_path, monkeypatch):
    """MLX's matrix products, which are used for few rows, return the same results as our op."""
    base = read_base(llama4, Confined(llama4))
    path = "model.layers.0.self_attn.q_proj"
    linear = base.modules[path]
    keys = mx.random.split(mx.random.key(3), 5)
    x = mx.random.normal((1, 3, 64), key=keys[0])
    found = []
    for few in (False, True):
        monkeypatch.setattr(lora.modules, "few", lambda rows, few=few: few)
        ys = [linear(x)]
        for i in (1, 3, 1):  # the last call reuses the first adapter from the cache
            linear.lora_a = mx.random.normal((64, 4), key=keys[i])
            linear.lora_b, linear.scale = mx.random.normal((4, 64), key=keys[i + 1]), float(i)
            ys.append(linear(x))
            linear.take_out()
        found.append([*ys, linear(x)])
    # On GPUs, our float32 matrix products use TF32, so the bound is larger.
    bound = 1e-5 if mx.default_device() == mx.Device(mx.cpu) else 5e-3
    for ours, few in zip(*found, strict=True):
        assert mx.abs(ours - few).max() < bound * mx.abs(ours).max()
    assert not mx.allclose(found[1][1], found[1][2], atol=1) and linear._casts
    linear.clear()
    assert not linear._casts
    linear.train()
    monkeypatch.setattr(linear, "updated", None)
    linear(x)  # training must use our op and its gradient
