"""Long-context LoRA fine-tuning of quantized language models with MLX.

    from mlx_segtrain import train, load, TrainConfig, segmented_value_and_grad

Names are imported when they are first used, so that `mlx-segtrain --help` does not wait for MLX.
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

#: The MLX release against whose C++ ABI `_core` was compiled.
MLX_VERSION = "0.32.4"


def _require_mlx() -> None:
    """Raises ImportError unless version MLX_VERSION of mlx is installed. The message includes the
    install command."""
    mend = (
        'run pip install "mlx-segtrain[cpu]" (or [cuda12], [cuda13]), which installs mlx '
        f"{MLX_VERSION}"
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
    # By default, MLX on CUDA queues ops that read up to 10⁹ elements in total before it launches
    # them, so the device idles at first, and memory is freed late. Lower this limit to 32 million
    # elements, which is one large op or a few small ones (bench/LOG.md, 2026-11-25). MLX reads this
    # variable when it first uses the device.
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "32")

_require_mlx()
__version__ = version("mlx-segtrain")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_segtrain' has no attribute '{name}'")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    """Returns the names of the public API."""
    return sorted(__all__)
