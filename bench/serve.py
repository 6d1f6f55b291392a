"""Compares our engine, with many adapters, to stock mlx-lm: tokens/s, stalls, and the time to
switch adapters.

    python bench/serve.py [--model DIR|SHAPE] [--prompt 256] [--tokens 64] [--rank 16]
                          [--at-once 8 16 64] [--rounds 2] [--only-ours]

SHAPE is one of the shapes in bench/step.py, with random 4-bit weights. Everything runs in one
process with greedy decoding, and each cell has a warm-up. All prompts differ, and none is cached.
Every round runs all cells, so other load on the machine affects all cells equally. The best round
of each cell is printed. If `--at-once` is given without numbers, only the cells with one request
run. The cells are:
    mlx-lm            generate_step with the model as mlx-lm loads it
    mlx-lm, adapter   the same with mlx-lm's own LoRA layers
    mlx-lm, N         mlx-lm's BatchGenerator with N prompts, which all use the same adapter if
                      there is one
    alone             one request to our engine, with and without an adapter
    deterministic     the same with "deterministic": true
    N at once         N requests to our engine, without adapters, and with three adapters in turn
The columns are the median time to the first token of a request; the tokens/s of all requests
together, counted from the first token; the same figure for the whole run, including the prompts;
and the longest wait between two tokens of one response.
"""

import argparse
import asyncio
import json
import platform
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_segtrain import lora
from mlx_segtrain.adapters.card import About
from mlx_segtrain.adapters.writing import write_adapter
from mlx_segtrain.generation.decoding import Options
from mlx_segtrain.models import adapting, chain_of, load_base
from mlx_segtrain.serving.generation.engine import Engine
from mlx_segtrain.serving.generation.mounting import Selected
from step import SHAPES, load


def model_folder(name: str, scratch: Path) -> Path:
    """Returns a model folder that mlx-lm can load. For a shape, writes such a folder with random
    weights."""
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
    words = {f"w{i}": i for i in range(SHAPES[name]["vocab_size"])}  # every token has a text
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    return folder


def adapters(model: Path, rank: int, scratch: Path) -> list[Path]:
    """Writes three adapters for all projections, with a nonzero B, and returns their folders."""
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


Times = list[list[float]]  #: for each request, the times at which its tokens arrived


class Table:
    """A table that contains the best round of each cell."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[float, float, float, float]] = {}

    def add(self, cell: str, begun: float, times: Times) -> None:
        first = statistics.median(own[0] for own in times) - begun
        start, end = min(own[0] for own in times), max(own[-1] for own in times)
        n = sum(map(len, times))
        stall = max((y - x for own in times for x, y in pairwise(own)), default=0.0)
        row = (first, (n - len(times)) / (end - start), n / (end - begun), stall)
        if cell not in self.rows or row[1] > self.rows[cell][1]:
            self.rows[cell] = row
        print(f"{time.strftime('%X')} {cell}: {row[1]:.1f} tokens/s", file=sys.stderr, flush=True)

    def show(self) -> None:
        print("| cell | first token s | tokens/s | with prompts | longest stall s |")
        print("|---|---|---|---|---|")
        for cell, (first, speed, whole, stall) in self.rows.items():
            print(f"| {cell} | {first:.3f} | {speed:.1f} | {whole:.1f} | {stall:.3f} |")


def stock(base: Any, prompts: list[list[int]], tokens: int) -> tuple[float, Times]:
    """Generates with mlx-lm, using generate_step for one request and BatchGenerator for several."""
    from mlx_lm.generate import BatchGenerator, generate_step

    begun = time.perf_counter()
    if len(prompts) == 1:
        steps = generate_step(mx.array(prompts[0]), base, max_tokens=tokens)
        return begun, [[time.perf_counter() for _ in steps]]
    times: dict[int, list[float]] = {}
    batch = BatchGenerator(base, max_tokens=tokens, completion_batch_size=len(prompts))
    batch.insert(prompts)
    while found := batch.next():
        if not any(found):
            break
        for answer in found[1]:
            times.setdefault(answer.uid, []).append(time.perf_counter())
    batch.close()
    return begun, list(times.values())


async def ours(
    engine: Engine, prompts: list[list[int]], names: list[str], options: Options
) -> tuple[float, Times]:
    async def one(prompt: list[int], name: str) -> list[float]:
        times: list[float] = []
        async for piece in engine.generate(prompt, engine.select(name), options):
            times += [time.perf_counter()] * (piece.tokens - len(times))
        return times

    await engine.call(lambda: engine._prompts.trim_to(n_sequences=0))
    begun = time.perf_counter()
    return begun, await asyncio.gather(*map(one, prompts, names))


async def measure(args: argparse.Namespace, model: Path, folders: list[Path]) -> None:
    from mlx_lm.utils import load as load_stock

    engine = Engine(cache_bytes=0)
    base = await engine.load(model)
    base.tokenizer.eos_token_ids = set()  # so that no response ends early
    for i, folder in enumerate(folders):
        await engine.mount(f"a{i}", folder)
    most = max([1, *args.at_once])
    prompts = [[(7 * i + 3 * j + j // 250) % 250 for j in range(args.prompt)] for i in range(most)]
    greedy = Options(max_tokens=args.tokens)
    alone = Options(max_tokens=args.tokens, deterministic=True)
    stocks = {}
    if not args.only_ours:
        stocks["mlx-lm"] = load_stock(str(model))[0]
        stocks["mlx-lm, adapter"] = load_stock(str(model), adapter_path=str(folders[0]))[0]
    table = Table()

    async def cell(name: str, n: int, names: list[str], options: Options = greedy) -> None:
        for _ in range(2):
            begun, times = await ours(engine, prompts[:n], names, options)
        table.add(name, begun, times)
        await engine.call(mx.clear_cache)

    for _ in range(args.rounds):
        for name, own in stocks.items():
            for n in (1, *args.at_once):
                for _ in range(2):
                    begun, times = stock(own, prompts[:n], args.tokens)
                table.add(name if n == 1 else f"{name}, {n}", begun, times)
                mx.clear_cache()
        for name in ("none", "a0"):
            await cell(f"alone, {name}", 1, [name])
            await cell(f"deterministic, {name}", 1, [name], alone)
        for n in args.at_once:
            await cell(f"{n} at once, none", n, ["none"] * n)
            await cell(f"{n} at once, 3 adapters", n, [f"a{i % 3}" for i in range(n)])
    table.show()

    def swaps() -> list[float]:
        found = []
        for i in range(300):
            begun = time.perf_counter()
            engine._linears.put_in(Selected(base, (engine.adapters[f"a{i % 3}"],)))
            found.append(time.perf_counter() - begun)
        return found

    swap = statistics.median(await engine.call(swaps))
    print(f"\na swap of {len(base.modules)} linear layers: {1e6 * swap:.0f} µs")
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    parser.add_argument("--model", default="minicpm5-1b")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--at-once", type=int, nargs="*", default=[8, 16, 64])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--only-ours", action="store_true", help="skip mlx-lm, which takes minutes on a CPU"
    )
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {mx.device_info().get('device_name')}")
    print(f"{args.model}, prompt {args.prompt}, {args.tokens} tokens, rank {args.rank}\n")
    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(args.model, Path(scratch))
        folders = adapters(model, args.rank, Path(scratch))
        asyncio.run(measure(args, model, folders))


class _Plain(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
