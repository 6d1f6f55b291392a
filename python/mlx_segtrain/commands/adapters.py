"""Commands that convert adapters and models, or list adapters: export, import, merge, adapters,
convert."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_segtrain import hub
from mlx_segtrain.errors import InputError
from mlx_segtrain.events import OnEvent
from mlx_segtrain.fields import place

if TYPE_CHECKING:
    from mlx_segtrain.adapters.conversion import Converted
    from mlx_segtrain.adapters.folding import Folded
    from mlx_segtrain.lora import Adapter

MODEL = "directory, or name on the Hugging Face hub"
ADAPTERS = "directories, or names on the Hugging Face hub"
KINDS = ("float32", "bfloat16", "float16")


def add_commands(command: Callable[..., Any]) -> None:
    """Adds the commands. `command(name, run, text)` creates the parser of each command."""
    added = command("export", _export, "export an adapter to PEFT, mlx-lm or GGUF", json=True)
    added.add_argument("adapter", type=place, metavar="ADAPTER", help=MODEL)
    added.add_argument(
        "--to", choices=("peft", "mlx-lm", "gguf"), required=True, help="format of the new adapter"
    )
    _out(added, "the new adapter")
    _model(
        added,
        "base model. Default: the model named in the adapter's files, if that model is on this "
        "machine.",
    )
    added.add_argument(
        "--names",
        choices=("text", "multimodal"),
        help="with --to peft: use the module names of a text model or of a multimodal model. "
        "Default: determined by the base model's config.json.",
    )
    added.add_argument(
        "--dtype",
        choices=KINDS,
        default="float32",
        help="dtype of the new adapter's weights. Default: float32.",
    )

    text = "convert an adapter from mlx-lm, PEFT, OptiQ or mlx-bun"
    added = command("import", _import, text, json=True)
    added.add_argument("adapter", type=place, metavar="ADAPTER", help=MODEL)
    _out(added, "the new adapter")
    _model(
        added,
        "model whose layer names to use in the new adapter. By default, the names in the given "
        "adapter are kept.",
    )

    added = command("merge", _merge, "merge adapters into one, or into their base model", json=True)
    added.add_argument("adapters", type=place, nargs="+", metavar="ADAPTER", help=ADAPTERS)
    added.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="X",
        help="one weight per adapter, in the order in which the adapters are given. Default: 1 for "
        "each.",
    )
    added.add_argument(
        "--into",
        type=place,
        metavar="MODEL",
        help="base model to merge the adapters into. By default, the result is an adapter.",
    )
    _model(
        added,
        "without --into: base model of the adapters. Default: the model named in their files, if "
        "that model is on this machine.",
    )
    added.add_argument(
        "--dequantize", action="store_true", help="with --into: write an unquantized model"
    )
    added.add_argument(
        "--bits",
        type=int,
        metavar="N",
        help="with --into: bits per weight in the merged layers. Default: the same as in the base "
        "model.",
    )
    added.add_argument(
        "--dtype",
        choices=KINDS,
        help="with --dequantize: dtype of the weights. Default: the dtype of the base model.",
    )
    _out(added, "the new adapter or model")

    text = "list adapters, and check whether they fit a model"
    added = command("adapters", _adapters, text, json=True)
    added.add_argument(
        "roots",
        type=Path,
        nargs="*",
        metavar="ROOT",
        help="directories to search for adapters. Default: the current directory.",
    )
    _model(added, "model to check the adapters against")

    added = command("convert", _convert, "quantize a model for MLX", json=True)
    added.add_argument("model_dir", type=place, metavar="MODEL", help=MODEL)
    added.add_argument(
        "--bits",
        type=int,
        choices=(2, 3, 4, 5, 6, 8),
        default=4,
        help="bits per weight. Default: 4.",
    )
    added.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128),
        default=64,
        help="number of weights that share a quantization scale. Default: 64.",
    )
    _out(added, "the new model")


def _model(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--model", dest="model_dir", type=place, metavar="MODEL", help=what)


def _folder(find: Callable[[Path, OnEvent], Path], path: Path) -> Path:
    """Returns the folder for a path or a name on the hub. `find`, which is hub.model or
    hub.adapter, may download it."""
    from mlx_segtrain.commands.terminal import waiting

    with waiting() as show:
        return find(path, show)


def _base(args: argparse.Namespace) -> Path | None:
    """Returns the folder of the model that --model names, or None if --model is not given."""
    return None if args.model_dir is None else _folder(hub.model, args.model_dir)


def _out(parser: argparse.ArgumentParser, what: str) -> None:
    text = f"output directory for {what}; must not exist yet"
    parser.add_argument("--out", type=place, metavar="DIR", required=True, help=text)


def _export(args: argparse.Namespace) -> int:
    from mlx_segtrain.adapters.conversion import export

    how = {"model_dir": _base(args), "names": args.names, "dtype": args.dtype}
    adapter = _folder(hub.adapter, args.adapter)
    return _answer(export(adapter, args.out, args.to, **how), args)


def _import(args: argparse.Namespace) -> int:
    from mlx_segtrain.adapters.conversion import import_

    return _answer(import_(_folder(hub.adapter, args.adapter), args.out, _base(args)), args)


def _convert(args: argparse.Namespace) -> int:
    from mlx_segtrain.commands.terminal import answer
    from mlx_segtrain.commands.views import show_made
    from mlx_segtrain.models.conversion import convert

    model = _folder(hub.model, args.model_dir)
    made = convert(model, args.out, bits=args.bits, group_size=args.group_size)
    return answer(made, show_made, args.json)


def _answer(done: Converted, args: argparse.Namespace) -> int:
    from mlx_segtrain.commands.terminal import answer
    from mlx_segtrain.commands.views import show_converted

    return answer(done, show_converted, args.json)


def _merge(args: argparse.Namespace) -> int:
    quantizes = args.dequantize or args.bits is not None or args.dtype is not None
    if args.into is None and quantizes:
        raise InputError(
            "--dequantize, --bits and --dtype have no effect without --into MODEL: add --into."
        )
    adapters = [_folder(hub.adapter, adapter) for adapter in args.adapters]
    if args.into is None:
        from mlx_segtrain.adapters.merging import merge

        return _answer(merge(adapters, args.out, args.weights, _base(args)), args)
    if args.model_dir is not None:
        raise InputError("--model has no effect with --into, which names the model: leave it out")
    from mlx_segtrain import events
    from mlx_segtrain.adapters.conversion import DTYPES
    from mlx_segtrain.adapters.folding import fold
    from mlx_segtrain.adapters.merging import weighted
    from mlx_segtrain.commands.terminal import answer, waiting
    from mlx_segtrain.commands.views import show_fold

    base = _folder(hub.model, args.into)
    adapter = weighted(adapters, args.weights, base)
    if not args.json and not args.quiet:
        _announce(adapter, adapters, args, base)
    how = {"dequantize": args.dequantize, "bits": args.bits, "dtype": DTYPES.get(args.dtype or "")}
    done = count(1)
    with waiting() as show:

        def tell(own: Folded) -> None:
            share = next(done) / len(adapter.tensors)
            show(events.stage("fold", share, f"merging: {share:.0%}, {own.path}", share=share))

        report = fold(adapter, base, args.out, **how, on_linear=tell)
    return answer(report, show_fold, args.json)


def _announce(adapter: Adapter, adapters: list[Path], args: argparse.Namespace, base: Path) -> None:
    """Announces the merge before it starts, because merging takes minutes."""
    from mlx_segtrain.commands.views import wide
    from mlx_segtrain.commands.words import hanging
    from mlx_segtrain.models.snapshot import Snapshot

    weights = args.weights or [1.0] * len(adapters)
    named = zip(weights, adapters, strict=True)
    sources = " + ".join(str(path) if x == 1 else f"{x:g} × {path}" for x, path in named)
    ranks = ", ".join(map(str, sorted(set(adapter.ranks.values()))))
    if args.dequantize:
        form = f"not quantized, {args.dtype or 'in the dtype of the base model'}"
    elif args.bits is not None:
        form = f"merged layers in {args.bits} bits, all others unchanged"
    else:
        form = "quantized like the base" if Snapshot(base).config.get("quantization") else "dense"
    for name, text in (
        ("adapter", f"{sources} ({len(adapter.tensors)} linear layers, rank {ranks})"),
        ("into", str(args.into)),
        ("weights", form),
        ("writes", str(args.out)),
    ):
        print(hanging(name, text, 9, wide().width), flush=True)
    print(flush=True)


def _adapters(args: argparse.Namespace) -> int:
    from mlx_segtrain.adapters.discovery import adapters
    from mlx_segtrain.commands.terminal import answer
    from mlx_segtrain.commands.views import show_adapters

    found = adapters(args.roots or [Path(".")], _base(args))
    return answer(found, show_adapters, args.json)
