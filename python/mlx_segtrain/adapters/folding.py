"""An adapter folded into its base: weights that need no adapter any more, one shard at a time."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import InputError
from ..files import new_folder, sync, write_json, write_tensors
from ..lora import Adapter
from ..models.snapshot import Quantization, Snapshot
from .tying import check_base

#: Bytes of a file of weights, at most, unless one tensor is larger.
SHARD = 4 << 30
#: Share of an update that may be missing before the report warns.
LOST = 0.1
#: What a module that is changed may hold.
DENSE, QUANTIZED = {"weight", "bias"}, {"weight", "scales", "biases", "bias"}
#: What of a model's folder is copied: no weights of other formats.
NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
#: Keys of a quantization in config.json that are no module's.
COMMON = ("group_size", "bits", "mode")


@dataclass(frozen=True)
class Folded:
    """What became of a linear's update. Norms are roots of sums of squares.

    W is the base's weight, ΔW the update, W' what was written. `lost` is the share of ΔW that W'
    has not, 1 − ⟨W' − W, ΔW⟩ / ‖ΔW‖²: 0 if all of it is there, 1 if nothing. `error` is what
    rounding did besides, ‖W' − (W + ΔW)‖ / ‖ΔW‖: noise, which a model bears better than a loss.
    """

    path: str
    bits: int | None  #: of the folded weight; None: not quantized
    update: float
    weight: float
    lost: float
    error: float


@dataclass(frozen=True)
class Report:
    """A snapshot that was written, and what it has of the adapter."""

    path: Path
    linears: list[Folded]
    untouched: int  #: tensors that are bit for bit those of the base
    size: int  #: bytes of all weights

    @property
    def swallowed(self) -> list[Folded]:
        """Linears of which the folded weight misses more than a tenth of the update."""
        return [own for own in self.linears if not own.lost < LOST]

    @property
    def lost(self) -> float:
        """The share of the whole update that is missing."""
        total = sum(own.update**2 for own in self.linears)
        return sum(own.lost * own.update**2 for own in self.linears) / total if total else 0.0


def fold(
    adapter: Adapter,
    model_dir: Path,
    out: Path,
    *,
    dequantize: bool = False,
    bits: int | None = None,
    dtype: mx.Dtype | None = None,
    on_linear: Callable[[Folded], None] = lambda own: None,
) -> Report:
    """Writes the base with the adapter in its weights, a model folder that mlx-lm loads.

    Quantized linears are quantized again as they were, or with so many `bits`; with `dequantize`
    the whole model is dense afterwards, in `dtype` or that in which the base computes. What the
    adapter does not touch is copied bit for bit. One file of weights is in memory at a time.
    InputError if the two do not fit each other.
    """
    if dequantize and bits is not None:
        raise InputError("--dequantize and --bits contradict each other: give one of them.")
    if dtype is not None and not dequantize:
        raise InputError("--dtype is of weights that --dequantize makes: give both.")
    if bits not in (None, 2, 3, 4, 5, 6, 8):
        raise InputError(f"--bits is {bits}: MLX quantizes to 2, 3, 4, 5, 6 or 8.")
    base = Snapshot(model_dir, whole=True)
    check_base(adapter, base)
    linears = linears_of(adapter, base)
    if bits is not None and not any(map(base.quantization, linears)):
        raise InputError(f"{model_dir} is not quantized where the adapter is: leave --bits out.")
    found: list[Folded] = []
    untouched = 0
    with new_folder(out) as aside:
        writer = _Writer(aside)
        config = dict(base.config)
        for path, module in _modules(base):
            how = base.quantization(path) if dequantize or path in linears else None
            if path in linears or how is not None:
                _check(base, path, module, how is not None)
            if path in linears:
                kept = None if dequantize else _with_bits(how, bits)
                name = linears[path]
                module, own = _folded(base, adapter, name, path, module, how, kept, dtype)
                found.append(own)
                on_linear(own)
                if kept is not None:
                    _tell(config, path, kept)
            elif how is not None:
                dense = _dense(module, how, dtype or _dtype(base, module))
                module = {"weight": dense, **_bias(module)}
            else:
                untouched += len(module)
            writer.add({f"{path}.{name}" if path else name: x for name, x in module.items()})
        size = writer.close()
        if dequantize:
            for key in ("quantization", "quantization_config"):
                config.pop(key, None)
        for file in sorted(base.folder.iterdir()):
            other = file.name in ("config.json", "README.md") or file.name.endswith(NOT_COPIED)
            if file.is_file() and not other:
                shutil.copyfile(file, aside / file.name)
        write_json(aside / "config.json", config)
    return Report(out, found, untouched, size)


def linears_of(adapter: Adapter, base: Snapshot) -> dict[str, str]:
    """The adapter's name of each linear, by the base's; InputError if one is not there."""
    found: dict[str, str] = {}
    for name in adapter.tensors:
        path = base.spelled(name)
        if path is None:
            raise InputError(
                f"'{name}' is no linear of {base.folder} as its files name them: it is of another "
                "model, or this one is not in mlx-lm's form (mlx_lm.convert)."
            )
        if path in found:
            raise InputError(f"the adapter holds two updates of '{path}': remove one.")
        found[path] = name
    return found


def _modules(base: Snapshot) -> Iterator[tuple[str, dict[str, mx.array]]]:
    """Path and tensors of each module, in the order of the files; read when they are used."""
    files: dict[str, dict[str, Path]] = {}
    for file, header in base.headers.items():
        for name in header:
            path, _, leaf = name.rpartition(".")
            files.setdefault(path, {})[leaf] = file
    opened: dict[Path, Any] = {}  # one at a time, or two where a module lies in both

    def take(path: str) -> dict[str, mx.array]:
        found: dict[str, mx.array] = {}
        for leaf, file in files[path].items():
            if file not in opened:
                opened[file] = mx.load(str(file))
            found[leaf] = opened[file].pop(f"{path}.{leaf}" if path else leaf)
            if not opened[file]:
                del opened[file]
        return found

    # Each file is read once: a module goes with its first tensor.
    for path in sorted(files, key=lambda path: (next(iter(files[path].values())), path)):
        yield path, take(path)


def _check(base: Snapshot, path: str, module: Mapping[str, mx.array], quantized: bool) -> None:
    """InputError if a module that is changed is more than a weight, quantized by MLX or not."""
    more = sorted(set(module) - (QUANTIZED if quantized else DENSE))
    if more or not (quantized or mx.issubdtype(module["weight"].dtype, mx.floating)):
        what = f"has {', '.join(more)}" if more else f"is {module['weight'].dtype}"
        raise InputError(
            f"'{path}' of {base.folder} {what}, which is not folded: convert the model first "
            "(mlx_lm.convert)."
        )


def _with_bits(how: Quantization | None, bits: int | None) -> Quantization | None:
    """A quantization with so many bits; MLX has a choice of them in the affine mode alone."""
    if how is None or bits is None:
        return how
    return replace(how, bits=bits) if how.mode == "affine" else Quantization(32, bits, "affine")


def _bias(module: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """What a module has beside its weight: a bias that is added."""
    return {"bias": module["bias"]} if "bias" in module else {}


def _dense(module: Mapping[str, mx.array], how: Quantization | None, dtype: mx.Dtype) -> mx.array:
    """The weight of a module that is quantized so, or not, in this dtype."""
    weight, scales, biases = module["weight"], module.get("scales"), module.get("biases")
    if how is None or scales is None:
        return weight.astype(dtype)
    if biases is not None:  # MLX computes in their dtype, whichever is asked for
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    options: Any = asdict(how)
    return mx.dequantize(weight, scales, biases, **options, dtype=dtype)


def _dtype(base: Snapshot, module: Mapping[str, mx.array]) -> mx.Dtype:
    """In which the base computes with a quantized module."""
    scales = module["scales"].dtype
    if mx.issubdtype(scales, mx.floating):
        return scales
    text = base.config.get("text_config") or base.config
    return getattr(mx, str(text.get("torch_dtype") or text.get("dtype") or "bfloat16"), mx.bfloat16)


def _folded(
    base: Snapshot,
    adapter: Adapter,
    name: str,
    path: str,
    module: Mapping[str, mx.array],
    how: Quantization | None,
    kept: Quantization | None,
    dtype: mx.Dtype | None,
) -> tuple[dict[str, mx.array], Folded]:
    """The module, which is quantized so, with the update in its weight and quantized as is to be
    `kept`; and how much of the update is there."""
    bits = None if kept is None else kept.bits
    before = _dense(module, how, mx.float32)
    wanted = _updated(adapter, name, before, path)
    delta = wanted - before
    size = _norm(delta)
    if size == 0 and how == kept and dtype is None:
        return dict(module), Folded(path, bits, 0.0, _norm(before), 0.0, 0.0)
    chosen = dtype or (module["weight"].dtype if how is None else _dtype(base, module))
    new = {"weight": wanted.astype(chosen), **_bias(module)}
    if kept is not None:
        options: Any = asdict(kept)
        parts: Any = mx.quantize(new["weight"], **options)
        new |= dict(zip(("weight", "scales", "biases"), parts, strict=False))
    after = _dense(new, kept, mx.float32)
    square = max(size * size, 1e-30)
    lost = 1 - float(((after - before) * delta).sum()) / square if size else 0.0
    error = _norm(after - wanted) / max(size, 1e-15) if size else 0.0
    mx.eval(new)
    return new, Folded(path, bits, size, _norm(before), lost, error)


def _norm(x: mx.array) -> float:
    return float(mx.sqrt(mx.square(x).sum()))


def _updated(adapter: Adapter, name: str, weight: mx.array, path: str) -> mx.array:
    """W + ΔW in float32: [out, in], of an embedding [V, H], of experts [E, out, in]."""
    a, b = adapter.tensors[name]
    if a.ndim == 3:
        delta = b @ a
    elif path.endswith("embed_tokens"):
        delta = a @ b
    else:
        delta = (a @ b).T
    if delta.shape != weight.shape:
        raise InputError(
            f"'{name}' has an update of {delta.shape}, but the model's weight is {weight.shape}: "
            "it was trained on another model."
        )
    new = weight + adapter.scales[name] * delta
    more = adapter.more.get(name)
    return new if more is None else adapter.kind.runs.dense(new, more)


def _tell(config: dict[str, Any], path: str, how: Quantization) -> None:
    """Says in config.json how a module is quantized, unless that follows from the rest."""
    for key in ("quantization", "quantization_config"):
        whole = config.get(key)
        if isinstance(whole, dict):
            common = {"mode": "affine", **{name: whole[name] for name in COMMON if name in whole}}
            if path in whole or asdict(how) != common:
                config[key] = {**whole, path: asdict(how)}


class _Writer:
    """Files of weights of at most SHARD bytes, and their index."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pending: dict[str, mx.array] = {}
        self.files: list[list[str]] = []
        self.size = 0

    def add(self, tensors: Mapping[str, mx.array]) -> None:
        more = sum(x.nbytes for x in tensors.values())
        if self.pending and sum(x.nbytes for x in self.pending.values()) + more > SHARD:
            self._write()
        self.pending.update(tensors)
        self.size += more

    def _write(self) -> None:
        file = self.folder / f"{len(self.files) + 1}.safetensors"
        write_tensors(file, self.pending, {"format": "mlx"})
        sync(file)
        self.files.append(list(self.pending))
        self.pending = {}
        mx.clear_cache()

    def close(self) -> int:
        """Gives the files their names, of which each tells the number of all; bytes of all."""
        self._write()
        n = len(self.files)
        where = {}
        for i, names in enumerate(self.files, 1):
            name = "model.safetensors" if n == 1 else f"model-{i:05d}-of-{n:05d}.safetensors"
            (self.folder / f"{i}.safetensors").rename(self.folder / name)
            where |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(where.items()))}
        write_json(self.folder / "model.safetensors.index.json", index)
        return self.size
