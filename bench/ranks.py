"""Tokens per second of `train` on one rank and on several ranks of this host, with the same rows.

    python bench/ranks.py [--shape minicpm5-1b] [--length 8192] [--ranks 1 2] [--steps 12]
                          [--signal KILL|STOP]

A shape of bench/step.py with random 4-bit weights, and rows of random bytes, are written below
--folder once. LoRA of rank 16 on all projections, batch 1; a step has one row for each rank. NCCL
connects the ranks where there is CUDA, else MLX's ring over the loopback. Prints the median of the
steps after the first four, and the speedup over one rank. With --signal the last rank of the
largest group gets it after its fourth step; prints what each rank then says, and after how long.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from lib.launched import free_ports  # noqa: E402  # pyright: ignore[reportMissingImports]

WARM_UP = 4
WORKER = "import sys, ranks; ranks.work(*sys.argv[1:])"


def write_inputs(folder, shape, length, rows=64):
    """Writes a model folder of the shape and a data file, unless they exist."""
    import step
    from lib.folders import write_model  # pyright: ignore[reportMissingImports]

    model = folder / shape
    if not (model / "model.safetensors").exists():
        quantization = {"quantization": {"bits": 4, "group_size": 64}}
        config = {**step.SHAPES[shape], **quantization, "max_position_embeddings": 1 << 17}
        write_model(model, config, step.load(shape)[0])
    data = folder / f"rows-{length}"
    data.mkdir(exist_ok=True)
    letters = np.random.default_rng(0).integers(97, 123, (rows, length)).astype(np.uint8)
    lines = [json.dumps({"text": own.tobytes().decode()}) + "\n" for own in letters]
    (data / "train.jsonl").write_text("".join(lines))
    return model, data


def work(model, data, out, length, steps):
    """Runs one rank."""
    from mlx_segtrain import TrainConfig, train

    config = TrainConfig(
        model_dir=model, data_dir=data, adapter_path=out, max_seq_length=int(length), rank=16,
        rank_scaling="constant", iters=int(steps), steps_per_report=1, steps_per_save=0,
        val_split=0, overwrite=True,
    )  # fmt: skip
    train(config)


def environment(n, rank, folder, cuda):
    if n == 1:
        return {"CUDA_VISIBLE_DEVICES": "0"}
    if cuda:
        own = {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(PORTS[0]), "MLX_WORLD_SIZE": str(n)}
        return own | {"MLX_RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank)}
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in PORTS[:n]]))
    return {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}


def metrics(out):
    try:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [own for own in lines if own.get("kind") == "train"]


def run(n, folder, model, data, args, cuda, sent=None):
    """Runs steps on n ranks: returns their figures, and what each printed last."""
    out = folder / f"run-{n}"
    steps = 10**6 if sent else args.steps
    what = [str(x) for x in (model, data, out, args.length, steps)]
    started, errors = [], [folder / f"err-{rank}" for rank in range(n)]
    (out / "metrics.jsonl").unlink(missing_ok=True)
    for rank in range(n):
        own = os.environ | environment(n, rank, folder, cuda) | {"PYTHONPATH": path()}
        with open(errors[rank], "w") as file:
            command = [sys.executable, "-c", WORKER, *what]
            started.append(subprocess.Popen(command, env=own, stdout=file, stderr=file))
    if sent:
        while len(metrics(out)) < WARM_UP and started[0].poll() is None:
            time.sleep(0.1)
        begin = time.monotonic()
        started[-1].send_signal(getattr(signal, f"SIG{sent}"))
        for rank, own in enumerate(started[:-1]):
            try:
                code = own.wait(90)
            except subprocess.TimeoutExpired:
                code = "still there: killed"
                own.kill()
            last = errors[rank].read_text().strip().splitlines()[-1:]
            print(f"rank {rank}: {code} after {time.monotonic() - begin:.1f} s: {last}")
        started[-1].kill()
        kept = sorted(own.name for own in (out / "state").glob("step-*"))
        print(f"steps that had ended: {metrics(out)[-1]['step']}, kept: {kept}")
        return []
    codes = [own.wait() for own in started]
    if any(codes):
        sys.exit("\n".join(own.read_text()[-2000:] for own in errors))
    return metrics(out)[WARM_UP:]


def path():
    places = [str(HERE), str(HERE.parent / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, places))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="minicpm5-1b")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--signal", choices=("KILL", "STOP"))
    parser.add_argument("--folder", type=Path, default=Path("ranks-bench"))
    args = parser.parse_args()
    import mlx.core as mx

    cuda = mx.cuda.is_available()
    args.folder.mkdir(exist_ok=True)
    folder = args.folder.resolve()
    model, data = write_inputs(folder, args.shape, args.length)
    mx.clear_cache()
    if args.signal:
        run(max(args.ranks), folder, model, data, args, cuda, args.signal)
        return
    one = None
    for n in args.ranks:
        found = run(n, folder, model, data, args, cuda)
        seconds = sorted(own["step_s"] for own in found)
        speed = statistics.median(own["tokens_per_sec"] for own in found)
        one = one or speed / n
        print(
            f"{n} ranks: {statistics.median(seconds) * 1e3:,.0f} ms a step "
            f"({seconds[0] * 1e3:,.0f} to {seconds[-1] * 1e3:,.0f}), {speed:,.0f} tokens/s, "
            f"{speed / one:.2f} times as fast as one",
            flush=True,
        )


PORTS = free_ports(8)

if __name__ == "__main__":
    main()
