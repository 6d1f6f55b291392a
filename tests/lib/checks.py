"""Shared test helpers: random arrays and adapters, gradients, and a check of one op call."""

from contextlib import contextmanager

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from lib import oracle
from mlx_segtrain import lora
from mlx_segtrain.models import adapting

ON_GPU = mx.default_device() != mx.Device(mx.cpu)


@contextmanager
def served():
    """Skips the test if a GPU-specific implementation does not support the call. On a CPU, the test
    fails instead."""
    try:
        yield
    except ValueError as error:
        if ON_GPU and "does not support this call" in str(error):
            pytest.skip(str(error))
        raise


def needs_router_gradient():
    """Skips the test if the router in the installed mlx-lm has no gradient, as in the last version
    that supports Python 3.10."""
    if mlx_lm.__version__ < "0.32":
        pytest.skip(f"in mlx-lm {mlx_lm.__version__}, the router of experts has no gradient")


def rand(rng, *shape, dtype="float32"):
    """Returns random values as an mx array of `dtype`, and the same values as a float64 array."""
    x = mx.array(rng.standard_normal(shape).astype(np.float32)).astype(getattr(mx, dtype))
    return x, f64(x)


def f64(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


def grads(f, args, dy):
    return mx.vjp(f, list(args), [dy])[1]


def check_op(name, f, plain, args, truth, true_grads, dy, dtype):
    """Checks the value and the gradients of f. Also checks that two calls return the same values,
    and that each gradient is the same if it is computed alone."""
    y = f(*args)
    assert y.dtype == getattr(mx, dtype) or name in ("linear_cross_entropy", "linear_log_probs")
    oracle.assert_no_worse(f"{name} y", f64(y), f64(plain(*args)), truth, dtype)
    assert mx.array_equal(y, f(*args))
    got, plains = grads(f, args, dy), grads(plain, args, dy)
    again = grads(f, args, dy)
    for i, (grad, ref, true) in enumerate(zip(got, plains, true_grads, strict=True)):
        oracle.assert_no_worse(f"{name} d{i}", f64(grad), f64(ref), true, dtype)
        assert mx.array_equal(grad, again[i])

        def alone(x, i=i):
            return f(*[*args[:i], x, *args[i + 1 :]])

        assert mx.array_equal(grad, grads(alone, [args[i]], dy)[0])


def random_adapter(chain, ranks: dict[str, int], scale: float, size: float) -> lora.Adapter:
    """Returns a LoRA adapter whose B is random with standard deviation `size`. If B were 0, A would
    have no gradient."""
    fresh = adapting.init(chain, ranks, scale, seed=1)
    keys = mx.random.split(mx.random.key(2), len(fresh.tensors))
    tensors = {
        path: (a, size * mx.random.normal(b.shape, key=key))
        for key, (path, (a, b)) in zip(keys, fresh.tensors.items(), strict=True)
    }
    return lora.Adapter(tensors, fresh.scales)
