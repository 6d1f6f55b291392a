"""The results of train and probe."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """The result of a run. Losses are in nats per token, or per pair with preference methods.

    In GB (10⁹ bytes): peak_gb is the peak of MLX's active memory, planned_gb its prediction (None
    for a family that the planner does not know), process_gb the peak of the process's main memory.
    After a resume after step `resumed_from`, every figure except process_gb covers the whole run.
    """

    adapter_path: Path
    steps: int
    final_train_loss: float | None
    first_val_loss: float | None
    final_val_loss: float | None
    best_val_loss: float | None
    best_step: int | None
    first_val_accuracy: float | None
    final_val_accuracy: float | None
    wall_s: float
    tokens_per_sec: float
    supervised_tokens_per_sec: float
    peak_gb: float
    planned_gb: float | None
    process_gb: float
    applied_ranks: dict[str, int]
    interrupted: bool
    stopped_early: bool
    resumed_from: int | None = None


@dataclass(frozen=True)
class ProbeResult:
    """The result of two steps on the longest rows. resting_gb is the memory of the loaded model."""

    step_s: float
    first_step_s: float
    peak_gb: float
    planned_gb: float | None
    resting_gb: float
    loss: float
    grad_norm: float
    finite: bool
    tokens: int
