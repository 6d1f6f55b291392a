"""The command generate: one prompt, one answer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_segtrain.commands.flags import Parser, add_flags, count, temperature
from mlx_segtrain.commands.runs import UNUSED, config_of
from mlx_segtrain.errors import InputError

if TYPE_CHECKING:
    from mlx_segtrain.data import Prompting


def add_command(command: Callable[..., Parser]) -> None:
    """Adds it to a parser; `command(name, run, text)` makes one."""
    added = command("generate", _generate, "answer a prompt, with or without an adapter")
    add_flags(added, ("model_dir",), required=True)
    add_flags(added, ("adapter_path", "prompt_format", "chat_template_kwargs"))
    prompt = added.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt, or - to read it from stdin")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file with the prompt, - is stdin")
    add_sampling(added)


def add_sampling(parser: Parser) -> None:
    """How an answer is drawn, and what comes before the prompt."""
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    text = "max new tokens. Default: 256."
    parser.add_argument("--max-tokens", type=count(1), default=256, metavar="N", help=text)
    parser.add_argument(
        "--temp",
        type=temperature,
        default=0.0,
        metavar="X",
        help="temperature; 0 is greedy decoding. Default: 0.",
    )


def _generate(args: argparse.Namespace) -> int:
    config = config_of(args, data_dir=UNUSED, adapter_path=getattr(args, "adapter_path", UNUSED))
    if args.system is not None and config.prompt_format == "raw":
        raise InputError("--system needs the chat template: leave out --prompt-format raw")
    text = _prompt(args)
    import mlx_segtrain
    from mlx_segtrain import hub
    from mlx_segtrain.commands.terminal import downloads

    with downloads() as show:
        adapter = hub.adapter(config.adapter_path, show) if "adapter_path" in args else None
        model, tokenizer = mlx_segtrain.load(config.model_dir, adapter, show)
    prompt = prompting_for(adapter, args).ids(tokenizer, text, args.system)
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_sampler

    sampler = make_sampler(temp=args.temp)
    for part in stream_generate(
        model, tokenizer, prompt, max_tokens=args.max_tokens, sampler=sampler
    ):
        print(part.text, end="", flush=True)
    print()
    return 0


def prompting_for(adapter: Path | None, args: argparse.Namespace) -> Prompting:
    """As the adapter was trained, where the flags say nothing else."""
    from mlx_segtrain.adapters import prompting_of

    prompting = prompting_of(adapter)
    if "prompt_format" in args:
        prompting = replace(prompting, format=args.prompt_format)
    if "chat_template_kwargs" in args:
        own = config_of(args, data_dir=UNUSED, adapter_path=UNUSED).chat_template_kwargs
        prompting = replace(prompting, variables=own)
    return prompting


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
