"""Training: the loop, its optimizer step, evaluation and the probe."""

from .evaluation import EvalResult, evaluate
from .loop import ProbeResult, TrainResult, probe, train

__all__ = ["EvalResult", "ProbeResult", "TrainResult", "evaluate", "probe", "train"]
