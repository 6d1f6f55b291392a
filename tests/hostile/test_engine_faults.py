"""Tests that the engine survives hostile models, for example if a decoder panics in Rust, or if a
token id is beyond the end of the embedding table."""

import asyncio
import json
import math
import os
import struct
import time

import httpx
import mlx.core as mx
import pytest

from lib.checks import random_adapter
from lib.folders import write_llama, write_rows
from mlx_segtrain import InputError
from mlx_segtrain.adapters import About, write_adapter
from mlx_segtrain.adapters.discovery import look
from mlx_segtrain.config import load_config
from mlx_segtrain.errors import RunError
from mlx_segtrain.generation.decoding import Options
from mlx_segtrain.models import chain_of, load_base
from mlx_segtrain.serving import app as application
from mlx_segtrain.serving.generation import engine as module
from mlx_segtrain.serving.generation import mounting
from mlx_segtrain.serving.generation.engine import Busy, Engine
from mlx_segtrain.serving.service import Service, resident
from mlx_segtrain.serving.settings import Settings
from mlx_segtrain.training import train

PROMPT = list(b"Hello")


def changed(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.close()


async def ask(engine, **options):
    text = ""
    chosen = engine.select("none")
    async for piece in engine.generate(list(PROMPT), chosen, Options(max_tokens=4, **options)):
        text += piece.text
    return text


def within(seconds, waited):
    async def main():
        return await asyncio.wait_for(waited, seconds)

    return asyncio.run(main())


def test_a_decoder_that_panics_fails_its_request_alone(engine, model, tmp_path):
    """A panic in the tokenizers library raises an error that is not a subclass of Exception. Such
    an error once ended the engine's thread, so that requests hung."""
    bad = write_llama(tmp_path / "bad")
    strip = {"type": "Strip", "content": "I", "start": 10, "stop": 10}
    changed(bad / "tokenizer.json", decoder=strip)
    asyncio.run(engine.load(bad))
    for _ in range(2):
        with pytest.raises(RunError, match="PanicException"):
            within(20, ask(engine, logit_bias={40: 100.0}))
    asyncio.run(engine.load(model))
    assert isinstance(within(20, ask(engine)), str) and engine.fault is None


class Panic(BaseException):
    """Stands in for pyo3_runtime.PanicException, whose class cannot be imported."""


def panic(*_, **__):
    raise Panic("index out of bounds")


@pytest.mark.parametrize("where", ["_run_commands", "_admit", "_round", "_end"])
def test_a_failure_that_belongs_to_no_request_is_survived(engine, model, where, monkeypatch):
    asyncio.run(engine.load(model))
    with monkeypatch.context() as patch:
        patch.setattr(engine, where, panic)

        async def meanwhile():
            answer = asyncio.ensure_future(ask(engine))
            await asyncio.sleep(0.3)
            patch.undo()
            return await answer

        try:
            assert isinstance(within(20, meanwhile()), str)
        except RunError as error:
            assert "index out of bounds" in str(error)
    assert isinstance(within(20, ask(engine)), str) and engine.fault is None


def test_a_command_that_panics_fails_alone(engine, model):
    asyncio.run(engine.load(model))
    with pytest.raises(RunError, match="Panic: index"):
        within(20, engine.call(panic))
    assert isinstance(within(20, ask(engine)), str)


def test_health_says_when_the_engine_has_ended(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module.Engine, "_serve", panic)
    service = Service(Settings(store=tmp_path / "store", roots=(tmp_path,)))
    transport = httpx.ASGITransport(application.create(service))

    async def main():
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            health = await http.get("/healthz")
            load = await http.post("/api/models/serve", json={"model_dir": str(tmp_path)})
            return health, load

    health, load = within(20, main())
    assert health.status_code == 503 and "restart the server" in health.json()["error"]
    assert load.status_code >= 400 and "restart the server" in load.text
    service.engine.close()


# Tables


def test_what_was_loaded_counts_and_not_what_config_says(engine, tmp_path):
    """For a multimodal model, mlx-lm reads only the values in text_config, so the engine must not
    trust values outside of text_config."""
    path = write_llama(tmp_path / "false")
    config = json.loads((path / "config.json").read_text())
    outer = {"model_type": "mistral3", "vocab_size": 10**6, "max_position_embeddings": 10**6}
    (path / "config.json").write_text(json.dumps({**outer, "text_config": config}))
    weights = mx.load(str(path / "model.safetensors"))
    named = {f"language_model.{name}": x for name, x in weights.items()}
    mx.save_safetensors(str(path / "model.safetensors"), named, {"format": "mlx"})
    asyncio.run(engine.load(path))
    assert (engine.base.vocabulary, engine.base.logits) == (300, 300)
    for prompt, bias in (([5, 300], {}), ([5, 999_999], {}), ([5], {300: 1.0}), ([5], {10**8: 1})):
        with pytest.raises(InputError, match="is not a token id of"):
            engine.base.check(prompt, bias)
    assert isinstance(within(20, ask(engine)), str)


def test_a_head_with_more_rows_than_the_embedding_is_refused(engine, tmp_path, monkeypatch):
    from mlx_lm.models import llama as family

    plain = family.Model.__init__

    def odd(self, args):
        plain(self, args)
        self.lm_head = family.nn.Linear(64, 400, bias=False)

    monkeypatch.setattr(family.Model, "__init__", odd)
    path = write_llama(tmp_path / "odd", tied=False)
    with pytest.raises(InputError, match="has 400 rows, but the embedding has 300"):
        asyncio.run(engine.load(path))


def test_training_refuses_tokens_that_the_model_has_no_rows_for(tmp_path):
    model = write_llama(tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġ"] = 100_000
    changed(model / "tokenizer.json", model={**tokenizer["model"], "vocab": vocabulary})
    values = {"model_dir": model, "data_dir": write_rows(tmp_path / "data"), "iters": 1}
    config = load_config(None, {**values, "adapter_path": tmp_path / "out", "max_seq_length": 64})
    with pytest.raises(InputError, match="the tokenizer returns token 100000, but the model has"):
        train(config, lambda event: None)


# Long responses and waiting requests

LONG = {"logit_bias": {259: -100.0}}  # the response only ends at max_tokens


async def long_answer(engine, n=100):
    options = Options(max_tokens=n, **LONG)
    return [piece async for piece in engine.generate(list(PROMPT), engine.select("none"), options)]


def test_long_answers_give_way_to_those_who_wait(engine, model, monkeypatch):
    """Clients with long responses once occupied all slots until the responses were complete."""
    for name, value in {"MOST_ACTIVE": 2, "TURN_S": 0.1, "MOST_PAUSED": 2}.items():
        monkeypatch.setattr(module, name, value)
    asyncio.run(engine.load(model))
    alone = asyncio.run(long_answer(engine))
    seen = []

    async def main():
        long = [asyncio.ensure_future(long_answer(engine)) for _ in range(2)]
        while len(engine._active) < 2:
            await asyncio.sleep(0.01)
        plain, engine._round = engine._round, lambda: (plain(), time.sleep(0.02))[0]
        for _ in range(3):
            await asyncio.wait_for(ask(engine), 10)
            seen.append([x.done() for x in long])
        engine._round = plain
        return await asyncio.gather(*long)

    for pieces in asyncio.run(main()):  # the responses are the same as without pauses
        assert [piece.text for piece in pieces] == [piece.text for piece in alone]
    assert seen[0] == [False, False]


def test_a_paused_answer_that_nobody_wants_is_ended(engine, model, monkeypatch):
    for name, value in {"MOST_ACTIVE": 1, "TURN_S": 0.05}.items():
        monkeypatch.setattr(module, name, value)
    asyncio.run(engine.load(model))

    async def main():
        tasks = [asyncio.ensure_future(long_answer(engine, 120)) for _ in range(3)]
        while not any(x.cache for x in engine._waiting):
            await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while engine._waiting or engine._active:
            await asyncio.sleep(0.01)
        return await ask(engine)

    assert isinstance(within(20, main()), str)


def test_who_waits_too_long_is_told(engine, model, monkeypatch):
    monkeypatch.setattr(module, "MOST_ACTIVE", 1)
    asyncio.run(engine.load(model))

    async def main():
        long = asyncio.ensure_future(long_answer(engine))
        while not engine._active:
            await asyncio.sleep(0.005)
        monkeypatch.setattr(module, "LONGEST_WAIT_S", 0.0)
        with pytest.raises(Busy, match="the server was busy"):
            await ask(engine)
        await long

    within(20, main())


def test_a_swap_of_models_waits_for_a_while_and_then_lets_others_on(engine, model, monkeypatch):
    """A change of the model waits for running responses. During a long response, this wait once
    blocked all other requests."""
    monkeypatch.setattr(module, "SWAP_S", 0.3)
    asyncio.run(engine.load(model))
    plain = engine._round
    engine._round = lambda: (plain(), time.sleep(0.02))[0]

    async def main():
        long = asyncio.ensure_future(long_answer(engine))
        while not engine._active:
            await asyncio.sleep(0.005)
        begun = time.monotonic()
        with pytest.raises(Busy, match="take too long: try again"):
            await engine.load(model)
        assert time.monotonic() - begun < 5 and not long.done()
        assert isinstance(await ask(engine), str)
        with pytest.raises(Busy, match="take too long: try again"):  # repeated attempts fail too
            await engine.load(model)
        await long
        engine._next_swap = 0.0
        await engine.load(model)

    within(30, main())


def test_what_was_unmounted_is_given_back(engine, model, tmp_path):
    chain = chain_of(load_base(model)[0])
    ranks = dict.fromkeys(chain.linears, 512)
    write_adapter(tmp_path / "a", random_adapter(chain, ranks, 1.0, 0.1), About("model"))
    asyncio.run(engine.load(model))

    async def main():
        sizes = []
        for _ in range(3):
            for i in range(40):
                await engine.mount(f"a{i}", tmp_path / "a")
                if i % 20 == 0:
                    options = Options(max_tokens=1)
                    async for _ in engine.generate(PROMPT, engine.select(f"a{i}"), options):
                        pass
            for i in range(40):
                await engine.unmount(f"a{i}")
            sizes.append(resident_mb())
        return sizes

    before = resident_mb()
    after = asyncio.run(main())
    assert max(after) - before < 150 and after[-1] - after[0] < 50, (before, after)


def test_mounts_are_bounded(engine, model, tmp_path, monkeypatch):
    chain = chain_of(load_base(model)[0])
    ranks = dict.fromkeys(chain.linears, 4)
    write_adapter(tmp_path / "a", random_adapter(chain, ranks, 1.0, 0.1), About("model"))
    asyncio.run(engine.load(model))
    monkeypatch.setattr(module, "MOST_MOUNTED", 1)
    asyncio.run(engine.mount("a", tmp_path / "a"))
    with pytest.raises(InputError, match="1 adapters are already mounted, which is"):
        asyncio.run(engine.mount("b", tmp_path / "a"))
    monkeypatch.setattr(module, "MOST_MOUNTED", 5)
    monkeypatch.setattr(module, "MOST_MOUNTED_BYTES", engine.adapters["a"].size_bytes)
    with pytest.raises(InputError, match="unmount some"):
        asyncio.run(engine.mount("b", tmp_path / "a"))
    assert set(engine.adapters) == {"a"}


def write_sparse(file, shapes):
    """Writes a sparse safetensors file, whose data uses no disk space."""
    header, place = {}, 0
    for name, shape in shapes.items():
        after = place + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [place, after]}
        place = after
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + place)


def test_an_adapter_that_is_a_hole(engine, model, tmp_path):
    """A sparse adapter needs a few kilobytes on disk, but a lot of memory when it is loaded."""
    name, rank = "model.layers.0.self_attn.q_proj", 50_000_000
    shapes = {f"{name}.lora_a": [64, rank], f"{name}.lora_b": [rank, 64]}
    write_sparse(tmp_path / "adapters.safetensors", shapes)
    config = {"fine_tune_type": "lora", "num_layers": 1}
    config["lora_parameters"] = {"rank": rank, "scale": 1.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    asyncio.run(engine.load(model))
    before, begun = resident_mb(), time.monotonic()
    with pytest.raises(InputError, match="GB of memory, but only"):
        asyncio.run(engine.mount("a", tmp_path))
    assert resident_mb() - before < 100 and time.monotonic() - begun < 5
    # Listing adapters does not read the file either.
    os.truncate(tmp_path / "adapters.safetensors", 1 << 42)
    (tmp_path / "adapters_unpadded.safetensors").write_bytes(b"")
    os.truncate(tmp_path / "adapters_unpadded.safetensors", 1 << 42)
    config["segtrain"] = {"padded": "x"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert look(tmp_path).fault and time.monotonic() - begun < 10


def test_sums_of_stacks_are_bounded(engine, model, tmp_path, monkeypatch):
    """The sum of several adapters is cached once, regardless of their order, and the size of the
    cache is limited."""
    chain = chain_of(load_base(model)[0])
    ranks = dict.fromkeys(chain.linears, 4)
    asyncio.run(engine.load(model))
    for name in "abcd":
        write_adapter(tmp_path / name, random_adapter(chain, ranks, 1.0, 0.1), About("model"))
        asyncio.run(engine.mount(name, tmp_path / name))

    async def say(stack):
        async for _ in engine.generate(PROMPT, engine.select(stack), Options(max_tokens=1)):
            pass

    for stack in ("a+b+c", "c+b+a", "b+a+c"):
        asyncio.run(say(stack))
    assert len(engine._linears._sums) == 1
    monkeypatch.setattr(mounting, "MOST_SUM_BYTES", 2.5 * engine.adapters["a"].size_bytes)
    for stack in ("a+b", "b+c", "c+d", "a+b+c+d"):
        asyncio.run(say(stack))
    assert len(engine._linears._sums) == 1


def resident_mb():
    return resident() / 1e6
