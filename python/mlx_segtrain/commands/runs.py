"""Commands for training runs: train, probe, verify and plan."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_segtrain.commands.flags import (
    Parser,
    add_flags,
    add_run_flags,
    count,
    examples,
    part,
    seconds,
    share,
)
from mlx_segtrain.config import ROWS, TrainConfig, affecting, flag, load_config
from mlx_segtrain.errors import InputError, RunError

if TYPE_CHECKING:
    from mlx_segtrain.commands.terminal import Terminal
    from mlx_segtrain.training import TrainResult

#: The default folder for an adapter, as in mlx-lm.
OUTPUT = {"adapter_path": "adapters"}
UNUSED = "unused"  # for the required fields of TrainConfig that a command does not need
#: The maximum length, in characters, of a system message that suggested commands include.
MOST_SYSTEM = 300


def add_commands(command: Callable[..., Parser]) -> None:
    """Adds the commands. `command(name, run, text)` creates the parser of each command."""
    for name, run, text in (
        ("train", _train, "train an adapter"),
        ("probe", _probe, "run a few steps without saving, and report their time and memory"),
    ):
        added = command(name, run, text)
        added.usage = f"mlx-segtrain {name} [--config FILE] [--model MODEL --data DATA] [FLAG ...]"
        add_run_flags(added)
        added.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="YAML file that sets any of these options, such as a file written by "
            "`mlx-segtrain init`; flags take precedence",
        )
        if name == "train":
            added.epilog = examples(
                (
                    "train on a CSV file for three epochs",
                    "mlx-segtrain train --model MODEL --data rows.csv --epochs 3",
                ),
                (
                    "read the options from a file, and override one of them",
                    "mlx-segtrain train --config run.yaml --lr 1e-4",
                ),
                ("continue an interrupted run", "mlx-segtrain train --config run.yaml --resume"),
            )

    text = "check that a run's model, data and adapter are unchanged"
    added = command("verify", _verify, text, json=True)
    added.add_argument("folder", type=Path, metavar="RUN", help="adapter directory of the run")

    text = "estimate the memory usage of a run without loading the model"
    added = command("plan", _plan, text, json=True)
    added.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file with options, as for `mlx-segtrain train`",
    )
    add_flags(added, ("model_dir", *affecting("memory")))
    added.add_argument(
        "--loss-rows",
        type=part,
        default=1.0,
        metavar="X",
        help="fraction of each row's tokens that are in the loss, counted from the end of the row. "
        "Default: 1.",
    )
    added.add_argument(
        "--shared",
        type=share,
        default=0.0,
        metavar="X",
        help="length of the prefix that the two sequences of a pair share, as a fraction of each "
        "sequence. Default: 0.",
    )
    added.add_argument(
        "--ranks",
        type=count(2),
        metavar="N",
        help="number of processes to plan for. With data parallelism, the speed is also estimated "
        "for 2, 4, 8, …, 256 processes (docs/distributed.md).",
    )
    added.add_argument(
        "--link",
        type=seconds,
        metavar="X",
        help="network bandwidth between the processes, in 10⁹ bytes per second. Default: 1.25.",
    )
    added.add_argument(
        "--rank-budgets",
        type=seconds,
        nargs="+",
        metavar="GB",
        help="with --parallel pipeline: memory that each process may use, in 10⁹ bytes, one value "
        "per process. Default: the memory available on this machine.",
    )
    added.add_argument(
        "--step-seconds",
        type=seconds,
        metavar="X",
        help="seconds per step with one process, as measured by `mlx-segtrain probe`. Default: an "
        "estimate.",
    )
    added.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="plot the predicted and the measured memory during a step, and save the plot to this "
        "file. This loads the model and runs two steps.",
    )


def config_of(args: argparse.Namespace, *unused: str, **fill: Any) -> TrainConfig:
    """Returns the TrainConfig from --config and the flags, which take precedence.

    `unused` lists required fields that the command does not need. `fill` sets other fields.
    """
    flags = {key: value for key, value in vars(args).items() if key in TrainConfig.model_fields}
    given = dict.fromkeys(unused, UNUSED) | flags | fill
    return load_config(getattr(args, "config", None), given, OUTPUT)


def _train(args: argparse.Namespace) -> int:
    config = config_of(args)
    from mlx_segtrain.commands.terminal import complain
    from mlx_segtrain.training import checkpoint
    from mlx_segtrain.training.ranks import LostRank, launched

    try:
        return _trained(args, config)
    except RunError as error:
        complain(f"mlx-segtrain: error: {error}")
        if not launched() and checkpoint.found(config.adapter_path):
            complain(f"continue with: {shlex.join(resume_command(args.argv))}")
        if isinstance(error, LostRank):
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(1)  # a normal exit would wait for the device, which may wait for the lost rank
        return 1


def _trained(args: argparse.Namespace, config: TrainConfig) -> int:
    from mlx_segtrain.commands.terminal import Terminal, errors
    from mlx_segtrain.training import train
    from mlx_segtrain.training.curves import draw_run
    from mlx_segtrain.training.ranks import launched

    if launched():  # rank 0 shows the run; the other ranks show only their own warnings
        with Terminal(errors()) as show:
            return 130 if train(config, show).interrupted else 0
    with Terminal() as show:
        result = train(config, show, on_step=show.step)
        if not result.interrupted:  # drawing takes time, and an interrupted run should end soon
            draw_run(config, lambda message: print(message, file=sys.stderr))
        show.stop_bar()
        show_result(show, config, result, args.argv)
    return 130 if result.interrupted else 0


def show_result(
    show: Terminal, config: TrainConfig, result: TrainResult, argv: Sequence[str]
) -> None:
    """Shows the results of a run, and commands for possible next steps."""
    from mlx_segtrain.commands.words import duration
    from mlx_segtrain.events import speed

    rewarded = ROWS[config.method] == "prompt"
    state = "interrupted after" if result.interrupted else "trained"
    if result.stopped_early:
        better = "higher reward" if rewarded else "lower validation loss"
        state = f"stopped early, without a {better}, after"
    show.say(f"\n{state} {result.steps} steps in {duration(result.wall_s)}")
    if result.interrupted and not result.steps:
        show.say("nothing was saved: no step was finished")
        return
    show.fact("adapter", str(result.adapter_path))
    if rewarded and result.final_val_loss is not None:
        assert result.first_val_loss is not None and result.best_val_loss is not None
        show.fact(
            "held-out reward",
            f"{-result.first_val_loss:.3f} -> {-result.final_val_loss:.3f} "
            f"(best {-result.best_val_loss:.3f} at step {result.best_step})",
        )
    elif result.final_train_loss is not None:
        most = min(config.steps_per_report, result.steps)
        over = f" (mean of the last {most} steps)" if most > 1 else ""
        show.fact("training loss", f"{result.final_train_loss:.4f}{over}")
    if result.final_val_loss is not None and not rewarded:
        show.fact(
            "validation loss",
            f"{result.first_val_loss:.4f} -> {result.final_val_loss:.4f} "
            f"(best {result.best_val_loss:.4f} at step {result.best_step})",
        )
    if result.final_val_accuracy is not None:
        show.fact(
            "accuracy",
            f"{result.first_val_accuracy:.1%} -> {result.final_val_accuracy:.1%} of validation "
            "pairs",
        )
    show.fact("speed", speed(asdict(result)))
    show.fact("peak memory", f"{_peak(result)}; process: {result.process_gb:.2f} GB")
    if result.interrupted:
        show.command("continue with", resume_command(argv))
        return
    for what, command in uses(config, result.adapter_path):
        show.command(what, command)


def uses(config: TrainConfig, adapter: Path) -> list[tuple[str, list[str]]]:
    """Returns commands that use a run's adapter, with the system message of the run's data."""
    from mlx_segtrain.adapters import prompting_of
    from mlx_segtrain.ops.selfcheck import on_gpu

    prompting = prompting_of(adapter)
    own = ["--model", str(config.model_dir), "--adapter", str(adapter)]
    system = _system(config) if prompting.format != "raw" else None
    more, note = [], ""
    if system is not None and len(system) <= MOST_SYSTEM:
        more = ["--system", system]
    elif system is not None:
        more = ["--system", "…"]
        note = f", with the system message of the data ({len(system):,} characters)"
    found = [
        (f"chat with it{note}", ["mlx-segtrain", "chat", *own, *more]),
        ("or ask a single question", ["mlx-segtrain", "generate", *own, *more, "--prompt", "…"]),
    ]
    if on_gpu():  # on a CPU, stock mlx-lm computes in bfloat16, which takes seconds per token
        theirs = ["--model", str(config.model_dir), "--adapter-path", str(adapter), *more]
        mlx_lm = ["python", "-m", "mlx_lm", "generate", *theirs]
        if more:
            mlx_lm[mlx_lm.index("--system")] = "--system-prompt"
        found.append(("or with mlx-lm", [*mlx_lm, *prompting.flags, "--prompt", "…"]))
    return found


def _system(config: TrainConfig) -> str | None:
    """Returns the system message of the data, if it is the same in all rows."""
    from mlx_segtrain.data import Options
    from mlx_segtrain.data.sources import sources_of
    from mlx_segtrain.data.system import system_message

    with suppress(InputError):  # the data may have been deleted after the run
        return system_message(sources_of(config.data_dir, ask=False)[0], Options.of(config))
    return None


def resume_command(argv: Sequence[str]) -> list[str]:
    """Returns the command that resumes the run started with `argv`."""
    kept, skip = [], False
    for i, word in enumerate(argv):
        if skip:
            skip = False
        elif word == "--resume":
            skip = argv[i + 1 : i + 2] in (["auto"], ["true"], ["false"])
        elif word not in (flag("overwrite"), "--no-overwrite") and not word.startswith("--resume="):
            kept.append(word)
    return ["mlx-segtrain", *kept, "--resume"]


def _probe(args: argparse.Namespace) -> int:
    config = config_of(args, adapter_path=UNUSED)
    from mlx_segtrain.commands.terminal import waiting
    from mlx_segtrain.training import probe

    with waiting() as show:
        result = probe(config, show)
    print(f"resting memory   {result.resting_gb:.2f} GB")
    print(f"peak memory      {_peak(result)}")
    print(f"step             {result.step_s:.3f} s (first step: {result.first_step_s:.3f} s)")
    print(f"speed            {result.tokens / result.step_s:,.0f} tokens/s")
    print(f"loss             {result.loss:.4f}")
    print(f"gradient norm    {result.grad_norm:.4f}")
    print(f"finite           {'yes' if result.finite else 'no'}")
    return 0 if result.finite else 1


def _peak(result: Any) -> str:
    planned = "" if result.planned_gb is None else f" (planned {result.planned_gb:.2f} GB)"
    return f"{result.peak_gb:.2f} GB{planned}"


def _verify(args: argparse.Namespace) -> int:
    from mlx_segtrain.commands.terminal import answer
    from mlx_segtrain.commands.views import show_verified
    from mlx_segtrain.training import verify

    found = verify(args.folder)
    return answer(found, show_verified, args.json, found.ok)


def _plan(args: argparse.Namespace) -> int:
    if args.ranks is None and (args.link or args.step_seconds):
        raise InputError("--link and --step-seconds have no effect without --ranks: leave them out")
    # `plan` needs neither data nor an adapter, even if --config names them.
    config = config_of(args, data_dir=UNUSED, adapter_path=UNUSED)
    if config.parallel == "pipeline" and args.ranks is None:
        raise InputError("a plan for `parallel: pipeline` needs the number of ranks: add --ranks N")
    from mlx_segtrain.commands.terminal import answer, waiting
    from mlx_segtrain.commands.views import show_plan
    from mlx_segtrain.hub import located, model, outline
    from mlx_segtrain.planning.report import planned_report
    from mlx_segtrain.planning.run import full_batch
    from mlx_segtrain.planning.scaling import LINK, scaled
    from mlx_segtrain.training.ranks import Ranks
    from mlx_segtrain.training.setup import accumulating

    with waiting() as show:
        # --plot runs the model, so it needs the weights.
        config = located(config, show, bring=outline if args.plot is None else model)
    batch = full_batch(config, args.loss_rows, args.shared)
    count, pipeline = args.ranks or 1, config.parallel == "pipeline"
    if pipeline and (args.link or args.step_seconds):
        raise InputError(
            "--link and --step-seconds only apply with --parallel data: leave them out"
        )
    if pipeline and args.plot is not None:
        raise InputError("--plot only applies with --parallel data: leave it out")
    if args.rank_budgets and not (pipeline and count > 1):
        raise InputError(
            "--rank-budgets has no effect without --ranks and --parallel pipeline: leave it out"
        )
    config = accumulating(config, Ranks(size=count, pipeline=pipeline), None, lambda event: None)
    found, run = planned_report(config, batch, count, args.rank_budgets or [])
    if args.ranks is not None and not pipeline:
        found = replace(found, ranks=scaled(run, args.ranks, args.link or LINK, args.step_seconds))
    if args.plot is not None:
        from mlx_segtrain.commands.picture import draw

        draw(args.plot, run, config)
    return answer(found, show_plan, args.json)
