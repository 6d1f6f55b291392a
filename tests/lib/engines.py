"""Creates an engine with a model and adapters, and computes reference responses with mlx-lm."""

import asyncio

import mlx.core as mx
from mlx_lm.generate import generate_step

import mlx_segtrain
from lib.checks import random_adapter
from lib.folders import write_llama
from mlx_segtrain import lora
from mlx_segtrain.adapters import About, write_adapter
from mlx_segtrain.adapters.merging import merge
from mlx_segtrain.models import adapting, chain_of, load_base
from mlx_segtrain.serving.generation.engine import Engine

END = 259  # <|im_end|>


def write_lively(path):
    """Writes a model with a large context length, whose responses are printable and rarely
    repetitive."""
    write_llama(path, tied=False, max_position_embeddings=20_000)
    file = str(path / "model.safetensors")
    weights = {k: 3 * x if "_proj" in k else x for k, x in mx.load(file).items()}
    weights["model.embed_tokens.weight"] *= 20
    weights["lm_head.weight"] *= mx.where(mx.arange(300) < 94, 3, 0.5)[:, None]  # from ! to ~
    mx.eval(weights)
    mx.save_safetensors(file, weights, {"format": "mlx"})
    return path


def write_adapters(folder, model):
    """Writes adapters and returns their folders by name. `dora` uses DoRA, `outer` adapts the
    embedding, and `ab` is the sum of `a` and `b`."""
    chain = chain_of(load_base(model)[0])

    def write(name, adapter):
        write_adapter(folder / name, adapter, About("model"))

    for i, name in enumerate("abc"):
        linears = list(chain.linears)[i:]  # only some adapters change the first linear layers
        adapter = random_adapter(chain, dict.fromkeys(linears, 2 + 2 * i), 1.0 + i, 0.1)
        moved = {p: (x, mx.roll(y, i, 1)) for p, (x, y) in adapter.tensors.items()}
        write(name, lora.Adapter(moved, adapter.scales))
    ranks = dict.fromkeys(chain.linears, 4)
    dora = adapting.init(chain, ranks, 2.0, seed=3, dora=True)
    moved = random_adapter(chain, ranks, 2.0, 0.1).tensors
    longer = {p: m * 1.2 for p, m in dora.magnitudes.items()}
    write("dora", lora.Adapter(moved, dora.scales, longer))
    write("outer", random_adapter(chain, {"model.embed_tokens": 4, **ranks}, 1.0, 0.3))
    merge([folder / "a", folder / "b"], folder / "ab")
    return {name: folder / name for name in ("a", "b", "c", "dora", "outer", "ab")}


def mounted(model, adapters):
    """Returns an engine with the model and all its adapters. The caller must close the engine."""
    engine = Engine()

    async def begin():
        await engine.load(model)
        for name, path in adapters.items():
            await engine.mount(name, path)

    asyncio.run(begin())
    return engine


class Alone:
    """Computes greedy responses with mlx-lm, using a separate model for each adapter."""

    def __init__(self, model, adapters):
        self.model, self.adapters, self.models, self.known = model, adapters, {}, {}
        self.tokenizer = load_base(model)[2]

    def tokens(self, prompt, name=None, n=12, goes_on=False):
        key = (tuple(prompt), name, goes_on)
        asked, known = self.known.get(key, (0, []))
        if asked < n:
            known = list(self._tokens(*key, n))
            self.known[key] = n, known
        return known[:n]  # a longer greedy response begins with the shorter one

    def _tokens(self, prompt, name, goes_on, n):
        if name not in self.models:
            self.models[name], _ = mlx_segtrain.load(self.model, self.adapters.get(name))

        def sampler(logprobs):
            if goes_on:
                logprobs[..., END] -= 100
            return mx.argmax(logprobs, axis=-1)

        for token, _ in generate_step(
            mx.array(prompt), self.models[name], max_tokens=n, sampler=sampler
        ):
            yield token
            if token == END:
                return

    def __call__(self, *args, **how):
        """Returns the text of the response."""
        return self.tokenizer.decode([x for x in self.tokens(*args, **how) if x != END])
