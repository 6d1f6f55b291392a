"""Compares the losses of DPO and KTO, as functions of log-ratios, with TRL's formulas in NumPy, and
their gradients with complex-step derivatives."""

from typing import get_args

import mlx.core as mx
import numpy as np
import pytest

from lib.oracle import assert_close, vjp
from mlx_segtrain.config import TrainConfig
from mlx_segtrain.objectives.kto import Kto, Total
from mlx_segtrain.objectives.preference import LOSSES, OF_MEANS, Rewards

BETA, EPS = 0.3, 0.15
RNG = np.random.default_rng(3)
#: Log-ratios of chosen and rejected responses, above and below 0.
RATIOS = RNG.uniform(-6, 6, (2, 9))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x):
    return np.log(sigmoid(x))


def trl_dpo(kind, c, r):
    """Returns TRL's loss for each pair as a function of log-ratios."""
    z = BETA * (c - r)
    good, bad, share = log_sigmoid(z), log_sigmoid(-z), sigmoid(z / 0.05)
    return {
        "sigmoid": lambda: -good * (1 - EPS) - bad * EPS,
        "hinge": lambda: np.where(1 - z.real > 0, 1 - z, 0),
        "ipo": lambda: (c - r - 1 / (2 * BETA)) ** 2,
        "robust": lambda: (-good * (1 - EPS) + bad * EPS) / (1 - 2 * EPS),
        "exo_pair": lambda: (
            sigmoid(z) * (good - np.log(1 - EPS)) + sigmoid(-z) * (bad - np.log(EPS))
        ),
        "nca_pair": lambda: (
            -log_sigmoid(BETA * c) - 0.5 * log_sigmoid(-BETA * c) - 0.5 * log_sigmoid(-BETA * r)
        ),
        "bco_pair": lambda: -log_sigmoid(BETA * c) - log_sigmoid(-BETA * r),
        "sppo_hard": lambda: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
        "apo_zero": lambda: 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
        "apo_down": lambda: sigmoid(BETA * c) + 1 - sigmoid(z),
        "discopop": lambda: -good * (1 - share) + np.exp(-z) * share,
        "sigmoid_norm": lambda: -good,
    }[kind]()


def test_every_loss_of_the_configuration_is_there():
    assert tuple(LOSSES) == get_args(TrainConfig.model_fields["dpo_loss"].annotation)
    assert set(OF_MEANS) < set(LOSSES)


def rewards(c, r):
    return Rewards(BETA * c, BETA * r, BETA, EPS)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_of_dpo_is_trls(kind):
    dy = RNG.normal(size=9)
    own, grads = mx.vjp(
        lambda c, r: LOSSES[kind](rewards(c, r)), [*map(mx.array, RATIOS)], [mx.array(dy)]
    )
    assert_close(kind, own[0], trl_dpo(kind, *RATIOS), 1e-6)
    truth = vjp(lambda c, r: trl_dpo(kind, c, r), list(RATIOS), dy)
    for name, grad, expected in zip("cr", grads, truth, strict=True):
        assert_close(f"{kind}, d{name}", grad, expected, 1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_of_dpo_is_finite_far_from_0(kind):
    far = mx.array([-3000.0, 3000, -3000, 3000]), mx.array([3000.0, -3000, -3000, 3000])
    own, grads = mx.vjp(lambda c, r: LOSSES[kind](rewards(c, r)), [*far], [mx.ones(4)])
    if kind == "discopop":  # for large z, exp(−z) is 0
        assert own[0][1] == 0
    for x in (*own, *grads):
        assert mx.isfinite(x).all()


LABELS = np.array([1, -1, -1, 1, -1, 1, -1, -1, -1.0])
WEIGHTS = {"desirable": 1.3, "undesirable": 0.7}


def trl_kto(ratios, kl):
    """Returns TRL's mean loss over rows as a function of log-ratios and the clipped divergence."""
    wanted = LABELS > 0
    high = WEIGHTS["desirable"] * (1 - sigmoid(BETA * (ratios[wanted] - kl)))
    low = WEIGHTS["undesirable"] * (1 - sigmoid(BETA * (kl - ratios[~wanted])))
    return np.array([np.concatenate([high, low]).mean()])


def outputs_of(kind, ratios, baseline, total=None):
    """Returns KTO's outputs for the given log-ratios. All references are 0."""
    total = total or Total(9, 3, baseline)
    parts = mx.array([1 / n for n in (total.rows, total.wanted, total.rows - total.wanted)])
    kl = mx.array(max(total.baseline, 0.0))
    objective = Kto(BETA, kind, **WEIGHTS)
    return objective._of_sums(ratios, mx.array(LABELS), mx.zeros(9), kl, parts)


@pytest.mark.parametrize(
    ("kind", "baseline", "kl"),
    [("kto", 1.7, 1.7), ("kto", -2.5, 0), ("apo_zero_unpaired", 0.0, 0)],
)
def test_a_loss_of_kto_is_trls(kind, baseline, kl):
    ratios = RATIOS[0]
    own, grads = mx.vjp(
        lambda x: outputs_of(kind, x, baseline)[0], [mx.array(ratios)], [mx.array(0.7)]
    )
    assert_close("loss", own[0], trl_kto(ratios, kl)[0], 1e-6)
    (truth,) = vjp(lambda x: trl_kto(x, kl), [ratios], np.array([0.7]))
    assert_close("d ratios", grads[0], truth, 1e-6)
    found = dict(zip(Kto.metrics, outputs_of(kind, mx.array(ratios), baseline)[1:], strict=True))
    wanted = BETA * ratios[LABELS > 0].mean(), BETA * ratios[LABELS < 0].mean()
    assert found["desirable_reward"].item() == pytest.approx(wanted[0], rel=1e-5)
    assert found["undesirable_reward"].item() == pytest.approx(wanted[1], rel=1e-5)
    assert found["margin"].item() == pytest.approx(wanted[0] - wanted[1], rel=1e-5)
    assert found["accuracy"].item() == pytest.approx((LABELS * (ratios - kl) > 0).mean(), rel=1e-5)
    reported = found["kl"].item()
    assert np.isnan(reported) if kind != "kto" else reported == pytest.approx(kl, rel=1e-5)


def test_no_gradient_goes_through_metrics():
    def every(x):
        return sum(outputs_of("kto", x, 1.0)[1:])

    assert (mx.grad(every)(mx.array(RATIOS[0])) == 0).all()
