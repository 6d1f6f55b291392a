"""Measures the peak memory of each step of a run."""

import os
import resource
import sys
from dataclasses import dataclass

import mlx.core as mx


@dataclass
class Memory:
    """The peak of MLX's active memory over all steps, in bytes."""

    peak: int = 0

    def __post_init__(self) -> None:
        mx.reset_peak_memory()

    def measure(self, step: int | None = None) -> int:
        """Returns the peak since the last call, in bytes. If MLX_SEGTRAIN_MEM_LOG=1 is set, prints
        a line per step to stderr."""
        now = mx.get_peak_memory()
        self.peak = max(self.peak, now)
        mx.reset_peak_memory()
        if step is not None and os.environ.get("MLX_SEGTRAIN_MEM_LOG") == "1":
            own = (now, mx.get_active_memory(), mx.get_cache_memory(), process_peak())
            parts = zip(("peak", "active", "cache", "process"), own, strict=True)
            line = ", ".join(f"{name} {n / 1e9:.3f} GB" for name, n in parts)
            print(f"step {step}: {line}", file=sys.stderr, flush=True)
        return now


def process_peak() -> int:
    """Returns the maximum amount of main memory that this process has used, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
