"""Implements the flag `--report` of the commands doctor and bench. The flag writes a small file
about this device, which users can attach to an issue.

The file describes the device, the system, versions, checks and times. It contains no paths and no
names of people, of this machine or of files.
"""

import importlib
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import MLX_VERSION, __version__
from ..data import Batch
from ..files import write_json
from ..models import adapting, chain_of
from ..objectives import Functions, value_and_grad
from ..objectives.sft import Sft
from ..ops import bench, choice, selfcheck

LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 1e5}
#: Models to time. They have the shapes of real models and random 4-bit weights.
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "MiniCPM5-1B": {
        "hidden_size": 1536,
        "num_hidden_layers": 24,
        "intermediate_size": 4608,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 130560,
        "tie_word_embeddings": False,
    },
}
#: The number of tokens in a step, on a GPU and on a CPU.
TOKENS, TOKENS_ON_CPU = 2048, 256


@dataclass(frozen=True)
class Step:
    """The time to compute the loss and the gradients, with LoRA of rank 16 on all linear layers and
    one layer per segment."""

    model: str
    tokens: int
    first_s: float
    ms: float  #: the median of three runs
    peak_gb: float


def facts() -> dict[str, Any]:
    """Returns the fields at the start of every report."""
    mac = platform.mac_ver()[0]
    info = mx.device_info()
    return {
        "device": selfcheck.device_name(),
        "gpu": selfcheck.on_gpu(),
        "architecture": str(info.get("architecture", platform.machine())),
        "memory_gb": round(int(info.get("memory_size", 0)) / 1e9),
        "system": f"macOS {mac}" if mac else platform.system(),
        "interpreter": platform.python_version(),
        "mlx": MLX_VERSION,
        "mlx_segtrain": __version__,
        "attention": choice.known().get(choice.key(), {}),
    }


def step(name: str, config: dict[str, Any], tokens: int) -> Step:
    """Times a step of a model with this configuration."""
    module = importlib.import_module("mlx_lm.models.llama")
    model = module.Model(module.ModelArgs.from_dict(LLAMA | config))
    model.set_dtype(bench.dtype())
    nn.quantize(model, 64, 4)
    mx.eval(model.parameters())
    chain = chain_of(model)
    adapter = adapting.init(chain, dict.fromkeys(chain.linears, 16), 1.0, 0)
    params = adapting.stage_params(chain, adapter)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (1, tokens + 1))
    weights = np.ones(ids.shape, np.float32)
    batch = Batch(ids.astype(np.int32), weights, np.arange(1), np.array([tokens + 1]))
    objective = Sft()
    total = objective.total([batch])
    functions = Functions(objective, chain, adapter.scales)
    mx.eval(params)
    times = []
    mx.reset_peak_memory()
    for _ in range(4):
        begin = time.perf_counter()
        made = value_and_grad(
            functions, params, batch, total, cuts=lambda streams: chain.cuts(1, streams)
        )
        mx.eval(made)
        times.append(time.perf_counter() - begin)
    peak = mx.get_peak_memory() / 1e9
    return Step(name, tokens, times[0], statistics.median(times[1:]) * 1e3, peak)


def steps() -> list[Step]:
    tokens = TOKENS if selfcheck.on_gpu() else TOKENS_ON_CPU
    made = []
    for name, config in MODELS.items():
        made.append(step(name, config, tokens))
        mx.clear_cache()
    return made


def of_doctor(report: selfcheck.Report) -> dict[str, Any]:
    return facts() | {"ok": report.ok, "checks": [asdict(x) for x in report.checks]}


def of_bench(rows: Sequence[bench.Row]) -> dict[str, Any]:
    device = asdict(bench.measure_device())
    return facts() | {
        "rates": device,
        "ops": [asdict(x) for x in rows],
        "steps": [asdict(x) for x in steps()],
    }


def write(kind: str, content: dict[str, Any]) -> str:
    """Writes the report to the working directory, and returns a sentence about it to print."""
    path = Path(f"mlx-segtrain-{kind}.json")
    write_json(path, content)
    return (
        f"{path} lists the device, versions, check results and times, but no paths or names: "
        "attach it to an issue in the mlx-segtrain repository"
    )
