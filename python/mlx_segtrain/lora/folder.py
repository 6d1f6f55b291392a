"""Opens adapter folders: finds the weights, reads the configuration, and rejects unsupported kinds
of adapters."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from .. import files, hub
from ..errors import InputError, shown, word
from ..files import read_json, sha256
from .adapter import FACTORS, KINDS, LORA, Kind

WEIGHTS, UNPADDED = "adapters.safetensors", "adapters_unpadded.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
CONFIG, OPTIQ_CONFIG = "adapter_config.json", "optiq_lora_config.json"
README = "README.md"
#: The values of PEFT's init_lora_weights that leave the base unchanged. With other values (PiSSA,
#: OLoRA, CorDA, LoftQ, LoRA-GA), part of the base weights may have been moved into the factors, so
#: the factors alone are not the update.
PLAIN_STARTS = ("none", "true", "false", "gaussian", "orthogonal", "mica", "eva")


@dataclass(frozen=True)
class Folder:
    """The folder of an adapter of a supported kind."""

    weights: Path
    config_file: Path
    config: dict[str, Any]

    @property
    def peft(self) -> bool:
        """Whether the factors have PEFT's names and are therefore transposed relative to ours."""
        return self.weights.name == PEFT_WEIGHTS

    @property
    def kind(self) -> Kind:
        named, config = self.config.get("fine_tune_type"), self.config
        return next((k for k in KINDS if named == k.word or config.get(f"use_{k.word}")), LORA)

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of the arrays in each linear layer's update."""
        return (*FACTORS, *filter(None, [self.kind.array]))

    @property
    def tied(self) -> bool | None:
        """For adapters of an embedding, whether the base model uses this embedding as its head;
        None if this is unknown."""
        tied = ours(self.config).get("tied")
        return tied if isinstance(tied, bool) else None

    @property
    def base(self) -> str:
        """The base model that the adapter names, or "" if it names none."""
        return str(self.config.get("base_model_name_or_path") or self.config.get("model") or "")

    @property
    def base_folder(self) -> Path | None:
        """The folder of the base model that the adapter names. It may be a snapshot in the hub's
        cache. None if the folder does not exist or must not be read."""
        name = self.base.replace("\0", "")
        with suppress(OSError):  # the name may be too long for a path
            path = hub.cached(name) or Path(name)
            if name and files.may_follow(path) and (path / "config.json").is_file():
                return path
        return None


def open_folder(path: "str | Path | Folder") -> Folder:
    """Opens an adapter folder. For adapters written by our runs, chooses the weight file in which
    each layer has its own rank. If `path` is already a Folder, it is returned unchanged.

    Raises InputError if a file is missing, if the configuration is unreadable, or if the kind of
    adapter is not supported.
    """
    if isinstance(path, Folder):
        return path
    path = Path(path).expanduser()
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: pass the path of an adapter's folder.")
    weights = [path / name for name in (WEIGHTS, PEFT_WEIGHTS) if (path / name).is_file()]
    if not weights:
        raise InputError(
            f"{path} contains neither {WEIGHTS} nor {PEFT_WEIGHTS}, so it is not an adapter."
        )
    if not (path / CONFIG).is_file():
        raise InputError(
            f"{path} contains no {CONFIG}, which specifies the scale, so it is not an adapter."
        )
    config = read_json(path / CONFIG)
    if _is_unpadded(path, config):
        weights.insert(0, path / UNPADDED)
    folder = Folder(weights[0], path / CONFIG, config)
    _check_kind(folder)
    return folder


def _is_unpadded(path: Path, config: Mapping[str, Any]) -> bool:
    """Returns whether the file with unpadded factors still matches the file with padded factors,
    which another tool may have trained further."""
    own, file = ours(config), path / WEIGHTS
    if not (own and (path / UNPADDED).is_file() and file.is_file()):
        return False
    try:
        facts = file.stat()
        if facts.st_size > (1 << 20) and 512 * facts.st_blocks < facts.st_size // 2:
            return False  # a sparse file is not a trained adapter, and may take hours to read
        return own.get("padded") == _digest(file, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    except OSError:
        return False


@lru_cache(maxsize=1000)
def _digest(file: Path, *state: int) -> str:
    """Returns the digest of a file. Digests are cached, because the same folders are opened
    often."""
    return sha256(file)


def ours(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that our runs record in an adapter's configuration, or {} for other
    adapters."""
    own = config.get("segtrain")
    return own if isinstance(own, dict) else {}


def section(file: Path, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Returns the object at `key`, or {} if there is none."""
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise InputError(f"{file}: {key} must be a JSON object; got {shown(found)}.")
    return found


def number(file: Path, values: Mapping[str, Any], key: str) -> float | None:
    """Returns the number at `key`, or None if there is none."""
    value = values.get(key)
    if value is None:
        return None
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    if not usable or not abs(value) < 1e30:
        raise InputError(f"{file}: {key} must be a finite number; got {shown(value)}.")
    return float(value)


def _check_kind(folder: Folder) -> None:
    """Raises InputError if the adapter contains anything other than updates of supported kinds for
    linear layers and embeddings."""
    config = folder.config
    kind, start = config.get("fine_tune_type"), str(config.get("init_lora_weights")).lower()
    bias, peft_type = config.get("bias") or "none", config.get("peft_type") or "LORA"
    refused = {
        "fully trained weights (fine_tune_type full)": kind == "full",
        f"adapters of peft_type {word(peft_type)}": peft_type != "LORA",
        f"adapters with biases (bias {word(bias)})": bias != "none",
        "adapters with whole modules (modules_to_save)": config.get("modules_to_save"),
        "adapters for bare parameters (target_parameters)": config.get("target_parameters"),
        "adapters that apply to only part of a text (aLoRA)": config.get("alora_invocation_tokens"),
        "adapters with a different scale for each layer (Unsloth)": config.get(
            "unsloth_mlx_requires_unsloth_loader"
        ),
        "adapters for repeated layers (layer_replication)": config.get("layer_replication"),
        f"adapters that may need a modified base (init_lora_weights {word(start)})": start
        not in PLAIN_STARTS,
    }
    for what, holds in refused.items():
        if holds:
            refuse(folder, what)


def refuse(folder: Folder, what: str) -> NoReturn:
    """Raises the InputError for an adapter of an unsupported kind; `what` names the unsupported
    kind."""
    kinds = " and ".join(kind.name for kind in (LORA, *KINDS))
    raise InputError(
        f"{what} are not supported (only {kinds} adapters are): merge {folder.weights.parent} into "
        "its model with the tool that created the adapter."
    )
