"""Measures runs on a million rows: the time until training starts (in the first run, and in a
second run on the same data), the memory, and the time until an interrupted run ends.

    python bench/data.py make --out DIR --rows 1000000     # train.jsonl, about 1 GB
    python bench/data.py run --data DIR --model MODEL      # two starts, Ctrl-C, resume

Rows are messages of about 1 KB: a question from the documentation of Python, and a piece of its
standard library as the response. Each figure comes from a separate `mlx-segtrain train` process,
started as a user would start it. Memory is the sum of the proportional set sizes of all processes
of the run, sampled ten times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import psutil


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Yields distinct rows. Every call yields the same rows."""
    rng = random.Random(0)
    library = Path(sysconfig.get_paths()["stdlib"])
    code = [path.read_text(encoding="utf-8") for path in sorted(library.glob("[a-t]*.py"))]
    code = [text for text in code if len(text) > 4000]
    prose = "\n".join(topics.values())
    for number in range(count):
        at, text = rng.randrange(len(prose) - 300), rng.choice(code)
        begin, length = rng.randrange(len(text) - 2000), rng.randrange(400, 930)
        figures = " ".join(str(rng.randrange(1000)) for _ in range(24))
        question = f"{number}: {prose[at : at + 130]} {figures}"
        yield {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": text[begin : begin + length].strip() or "pass"},
            ]
        }


def make(out: Path, count: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "train.jsonl", "w", encoding="utf-8") as file:
        for row in rows(count):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{out / 'train.jsonl'}: {(out / 'train.jsonl').stat().st_size / 1e9:.2f} GB")


class Watched:
    """Runs `mlx-segtrain train`, and records its memory and each line of its output with a
    timestamp."""

    def __init__(self, *args: str, cache: Path):
        self.lines: list[tuple[float, str]] = []
        self.peak = self.most = 0
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_segtrain.commands.main", "train", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "MLX_SEGTRAIN_CACHE": str(cache), "PYTHONUNBUFFERED": "1"},
        )
        self.threads = [threading.Thread(target=own) for own in (self._read, self._look)]
        for thread in self.threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic() - self.begun, line.rstrip()))

    def _look(self) -> None:
        own = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            total = 0
            with suppress(psutil.Error):
                for process in (own, *own.children(recursive=True)):
                    with suppress(psutil.Error):
                        total += process.memory_full_info().pss
            self.peak = max(self.peak, total)
            time.sleep(0.1)

    def until(self, text: str, seconds: float = 3600) -> float:
        """Waits for a line with this text, and returns the seconds from the start until the line
        was printed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for at, line in list(self.lines):
                if text in line:
                    return at
            if self.process.poll() is not None and not self.threads[0].is_alive():
                break
            time.sleep(0.01)
        raise SystemExit(
            f"{text!r} was never printed:\n" + "\n".join(line for _, line in self.lines[-20:])
        )

    def interrupt(self) -> float:
        """Sends SIGINT, as Ctrl-C does, and returns the seconds until the process ended."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.process.wait()
        return time.monotonic() - begun

    def end(self) -> None:
        self.process.wait()
        for thread in self.threads:
            thread.join()


def run(data: Path, model: str, iters: int) -> None:
    work = Path(tempfile.mkdtemp(prefix="bench-data-"))
    cache, out = work / "cache", work / "out"
    how = ["--data", str(data), "--model", model, "--adapter-path", str(out)]
    how += ["--max-seq-length", "256", "--iters", str(iters), "--steps-per-report", "1"]
    how += ["--steps-per-eval", "1000000", "--val-split", "2", "--steps-per-save", "3"]
    try:
        cut = Watched(*how, cache=cache)
        cut.until("tokenizing")
        time.sleep(15)
        print(f"Ctrl-C during tokenization: {cut.interrupt():.2f} s")
        cut.end()
        blocks = len(list(cache.glob("tokens/*/*.arrow")))
        print(f"  {blocks} blocks were complete")

        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        first = Watched(*how, cache=cache)
        begin = first.until("tokenizing")
        read, step = first.until(" rows, "), first.until("step 1/")
        first.end()
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        tokenized = max(at for at, line in first.lines if "tokenizing" in line)
        print(f"first start, resumed: tokenized after {tokenized:.1f} s, first step {step:.1f} s")
        print(f"  CPU time {cpu:.0f} s (whole run), memory {first.peak / 1e9:.2f} GB")
        print(f"  first output after {begin:.1f} s, number of rows after {read:.1f} s")

        second = Watched(*how, "--overwrite", cache=cache)
        begun, ready = second.until("steps on"), second.until("step 1/")
        second.until("step 4/")
        print(f"Ctrl-C during training: {second.interrupt():.2f} s")
        second.end()
        print(f"second start: validation and the first step begin after {begun:.1f} s")
        print(f"  first step is done after {ready:.1f} s, memory {second.peak / 1e9:.2f} GB")

        third = Watched(*how, "--resume", cache=cache)
        begun = third.until("resumed")
        third.end()
        ready = min(at for at, line in third.lines if line.startswith("step "))
        print(f"resumed: the first step begins after {begun:.1f} s, is done after {ready:.1f} s")
        print(subprocess.run(["du", "-sh", str(cache)], capture_output=True, text=True).stdout)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # Restore the default handler: a shell may start background processes with SIGINT ignored, and
    # runs would inherit this setting.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "run"))
    parser.add_argument("--out", type=Path, default=Path("/tmp/bench-data"))
    parser.add_argument("--data", type=Path, default=Path("/tmp/bench-data"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", default="")
    parser.add_argument("--iters", type=int, default=6)
    args = parser.parse_args()
    if args.what == "make":
        make(args.out, args.rows)
    else:
        run(args.data, args.model, args.iters)


if __name__ == "__main__":
    main()
