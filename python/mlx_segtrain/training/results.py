"""The results of `train` and `probe`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """The result of a run. Losses are in nats per token; with preference methods, they are per pair
    or per row.

    Memory is in GB (10⁹ bytes): peak_gb is the peak of MLX's active memory, planned_gb is the
    predicted peak (None for a model family that the planner does not know), and process_gb is the
    peak main memory use of the process. If the run was resumed after step `resumed_from`, all
    figures except process_gb cover the whole run.
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
    """The result of two steps on the longest rows. resting_gb is MLX's active memory in GB once the
    model is loaded."""

    step_s: float
    first_step_s: float
    peak_gb: float
    planned_gb: float | None
    resting_gb: float
    loss: float
    grad_norm: float
    finite: bool
    tokens: int
