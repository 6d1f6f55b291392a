"""The command line. Heavy modules (mlx, transformers) are imported inside the commands only."""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn, get_args

from mlx_segtrain import __version__
from mlx_segtrain.commands import adapters, cache
from mlx_segtrain.commands.adapters import MODEL
from mlx_segtrain.config import (
    FACETS,
    TrainConfig,
    affecting,
    allowed,
    default,
    flag,
    load_config,
    nearest,
)
from mlx_segtrain.errors import InputError, RunError
from mlx_segtrain.fields import choices, is_list, kind, place
from mlx_segtrain.torchless import hide_torch

DATA = "a file with rows or its folder, or the name of a data set on the Hugging Face hub"
#: Where an adapter goes that is told nothing else, as with mlx-lm.
OUTPUT = {"adapter_path": "adapters"}
UNUSED = "unused"  # for the required fields of TrainConfig that a command does not need


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors and that takes no abbreviated flags."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 (it failed), 2 (bad input), 130 (a signal)."""
    if argv is None:  # this process is the command
        hide_torch()
    try:
        parser, commands = _parsers()
        args, rest = parser.parse_known_args(argv)
        if args.command is None:
            parser.print_help()
            return 0
        if rest:
            known = [name for name in commands[args.command]._option_string_actions]
            raise InputError(
                f"{args.command} does not know {rest[0]}.{nearest(rest[0].split('=')[0], known)}"
            )
        return args.run(args)
    except (InputError, RunError) as error:
        print(f"mlx-segtrain: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="mlx-segtrain",
        description="LoRA fine-tuning of language models at long context, on one machine.",
    )
    version = f"mlx-segtrain {__version__}"
    parser.add_argument("--version", action="version", version=version, help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Parser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        return added

    for name, run, text in (
        ("train", _train, "train an adapter"),
        ("probe", _probe, "take a few steps, write nothing, and print time and memory"),
    ):
        added = command(name, run, text)
        added.usage = f"mlx-segtrain {name} [--config FILE] [--model MODEL --data DATA] [FLAG ...]"
        added.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="YAML file with any of the fields below; flags given here replace its values",
        )
        add_flags(added, TrainConfig.model_fields)

    added = command("verify", _verify, "say whether what a run was made of is still the same")
    added.add_argument("folder", type=Path, metavar="RUN", help="the adapter_path of a run")
    added.add_argument("--json", action="store_true", help="print JSON")

    added = command("plan", _plan, "say what a run would take, without loading anything")
    added.add_argument("--config", type=Path, metavar="FILE", help="YAML file, as of train")
    add_flags(added, ("model_dir", *affecting("memory")))
    added.add_argument(
        "--loss-rows",
        type=_part,
        default=1.0,
        metavar="X",
        help="part of a row that is trained, its end. Default: 1.",
    )
    added.add_argument(
        "--shared",
        type=_share,
        default=0.0,
        metavar="X",
        help="part of a row that both sequences of a pair begin with. Default: 0.",
    )
    added.add_argument(
        "--ranks",
        type=_count(2),
        metavar="N",
        help="say what N processes would give, and 2 to 256 of them (docs/distributed.md)",
    )
    added.add_argument(
        "--link",
        type=_seconds,
        metavar="X",
        help="speed of the network between them, in 10⁹ bytes a second. Default: 1.25.",
    )
    added.add_argument(
        "--step-seconds",
        type=_seconds,
        metavar="X",
        help="what a step takes one of them, as probe measures it. Default: an estimate.",
    )
    added.add_argument("--json", action="store_true", help="print JSON")
    added.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw predicted and measured memory over a step; loads the model and takes two steps",
    )

    added = command("inspect", _inspect, "show what a data set trains, token by token")
    added.add_argument("path", type=place, metavar="DATA", help=DATA)
    more = ("batch_size", "grad_accumulation_steps")
    add_flags(added, ("model_dir", *affecting("rows"), *more))
    added.add_argument("--rows", type=_count(0), default=3, metavar="N", help="rows to show")
    added.add_argument(
        "--step-seconds", type=_seconds, metavar="X", help="what a step takes, as probe measures it"
    )
    added.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page that can be passed on"
    )
    added.add_argument("--json", action="store_true", help="print JSON")

    added = command("eval", _eval, "measure loss and perplexity, with or without an adapter")
    add_flags(added, ("model_dir", "data_dir"), required=True)
    add_flags(added, ("adapter_path", *affecting("loss")))
    added.add_argument("--split", choices=("valid", "train"), default="valid", help="the file")
    added.add_argument("--json", action="store_true", help="print JSON")

    added = command("generate", _generate, "answer a prompt, with or without an adapter")
    add_flags(added, ("model_dir",), required=True)
    add_flags(added, ("adapter_path", "prompt_format", "chat_template_kwargs"))
    prompt = added.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt, or - to read it from stdin")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file with the prompt, - is stdin")
    added.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    added.add_argument(
        "--max-tokens", type=_count(1), default=256, metavar="N", help="most tokens to write"
    )
    added.add_argument(
        "--temp", type=_temperature, default=0.0, metavar="X", help="temperature; 0 is greedy"
    )

    adapters.add_commands(command)
    cache.add_commands(command)

    added = command("serve", _serve, "serve a model with adapters, jobs and the page /finetune")
    added.add_argument("model_dir", nargs="?", type=place, metavar="MODEL", help=MODEL)
    added.add_argument(
        "--adapter", type=Path, metavar="DIR", help="adapter of requests that name none"
    )
    added.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on. Default: 127.0.0.1."
    )
    added.add_argument("--port", type=_count(0), default=8090, metavar="N", help="default: 8090")
    added.add_argument(
        "--token",
        metavar="TEXT",
        help="what clients must know; needed on other addresses. Default: $MLX_SEGTRAIN_TOKEN.",
    )
    added.add_argument(
        "--root",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder below which clients may name paths; may be repeated. Default: this folder and "
        "the Hugging Face cache, besides our own.",
    )
    added.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name of this machine that browsers may use; may be repeated",
    )
    added.add_argument(
        "--allow-downloads",
        action="store_true",
        help="let clients download models and data sets of the Hugging Face hub by name",
    )
    added.add_argument(
        "--while-training",
        choices=("serve", "refuse"),
        default="serve",
        help="what to do with requests while a job computes. Default: serve.",
    )
    added.add_argument(
        "--prompt-cache-gb",
        type=float,
        default=1.0,
        metavar="GB",
        help="10⁹ bytes of prompts that are kept for requests that begin alike; none while a job "
        "computes. Default: 1.",
    )

    added = command("doctor", _doctor, "check and time the kernels on this device")
    added.add_argument("--json", action="store_true", help="print JSON")
    report = "also write one small file, without paths or names, to send with an issue"
    added.add_argument("--report", action="store_true", help=report)

    added = command("bench", _bench, "time the ops of a layer on this device beside MLX's own")
    added.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="ops or shapes whose name holds one"
    )
    added.add_argument(
        "--impls", nargs="+", default=[], metavar="NAME", help="implementations. Default: all."
    )
    added.add_argument(
        "--runs", type=_count(1), default=20, metavar="N", help="timed calls of each row"
    )
    added.add_argument("--json", action="store_true", help="print JSON")
    added.add_argument("--report", action="store_true", help=f"{report}; with times of steps")

    added = command("demo", _demo, "train a small model on this machine and show what it learned")
    added.add_argument(
        "--out", type=Path, metavar="DIR", help="output directory. Default: demo-run."
    )
    added.add_argument("--iters", type=_count(1), metavar="N", help="optimizer steps")
    return parser, commands.choices  # type: ignore[return-value]


def add_flags(parser: Parser, names: Iterable[str], *, required: bool = False) -> None:
    """Add the flags of fields of TrainConfig; a flag that is not given leaves no attribute."""
    for name in names:
        field = TrainConfig.model_fields[name]
        text = field.description or ""
        if is_list(field):
            text += f" {allowed(name).capitalize()}."
        if not field.is_required():
            text += f" Default: {default(name)}."
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "required": required}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif bool in get_args(field.annotation):
            options |= {"nargs": "?", "const": True, "metavar": _metavar(name)}
        else:
            options["metavar"] = _metavar(name)
            options["nargs"] = "+" if is_list(field) else None
        parser.add_argument(flag(name), dest=name, help=text.replace("%", "%%"), **options)


def _metavar(name: str) -> str:
    field = TrainConfig.model_fields[name]
    if is_list(field):
        return "TEXT" if FACETS[name].texts else "NAME"
    if bool in get_args(field.annotation):  # or a word
        return get_args(get_args(field.annotation)[1])[0]
    if words := choices(field):
        return "{" + ",".join(words) + "}"
    if FACETS[name].flag:
        return FACETS[name].flag.strip("-").upper()
    return {Path: "PATH", float: "X", str: "TEXT", dict: "JSON"}.get(kind(field), "N")


def _config(args: argparse.Namespace, **fill: Any) -> TrainConfig:
    """The TrainConfig of the given flags over those of --config; fill is for unneeded fields."""
    given = {key: value for key, value in vars(args).items() if key in TrainConfig.model_fields}
    return load_config(getattr(args, "config", None), given | fill, OUTPUT)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return seconds


def _count(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer >= {least}, got {text}")
        return int(text)

    return count


def _number(expected: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return number


_part = _number("a number above 0 and up to 1", lambda x: 0 < x <= 1)
_temperature = _number("a finite number >= 0", lambda x: 0 <= x < math.inf)


def _share(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else _part(text)


def _train(args: argparse.Namespace) -> int:
    config = _config(args)
    from mlx_segtrain.commands.terminal import Terminal, duration, errors
    from mlx_segtrain.events import speed
    from mlx_segtrain.training import train
    from mlx_segtrain.training.curves import draw_run
    from mlx_segtrain.training.ranks import LostRank, launched

    try:
        if launched():  # rank 0 shows the run, and this one what is wrong here
            with Terminal(errors()) as show:
                return 130 if train(config, show).interrupted else 0
        with Terminal() as show:
            result = train(config, show)
            if not result.interrupted:  # who interrupts a run waits for it to end
                draw_run(config, lambda message: print(message, file=sys.stderr))
    except LostRank as error:
        print(f"mlx-segtrain: error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # a device may still wait for that rank, and the end of the process for it
    from mlx_segtrain.adapters import prompting_of

    model, adapter = (shlex.quote(str(path)) for path in (config.model_dir, result.adapter_path))
    flags = shlex.join(prompting_of(result.adapter_path).flags)
    state = "interrupted after" if result.interrupted else "trained"
    if result.stopped_early:
        state = "no lower validation loss any more: stopped after"
    print(f"\n{state} {result.steps} steps in {duration(result.wall_s)}")
    print(f"adapter          {result.adapter_path}")
    if result.final_train_loss is not None:
        print(f"training loss    {result.final_train_loss:.4f}")
    if result.final_val_loss is not None:
        print(
            f"validation loss  {result.first_val_loss:.4f} -> {result.final_val_loss:.4f} "
            f"(best {result.best_val_loss:.4f} at step {result.best_step})"
        )
    if result.final_val_accuracy is not None:
        print(
            f"accuracy         {result.first_val_accuracy:.1%} -> {result.final_val_accuracy:.1%} "
            "of validation pairs"
        )
    print(f"speed            {speed(asdict(result))}")
    print(f"peak memory      {_peak(result)}, of the process {result.process_gb:.2f} GB")
    print(f"use it: mlx-segtrain generate --model {model} --adapter-path {adapter} --prompt …")
    theirs = f"mlx_lm.generate --model {model} --adapter-path {adapter}"
    print(f"    or: {theirs} {flags and flags + ' '}--prompt …")
    return 130 if result.interrupted else 0


def _probe(args: argparse.Namespace) -> int:
    config = _config(args, adapter_path=UNUSED)
    from mlx_segtrain.commands.terminal import downloads
    from mlx_segtrain.training import probe

    with downloads() as show:
        result = probe(config, show)
    print(f"resting memory   {result.resting_gb:.2f} GB")
    print(f"peak memory      {_peak(result)}")
    print(f"step             {result.step_s:.3f} s (the first one {result.first_step_s:.3f} s)")
    print(f"speed            {result.tokens / result.step_s:,.0f} tokens/s")
    print(f"loss             {result.loss:.4f}")
    print(f"gradient norm    {result.grad_norm:.4f}")
    print(f"finite           {'yes' if result.finite else 'no'}")
    return 0 if result.finite else 1


def _verify(args: argparse.Namespace) -> int:
    from mlx_segtrain.commands.terminal import answer, show_verified
    from mlx_segtrain.training import verify

    found = verify(args.folder)
    return answer(found, show_verified, args.json, found.ok)


def _peak(result: Any) -> str:
    planned = "" if result.planned_gb is None else f" (planned {result.planned_gb:.2f} GB)"
    return f"{result.peak_gb:.2f} GB{planned}"


def _plan(args: argparse.Namespace) -> int:
    if args.ranks is None and (args.link or args.step_seconds):
        raise InputError("--link and --step-seconds have no effect without --ranks: leave them out")
    config = _config(args, data_dir=UNUSED, adapter_path=UNUSED)
    from mlx_segtrain.commands.terminal import answer, downloads, show_plan
    from mlx_segtrain.hub import located, model, outline
    from mlx_segtrain.planning import report
    from mlx_segtrain.planning.run import full_batch, plan_run
    from mlx_segtrain.planning.scaling import LINK, scaled

    with downloads() as show:
        # A picture is drawn of a model that runs.
        config = located(config, show, bring=outline if args.plot is None else model)
    run = plan_run(config, full_batch(config, args.loss_rows, args.shared))
    found = report.of(run)
    if args.ranks is not None:
        found = replace(found, ranks=scaled(run, args.ranks, args.link or LINK, args.step_seconds))
    if args.plot is not None:
        from mlx_segtrain.commands.picture import draw

        draw(args.plot, run, config)
    return answer(found, show_plan, args.json)


def _inspect(args: argparse.Namespace) -> int:
    config = _config(
        args,
        data_dir=args.path,
        model_dir=getattr(args, "model_dir", UNUSED),
        adapter_path=UNUSED,
    )
    from mlx_segtrain import hub
    from mlx_segtrain.commands.terminal import downloads
    from mlx_segtrain.data import Options, inspect
    from mlx_segtrain.models import load_tokenizer

    options = replace(Options.of(config), method=config.method if "method" in args else None)
    with downloads() as show:
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
    from mlx_segtrain.commands.terminal import answer, show_report

    if args.html is not None:
        from mlx_segtrain.commands.leaflet import write_report

        write_report(args.html, report, config.data_dir, config.max_seq_length)
    answer(report, show_report, args.json)
    return 0 if report.ok else 2


def _eval(args: argparse.Namespace) -> int:
    config = _config(args, adapter_path=getattr(args, "adapter_path", UNUSED))
    from mlx_segtrain.commands.terminal import answer, downloads, show_evaluation
    from mlx_segtrain.training import evaluate

    adapter = config.adapter_path if "adapter_path" in args else None
    with downloads() as show:
        result = evaluate(config, adapter, split=args.split, on_event=show)
    return answer(result, show_evaluation, args.json)


def _generate(args: argparse.Namespace) -> int:
    config = _config(args, data_dir=UNUSED, adapter_path=getattr(args, "adapter_path", UNUSED))
    if args.system is not None and config.prompt_format == "raw":
        raise InputError("--system needs the chat template: leave out --prompt-format raw")
    text = _prompt(args)
    import mlx_segtrain
    from mlx_segtrain import hub
    from mlx_segtrain.adapters import prompting_of
    from mlx_segtrain.commands.terminal import downloads

    with downloads() as show:
        adapter = hub.adapter(config.adapter_path, show) if "adapter_path" in args else None
        model, tokenizer = mlx_segtrain.load(config.model_dir, adapter, show)
    prompting = prompting_of(adapter)  # as the adapter was trained, where nothing else is asked for
    if "prompt_format" in args:
        prompting = replace(prompting, format=config.prompt_format)
    if "chat_template_kwargs" in args:
        prompting = replace(prompting, variables=config.chat_template_kwargs)
    prompt = prompting.ids(tokenizer, text, args.system)
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_sampler

    sampler = make_sampler(temp=args.temp)
    for part in stream_generate(
        model, tokenizer, prompt, max_tokens=args.max_tokens, sampler=sampler
    ):
        print(part.text, end="", flush=True)
    print()
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt == "-" or args.prompt_file == "-":
        text = sys.stdin.read()
    elif args.prompt_file is not None:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the prompt {args.prompt_file}: {error}") from None
    else:
        text = args.prompt
    if not text.strip():
        raise InputError("the prompt is empty")
    return text


def _serve(args: argparse.Namespace) -> int:
    try:
        from mlx_segtrain.serving import app
        from mlx_segtrain.serving.settings import Settings
    except ImportError as error:
        raise InputError(
            f"serve needs packages that are not installed ({error.name}): pip install "
            '"mlx-segtrain[serve]".'
        ) from None
    from mlx_segtrain import hub
    from mlx_segtrain.commands.terminal import downloads

    with downloads() as show:
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
        )
    )
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from mlx_segtrain.commands.terminal import answer, show_checks
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
        raise InputError("no op, shape or implementation has a name that holds what was asked for")
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
