"""Measures the tokens per second of `train` on one rank and on several ranks of this host, on the
same rows.

    python bench/ranks.py [--shape minicpm5-1b] [--length 8192] [--ranks 1 2] [--steps 12]
                          [--parallel data|pipeline] [--batches N] [--budget GB]
                          [--signal KILL|STOP] [--transfer MB ...]

The first run writes a model with random 4-bit weights, in one of the shapes in bench/step.py, and
rows of random bytes below --folder. LoRA has rank 16 on all projections, and a step has one row for
each rank. With CUDA, the ranks are connected by NCCL; otherwise, by MLX's ring over the loopback
interface. Prints the median time of the steps after the first four, and the speed relative to one
rank, or an error if a group does not have enough memory. With --signal, the last rank of the
largest group receives this signal after its fourth step. For each other rank, the last line of
output and the time until that rank ended are printed. With --transfer, nothing is trained: arrays
of MB · 10⁶ bytes are sent from rank 0 to rank 1 and back with each available method.
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
WORKER = "import sys, ranks; getattr(ranks, sys.argv[1])(*sys.argv[2:])"


def write_inputs(folder, shape, length, rows=64):
    """Writes a model folder with this shape and a data file, unless they exist already."""
    import step
    from lib.folders import write_model  # pyright: ignore[reportMissingImports]

    model = folder / shape
    if not (model / "model.safetensors").exists():
        quantization = {"quantization": {"bits": 4, "group_size": 64}}
        config = {**step.SHAPES[shape], **quantization, "max_position_embeddings": 1 << 17}
        write_model(model, config, step.load(shape)[0])
    data = folder / f"rows-{length}"
    if (data / "train.jsonl").exists():
        return model, data
    data.mkdir(exist_ok=True)
    letters = np.random.default_rng(0).integers(97, 123, (rows, length)).astype(np.uint8)
    lines = [json.dumps({"text": own.tobytes().decode()}) + "\n" for own in letters]
    (data / "train.jsonl").write_text("".join(lines))
    return model, data


def work(model, data, out, length, steps, more):
    """Trains as one rank of a group."""
    from mlx_segtrain import TrainConfig, train

    config = TrainConfig(
        model_dir=model, data_dir=data, adapter_path=out, max_seq_length=int(length), rank=16,
        rank_scaling="constant", iters=int(steps), steps_per_report=1, steps_per_save=0,
        val_split=0, overwrite=True, **json.loads(more),
    )  # fmt: skip
    train(config, tell)


def tell(event):
    """Prints the memory plan of a rank to its standard error."""
    if event["type"] == "plan":
        print(event["message"], file=sys.stderr, flush=True)


def transfer(*sizes):
    """Sends arrays from rank 0 to rank 1 and back, and prints the times."""
    import mlx.core as mx

    from mlx_segtrain.training import transfers
    from mlx_segtrain.training.ranks import joined

    with joined(print) as ranks:
        nccl = ranks.backend == "nccl"
        ways = {"MLX's ring": transfers.Transfers(ranks, transfers.ring_of(ranks))} if nccl else {}
        ways["two ranks add up" if nccl else "MLX's ring"] = transfers.transfers_of(ranks)
        for name, way in ways.items():
            for size in map(float, sizes):
                x = mx.random.normal((int(size * 1e6 / 2),)).astype(mx.bfloat16)
                mx.eval(x)
                times = []
                for _ in range(WARM_UP + 10):
                    begin = time.perf_counter()
                    if ranks.first:
                        way.send([x], 1)
                    back = way.post([(x.shape, x.dtype)], 1 - ranks.rank)
                    ranks.wait_for(back)
                    if not ranks.first:
                        way.send(back, 0)
                    way.settle()
                    times.append(time.perf_counter() - begin)
                if ranks.first:
                    assert mx.array_equal(back[0], x)
                    one = statistics.median(times[WARM_UP:]) / 2
                    speed = f"{size / 1e3 / one:.2f} GB/s"
                    print(f"{name}: {size:g} MB in {one * 1e3:.2f} ms, {speed}", flush=True)


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


def start(n, folder, cuda, *what):
    """Starts n ranks, and returns their processes and the files that contain their output."""
    started, errors = [], [folder / f"err-{rank}" for rank in range(n)]
    for rank in range(n):
        own = os.environ | environment(n, rank, folder, cuda) | {"PYTHONPATH": path()}
        with open(errors[rank], "w") as file:
            command = [sys.executable, "-c", WORKER, *map(str, what)]
            started.append(subprocess.Popen(command, env=own, stdout=file, stderr=file))
    return started, errors


def run(n, folder, model, data, args, cuda, sent=None):
    """Runs steps on n ranks, and returns the log lines of the steps after the warm-up, or [] if a
    signal was sent or memory ran out."""
    out = folder / f"run-{n}"
    steps = 10**6 if sent else args.steps
    more = {"memory_budget_gb": args.budget} if args.budget else {}
    more |= {"grad_accumulation_steps": args.batches} if args.batches else {}
    more |= {"parallel": args.parallel}
    (out / "metrics.jsonl").unlink(missing_ok=True)
    what = (model, data, out, args.length, steps, json.dumps(more))
    started, errors = start(n, folder, cuda, "work", *what)
    if sent:
        while len(metrics(out)) < WARM_UP and started[0].poll() is None:
            time.sleep(0.1)
        begin = time.monotonic()
        started[-1].send_signal(getattr(signal, f"SIG{sent}"))
        for rank, own in enumerate(started[:-1]):
            try:
                code = own.wait(90)
            except subprocess.TimeoutExpired:
                code = "still running: killed"
                own.kill()
            last = errors[rank].read_text().strip().splitlines()[-1:]
            print(f"rank {rank}: {code} after {time.monotonic() - begin:.1f} s: {last}")
        started[-1].kill()
        kept = sorted(own.name for own in (out / "state").glob("step-*"))
        print(f"completed steps: {metrics(out)[-1]['step']}, kept: {kept}")
        return []
    codes = [own.wait() for own in started]
    texts = [own.read_text() for own in errors]
    if any(codes):
        last = texts[0].strip().splitlines()[-1]
        if "NoRoom" not in last:
            sys.exit("\n".join(text[-2000:] for text in texts))
        print(f"{n} ranks: {last}", flush=True)
        return []
    for rank, text in enumerate(texts):
        print(f"rank {rank}: {' '.join(x for x in text.splitlines() if 'plan: ' in x)}")
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
    parser.add_argument("--parallel", choices=("data", "pipeline"), default="data")
    parser.add_argument("--batches", type=int)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--signal", choices=("KILL", "STOP"))
    parser.add_argument("--transfer", type=float, nargs="+")
    parser.add_argument("--folder", type=Path, default=Path("ranks-bench"))
    args = parser.parse_args()
    import mlx.core as mx

    cuda = mx.cuda.is_available()
    args.folder.mkdir(exist_ok=True)
    folder = args.folder.resolve()
    if args.transfer:
        started, files = start(2, folder, cuda, "transfer", *args.transfer)
        if any([own.wait() for own in started]):
            sys.exit("\n".join(own.read_text()[-2000:] for own in files))
        print(files[0].read_text().strip())
        return
    model, data = write_inputs(folder, args.shape, args.length)
    mx.clear_cache()
    if args.signal:
        run(max(args.ranks), folder, model, data, args, cuda, args.signal)
        return
    one = None
    for n in args.ranks:
        found = run(n, folder, model, data, args, cuda)
        if not found:
            continue
        peak = max(own["peak_gb"] for own in found)
        seconds = sorted(own["step_s"] for own in found)
        speed = statistics.median(own["tokens_per_sec"] for own in found)
        one = speed if n == 1 else one
        beside = f", {speed / one:.2f} times as fast as one" if one else ""
        print(
            f"{n} ranks: {statistics.median(seconds) * 1e3:,.0f} ms per step "
            f"({seconds[0] * 1e3:,.0f} to {seconds[-1] * 1e3:,.0f}), {speed:,.0f} tokens/s"
            f"{beside}; {peak:.2f} GB on rank 0",
            flush=True,
        )


PORTS = free_ports(8)

if __name__ == "__main__":
    main()
