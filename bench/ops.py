"""Times the ops of a layer on this device and compares them with MLX's own ops, as `mlx-segtrain
bench` does.

python bench/ops.py [--only NAME …] [--impls NAME …] [--runs N] [--peers]

`--peers` adds torch's attention on a GPU. The columns are the fields of
`mlx_segtrain.ops.bench.Row`.
"""

import argparse
from functools import partial

from mlx_segtrain.commands import bench as command
from mlx_segtrain.ops import bench


def torch_attention(runs: int) -> None:
    import torch  # pyright: ignore[reportMissingImports]

    for heads, d, t in ((8, 512, 8192), (8, 256, 8192), (16, 128, 8192), (16, 128, 8191)):
        q, k, v = (
            torch.randn(1, n, t, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for n in (heads, 2, 2)
        )
        attention = partial(
            torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True
        )
        do = torch.randn_like(q)

        def both(q=q, k=k, v=v, do=do, attention=attention):
            return torch.autograd.grad(attention(q, k, v), [q, k, v], do)

        first, ms, queued = bench.timed(both, runs, lambda _: torch.cuda.synchronize())
        rate = 14 * bench.pairs(t, None, None) * heads * d / queued / 1e6
        shape = f"causal D{d} T{t}"
        print(
            command.line(
                bench.Row(
                    "attention", shape, "torch", "both", ms, queued, rate, "GF/s", first_s=first
                )
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the ops of a layer and of other libraries.")
    parser.add_argument(
        "--only", nargs="+", default=[], help="ops or shapes whose names contain one of these"
    )
    parser.add_argument("--impls", nargs="+", default=[], help="implementations; default: all")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    command.run(args.only, args.impls, args.runs, partial(print, flush=True))
    if args.peers and bench.on_gpu():
        torch_attention(args.runs)


if __name__ == "__main__":
    main()
