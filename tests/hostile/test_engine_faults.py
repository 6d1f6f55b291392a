"""What a hostile model may do to the engine: panics of Rust, tokens past the end of a table."""

import asyncio
import json

import httpx
import mlx.core as mx
import pytest

from conftest import write_llama, write_rows
from mlx_segtrain import InputError
from mlx_segtrain.config import load_config
from mlx_segtrain.errors import RunError
from mlx_segtrain.serving import app as application
from mlx_segtrain.serving import engine as module
from mlx_segtrain.serving.decoding import Options
from mlx_segtrain.serving.engine import Engine
from mlx_segtrain.serving.service import Service
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
    """A panic of tokenizers is no Exception of Python: it ended the thread, and all waited."""
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
    """As pyo3_runtime.PanicException, whose class nobody can name."""


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
    """Of a model for text and images mlx-lm reads text_config; the outer number is anyone's."""
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
        with pytest.raises(InputError, match="is no token of"):
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
    with pytest.raises(InputError, match="has 400 rows, and its embedding 300"):
        asyncio.run(engine.load(path))


def test_training_refuses_tokens_that_the_model_has_no_rows_for(tmp_path):
    model = write_llama(tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġ"] = 100_000
    changed(model / "tokenizer.json", model={**tokenizer["model"], "vocab": vocabulary})
    values = {"model_dir": model, "data_dir": write_rows(tmp_path / "data"), "iters": 1}
    config = load_config(None, {**values, "adapter_path": tmp_path / "out", "max_seq_length": 64})
    with pytest.raises(InputError, match="the tokenizer gives token 100000, and the model has 300"):
        train(config, lambda event: None)
