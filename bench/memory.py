"""Compares the predicted peak memory of training steps with the measured peak.

    python bench/memory.py --model SHAPE|DIR --lengths 2048 8192 … [--plans min 2.5GB auto 0 1 …]
                           [--loss-rows 1 0.1] [--pairs 0 0.9] [--adapter dora] [--moves]

Plans and SHAPEs have the same names as in bench/step.py. Each cell frees the memory of the previous
cell and then runs --steps whole steps, including the optimizer (at least two steps, because the
optimizer has no state in the first step). `--moves` prints the predicted and the measured peak of
every move of the plan. With `--pairs`, the steps use DPO pairs whose sequences share this fraction
of their tokens. `--adapter` is lora, dora, dropout (0.1), or embeddings, which also adapts the
embedding and the head.
"""

import argparse
import dataclasses
import itertools
import time
from pathlib import Path

import step as steps


def cell(model, shape, vocabulary, length, loss, kind, shared, n_steps, adapter):
    """Returns (plan, best seconds, measured peak, measured peak of each move of the last step)."""
    import mlx.core as mx

    from mlx_segtrain import ops

    objective, batch, of = steps.batch_of(vocabulary, length, round(length * loss), shared)
    of = dataclasses.replace(of, dora=adapter == "dora", dropout=adapter == "dropout")
    plan = steps.plan_of(shape, kind, of, adapter)
    peaks, times, peak = [], [], 0

    def watch():
        peaks.append(mx.get_peak_memory())
        mx.reset_peak_memory()

    step = steps.training_step(model, shape, plan, objective, batch, watch, adapter, of)
    with ops.repeatable(True):
        for _ in range(n_steps):
            peaks.clear()
            steps.reset_peak()
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
            peak = max([peak, mx.get_peak_memory(), *peaks])
    return plan, min(times), peak, peaks


def main():
    parser = argparse.ArgumentParser(description="Compares predicted and measured peaks.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--lengths", nargs="+", type=int, required=True)
    parser.add_argument("--plans", nargs="+", default=["min", "1", "auto"])
    parser.add_argument("--loss-rows", nargs="+", type=float, default=[1.0])
    parser.add_argument("--pairs", nargs="+", type=float, default=[None])
    parser.add_argument("--adapter", default="lora", choices=steps.ADAPTERS)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--moves", action="store_true")
    args = parser.parse_args()
    model, vocabulary = steps.load(args.model)
    shape = steps.shape_of(args.model, model)
    print("model, tokens, loss rows, plan      predicted  measured  over measured      s  what")
    cells = itertools.product(args.lengths, args.loss_rows, args.pairs, args.plans)
    for length, loss, shared, kind in cells:
        label = f"{Path(args.model).name[:14]:14s} {length:6d} {loss:5g} {kind:9s}"
        label += "" if shared is None else f" {shared:g} shared"
        what = (length, loss, kind, shared, args.steps, args.adapter)
        try:
            plan, seconds, peak, peaks = cell(model, shape, vocabulary, *what)
        except (RuntimeError, ValueError) as error:
            print(label, "failed:", " ".join(str(error).split())[:200], flush=True)
            continue
        print(
            f"{label} {plan.peak / 1e9:9.3f} {peak / 1e9:9.3f} {plan.peak / peak - 1:+9.1%} "
            f"{seconds:9.3f}  {plan.text}",
            flush=True,
        )
        for move, predicted, measured in zip(plan.lines, plan.moves, peaks, strict=True):
            if args.moves:
                print(f"    {predicted / 1e9:9.3f} {measured / 1e9:9.3f}  {move}")
        if args.moves:
            print("   ", {name: round(n / 1e9, 3) for name, n in plan.parts.items()})


if __name__ == "__main__":
    main()
