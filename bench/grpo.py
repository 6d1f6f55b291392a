"""Measures cycles of grpo: the seconds and the peak memory of the rollouts and of the update.

    python bench/grpo.py [--model DIR|SHAPE] [--prompts 2] [--group 8] [--tokens 2048]
                         [--prompt 128] [--at-once 16] [--pass-tokens 8192] [--cycles 3]
                         [--beta 0] [--budget-gb X] [--trl 4]

SHAPE is one of the shapes in bench/step.py, with random 4-bit weights. LoRA has rank 16 on all
projections. No token ends a completion, so each completion has --tokens tokens. All completions
have different rewards, so all of them are in the loss. Completions are generated in batches of
--at-once, and then packed into passes of --pass-tokens tokens. The output shows the first cycle,
which includes compilation, separately from the median of the other cycles. All peaks are of MLX's
active memory. With `--trl N`, a separate process then runs the same cycles with TRL's GRPOTrainer
and transformers' generation, in bfloat16 with N sequences per pass. By default, a cycle has 16
completions of 2048 tokens. For 16K tokens in 24 GB, use --tokens 16384 --group 8 --prompts 1
--at-once 8 --pass-tokens 16512 --budget-gb 24 --cycles 0.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

import step as steps
from mlx_segtrain import ops, planning
from mlx_segtrain.config import TrainConfig
from mlx_segtrain.data import Batch, Dataset, Row
from mlx_segtrain.models import adapting, chain_of
from mlx_segtrain.objectives import objective_of
from mlx_segtrain.planning.run import RunPlan
from mlx_segtrain.rewards import Rewards
from mlx_segtrain.training.cycle import Cycle
from mlx_segtrain.training.layout import Layout
from mlx_segtrain.training.setup import Setup


class Endless:
    """A tokenizer without an end-of-text token."""

    eos_token_ids: tuple[int, ...] = ()

    def decode(self, tokens, **how):
        return ""


@dataclass
class Timed(Cycle):
    """A cycle that measures the time of its rollouts separately."""

    rollouts: list[tuple[float, int]] = field(default_factory=list)

    def _roll_out(self, *what):
        begin = time.perf_counter()
        found = super()._roll_out(*what)
        self.rollouts.append((time.perf_counter() - begin, self.rollout_peak))
        return found


def cycle_of(args):
    model, vocabulary = steps.load(args.model)
    shape = steps.shape_of(args.model, model)
    config = TrainConfig(
        model_dir=Path("unused"),
        adapter_path=Path("unused"),
        method="grpo",
        batch_size=args.prompts,
        group_size=args.group,
        max_completion_tokens=args.tokens,
        max_seq_length=args.pass_tokens,
        rollout_batch=args.at_once,
        grpo_beta=args.beta,
        packing=True,
        learning_rate=1e-5,
    )
    rng = np.random.default_rng(0)
    rows = [
        Row(
            rng.integers(0, vocabulary, args.prompt).astype(np.int32),
            np.zeros(args.prompt, np.float32),
            f"made:{i}",
            given={"prompt": str(i)},
        )
        for i in range(args.prompts)
    ]
    data, objective = Dataset.of(rows), objective_of(config)
    (batch,) = objective.batch_shapes(data, args.prompts)
    ranks, device = steps.ranks_of(shape), planning.device(True)
    budget = planning.budget_bytes(args.budget_gb)
    plan = planning.choose(shape, batch, ranks, device, budget)
    run = RunPlan(shape, (batch,), ranks, device, budget, None, (plan,))
    chain = chain_of(model)
    adapter = adapting.init(chain, ranks, steps.SCALE, 0)
    params = adapting.stage_params(chain, adapter)
    layout = Layout.of(params)
    vector = layout.join(params)
    mx.eval(vector)
    setup = Setup(
        config, Endless(), data, None, [], run, model, chain, objective, adapter.scales, layout
    )
    rewards = Rewards({"made": lambda completions, **_: range(len(completions))}, [1.0])
    made = Timed(setup, rewards=rewards)
    tokens = np.stack([row.ids for row in rows])
    prompts = Batch(
        tokens, np.zeros(tokens.shape), np.arange(len(rows)), np.full(len(rows), args.prompt)
    )
    return made, made.optimizer.start(vector), prompts


def of_trl(args):
    """Returns the same figures as `cycles_of`, but for TRL's trainer."""
    import peers

    shape = steps.SHAPES[args.model]
    rng = np.random.default_rng(0)
    words = rng.integers(3, 1000, (args.prompts, args.prompt))
    prompts = [" ".join(f"w{i}" for i in own) for own in words]
    lora = (steps.RANK, steps.SCALE, steps.SUFFIXES)
    place = peers.snapshot(shape, args.peer)
    model = None
    if args.peer == "unsloth":
        model = peers.unsloth(place, "keep", lora, args.prompt + args.tokens)
    how = (args.group, args.tokens, args.trl, 1 + args.cycles, lora, args.beta, model)
    found = peers.Groups(place, prompts, *how).run()
    made = args.prompts * args.group * args.tokens
    assert all(own[-1] == made for own in found), "a completion is too short"
    return [own[:-1] for own in found]


def cycles_of(args):
    """Returns, for each cycle, the seconds and the peak memory in bytes of the rollouts and of the
    update."""
    with ops.repeatable(True):
        cycle, at, prompts = cycle_of(args)
        print(f"{Path(args.model).name}: {cycle.plan}")
        found = []
        with cycle.plan.limits():
            for _ in range(1 + args.cycles):
                begin = time.perf_counter()
                at, outcome = cycle.take(at, [prompts], cycle, lambda part: part())
                whole, (rollout, peak) = time.perf_counter() - begin, cycle.rollouts[-1]
                found.append((rollout, whole - rollout, peak, mx.get_peak_memory()))
        print(f"mismatch {outcome.metrics['mismatch']:.2g}")
    return found


def main():
    parser = argparse.ArgumentParser(description="Times a cycle of grpo.")
    parser.add_argument("--model", default="minicpm5-1b", help="model folder, or a shape")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per completion")
    parser.add_argument("--prompt", type=int, default=128, help="tokens per prompt")
    parser.add_argument("--at-once", type=int, default=16, help="completions generated together")
    parser.add_argument("--pass-tokens", type=int, default=8192, help="tokens per pass")
    parser.add_argument("--cycles", type=int, default=3, help="number of cycles after the first")
    parser.add_argument(
        "--beta", type=float, default=0.0, help="if above 0, a cycle has a reference pass"
    )
    parser.add_argument("--budget-gb", type=float, help="default: the free memory of the device")
    parser.add_argument(
        "--trl", type=int, default=0, help="also time TRL, with this many sequences per pass"
    )
    parser.add_argument(
        "--peer", choices=("trl", "unsloth"), default="trl", help="with --trl: the trainer to time"
    )
    parser.add_argument("--only-trl", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    found = of_trl(args) if args.only_trl else cycles_of(args)
    names = ("rollout_s", "update_s", "rollout_peak_gb", "update_peak_gb")
    scale = np.array([1, 1, 1e-9, 1e-9])
    middle = [statistics.median(x) for x in zip(*found[1:], strict=True)] if args.cycles else []
    count = args.prompts * args.group * args.tokens
    for what, own in (("first", found[0]), ("median", middle)):
        if own:
            figures = dict(zip(names, (np.array(own) * scale).round(3).tolist(), strict=True))
            figures |= {"rollout_tokens_per_s": round(count / own[0])}
            by = args.peer if args.only_trl else "ours"
            print(json.dumps({"by": by, "cycle": what, **figures}), flush=True)
    if args.trl and not args.only_trl:
        subprocess.run([sys.executable, *sys.argv, "--only-trl"], check=True)


if __name__ == "__main__":
    main()
