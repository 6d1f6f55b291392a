"""Creates the table in docs/models.md. `python tests/model_table.py` updates the file.

For each mlx-lm family, a tiny random model is trained for three steps. In every step and after the
last one, the loss must equal that of mlx-lm's own code with the same adapter.
"""

import functools
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np

from lib import tiny_models
from lib.checks import random_adapter
from mlx_segtrain.data import Batch
from mlx_segtrain.errors import InputError
from mlx_segtrain.models import adapting, chain_of, family_of
from mlx_segtrain.objectives import Functions, value_and_grad
from mlx_segtrain.objectives.sft import Sft
from mlx_segtrain.training.setup import with_params

DOCS = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table: python tests/model_table.py -->", "<!-- end of table -->"
HEAD = "| mlx-lm | path | why |\n|---|---|---|\n"


def outcome(family: str) -> tuple[str, str]:
    """Returns the path (fast, generic, refused or not tried), and the reason. Raises AssertionError
    if the losses differ."""
    if family in tiny_models.UNBUILDABLE:
        return "not tried", tiny_models.UNBUILDABLE[family]
    model = tiny_models.build(family)
    try:
        chain = chain_of(model)
    except InputError as error:
        return "refused", str(error).split("cannot be trained: ", 1)[1]
    adapter = random_adapter(chain, dict.fromkeys(chain.linears, 2), 1.0, 0.05)
    tokens = np.random.default_rng(0).integers(0, 128, (2, 21)).astype(np.int32)
    batch = Batch(tokens, np.ones(tokens.shape, np.float32), np.arange(2), np.full(2, 21))
    params = adapting.stage_params(chain, adapter)
    cuts = functools.partial(chain.cuts, 1)
    functions = Functions(Sft(), chain, adapter.scales)
    trained, losses = [], []
    for _ in range(4):
        trained.append(params)
        (loss,), grads = value_and_grad(functions, params, batch, 40.0, cuts=cuts)
        losses.append(loss.item())
        params = {
            stage: {key: p - 0.05 * grads[stage][key] for key, p in own.items()}
            for stage, own in params.items()
        }
    for loss, params in zip(losses, trained, strict=True):
        adapting.attach(model, chain, with_params(chain, adapter.scales, params))
        logits = model(mx.array(tokens[:, :-1])).astype(mx.float32)
        expected = nn.losses.cross_entropy(logits, mx.array(tokens[:, 1:])).mean().item()
        assert abs(loss - expected) < 1e-4 * expected, (family, loss, expected)
    assert losses[-1] < losses[0], (family, losses)
    return ("fast" if family_of(model) else "generic"), ""


def table() -> str:
    names = sorted([*tiny_models.FAMILIES, *tiny_models.UNBUILDABLE], key=str.lower)
    return HEAD + "".join(f"| {name} | {' | '.join(outcome(name))} |\n" for name in names)


def documented() -> dict[str, tuple[str, str]]:
    """Returns each family's outcome in docs/models.md."""
    lines = DOCS.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: (path, why) for name, path, why in cells}


if __name__ == "__main__":
    mx.set_default_device(mx.Device(mx.cpu))
    text = DOCS.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCS.write_text(f"{before}{BEGIN}\n{table()}{END}{after}", encoding="utf-8")
    sys.stdout.write(f"{DOCS}: mlx-lm {mlx_lm.__version__}\n")
