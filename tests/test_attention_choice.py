"""Tests which attention implementation 'auto' chooses for each device, including devices that this
machine does not have."""

import mlx.core as mx
import pytest

from lib import tiny_models
from lib.chains import headers
from mlx_segtrain import _core
from mlx_segtrain.planning import shape_of
from mlx_segtrain.planning.costs import CPU, CUDA, METAL, Device, costs_of
from mlx_segtrain.streams import BatchShape

#: The head sizes that MLX 0.32.4's Metal library supports, according to its error message.
STOCK_ON_METAL = [64, 72, 80, 96, 128, 192, 256]
#: The implementation chosen on CUDA for head sizes that MLX's attention supports: our `hopper`
#: kernel on a Hopper GPU, where it is faster, and MLX's attention otherwise.
ON_CUDA = "hopper" if _core.attention_way("cuda", 256) == "hopper" else "stock"
OTHERS_ON_METAL = [8, 32, 40, 48, 56, 63, 65, 88, 100, 104, 112, 120, 136, 160, 224, 248, 257, 320]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_on_metal_mlx_has_these_heads_and_no_others(dtype):
    for head in STOCK_ON_METAL:
        assert _core.attention_way("metal", head, dtype) == "stock", head
    for head in OTHERS_ON_METAL:
        assert _core.attention_way("metal", head, dtype) == "blocked", head


def test_neural_accelerators_take_heads_of_512_in_half_precision():
    assert _core.attention_way("metal", 512) == "blocked"
    assert _core.attention_way("metal", 512, nax=True) == "stock"
    assert _core.attention_way("metal", 512, mx.float32, nax=True) == "blocked"
    assert _core.attention_way("metal", 320, nax=True) == "blocked"
    assert _core.attention_way("cuda", 512, nax=True) != "stock"


def test_on_cuda_mlx_has_heads_in_eights_up_to_128():
    for head in (8, 64, 72, 128):
        assert _core.attention_way("cuda", head) == ON_CUDA
        assert _core.attention_way("cuda", head, mx.float32) == "blocked"
        assert _core.attention_way("cuda", head, cudnn=True) == "cudnn"
        assert _core.attention_way("cuda", head, cudnn=True, repeatable=True) not in (
            "cudnn",
            "stock",
        )
    for head in (4, 63, 100, 136, 192, 256, 512):
        assert _core.attention_way("cuda", head) != "stock"
    assert _core.attention_way("cuda", 256, cudnn=True) == "cudnn"
    assert _core.attention_way("cuda", 512, cudnn=True) != "cudnn"
    assert _core.attention_way("cuda", 100, cudnn=True) == "blocked"


def test_a_repeatable_run_on_metal_keeps_mlx_own():
    """MLX's attention is deterministic on Metal, so `set_repeatable` matters only on CUDA."""
    assert _core.attention_way("metal", 128, repeatable=True) == "stock"


def test_a_cpu_takes_the_kernel():
    assert {_core.attention_way("cpu", head, mx.float32) for head in (8, 64, 256)} == {"kernel"}


def test_a_device_that_is_none_is_refused():
    with pytest.raises(ValueError, match="'cpu', 'metal' or 'cuda'; got 'tpu'"):
        _core.attention_way("tpu", 64)


def test_what_is_asked_for_here_is_what_is_chosen_here():
    """`attention_way` must return the implementation that an actual call chooses."""
    here = mx.default_device() != mx.Device(mx.cpu)
    name = ("cuda" if mx.cuda.is_available() else "metal") if here else "cpu"
    x = mx.zeros((1, 1, 128, 40), mx.bfloat16)
    saved = _core.attention_forward(x, x, x, _core.AttentionOptions(scale=1.0))
    assert (saved == []) == (_core.attention_way(name, 40) == "stock")


# ---- the planner


def attention_cost(head: int, device: Device) -> _core.StageCost:
    """Returns the planned cost of attention with two heads of this size and 256 tokens."""
    options = {"head_dim": head, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_models.build("llama", **options)
    shape = shape_of(tiny_models.config("llama", **options), headers(model))
    ranks = {"model.layers.0.self_attn.q_proj": 4}
    costs = costs_of(shape, BatchShape.single(1, 256, 256, 256), ranks, device)
    at = next(i for i, stage in enumerate(costs.stages) if stage.name.endswith("0.self_attn"))
    return costs.costs[at]


#: Returns the size of the values that attention with two heads saves for its backward pass: o in
#: half precision and lse in float32.
def kept(head: int) -> int:
    return 256 * 2 * (2 * head + 4)


@pytest.mark.parametrize(
    "head", [*STOCK_ON_METAL, *(d for d in OTHERS_ON_METAL if d % 2 == 0), 512]
)
def test_the_plan_on_metal_is_for_what_runs_there(head):
    """For the backward pass, MLX's attention saves nothing, but our kernels and blocked attention
    save o and lse."""
    cost = attention_cost(head, METAL)
    assert cost.saved == (0 if head in STOCK_ON_METAL else kept(head))
    assert (cost.saved_work > 0) == (head not in STOCK_ON_METAL)


def test_the_plan_follows_what_the_device_has():
    nax = Device("metal", size=2, nax=True)
    plain = Device("cuda", size=2)
    assert attention_cost(512, nax).saved == 0
    # Our calls to cuDNN save o and lse.
    assert attention_cost(64, CUDA).saved == kept(64)
    assert attention_cost(64, plain).saved == (0 if ON_CUDA == "stock" else kept(64))
    assert attention_cost(100, plain).saved == kept(100)
    assert attention_cost(64, Device("cuda", size=2, repeatable=True)).saved == kept(64)
    assert attention_cost(64, Device("cuda", size=4)).saved > 0  # MLX has no float32 CUDA kernel
    assert attention_cost(64, CPU).saved > 0


def test_what_is_saved_is_what_both_calls_give():
    """cuDNN is not used with a window, even one that covers all keys. A stream with a branch needs
    two calls: one for the main sequence and one for the branch."""
    shape = {"rows": 1, "heads": 2, "groups": 1, "head": 64, "queries": 256, "keys": 256}
    assert _core.attention_cost(CUDA, **shape, window=255).saved == kept(64)
    plain = _core.attention_cost(CUDA, **shape, window=256).saved
    assert plain == (0 if ON_CUDA == "stock" else kept(64))
    tree = shape | {"branch": 56, "shared": 100}
    assert _core.attention_cost(CUDA, **tree).saved == kept(64)
    assert _core.attention_cost(METAL, **tree).saved == 0
