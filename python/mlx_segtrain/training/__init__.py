"""The training loop, its optimizer step, checkpoints, evaluation and the probe."""

from .evaluation import EvalResult, evaluate
from .loop import train
from .probing import probe
from .record import Verified, verify
from .results import ProbeResult, TrainResult
from .scoring import ScoreResult, score

__all__ = [
    "EvalResult",
    "ProbeResult",
    "ScoreResult",
    "TrainResult",
    "Verified",
    "evaluate",
    "probe",
    "score",
    "train",
    "verify",
]
