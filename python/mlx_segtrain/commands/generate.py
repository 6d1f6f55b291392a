"""The command generate: generates a response to a single prompt."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_segtrain.commands.flags import (
    WITH_ADAPTER,
    Parser,
    add_flags,
    count,
    finite,
    number,
    temperature,
    whole,
)
from mlx_segtrain.commands.runs import config_of
from mlx_segtrain.errors import InputError, named_reason

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

    from mlx_segtrain.config import TrainConfig
    from mlx_segtrain.data import Prompting
    from mlx_segtrain.generation.decoding import Options

probability = number("a number from 0 to 1", lambda x: 0 <= x <= 1)
above_0 = number("a number above 0", lambda x: 0 < x < math.inf)
#: Sampling options besides the temperature, named as in requests to the server.
DRAWING: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "top_p": (
        probability,
        "X",
        "sample only from the most likely tokens whose probabilities add up to X",
    ),
    "top_k": (count(0), "N", "sample only from the N most likely tokens; 0 means all tokens"),
    "min_p": (
        probability,
        "X",
        "exclude tokens whose probability is less than X times that of the most likely token",
    ),
    "repetition_penalty": (
        above_0,
        "X",
        "penalty on tokens that are already in the prompt or the answer; 1 turns it off",
    ),
    "presence_penalty": (
        finite,
        "X",
        "number to subtract from the logit of each token that is already in the answer",
    ),
    "frequency_penalty": (
        finite,
        "X",
        "number to subtract from a token's logit for each occurrence of the token in the answer",
    ),
    "seed": (whole, "N", "seed for sampling: the same seed gives the same answer"),
}
#: Options that have no effect with greedy decoding.
ONLY_DRAWN = ("top_p", "top_k", "min_p", "seed")


def add_command(command: Callable[..., Parser]) -> None:
    """Adds the command. `command(name, run, text)` creates its parser."""
    added = command(
        "generate", _generate, "answer a prompt with a model, with or without an adapter"
    )
    add_flags(added, ("model_dir",), required=True)
    add_flags(added, ("adapter_path",), text=WITH_ADAPTER)
    add_flags(added, ("prompt_format", "chat_template_kwargs"))
    prompt = added.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt", metavar="TEXT", help="prompt, or - to read the prompt from standard input"
    )
    prompt.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="file that contains the prompt, or - for standard input",
    )
    add_sampling(added)


def add_sampling(parser: Parser) -> None:
    """Adds the flags for sampling and for the system message."""
    parser.add_argument("--system", metavar="TEXT", help="system message")
    group = parser.group("sampling")
    text = "maximum number of tokens to generate. Default: 256."
    group.add_argument("--max-tokens", type=count(1), default=256, metavar="N", help=text)
    group.add_argument(
        "--temp",
        "--temperature",
        dest="temp",
        type=temperature,
        default=0.0,
        metavar="X",
        help="sampling temperature; 0 means greedy decoding. Default: 0.",
    )
    for name, (kind, metavar, text) in DRAWING.items():
        option = "--" + name.replace("_", "-")
        # The prefix avoids a conflict with the configuration's field `seed`.
        group.add_argument(option, dest=f"draw_{name}", type=kind, metavar=metavar, help=text)


def options_of(args: argparse.Namespace) -> Options:
    """Returns the sampling options set by flags. Raises InputError for an option that has no
    effect."""
    from mlx_segtrain.generation.decoding import Options

    given = {
        name: value for name in DRAWING if (value := getattr(args, f"draw_{name}")) is not None
    }
    for name in given:
        if args.temp == 0 and name in ONLY_DRAWN:
            own = "--" + name.replace("_", "-")
            raise InputError(
                f"{own} has no effect at temperature 0 (greedy decoding): set --temp above 0"
            )
    return Options(args.max_tokens, args.temp, **given)


def stream(
    model: Any, tokenizer: Any, prompt: list[int], options: Options, known: int = 0, **more: Any
) -> Iterator[GenerationResponse]:
    """Yields the parts of a completion, which is sampled in the same way as on the server. `more`
    is passed to mlx-lm's stream_generate. If `more` contains a prompt cache, the cache must contain
    the first `known` tokens of the prompt."""
    from mlx_lm.generate import stream_generate

    from mlx_segtrain.generation.decoding import Choice, first_key, processor

    change = processor(options, prompt)
    if change is not None:
        more["logits_processors"] = [lambda tokens, logits: change(tokens[-1:], logits)]
    yield from stream_generate(
        model,
        tokenizer,
        prompt[known:],
        max_tokens=options.max_tokens,
        sampler=Choice([options], [first_key(options)]),
        **more,
    )


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the common prefix of two sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _generate(args: argparse.Namespace) -> int:
    config = config_for(args)
    text, options = _prompt(args), options_of(args)
    import mlx_segtrain
    from mlx_segtrain import hub
    from mlx_segtrain.commands.terminal import waiting

    with waiting() as show:
        adapter = hub.adapter(config.adapter_path, show) if "adapter_path" in args else None
        model, tokenizer = mlx_segtrain.load(config.model_dir, adapter, show)
    with rendering():
        prompt = prompting_for(adapter, args, config).ids(tokenizer, text, args.system)
    for part in stream(model, tokenizer, prompt, options):
        print(part.text, end="", flush=True)
    print()
    return 0


@contextmanager
def rendering() -> Iterator[None]:
    """Raises InputError for every exception of a chat template in the context."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a template may raise any exception
        raise InputError(
            f"the chat template cannot render these messages ({named_reason(error)})."
        ) from error


def config_for(args: argparse.Namespace) -> TrainConfig:
    """Returns the configuration. Raises InputError if --system is given with --prompt-format raw,
    which uses no chat template."""
    config = config_of(args, "data_dir", "adapter_path")
    if args.system is not None and config.prompt_format == "raw":
        raise InputError("--system requires the chat template: leave out --prompt-format raw")
    return config


def prompting_for(adapter: Path | None, args: argparse.Namespace, config: TrainConfig) -> Prompting:
    """Returns the prompt format with which the adapter was trained, unless flags set another
    format."""
    from mlx_segtrain.adapters import prompting_of

    prompting = prompting_of(adapter)
    if "prompt_format" in args:
        prompting = replace(prompting, format=args.prompt_format)
    if "chat_template_kwargs" in args:
        prompting = replace(prompting, variables=config.chat_template_kwargs)
    return prompting


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt == "-" or args.prompt_file == "-":
        text = sys.stdin.read()
    elif args.prompt_file is not None:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the prompt file {args.prompt_file}: {error}") from None
    else:
        text = args.prompt
    if not text.strip():
        raise InputError("the prompt is empty")
    return text
