"""Packed rows beside batches: tokens and supervised tokens a second, steps of all cells in turns.

    python bench/packing.py [--model DIR|SHAPE] [--batches 1 2 4 8 16 32] [--packed 2048 4096 8192]
                            [--turns 40] [--seconds 150] [--rows 4000]

Made rows of instruction-like lengths: lognormal, median 138, 95 % below 360, at most 2048 (or what
the shortest packed row holds), the last 55 % of each supervised. LoRA of rank 16 on all seven
projections. `batch N` pads N rows of similar length; `packed N` is one row of N tokens. Every cell
takes the next of its own batches in each turn, after two warm-up turns. Tokens a second are all
tokens (without padding) over all the time.
"""

import argparse
import statistics
import time

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from step import RANK, SCALE, load, ranks_of, shape_of

SUPERVISED = 0.55


def dataset(n, longest, vocabulary):
    from mlx_segtrain.data import Dataset, Row

    rng = np.random.default_rng(0)
    spread = np.log(360 / 138) / 1.645
    lengths = np.exp(rng.normal(np.log(138), spread, n)).round().astype(int).clip(8, longest)
    rows = []
    for i, length in enumerate(lengths):
        weights = np.zeros(length, np.float32)
        weights[-round(length * SUPERVISED) :] = 1
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        rows.append(Row(ids, weights, f"made:{i + 1}"))
    return Dataset.of(rows)


class Cell:
    """Data that are packed or not, and the plan and the batches that they have."""

    def __init__(self, name, shape, data, rows, budget):
        from mlx_segtrain import planning
        from mlx_segtrain.data import batches, padding
        from mlx_segtrain.objectives.sft import Sft

        (of,) = Sft().batch_shapes(data, rows)
        self.plan = planning.choose(shape, of, ranks_of(shape), planning.device(), budget)
        self.name, self.batches = name, batches(data, rows, 0)
        self.padding = padding(data, rows)
        self.times, self.tokens, self.supervised = [], [], []

    def line(self):
        seconds = sum(self.times)
        ms = [t * 1e3 for t in self.times]
        q = statistics.quantiles(ms if len(ms) > 1 else 2 * ms, n=5, method="inclusive")
        return (
            f"{self.name:12s} {sum(self.supervised) / seconds:11,.0f} "
            f"{sum(self.tokens) / seconds:9,.0f} {statistics.median(ms):10.1f} {q[0]:8.1f} "
            f"{q[3]:8.1f} {len(ms):4d} {statistics.mean(self.tokens):9,.0f} {self.padding:8.1%}  "
            f"{self.plan.peak / 1e9:7.2f}  {self.plan.text}"
        )


def main():
    from mlx_segtrain import planning
    from mlx_segtrain.models import adapting, chain_of
    from mlx_segtrain.objectives import value_and_grad
    from mlx_segtrain.objectives.sft import Sft
    from mlx_segtrain.training.layout import Layout

    gpu = mx.default_device() != mx.Device(mx.cpu)
    parser = argparse.ArgumentParser(description="Times packed rows beside batches.")
    parser.add_argument("--model", help="folder of an MLX model, or a shape of bench/step.py")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--packed", type=int, nargs="*", default=[2048, 4096, 8192])
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=150, help="after which no turn begins")
    parser.add_argument("--rows", type=int, default=4000)
    args = parser.parse_args()
    if args.model is None and not gpu:
        from mlx_segtrain.commands.demo.snapshot import smollm2_snapshot
        from mlx_segtrain.files import cache_dir

        args.model = str(smollm2_snapshot(cache_dir()))
    name = args.model or "minicpm5-1b"
    model, vocabulary = load(name)
    shape, budget = shape_of(name, model), planning.budget_bytes()
    data = dataset(args.rows, min([2048, *args.packed]), vocabulary)
    cells = [Cell(f"batch {n}", shape, data, n, budget) for n in args.batches]
    for n in args.packed:
        cells.append(Cell(f"packed {n}", shape, data.in_rows_of(n), 1, budget))

    chain, objective = chain_of(model), Sft()
    adapter = adapting.init(chain, ranks_of(shape), SCALE, 0)
    params = adapting.stage_params(chain, adapter)
    layout = Layout.of(params)

    vector = layout.join(params)
    optimizer = optim.AdamW(1e-4, bias_correction=True)
    mx.eval(vector)

    def step(cell):
        nonlocal vector
        batch = next(cell.batches)
        begin = time.perf_counter()
        what = (objective, chain, adapter.scales, layout.split(vector), batch)
        (loss, *_), grads = value_and_grad(
            *what, objective.total([batch]), cuts=lambda streams: cell.plan.cuts
        )
        gradient = {"factors": layout.join(grads)}
        vector = optimizer.apply_gradients(gradient, {"factors": vector})["factors"]
        mx.eval(vector, optimizer.state, loss)
        seconds = time.perf_counter() - begin
        return seconds, int(batch.lengths.sum()), int((batch.weights != 0).sum())

    device = mx.device_info().get("device_name", "CPU") if gpu else "CPU"
    lengths = data.columns.length
    print(
        f"{device}, {name}, rank {RANK}; {len(data)} rows, median {np.median(lengths):.0f} tokens"
    )
    begun = time.perf_counter()
    for turn in range(-2, args.turns):
        if turn > 0 and time.perf_counter() - begun > args.seconds:
            break
        for cell in cells:
            found = step(cell)
            if turn >= 0:
                for values, x in zip(
                    (cell.times, cell.tokens, cell.supervised), found, strict=True
                ):
                    values.append(x)
    print(
        "cell         supervised/s tokens/s  median_ms   p20_ms   p80_ms    n    tokens  padding"
        "  planned  plan"
    )
    for cell in cells:
        print(cell.line(), flush=True)


if __name__ == "__main__":
    main()
