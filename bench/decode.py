"""Measures the parts of a decoding step of one sequence: building, launching and waiting.

    python bench/decode.py [--model DIR|SHAPE] [--prompt 1024] [--tokens 128] [--rounds 5]

The models and the options are those of bench/serve.py. In each step, the host builds the graph of
the next token, launches it, and waits for the previous token, as mlx-lm's generate_step does. The
first three columns are the medians of these times in ms, over the steps of all rounds. The last two
are the time of a whole step and the tokens/s in the best round. If the host hardly waits, it is the
bottleneck. The rows are:
    mlx-lm            the model as mlx-lm loads it, with the log-probabilities of all tokens
    ours              our model without an adapter, as in a batch of one request
    ours, MLX's       the same with MLX's matrix multiplications instead of our kernel
    ours, in place    our model without batching, as in a request with "deterministic": true
    ours, adapter     our model with an adapter, as in a batch of one request
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_segtrain import lora
from mlx_segtrain.adapters import read_adapter
from mlx_segtrain.lora.rows import Rows
from mlx_segtrain.models import chain_of, load_base
from serve import adapters, model_folder

Times = list[tuple[float, float, float]]


def steps(
    model: Any, choose: Callable[[mx.array], mx.array], around: Any, prompt: int, tokens: int
) -> Times:
    """Returns the seconds that each step spends building, launching and waiting."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    model(mx.array([[(3 * j) % 250 for j in range(prompt)]]), cache=cache)
    mx.eval([layer.state for layer in cache])
    token, found = mx.array([1], mx.uint32), []
    for _ in range(tokens):
        begun = time.perf_counter()
        with around():
            following = choose(model(token[None], cache=cache)[:, -1])
        built = time.perf_counter()
        mx.async_eval(following)
        launched = time.perf_counter()
        token.item()
        found.append((built - begun, launched - built, time.perf_counter() - launched))
        token = following
    mx.eval(token)
    return found


def main() -> None:
    from mlx_lm.utils import load as load_stock

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    parser.add_argument("--model", default="minicpm5-1b")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {mx.device_info().get('device_name')}\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(args.model, Path(scratch))
        (first, *_) = adapters(folder, args.rank, Path(scratch))
        stock, base = load_stock(str(folder))[0], load_base(folder)[0]
        chain = chain_of(base)
        modules = {path: lora.wrap(base, path, 1.0) for path in chain.linears}
        base.eval()
        rows = Rows(modules, base)
        adapter = read_adapter(first, chain)
    twin = lora.twin_of(base)
    groups = {path: module.together for path, module in modules.items()}

    def greedy(logits: mx.array) -> mx.array:
        return mx.argmax(logits, axis=-1)

    def stock_greedy(logits: mx.array) -> mx.array:
        return mx.argmax(logits - mx.logsumexp(logits, keepdims=True), axis=-1)

    def ours(ours: bool, name: str | None, around: Any = rows.running) -> Times:
        for path, module in modules.items():
            module.together = groups[path] if ours else None
        rows.put_in([name], {"adapter": adapter} if name else {})
        return steps(twin, greedy, around, args.prompt, args.tokens)

    cells: dict[str, Callable[[], Times]] = {
        "mlx-lm": lambda: steps(stock, stock_greedy, nullcontext, args.prompt, args.tokens),
        "ours": lambda: ours(True, None),
        "ours, MLX's": lambda: ours(False, None),
        "ours, in place": lambda: ours(True, None, nullcontext),
        "ours, adapter": lambda: ours(True, "adapter"),
    }
    found: dict[str, list[Times]] = {name: [] for name in cells}
    for round in range(args.rounds + 1):  # the first round is a warm-up
        for name, run in cells.items():
            times = run()[8:]
            if round:
                found[name].append(times)
    print("| cell | build | launch | wait | step | tokens/s |")
    print("|---|---|---|---|---|---|")
    for name, rounds in found.items():
        parts = zip(*(step for times in rounds for step in times), strict=True)
        medians = " | ".join(f"{1e3 * statistics.median(x):.3f}" for x in parts)
        step = min(statistics.mean(map(sum, times)) for times in rounds)
        print(f"| {name} | {medians} | {1e3 * step:.3f} | {1 / step:.1f} |")


class _Plain(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
