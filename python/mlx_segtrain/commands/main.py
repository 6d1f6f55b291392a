"""The command line. Heavy modules (mlx, transformers) are imported only when a command needs
them."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mlx_segtrain import __version__, hub
from mlx_segtrain.commands import adapters, cache, chat, completion, generate, init, runs
from mlx_segtrain.commands import hub as hub_commands
from mlx_segtrain.commands.adapters import MODEL
from mlx_segtrain.commands.flags import (
    WITH_ADAPTER,
    Parser,
    add_flags,
    add_output_flags,
    count,
    finite,
    seconds,
)
from mlx_segtrain.commands.output import output
from mlx_segtrain.commands.runs import config_of
from mlx_segtrain.config import ROWS, affecting
from mlx_segtrain.errors import InputError, RunError
from mlx_segtrain.fields import place
from mlx_segtrain.torchless import hide_torch

#: Commands that finish too quickly for --quiet, --verbose and --log-file to be useful.
AT_ONCE = ("cache", "completion")
#: Fields that make eval measure rewards instead of a loss.
SOURCES = ("rewards", "reward_functions", "reward_command", "reward_model", "environment")
DATA = "file or directory of rows, or name of a data set on the Hugging Face hub"
DATA_TO_EVALUATE = (
    "Data to evaluate on: a directory with valid.jsonl or train.jsonl, one file of rows, or the "
    "name of a data set on the Hugging Face hub."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, and returns its exit code: 0, 1 (failure), 2 (bad input) or 130 (stopped by a
    signal)."""
    if argv is None:  # this process was started from the command line
        hide_torch()
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        parser, commands = parsers()
        args, rest = parser.parse_known_args(given)
        if args.command is None:
            parser.print_help()
            return 0
        if rest:
            hint = commands[args.command].meant(rest[0])
            others = [name for name, own in commands.items() if own.knows(rest[0])]
            if others and not hint:
                hint = f" These commands do: {', '.join(others)}."
            raise InputError(f"{args.command} does not accept {rest[0]}.{hint}")
        args.argv = given
        with output(args):
            return args.run(args)
    except (InputError, RunError) as error:
        from mlx_segtrain.commands.terminal import complain

        complain(f"mlx-segtrain: error: {error}")
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the program that reads our output (head, less) has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parsers() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="mlx-segtrain",
        description="LoRA fine-tuning of language models at long context, on one machine.",
    )
    version = f"mlx-segtrain {__version__}"
    parser.add_argument("--version", action="version", version=version, help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    with_json: list[Parser] = []

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *, json: bool = False
    ) -> Parser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        if json:
            with_json.append(added)
        return added

    init.add_command(command)
    runs.add_commands(command)

    text = "show the rows of a data set and which of their tokens are in the loss"
    added = command("inspect", _inspect, text, json=True)
    added.add_argument("path", type=place, metavar="DATA", help=DATA)
    more = ("batch_size", "grad_accumulation_steps")
    add_flags(added, ("model_dir", *affecting("rows"), *more))
    added.add_argument(
        "--rows", type=count(0), default=3, metavar="N", help="number of rows to show. Default: 3."
    )
    added.add_argument(
        "--step-seconds",
        type=seconds,
        metavar="X",
        help="seconds per step, as measured by `mlx-segtrain probe`; used to estimate the duration "
        "of an epoch",
    )
    added.add_argument(
        "--html", type=Path, metavar="FILE", help="also write the report as an HTML file"
    )

    added = command(
        "eval",
        _eval,
        "measure the loss or the rewards of a model, with or without an adapter",
        json=True,
    )
    add_flags(added, ("model_dir",), required=True)
    add_flags(added, ("data_dir",), required=True, text=DATA_TO_EVALUATE)
    add_flags(added, ("adapter_path",), text=WITH_ADAPTER)
    add_flags(added, affecting("loss"))
    added.add_argument(
        "--split",
        choices=("valid", "train"),
        default="valid",
        help="split of the data to evaluate on. Default: valid.",
    )
    added.add_argument(
        "--pass-reward",
        type=finite,
        default=1.0,
        metavar="X",
        help="when measuring rewards: minimum reward for a completion to count as a pass. Default: "
        "1.",
    )

    generate.add_command(command)
    chat.add_command(command)

    adapters.add_commands(command)
    hub_commands.add_commands(command)
    cache.add_commands(command)

    added = command(
        "serve", _serve, "start a server for models, adapters and training jobs, with a web page"
    )
    added.add_argument("model_dir", nargs="?", type=place, metavar="MODEL", help=MODEL)
    added.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="default adapter, used for requests that do not name one",
    )
    added.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on. Default: 127.0.0.1.",
    )
    added.add_argument(
        "--port",
        type=count(0),
        default=8090,
        metavar="N",
        help="port to listen on. Default: 8090.",
    )
    added.add_argument(
        "--token",
        metavar="TEXT",
        help="access token that clients must send; required unless --host is a loopback address. "
        "Default: the value of $MLX_SEGTRAIN_TOKEN.",
    )
    added.add_argument(
        "--root",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="allow requests to use paths inside this directory; repeatable. Default: the current "
        "directory and the Hugging Face cache. The server's data directory is always allowed.",
    )
    added.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="additional host name to accept in the Host header of requests; repeatable",
    )
    added.add_argument(
        "--allow-downloads",
        action="store_true",
        help="let clients search the Hugging Face hub and download from it",
    )
    added.add_argument(
        "--while-training",
        choices=("serve", "refuse"),
        default="serve",
        help="whether to answer or refuse completion requests while a job is using the "
        "accelerator. Default: serve.",
    )
    added.add_argument(
        "--prompt-cache-gb",
        type=float,
        default=1.0,
        metavar="GB",
        help="maximum size of the cache for prompt prefixes, in 10⁹ bytes. The cache stays empty "
        "while a job is using the accelerator. Default: 1.",
    )
    added.add_argument(
        "--ranks",
        type=count(1),
        default=1,
        metavar="N",
        help="maximum number of processes per training job on this machine, for example one per "
        "GPU. Default: 1.",
    )
    added.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="file that lists hosts in the format of mlx.launch; a training job can then run one "
        "process on each of these hosts (docs/distributed.md)",
    )

    added = command("doctor", _doctor, "check and time the kernels on this device", json=True)
    report = (
        "also write a small report file that you can attach to an issue; paths and the names of "
        "people and machines are left out"
    )
    added.add_argument("--report", action="store_true", help=report)

    added = command(
        "bench", _bench, "time the ops of mlx-segtrain and of MLX on this device", json=True
    )
    added.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="time only the ops whose name or shape contains one of these words",
    )
    added.add_argument(
        "--impls",
        nargs="+",
        default=[],
        metavar="NAME",
        help="implementations to time. Default: all.",
    )
    added.add_argument(
        "--runs",
        type=count(1),
        default=20,
        metavar="N",
        help="number of timed runs per line of output. Default: 20.",
    )
    added.add_argument(
        "--report",
        action="store_true",
        help=f"{report}. The report also includes the times of training steps.",
    )

    added = command("demo", _demo, "train a small model on this machine and show what it learned")
    added.add_argument(
        "--out", type=Path, metavar="DIR", help="output directory. Default: demo-run."
    )
    added.add_argument("--iters", type=count(1), metavar="N", help="number of optimizer steps")

    completion.add_command(command)
    for added in with_json:
        added.add_argument("--json", action="store_true", help="print JSON")
    for name, added in commands.choices.items():
        if name not in AT_ONCE:
            add_output_flags(added)
    return parser, commands.choices  # type: ignore[return-value]


def _inspect(args: argparse.Namespace) -> int:
    config = config_of(args, "model_dir", "adapter_path", data_dir=args.path)
    from mlx_segtrain.commands.terminal import answer, waiting
    from mlx_segtrain.commands.views import show_report
    from mlx_segtrain.data import Options, inspect
    from mlx_segtrain.models import load_tokenizer

    options = replace(Options.of(config), method=config.method if "method" in args else None)
    with waiting() as show:
        model = tokenizer = None
        if "model_dir" in args:
            model = hub.model(config.model_dir, show, weights=False)
            tokenizer = load_tokenizer(model)
        report = inspect(
            config.data_dir,
            tokenizer,
            options,
            n_preview=args.rows,
            batch_size=config.batch_size,
            accumulation=config.grad_accumulation_steps,
            step_s=args.step_seconds,
            model_dir=model,
            on_event=show,
        )
    if not report.ok and not args.json:
        raise InputError(str(report.error))
    if args.html is not None:
        from mlx_segtrain.commands.leaflet import write_report

        write_report(args.html, report, config.data_dir, config.max_seq_length)
    answer(report, show_report, args.json)
    return 0 if report.ok else 2


def _eval(args: argparse.Namespace) -> int:
    rewarded = "method" not in args and any(name in args for name in SOURCES)
    fill = {"method": "grpo"} if rewarded else {}
    config = config_of(args, "adapter_path", **fill)
    from mlx_segtrain.commands.terminal import answer, waiting
    from mlx_segtrain.commands.views import show_evaluation, show_score
    from mlx_segtrain.objectives import OBJECTIVES
    from mlx_segtrain.training import evaluate, score

    adapter = config.adapter_path if "adapter_path" in args else None
    with waiting() as show:
        if ROWS[config.method] == "prompt":
            how = {"split": args.split, "passes": args.pass_reward}
            return answer(score(config, adapter, **how, on_event=show), show_score, args.json)
        result = evaluate(config, adapter, split=args.split, on_event=show)
    unit = OBJECTIVES[config.method].unit
    return answer(result, lambda own: show_evaluation(own, unit), args.json)


def _serve(args: argparse.Namespace) -> int:
    try:
        from mlx_segtrain.serving import app
        from mlx_segtrain.serving.settings import Settings
    except ImportError as error:
        if (error.name or "").startswith("mlx_segtrain"):
            raise  # a bug in this package, which installing other packages would not fix
        raise InputError(
            f"serve needs packages that are not installed ({error.name}): run pip install "
            '"mlx-segtrain[serve]".'
        ) from None
    from mlx_segtrain.commands.terminal import waiting

    with waiting() as show:
        model_dir = None if args.model_dir is None else hub.model(args.model_dir, show)
    app.run(
        Settings(
            model_dir=model_dir,
            adapter=args.adapter,
            host=args.host,
            port=args.port,
            token=args.token or os.environ.get("MLX_SEGTRAIN_TOKEN") or None,
            roots=tuple(args.root),
            allow_hosts=tuple(args.allow_host),
            downloads=args.allow_downloads,
            while_training=args.while_training,
            prompt_cache_gb=args.prompt_cache_gb,
            ranks=args.ranks,
            hostfile=args.hostfile,
        ),
        logging.WARNING if args.quiet else logging.DEBUG if args.verbose else logging.INFO,
    )
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from mlx_segtrain.commands.terminal import answer
    from mlx_segtrain.commands.views import show_checks
    from mlx_segtrain.ops.selfcheck import examine

    report = examine()
    code = answer(report, show_checks, args.json, report.ok)
    if args.report:
        from mlx_segtrain.commands import reports

        print(reports.write("doctor", reports.of_doctor(report)), file=sys.stderr)
    return code


def _bench(args: argparse.Namespace) -> int:
    from mlx_segtrain.commands import bench as benchmark

    show = (lambda _: None) if args.json else functools.partial(print, flush=True)
    rows = benchmark.run(args.only, args.impls, args.runs, show)
    if not rows:
        raise InputError(
            "no op, shape or implementation matches --only and --impls: run bench without flags to "
            "see their names."
        )
    if args.json:
        print(json.dumps([asdict(row) for row in rows]))
    if args.report:
        from mlx_segtrain.commands import reports

        print(reports.write("bench", reports.of_bench(rows)), file=sys.stderr)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from mlx_segtrain.commands import demo

    given = {"out_dir": args.out, "iters": args.iters}
    demo.run(**{key: value for key, value in given.items() if value is not None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
