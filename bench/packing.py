"""Compares packed rows with padded batches: tokens per second, and tokens in the loss per second.

    python bench/packing.py [--model DIR|SHAPE] [--batches 1 2 4 8 16 32] [--packed 2048 4096 8192]
                            [--turns 40] [--seconds 150] [--rows 4000] [--peft]
                            [--peer trl|unsloth]

The rows are synthetic, with lengths like those of instruction data: lognormal, with a median of
138, 95 % below 360, and at most 2048 tokens (or the length of the shortest packed row). The last
55 % of each row are in the loss. LoRA has rank 16 on all seven projections. The cell `batch N` pads
N rows of similar length; `packed N` is one packed row of N tokens. The cells alternate: in each
turn, every cell runs a step on its next batch. The first two turns are a warm-up. Tokens per second
are all tokens (without padding) divided by the total time. `--peft` adds the same cells with
transformers and PEFT, where position_ids separate the rows within a packed row, as in TRL. `--peer`
adds packed rows with TRL's trainer (trl, bfloat16), or with Unsloth through TRL's trainer (unsloth,
nf4), in a separate run.
"""

import argparse
import functools
import statistics
import time

import mlx.core as mx
import numpy as np

from step import (
    RANK,
    SCALE,
    SHAPES,
    SUFFIXES,
    load,
    peft_model,
    ranks_of,
    run_plan,
    shape_of,
    stepper,
)

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
    """Packed or unpacked data, its batches, and the function that runs a step on one batch."""

    def __init__(self, name, data, rows, step, plan=None):
        from mlx_segtrain.data import batches, padding

        self.name, self.batches, self.step, self.plan = name, batches(data, rows, 0), step, plan
        self.padding = padding(data, rows)
        self.times, self.tokens, self.supervised = [], [], []

    def line(self):
        return line(self.name, self.times, self.tokens, self.supervised) + (
            f" {self.padding:8.1%}  "
            + (f"{self.plan.peak / 1e9:7.2f}  {self.plan.text}" if self.plan else "")
        )


def line(name, times, tokens, supervised):
    seconds = sum(times)
    ms = [t * 1e3 for t in times]
    q = statistics.quantiles(ms if len(ms) > 1 else 2 * ms, n=5, method="inclusive")
    return (
        f"{name:17s} {sum(supervised) / seconds:11,.0f} "
        f"{sum(tokens) / seconds:9,.0f} {statistics.median(ms):10.1f} {q[0]:8.1f} "
        f"{q[3]:8.1f} {len(ms):4d} {statistics.mean(tokens):9,.0f}"
    )


def peer_lines(peer, name, data, packed, steps):
    """Returns the output lines for TRL's trainer on these rows, without the warm-up steps."""
    import peers

    lora = (RANK, SCALE, SUFFIXES)
    place = peers.snapshot(SHAPES[name], peer)
    rows = [(row.ids, row.weights) for row in data.rows]
    for longest in packed:
        model = None if peer == "trl" else peers.unsloth(place, "keep", lora, longest)
        run = peers.Packed(rows, place, longest, steps + 3, lora, model)
        run.run()
        yield line(f"{peer} packed {longest}", run.times[3:], run.tokens[3:], run.supervised[3:])


def peft_step(name):
    """Returns a function that runs a PEFT step on a packed or padded batch."""
    import torch  # pyright: ignore[reportMissingImports]

    model, device, _ = peft_model(name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(batch):
        inside = np.arange(batch.tokens.shape[1])[None] < batch.lengths[:, None]
        labels = np.where(batch.weights != 0, batch.tokens, -100)
        if batch.packed:
            places = np.concatenate([np.arange(n) for n in batch.lengths])[None]
            labels[places == 0] = -100
            more = {"position_ids": torch.from_numpy(places).to(device)}
        else:
            more = {"attention_mask": torch.from_numpy(inside.astype(np.int64)).to(device)}
        tokens, labels = (torch.from_numpy(x).long().to(device) for x in (batch.tokens, labels))
        loss = model(input_ids=tokens, labels=labels, use_cache=False, **more).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def main():
    from mlx_segtrain import planning
    from mlx_segtrain.objectives.sft import Sft

    gpu = mx.default_device() != mx.Device(mx.cpu)
    parser = argparse.ArgumentParser(description="Times packed rows and padded batches.")
    parser.add_argument("--model", help="folder of an MLX model, or a shape in bench/step.py")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--packed", type=int, nargs="*", default=[2048, 4096, 8192])
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument(
        "--seconds", type=float, default=150, help="seconds after which no new turn begins"
    )
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--peft", action="store_true", help="add cells for PEFT")
    parser.add_argument(
        "--peer", choices=("trl", "unsloth"), help="add this trainer (needs a SHAPE and a GPU)"
    )
    args = parser.parse_args()
    if args.model is None and not gpu:
        from mlx_segtrain.commands.demo.snapshot import smollm2_snapshot
        from mlx_segtrain.files import cache_dir

        args.model = str(smollm2_snapshot(cache_dir()))
    name = args.model or "minicpm5-1b"
    model, vocabulary = load(name)
    shape, budget = shape_of(name, model), planning.budget_bytes()
    data = dataset(args.rows, min([2048, *args.packed]), vocabulary)
    ways = [(f"batch {n}", data, n) for n in args.batches]
    ways += [(f"packed {n}", data.in_rows_of(n), 1) for n in args.packed]
    objective, cells = Sft(), []
    runs = []
    for _, data_of, rows in ways:
        (of,) = objective.batch_shapes(data_of, rows)
        plan = planning.choose(shape, of, ranks_of(shape), planning.device(True), budget)
        runs.append(run_plan(shape, of, plan))
    take, at = stepper(model, shape, runs[0], objective, data)

    def step(run, batch):
        nonlocal at
        take.plan = run
        at, _ = take(at, [batch])

    for run, (own, data_of, rows) in zip(runs, ways, strict=True):
        cells.append(Cell(own, data_of, rows, functools.partial(step, run), run.planned))
    if args.peft:
        mx.set_cache_limit(24 << 30)  # torch allocates its memory separately
        theirs = peft_step(name)
        cells += [Cell(f"peft {own}", data_of, rows, theirs) for own, data_of, rows in ways]

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
            batch = next(cell.batches)
            begin = time.perf_counter()
            cell.step(batch)
            seconds = time.perf_counter() - begin
            found = seconds, int(batch.lengths.sum()), int((batch.weights != 0).sum())
            if turn >= 0:
                for values, x in zip(
                    (cell.times, cell.tokens, cell.supervised), found, strict=True
                ):
                    values.append(x)
    print(
        "cell              supervised/s tokens/s  median_ms   p20_ms   p80_ms    n    tokens "
        " padding  planned  plan"
    )
    for cell in cells:
        print(cell.line(), flush=True)
    if args.peer:
        mx.clear_cache()
        for made in peer_lines(args.peer, name, data, args.packed, args.turns):
            print(made, flush=True)


if __name__ == "__main__":
    from mlx_segtrain import ops

    with ops.repeatable(True):  # as `train` does
        main()
