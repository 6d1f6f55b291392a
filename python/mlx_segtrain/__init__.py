"""Long-context LoRA fine-tuning of quantized language models on one machine, through MLX.

    from mlx_segtrain import train, load, TrainConfig, segmented_value_and_grad

Names are imported on first use, so that `mlx-segtrain --help` does not wait for MLX.
"""

import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import TrainResult, train
    from .config import TrainConfig
    from .errors import InputError, RunError
    from .loading import load
    from .schedule import Stage, segmented_value_and_grad

__all__ = [
    "InputError",
    "RunError",
    "Stage",
    "TrainConfig",
    "TrainResult",
    "load",
    "segmented_value_and_grad",
    "train",
]

_HOME = {
    "InputError": "errors",
    "RunError": "errors",
    "Stage": "schedule",
    "TrainConfig": "config",
    "TrainResult": "api",
    "load": "loading",
    "segmented_value_and_grad": "schedule",
    "train": "api",
}

#: The release whose C++ ABI `_core` was compiled against.
MLX_VERSION = "0.32.4"


def _require_mlx() -> None:
    """Raises ImportError, with a command that fixes it, unless the right MLX is installed."""
    mend = (
        f'pip install "mlx-segtrain[cpu]" (or [cuda12], [cuda13]), which installs mlx {MLX_VERSION}'
    )
    try:
        found = version("mlx")
    except PackageNotFoundError:
        raise ImportError(f"mlx_segtrain needs MLX, which is not installed: {mend}.") from None
    if found != MLX_VERSION:
        raise ImportError(
            f"mlx_segtrain was built for mlx {MLX_VERSION}, but mlx {found} is installed: {mend}."
        )
    try:
        import_module("mlx.core")
    except ImportError as error:
        raise ImportError(
            f"MLX is installed, but its backend for this machine is missing ({error}): {mend}."
        ) from None


if sys.platform == "linux":
    # On CUDA, MLX collects work that reads up to 10⁹ elements before it launches it: the device
    # idles at first, and memory is freed late. 32 million elements are a large op or a few small
    # ones (bench/LOG.md, 2026-11-25). MLX reads this variable when it first uses the device.
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "32")

_require_mlx()
__version__ = version("mlx-segtrain")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_segtrain' has no attribute '{name}'")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    """Returns the public API."""
    return sorted(__all__)
