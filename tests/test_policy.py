"""Tests that all code that runs a model uses the same MLX settings and restores them afterwards."""

import mlx.core as mx
import pytest

from lib.runs import config_of, setup_of
from mlx_segtrain import InputError, _core, train
from mlx_segtrain.commands import picture
from mlx_segtrain.planning import budget
from mlx_segtrain.planning.run import full_batch, plan_run
from mlx_segtrain.serving.generation import engine
from mlx_segtrain.training import evaluate, evaluation, policy, probe, references, step

pytestmark = pytest.mark.usefixtures("cache")
WORKING_SET = 24 << 30


@pytest.fixture
def metal(monkeypatch):
    """Simulates a Mac, and returns a list of all wired limits in the order in which they are
    set."""
    limits = [0]

    def set_wired_limit(n):
        limits.append(n)
        return limits[-2]

    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    info = {"max_recommended_working_set_size": WORKING_SET, "memory_size": 36 << 30}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    return limits


def test_the_wired_limit_is_the_working_set_and_the_budget_is_within_it(metal):
    with policy.wired():
        assert metal == [0, WORKING_SET]
        assert 0.9 * WORKING_SET < budget.budget_bytes() < WORKING_SET
    assert metal == [0, WORKING_SET, 0]
    with policy.wired(), policy.wired():
        pass
    assert metal[3:] == [WORKING_SET, WORKING_SET, WORKING_SET, 0]


def test_the_wired_limit_is_restored_after_an_error(metal):
    with pytest.raises(KeyboardInterrupt), policy.wired():
        raise KeyboardInterrupt
    assert metal[-1] == 0


@pytest.mark.parametrize("missing", ["metal", "gpu"])
def test_elsewhere_no_limit_is_set(missing, metal, monkeypatch):
    if missing == "metal":
        monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    else:
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    with policy.wired():
        pass
    assert policy.wire() is None and metal == [0]


# ---- all code that runs a model uses the same settings


class Spy:
    """Records the MLX settings in effect whenever a model is run."""

    def __init__(self, monkeypatch):
        self.seen, self.limit = [], None
        monkeypatch.setattr(policy, "working_set", lambda: WORKING_SET)
        monkeypatch.setattr(mx, "set_wired_limit", self._set)
        for module, name in (
            (evaluation, "eval_batches"),
            (references, "one_row"),
            (step, "value_and_grad"),
        ):
            monkeypatch.setattr(module, name, self._watched(module.__name__, getattr(module, name)))

    def _set(self, n):
        before, self.limit = self.limit or 0, n
        return before

    def _watched(self, name, function):
        def watched(*args, **how):
            self.seen.append((name.rsplit(".", 1)[-1], _core.is_repeatable(), self.limit))
            return function(*args, **how)

        return watched

    def in_force(self, name):
        return {(repeatable, limit) for seen, repeatable, limit in self.seen if seen == name}

    def is_over(self):
        return not _core.is_repeatable() and self.limit == 0


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


@pytest.mark.parametrize("deterministic", [True, False])
def test_training_and_its_evaluations(deterministic, llama4, data, tmp_path, spy):
    train(config_of(llama4, data, tmp_path / "a", iters=1, deterministic=deterministic))
    assert spy.in_force("step") == spy.in_force("evaluation") == {(deterministic, WORKING_SET)}
    assert spy.is_over()


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_probe(deterministic, llama4, data, tmp_path, spy):
    probe(config_of(llama4, data, tmp_path / "a", deterministic=deterministic))
    assert spy.in_force("step") == {(deterministic, WORKING_SET)} and spy.is_over()


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_evaluation_and_its_references(deterministic, llama4, data, pairs, tmp_path, spy, cache):
    config = setup_of("dpo", llama4, data, pairs, tmp_path / "a", deterministic=deterministic)
    evaluate(config)
    expected = {(deterministic, WORKING_SET)}
    assert spy.in_force("references") == spy.in_force("evaluation") == expected
    assert spy.is_over()


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_picture(deterministic, llama4, data, tmp_path, spy):
    pytest.importorskip("matplotlib")
    how = {"max_seq_length": 64, "deterministic": deterministic}
    config = config_of(llama4, data, tmp_path / "a", **how)
    picture.measure(plan_run(config, full_batch(config)), config)
    assert spy.in_force("step") == {(deterministic, WORKING_SET)} and spy.is_over()


@pytest.mark.parametrize("run", [train, probe, evaluate])
def test_after_an_error_it_is_as_before(run, llama4, data, tmp_path, spy):
    config = config_of(llama4, data, tmp_path / "a", deterministic=True)
    config = config.model_copy(update={"data_dir": tmp_path / "nothing"})
    with pytest.raises(InputError):
        run(config)
    assert spy.is_over()


def test_the_server_wires_by_the_same_helper():
    assert engine.wire is policy.wire


# ---- stored results depend on the settings


def test_references_are_filed_under_the_policy_that_was_in_force(llama4, data, pairs, tmp_path):
    """References are stored under the settings that were in effect, not under those of the
    configuration."""
    config = setup_of("dpo", llama4, data, pairs, tmp_path / "a", deterministic=True)
    outside = references.model_key(config)
    with policy.run_policy(config):
        within = references.model_key(config)
    free = config.model_copy(update={"deterministic": False})
    with policy.run_policy(free):
        assert references.model_key(free) == references.model_key(config) == outside
    assert within != outside


def test_a_run_takes_no_references_of_an_evaluation_that_was_not_repeatable(
    llama4,
    data,
    pairs,
    tmp_path,
    cache,
    spy,
):
    how = setup_of("dpo", llama4, data, pairs, tmp_path / "a", iters=1)
    evaluate(how.model_copy(update={"deterministic": False}))
    assert spy.in_force("references") == {(False, WORKING_SET)}
    spy.seen.clear()
    evaluate(how)
    assert spy.in_force("references") == {(True, WORKING_SET)}
    spy.seen.clear()
    evaluate(how)
    assert spy.in_force("references") == set()  # the references are cached
