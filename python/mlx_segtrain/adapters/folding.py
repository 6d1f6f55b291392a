"""Merges an adapter into its base model, one weight file at a time."""

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

#: Maximum size of a weight file, in bytes. A file may exceed it only to store a single tensor that
#: is larger.
SHARD = 4 << 30
#: The report warns if more than this share of an update is lost.
LOST = 0.1
#: The tensors that a dense or a quantized module may contain. An update cannot be merged into a
#: module that has other tensors.
DENSE, QUANTIZED = {"weight", "bias"}, {"weight", "scales", "biases", "bias"}
#: Suffixes of weight files in any format. These files are not copied from the base model's folder.
NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
#: Keys of the `quantization` section of config.json that are not names of modules.
COMMON = ("group_size", "bits", "mode")


@dataclass(frozen=True)
class Folded:
    """How much of a layer's update the merged weight contains. `update` and `weight` are the
    Frobenius norms of ΔW and W.

    W is the weight of the base model, ΔW is the update, and W' is the weight that was written.
    `lost` is the share of ΔW that W' lacks, 1 − ⟨W' − W, ΔW⟩ / ‖ΔW‖²: it is 0 if W' contains the
    whole update, and 1 if W' contains none of it. `error` is the rounding error relative to the
    update, ‖W' − (W + ΔW)‖ / ‖ΔW‖. A model tolerates rounding noise better than a lost update.
    """

    path: str
    bits: int | None  #: bits of the merged weight; None if it is not quantized
    update: float
    weight: float
    lost: float
    error: float


@dataclass(frozen=True)
class Report:
    """The folder of a merged model, and how much of the adapter its weights contain."""

    path: Path
    linears: list[Folded]
    untouched: int  #: number of tensors that are bit-identical to those of the base
    size: int  #: bytes of all weights

    @property
    def swallowed(self) -> list[Folded]:
        """The layers that lost at least a tenth of their update in the merge."""
        return [own for own in self.linears if not own.lost < LOST]

    @property
    def lost(self) -> float:
        """The share of the whole update that is lost."""
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
    """Merges the adapter into the weights of the base model, and writes the result as a folder that
    mlx-lm can load.

    Quantized layers are quantized again, either with their previous settings or with `bits` bits
    per weight. With `dequantize`, the whole model is dequantized to the dtype in which the base
    model computes or, if `dtype` is given, all of its tensors are converted to this dtype.
    Otherwise, tensors that the merge does not change are bit-identical to those of the base model.
    Only one weight file is in memory at a time. Raises InputError if the adapter does not fit the
    base model.
    """
    if dequantize and bits is not None:
        raise InputError("--dequantize and --bits contradict each other: use only one of them.")
    if dtype is not None and not dequantize:
        raise InputError("--dtype has no effect without --dequantize: add --dequantize.")
    if bits not in (None, 2, 3, 4, 5, 6, 8):
        raise InputError(f"--bits must be 2, 3, 4, 5, 6 or 8; got {bits}.")
    base = Snapshot(model_dir, whole=True)
    check_base(adapter, base)
    linears = linears_of(adapter, base)
    if bits is not None and not any(map(base.quantization, linears)):
        raise InputError(
            f"the layers that the adapter changes in {model_dir} are not quantized: leave "
            "--bits out."
        )
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
            if dtype is not None:
                module = {name: _cast(x, dtype) for name, x in module.items()}
            writer.add({f"{path}.{name}" if path else name: x for name, x in module.items()})
        size = writer.close()
        if dequantize:
            for key in ("quantization", "quantization_config"):
                config.pop(key, None)
        if dtype is not None:
            _set_dtype(config, dtype)
        for file in sorted(base.folder.iterdir()):
            other = file.name in ("config.json", "README.md") or file.name.endswith(NOT_COPIED)
            if file.is_file() and not other:
                shutil.copyfile(file, aside / file.name)
        write_json(aside / "config.json", config)
    return Report(out, found, untouched, size)


def linears_of(adapter: Adapter, base: Snapshot) -> dict[str, str]:
    """Returns a dict that maps the path of each adapted layer in the base model's files to its path
    in the adapter. Raises InputError if the base model lacks a layer."""
    found: dict[str, str] = {}
    for name in adapter.tensors:
        path = base.spelled(name)
        if path is None:
            raise InputError(
                f"'{name}' is not a layer in the files of {base.folder}: the adapter belongs to "
                "another model, or this model is not in mlx-lm's format (convert it with "
                "mlx_lm.convert)."
            )
        if path in found:
            raise InputError(f"the adapter contains two updates of '{path}': remove one.")
        found[path] = name
    return found


def _modules(base: Snapshot) -> Iterator[tuple[str, dict[str, mx.array]]]:
    """Yields the path and the tensors of each module, in the order of the files. A tensor is loaded
    when it is used."""
    files: dict[str, dict[str, Path]] = {}
    for file, header in base.headers.items():
        for name in header:
            path, _, leaf = name.rpartition(".")
            files.setdefault(path, {})[leaf] = file
    opened: dict[Path, Any] = {}  # at most two: a module may be split between files

    def take(path: str) -> dict[str, mx.array]:
        found: dict[str, mx.array] = {}
        for leaf, file in files[path].items():
            if file not in opened:
                opened[file] = mx.load(str(file))
            found[leaf] = opened[file].pop(f"{path}.{leaf}" if path else leaf)
            if not opened[file]:
                del opened[file]
        return found

    # Modules are sorted by the file of their first tensor, so that each file is read only once.
    for path in sorted(files, key=lambda path: (next(iter(files[path].values())), path)):
        yield path, take(path)


def _check(base: Snapshot, path: str, module: Mapping[str, mx.array], quantized: bool) -> None:
    """Raises InputError unless the module consists of a dense or MLX-quantized weight and,
    optionally, a bias."""
    more = sorted(set(module) - (QUANTIZED if quantized else DENSE))
    if more or not (quantized or mx.issubdtype(module["weight"].dtype, mx.floating)):
        what = (
            f"has unsupported tensors ({', '.join(more)})"
            if more
            else f"has dtype {module['weight'].dtype}"
        )
        raise InputError(
            f"the adapter cannot be merged into '{path}' of {base.folder}, because this module "
            f"{what}: convert the model first (mlx_lm.convert)."
        )


def _with_bits(how: Quantization | None, bits: int | None) -> Quantization | None:
    """Returns `how` with this number of bits. The mode becomes MLX's affine mode, because the other
    modes have a fixed number of bits."""
    if how is None or bits is None:
        return how
    return replace(how, bits=bits) if how.mode == "affine" else Quantization(32, bits, "affine")


def _bias(module: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Returns the bias of a module as a dict, which is empty if the module has no bias."""
    return {"bias": module["bias"]} if "bias" in module else {}


def _dense(module: Mapping[str, mx.array], how: Quantization | None, dtype: mx.Dtype) -> mx.array:
    """Returns the weight of a module as a dense array of this dtype. `how` is the quantization of
    the weight, or None."""
    weight, scales, biases = module["weight"], module.get("scales"), module.get("biases")
    if how is None or scales is None:
        return weight.astype(dtype)
    if biases is not None:  # MLX ignores `dtype` and computes in the dtype of the scales
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    options: Any = asdict(how)
    return mx.dequantize(weight, scales, biases, **options, dtype=dtype)


def _dtype(base: Snapshot, module: Mapping[str, mx.array]) -> mx.Dtype:
    """Returns the dtype in which the base model computes with a quantized module."""
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
    """Merges the update into the module's weight. Returns the merged module, quantized as in
    `kept`, and a report on how much of the update its weight contains."""
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


def _cast(x: mx.array, dtype: mx.Dtype) -> mx.array:
    return x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x


def _set_dtype(config: dict[str, Any], dtype: mx.Dtype) -> None:
    """Sets the dtype in which other programs load the model: `torch_dtype`, or `dtype` in newer
    files."""
    found = dict.fromkeys(("torch_dtype", "dtype"), str(dtype).removeprefix("mlx.core."))
    config |= found
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], **found}


def _norm(x: mx.array) -> float:
    return float(mx.sqrt(mx.square(x).sum()))


def _updated(adapter: Adapter, name: str, weight: mx.array, path: str) -> mx.array:
    """Returns W + ΔW in float32. Its shape is [out, in] for a linear layer, [V, H] for an
    embedding, or [E, out, in] for experts."""
    a, b = adapter.tensors[name]
    if a.ndim == 3:
        delta = b @ a
    elif path.endswith("embed_tokens"):
        delta = a @ b
    else:
        delta = (a @ b).T
    if delta.shape != weight.shape:
        raise InputError(
            f"'{name}' has an update of shape {delta.shape}, but the model's weight has shape "
            f"{weight.shape}: the adapter was trained on another model."
        )
    new = weight + adapter.scales[name] * delta
    more = adapter.more.get(name)
    return new if more is None else adapter.kind.runs.dense(new, more)


def _tell(config: dict[str, Any], path: str, how: Quantization) -> None:
    """Records the quantization of a module in config.json, unless config.json already sets the
    same quantization for all modules."""
    for key in ("quantization", "quantization_config"):
        whole = config.get(key)
        if isinstance(whole, dict):
            common = {"mode": "affine", **{name: whole[name] for name in COMMON if name in whole}}
            if path in whole or asdict(how) != common:
                config[key] = {**whole, path: asdict(how)}


class _Writer:
    """Writes weight files of at most SHARD bytes each, and their index."""

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
        """Writes the remaining tensors and the index. Then renames the files, because their final
        names contain the number of files. Returns the number of bytes of all tensors."""
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
