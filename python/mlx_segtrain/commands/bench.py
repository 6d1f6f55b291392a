"""The command bench: times the ops, and compares one of our layers with mlx-lm's."""

from collections.abc import Callable, Iterable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..models.layer import PROJECTIONS
from ..ops import bench


def layer(
    rows: int, width: int, hidden: int, heads: int, groups: int, d: int, rank: int
) -> bench.Case:
    """Returns the benchmark case that compares our Llama layer with mlx-lm's, with LoRA on every
    projection."""

    def run(impl: str) -> dict[str, bench.Work]:
        from mlx_lm.models.llama import Model, ModelArgs
        from mlx_lm.tuner.utils import linear_to_lora_layers

        from ..models import adapting, chain_of

        config = {
            "model_type": "llama",
            "hidden_size": width,
            "num_hidden_layers": 1,
            "intermediate_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": d,
            "rms_norm_eps": 1e-5,
            "vocab_size": 1024,
        }
        model = Model(ModelArgs.from_dict(config))
        model.set_dtype(bench.dtype())
        nn.quantize(model, 64, 4)
        mx.eval(model.parameters())
        h, dh = bench.normal(1, rows, width), bench.normal(1, rows, width, seed=1)
        if impl == "mlx":
            own = {"rank": rank, "scale": 2.0, "dropout": 0.0, "keys": list(PROJECTIONS)}
            model.freeze()
            linear_to_lora_layers(model, 1, own)
            block = model.model.layers[0]
            names, factors = zip(*tree_flatten(block.trainable_parameters()), strict=True)

            def plain(h: mx.array, *ab: mx.array) -> mx.array:
                block.update(tree_unflatten(list(zip(names, ab, strict=True))))
                return block(h, mask="causal")  # pyright: ignore[reportArgumentType]

            return bench.with_gradients(plain, [h, *factors], dh)
        chain = chain_of(model)
        adapter = adapting.init(chain, dict.fromkeys(chain.linears, rank), 2.0, 0)
        attention, mlp = chain.stages(adapter.scales)
        by_stage = adapting.stage_params(chain, adapter)
        params = {**by_stage[attention.name], **by_stage[mlp.name]}
        positions = mx.arange(rows)

        def ours(h: mx.array, *ab: mx.array) -> mx.array:
            own = dict(zip(params, ab, strict=True))
            return mlp.fn(own, attention.fn(own, h, positions)[0])

        return bench.with_gradients(ours, [h, *params.values()], dh)

    linears = width * d * (2 * heads + 2 * groups) + 3 * width * hidden
    flops = {"both": 4.0 * rows * linears + 14.0 * bench.pairs(rows, None, None) * heads * d}
    shape = f"{rows}×{width}/{hidden} {heads}/{groups}×{d}"
    limit = 100.0 if bench.on_gpu() else None
    return bench.Case("layer", shape, ["auto", "mlx"], run, flops, limit_mb=limit)


def cases() -> list[bench.Case]:
    """Returns the benchmark cases for the ops, and the case for a layer with the shape of
    MiniCPM5-1B (on a GPU) or SmolLM2 (on a CPU)."""
    shape = (8192, 1536, 4608, 16, 2, 128, 16) if bench.on_gpu() else (512, 576, 1536, 9, 3, 64, 16)
    return [*bench.cases(), layer(*shape)]


HEADER = (
    "op                   shape                      impl     what          ms   queued"
    "          rate  floor  peak MB  first s"
)


def line(row: bench.Row) -> str:
    start = f"{row.op:20s} {row.shape:26s} {row.impl:8s}"
    if row.reason:
        return f"{start} {row.reason}"
    return (
        f"{start} {row.what:8s} {row.ms:7.3f} {row.queued_ms:8.3f} {row.rate:8.0f} {row.unit} "
        f"{row.floor:5.0%} {row.peak_mb:8.1f} {row.first_s:8.2f}"
    )


def run(
    only: Iterable[str] = (),
    impls: Iterable[str] = (),
    runs: int = 20,
    show: Callable[[str], None] = print,
) -> list[bench.Row]:
    """Measures the cases whose op or shape contains one of the strings in `only`, with the
    implementations in `impls`. By default, measures all cases with all implementations."""
    wanted, chosen = list(only), set(impls)
    device = bench.measure_device()
    name = str(bench.dtype()).split(".")[-1]
    rates = f"matrix product {device.gf_s:.0f} GF/s, copy {device.gb_s:.0f} GB/s"
    show(f"{rates}, {name}; a synchronous call takes at least {device.wait_ms:.3f} ms")
    show(HEADER)
    rows = []
    for case in cases():
        if wanted and not any(x in f"{case.op} {case.shape}" for x in wanted):
            continue
        for impl in case.impls:
            if chosen and impl not in chosen:
                continue
            for row in bench.measure(case, impl, device, runs):
                rows.append(row)
                show(line(row))
    return rows
