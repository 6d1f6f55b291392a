"""Tests grpo on two local ranks, which divide each step's prompts between them. The results must
equal those of a single rank."""

import json

import numpy as np
import pytest
from pytest import approx

from lib.folders import write_llama
from lib.launched import FACTORS, ends, ranks_of, said
from lib.oracle import assert_close
from lib.runs import checkpoint_of, config_of, lines_of, weights_of
from mlx_segtrain import train
from mlx_segtrain.training import checkpoint

pytestmark = pytest.mark.acceptance

#: Prompts with odd numbers get equal rewards, so a rank may have nothing to train on.
REWARDS = """
import os

def spread(completions, number):
    with open(f"{__file__}.{os.environ.get('MLX_RANK')}", "a") as file:
        print(len(completions), file=file)
    scores = [sum(map(ord, own)) % 7 for own in completions]
    return [x * (n % 2 == 0) for x, n in zip(scores, number)]

def short(completion_tokens):
    return [-n / 7 for n in completion_tokens]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / "llama", layers=2)


@pytest.fixture
def config(model, tmp_path):
    (tmp_path / "own.py").write_text(REWARDS)
    data = tmp_path / "data"
    data.mkdir()
    for name, count in (("train", 7), ("valid", 3)):
        rows = [{"prompt": f"{name} {i}" + " x" * i, "number": i} for i in range(count)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {"method": "grpo", "iters": 3, "batch_size": 3, "group_size": 3, "steps_per_eval": 3}
    base |= {"max_completion_tokens": 6, "lr_schedule": "constant", "learning_rate": 1e-2}
    # Completions are generated one at a time, so a completion does not depend on which other ones
    # its rank generates.
    base |= {"rollout_batch": 1}
    base |= {"reward_functions": [f"{tmp_path / 'own.py'}:{name}" for name in ("spread", "short")]}
    return lambda out, **how: config_of(model, data, tmp_path / out, **{**base, **how})


RUNS = {
    "gspo": {"grpo_loss": "gspo", "grpo_beta": 0.1, "updates_per_step": 2, "iters": 2},
    "dapo": {"grpo_loss": "dapo", "advantage_scaling": "batch", "mask_truncated": False},
    # Every advantage is 0, so a step trains on a single completion, on one rank.
    "equal": {"reward_weights": [0.0, 0.0], "iters": 1, "packing": False},
}


def test_ranks_are_one_run(config, tmp_path):
    plain = [config(name, **how) for name, how in RUNS.items()]
    half = [config(name, **RUNS["dapo"], iters=2) for name in ("resumed", "moved")]
    rest = {**RUNS["dapo"], "resume": True}
    with ranks_of(2, tmp_path, *plain, *half, config("resumed", **rest), before=FACTORS) as started:
        for name, how in RUNS.items():
            train(config(f"one-{name}", **how))
        ends(tmp_path, started)
    for rank in range(2):
        found = [own[:2] for own in said(tmp_path, rank) if isinstance(own, list)]
        steps = [2, 3, 1, 2, 2, 3]
        assert found == [["ended", n] for n in steps], (tmp_path / f"err{rank}").read_text()
    for name in RUNS:
        one, many = tmp_path / f"one-{name}", tmp_path / name
        texts = [(out / "completions.jsonl").read_text() for out in (one, many)]
        assert texts[0] == texts[1] and len(texts[0].splitlines()) >= 9
        for x, y in zip(lines_of(one), lines_of(many), strict=True):
            assert x.keys() == y.keys()
            bound = 1e-6 if x["step"] <= 1 else 1e-5  # later, adapters differ by rounding errors
            for key in (key for key in x if isinstance(x[key], float)):
                least = {"mismatch": 1e-6, "loss": 2e-7, "grad_norm": 0}.get(key, 1e-9)
                assert y[key] == approx(x[key], rel=bound, abs=least), (name, x["step"], key)
        for key, x in weights_of(one).items():
            assert_close(key, weights_of(many)[key], x, 1e-4)  # Adam divides by small gradients
        states = [checkpoint._read(checkpoint_of(out)).progress for out in (one, many)]
        assert states[0].rewards == states[1].rewards and states[0].tokens == states[1].tokens
        assert states[0].supervised == states[1].supervised > 0
        factors = [np.load(tmp_path / f"{name}-{rank}.npy") for rank in range(2)]
        assert np.array_equal(*factors)
    calls = [(tmp_path / f"own.py.{rank}").read_text().split() for rank in range(2)]
    assert calls[0][:2] == ["2", "6"] and calls[1][:2] == ["1", "3"], (
        "the first call must be for an evaluation"
    )

    assert weights_of(tmp_path / "resumed").keys() == weights_of(tmp_path / "dapo").keys()
    for name in ("adapters.safetensors", "completions.jsonl"):
        same = [(tmp_path / out / name).read_bytes() for out in ("resumed", "dapo")]
        assert same[0] == same[1], name
    train(config("moved", **rest))
    for key, x in weights_of(tmp_path / "one-dapo").items():
        assert_close(key, weights_of(tmp_path / "moved")[key], x, 1e-4)


#: Rank 1 first generates for longer than the heartbeat timeout. In its next call, it is killed
#: while rank 0 generates for much longer.
SLOW = """
from mlx_segtrain.training import cycle
own, calls = cycle.complete, 0
def complete(*args):
    global calls
    calls += 1
    if rank == 1 and calls == 3:
        time.sleep(6)
    if rank == 1 and calls == 4:
        time.sleep(0.5)
        os.kill(os.getpid(), 9)
    if rank == 0 and calls == 4:
        time.sleep(50)
    return own(*args)
cycle.complete = complete
"""


def test_a_long_rollout_is_waited_for_and_a_rank_that_ends_in_one_is_named(config, tmp_path):
    with ranks_of(2, tmp_path, config("run"), before=SLOW) as started:
        found, seconds = ends(tmp_path, started, but=[1])
    kind, name, text = found[0]
    assert (kind, name) == ("failed", "LostRank") and seconds < 40
    assert text.startswith(f"step 3: rank 1 (process {started[1].pid} on ")
    assert "has ended: the state of step 2 is saved" in text
    assert checkpoint._read(checkpoint_of(tmp_path / "run")).step == 2
