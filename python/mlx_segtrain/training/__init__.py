"""Training: the loop, its optimizer step, checkpoints, evaluation and the probe."""

from .evaluation import EvalResult, evaluate
from .loop import train
from .probing import probe
from .record import Verified, verify
from .results import ProbeResult, TrainResult

__all__ = [
    "EvalResult",
    "ProbeResult",
    "TrainResult",
    "Verified",
    "evaluate",
    "probe",
    "train",
    "verify",
]
