import mlx.core as mx
import mlx.nn as nn

from ... import ops
from .. import bench
from .linear import factors_of, linear, mlx_linear, with_factors


def mlp(
    rows: int, width: int, hidden: int, bits: int, group: int, rank: int, gelu: bool
) -> bench.Case:
    def run(impl: str) -> dict[str, bench.Work]:
        sizes = [(hidden, width), (hidden, width), (width, hidden)]
        linears = [linear(*s, bits, group, rank, seed=i) for i, s in enumerate(sizes)]
        act = nn.gelu_approx if gelu else nn.silu

        def f(x: mx.array, *ab: mx.array) -> mx.array:
            gate, up, down = with_factors(linears, ab)
            if impl == "mlx":
                return mlx_linear(act(mlx_linear(x, gate)) * mlx_linear(x, up), down)
            return ops.lora_glu_mlp(x, gate, up, down, gelu=gelu, impl=impl)

        args = [bench.normal(rows, width), *factors_of(linears)]
        return bench.with_gradients(f, args, bench.normal(rows, width, seed=1))

    one = 6.0 * rows * width * hidden
    shape = f"{rows}×{width}/{hidden} r{rank}"
    flops = {"forward": one, "both": 2 * one}  # the gradients alone would also need gate and up
    return bench.Case("lora_glu_mlp", shape, ["kernel", "stock", "mlx"], run, flops)


def cases(gpu: bool) -> list[bench.Case]:
    if not gpu:
        return [mlp(512, 576, 1536, 4, 32, 16, gelu=False)]
    return [
        mlp(8192, 2560, 10240, 4, 64, 16, gelu=True),
        mlp(8192, 1536, 4608, 4, 64, 16, gelu=False),
    ]
