"""Packed rows: loss and gradients are those of the rows alone, and no row is split or lost."""

import mlx.core as mx
import numpy as np
import pytest

from lib import tiny_models
from lib.chains import FAST, adapter_of, run
from lib.oracle import assert_close
from mlx_segtrain.data import Batch
from mlx_segtrain.models import adapting, chain_of
from mlx_segtrain.objectives import value_and_grad
from mlx_segtrain.objectives.sft import Sft

#: Tokens of uneven examples: longer than the window of 8 and than a tile, and the least there is.
LENGTHS = (21, 2, 9, 70, 33, 3)
BOUND = 1e-5


def examples(lengths=LENGTHS, prompt=2, seed=0):
    """Rows as batches of one, and the same packed."""
    rng = np.random.default_rng(seed)
    alone = []
    for i, n in enumerate(lengths):
        weights = rng.uniform(0.5, 1, (1, n)).astype(np.float32)
        weights[:, : min(prompt, n - 1)] = 0
        tokens = rng.integers(0, 128, (1, n)).astype(np.int32)
        alone.append(Batch(tokens, weights, np.array([i]), np.array([n])))
    whole = (np.concatenate([getattr(x, name) for x in alone], 1) for name in ("tokens", "weights"))
    packed = Batch(*whole, np.arange(len(lengths)), np.array(lengths), packed=True)
    return alone, packed


def step(chain, adapter, batch, total, size=1):
    """Loss and gradients by path."""
    params = adapting.stage_params(chain, adapter)
    what = (Sft(), chain, adapter.scales, params, batch, total)
    (loss,), grads = value_and_grad(*what, cuts=lambda streams: chain.cuts(size, streams))
    return loss.item(), {k: g for own in grads.values() for k, g in own.items()}


def assert_same_packed(chain, adapter, lengths=LENGTHS, prompt=2, size=1):
    alone, packed = examples(lengths, prompt)
    total = Sft().total(alone)
    assert Sft().total([packed]) == pytest.approx(total)
    steps = [step(chain, adapter, batch, total, size) for batch in alone]
    loss, grads = step(chain, adapter, packed, total, size)
    assert loss == pytest.approx(sum(own for own, _ in steps), rel=BOUND)
    for name, grad in grads.items():
        assert_close(name, grad, sum((own[name] for _, own in steps), start=mx.zeros(())), BOUND)


@pytest.mark.parametrize("name", FAST)
def test_packed_is_unpacked(name):
    family, more = FAST[name]
    chain = chain_of(tiny_models.build(family, **more))
    assert_same_packed(chain, adapter_of(chain))
