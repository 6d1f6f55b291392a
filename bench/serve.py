"""Generation with adapters that are swapped, beside stock mlx-lm: tokens/s, and what a swap takes.

    python bench/serve.py [--model DIR|SHAPE] [--prompt 256] [--tokens 64] [--rank 16]

SHAPE is one of bench/step.py's, with random 4-bit weights. All in one process, greedy, each cell
after a warm-up of its own; the prompt is not in any cache. Cells:
    mlx-lm            stream_generate, the model as mlx-lm loads it
    mlx-lm, adapter   the same with mlx-lm's own LoRA layers
    alone             one request to our engine, without and with an adapter
    N at once         so many requests to it, of three adapters in turn
"""

import argparse
import asyncio
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_segtrain import lora
from mlx_segtrain.adapters.card import About
from mlx_segtrain.adapters.writing import write_adapter
from mlx_segtrain.models import adapting, chain_of, load_base
from mlx_segtrain.serving.generation.decoding import Options
from mlx_segtrain.serving.generation.engine import Engine
from mlx_segtrain.serving.generation.mounting import Selected
from step import SHAPES, load


def model_folder(name: str, scratch: Path) -> Path:
    """The model as a folder, which mlx-lm loads."""
    if name not in SHAPES:
        return Path(name)
    from mlx.utils import tree_flatten
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model, _ = load(name)
    folder = scratch / name
    folder.mkdir()
    quantization = {"bits": 4, "group_size": 64}
    config = {**SHAPES[name], "quantization": quantization, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    weights: Any = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    words = {f"w{i}": i for i in range(SHAPES[name]["vocab_size"])}  # each token has a text
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    return folder


def adapters(model: Path, rank: int, scratch: Path) -> list[Path]:
    """Three adapters of all projections, whose B is not zero."""
    chain = chain_of(load_base(model)[0])
    folders = []
    for seed in range(3):
        fresh = adapting.init(chain, dict.fromkeys(chain.linears, rank), 1.0, seed)
        keys = mx.random.split(mx.random.key(seed), len(fresh.tensors))
        tensors = {
            path: (a, 0.01 * mx.random.normal(b.shape, key=key))
            for key, (path, (a, b)) in zip(keys, fresh.tensors.items(), strict=True)
        }
        folder = scratch / f"adapter{seed}"
        folder.mkdir()
        write_adapter(folder, lora.Adapter(tensors, fresh.scales), About(str(model)))
        folders.append(folder)
    return folders


def stock(model: Path, adapter: Path | None, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens/s behind it."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load

    base = load(str(model), adapter_path=None if adapter is None else str(adapter))[0]
    found = (0.0, 0.0)
    for _ in range(2):
        begun = time.perf_counter()
        times = []
        for _ in generate_step(mx.array(prompt), base, max_tokens=tokens):
            times.append(time.perf_counter() - begun)
        found = times[0], (len(times) - 1) / (times[-1] - times[0])
    return found


async def ours(engine: Engine, prompts: list[list[int]], names: list[str], tokens: int):
    """The same of requests at once: of the median one, and tokens/s of all together."""

    async def one(prompt: list[int], name: str) -> list[float]:
        times = []
        options = Options(max_tokens=tokens)
        async for piece in engine.generate(prompt, engine.select(name), options):
            times += [time.perf_counter()] * (piece.tokens - len(times))
        return times

    for _ in range(2):
        await engine.call(lambda: engine._prompts.trim_to(n_sequences=0))
        begun = time.perf_counter()
        times = await asyncio.gather(*map(one, prompts, names))
    first = statistics.median(own[0] for own in times) - begun
    start, end = min(own[0] for own in times), max(own[-1] for own in times)
    return first, sum(len(own) - 1 for own in times) / (end - start)


async def measure(args: argparse.Namespace, model: Path, folders: list[Path]) -> None:
    engine = Engine()
    base = await engine.load(model)
    base.tokenizer.eos_token_ids = set()  # every answer has all its tokens
    for i, folder in enumerate(folders):
        await engine.mount(f"a{i}", folder)
    prompts = [[(7 * i + j) % 250 for j in range(args.prompt)] for i in range(16)]

    def row(cell: str, first: float, speed: float) -> None:
        print(f"| {cell} | {first:.3f} | {speed:.1f} |", flush=True)

    for name in ("none", "a0"):
        row(f"alone, {name}", *await ours(engine, prompts[:1], [name], args.tokens))
    for n in (4, 16):
        names = [f"a{i % 3}" for i in range(n)]
        row(f"{n} at once, 3 adapters", *await ours(engine, prompts[:n], names, args.tokens))

    def swaps() -> list[float]:
        found = []
        for i in range(300):
            begun = time.perf_counter()
            engine._linears.put_in(Selected(base, (engine.adapters[f"a{i % 3}"],)))
            found.append(time.perf_counter() - begun)
        return found

    swap = statistics.median(await engine.call(swaps))
    print(f"\na swap of {len(base.modules)} linears: {1e6 * swap:.0f} µs")
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    parser.add_argument("--model", default="minicpm5-1b")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {mx.device_info().get('device_name')}")
    print(f"{args.model}, prompt {args.prompt}, {args.tokens} tokens, rank {args.rank}\n")
    print("| cell | first token s | tokens/s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(args.model, Path(scratch))
        folders = adapters(model, args.rank, Path(scratch))
        prompt = [j % 250 for j in range(args.prompt)]
        for name, adapter in (("mlx-lm", None), ("mlx-lm, adapter", folders[0])):
            first, speed = stock(model, adapter, prompt, args.tokens)
            print(f"| {name} | {first:.3f} | {speed:.1f} |", flush=True)
            mx.clear_cache()
        asyncio.run(measure(args, model, folders))


class _Plain(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
