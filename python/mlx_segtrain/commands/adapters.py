"""Commands that make adapters and models of others: export, import, merge, adapters, convert."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_segtrain.errors import InputError
from mlx_segtrain.fields import place

if TYPE_CHECKING:
    from mlx_segtrain.adapters.conversion import Converted

MODEL = "its folder, or its name on the Hugging Face hub"
ADAPTERS = "their folders, or their names on the Hugging Face hub"
KINDS = ("float32", "bfloat16", "float16")


def add_commands(command: Callable[..., Any]) -> None:
    """Adds them to a parser; `command(name, run, text)` makes one."""
    added = command("export", _export, "write an adapter as PEFT, mlx-lm or llama.cpp reads it")
    added.add_argument("adapter", type=place, metavar="ADAPTER", help=MODEL)
    added.add_argument("--to", choices=("peft", "mlx-lm", "gguf"), required=True)
    _out(added, "the new adapter")
    _model(added, "the base. Default: the one that the adapter names, if it is there.")
    added.add_argument(
        "--names",
        choices=("text", "multimodal"),
        help="of PEFT: modules of the text model alone, or of one for text and images. Default: as "
        "the base's config.json says.",
    )
    added.add_argument("--dtype", choices=KINDS, default="float32", help="of the factors")
    added.add_argument("--json", action="store_true", help="print JSON")

    added = command("import", _import, "read an adapter of mlx-lm, PEFT, OptiQ or mlx-bun")
    added.add_argument("adapter", type=place, metavar="ADAPTER", help=MODEL)
    _out(added, "the new adapter")
    _model(added, "a model whose names the linears get. Default: as the adapter has them.")
    added.add_argument("--json", action="store_true", help="print JSON")

    added = command("merge", _merge, "add adapters to one, or fold them into their base")
    added.add_argument("adapters", type=place, nargs="+", metavar="ADAPTER", help=ADAPTERS)
    added.add_argument(
        "--weights", type=float, nargs="+", metavar="X", help="one for each. Default: 1."
    )
    added.add_argument(
        "--into", type=place, metavar="MODEL", help="the base whose weights take them up"
    )
    added.add_argument(
        "--dequantize", action="store_true", help="with --into: write a model that is dense"
    )
    added.add_argument(
        "--bits",
        type=int,
        metavar="N",
        help="with --into: bits of the linears that are adapted. Default: as they have.",
    )
    added.add_argument(
        "--dtype",
        choices=KINDS,
        help="with --dequantize: of its weights. Default: the base's.",
    )
    _out(added, "the new adapter or model")
    added.add_argument("--json", action="store_true", help="print JSON")

    added = command("adapters", _adapters, "list adapters, and whether a model can take them")
    added.add_argument("roots", type=Path, nargs="*", metavar="ROOT", help="default: this folder")
    _model(added, "the model in question")
    added.add_argument("--json", action="store_true", help="print JSON")

    added = command("convert", _convert, "quantize a model of the hub, or of a folder, for MLX")
    added.add_argument("model_dir", type=place, metavar="MODEL", help=MODEL)
    added.add_argument("--bits", type=int, choices=(2, 3, 4, 5, 6, 8), default=4, help="default: 4")
    added.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128),
        default=64,
        help="weights that share a scale. Default: 64.",
    )
    _out(added, "the new model")
    added.add_argument("--json", action="store_true", help="print JSON")


def _model(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--model", dest="model_dir", type=place, metavar="MODEL", help=what)


def _found(model: Path) -> Path:
    """The folder of a model that is named."""
    from mlx_segtrain import hub
    from mlx_segtrain.commands.terminal import downloads

    with downloads() as show:
        return hub.model(model, show)


def _adapter(adapter: Path) -> Path:
    """The folder of an adapter that is named."""
    from mlx_segtrain import hub
    from mlx_segtrain.commands.terminal import downloads

    with downloads() as show:
        return hub.adapter(adapter, show)


def _base(args: argparse.Namespace) -> Path | None:
    """The folder of --model, if that is given."""
    return None if args.model_dir is None else _found(args.model_dir)


def _out(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help=f"folder of {what}, not there yet"
    )


def _export(args: argparse.Namespace) -> int:
    from mlx_segtrain.adapters.conversion import export

    how = {"model_dir": _base(args), "names": args.names, "dtype": args.dtype}
    return _answer(export(_adapter(args.adapter), args.out, args.to, **how), args)


def _import(args: argparse.Namespace) -> int:
    from mlx_segtrain.adapters.conversion import import_

    return _answer(import_(_adapter(args.adapter), args.out, _base(args)), args)


def _convert(args: argparse.Namespace) -> int:
    from mlx_segtrain.commands.terminal import answer, show_made
    from mlx_segtrain.models.conversion import convert

    made = convert(_found(args.model_dir), args.out, bits=args.bits, group_size=args.group_size)
    return answer(made, show_made, args.json)


def _answer(done: Converted, args: argparse.Namespace) -> int:
    from mlx_segtrain.commands.terminal import answer, show_converted

    return answer(done, show_converted, args.json)


def _merge(args: argparse.Namespace) -> int:
    quantizes = args.dequantize or args.bits is not None or args.dtype is not None
    if args.into is None and quantizes:
        raise InputError("--dequantize, --bits and --dtype are for --into MODEL: give it too.")
    adapters = [*map(_adapter, args.adapters)]
    if args.into is None:
        from mlx_segtrain.adapters.merging import merge

        return _answer(merge(adapters, args.out, args.weights), args)
    from mlx_segtrain.adapters.conversion import DTYPES
    from mlx_segtrain.adapters.folding import fold
    from mlx_segtrain.adapters.merging import weighted
    from mlx_segtrain.commands.terminal import answer, show_fold

    base = _found(args.into)
    adapter = weighted(adapters, args.weights, base)
    how = {"dequantize": args.dequantize, "bits": args.bits, "dtype": DTYPES.get(args.dtype or "")}
    return answer(fold(adapter, base, args.out, **how), show_fold, args.json)


def _adapters(args: argparse.Namespace) -> int:
    from mlx_segtrain.adapters.discovery import adapters
    from mlx_segtrain.commands.terminal import answer, show_adapters

    found = adapters(args.roots or [Path(".")], _base(args))
    return answer(found, show_adapters, args.json)
