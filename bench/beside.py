"""Measures the step times of a job while clients chat with the server that runs it, and compares
them with the step times of the same job without clients.

    python bench/beside.py [--model DIR|SHAPE] [--length 2048] [--clients 8] [--steps 20]
                           [--tokens 128] [--budget GB]

SHAPE is one of the shapes in bench/step.py, with random 4-bit weights. A server (`mlx-segtrain
serve`) runs the same job three times. The first run is a warm-up, which compiles kernels and reads
the data. During the second run there are no clients. During the third run, each client requests one
completion after another. Rows have --length tokens, and LoRA has rank 16. Prints the median time of
the steps after the first four, the peak memory of the job, and the speed and the longest wait of
the clients with and without the job.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import httpx

from lib.served import Server  # pyright: ignore[reportMissingImports]
from ranks import WARM_UP, metrics, write_inputs
from step import SHAPES

#: The number of seconds for which the clients are measured without a job.
ALONE_S = 8.0


#: Request options that restrict a model with random weights to tokens that are letters. Most tokens
#: in its vocabulary have no text, so the server would send nothing for them.
LETTERS = {"logit_bias": {str(token): 100 for token in range(32, 58)}}


class Clients:
    """A context manager that runs threads, each of which streams one completion after another."""

    def __init__(self, url, count, tokens, options):
        self.url, self.count, self.tokens, self.options = url, count, tokens, options
        self.stopped, self.arrived, self.completed, self.faults = False, [], 0, []

    def chat(self, number):
        with httpx.Client(base_url=self.url, timeout=300) as http:
            asked = 0
            while not self.stopped:
                prompt = f"Client {number}, question {asked}: " + list(topics.values())[asked][:500]
                body = {"prompt": prompt, "max_tokens": self.tokens, "stream": True, **self.options}
                try:
                    self.stream(http, body)
                except (httpx.HTTPError, KeyError, AssertionError) as error:
                    self.faults.append(f"{type(error).__name__}: {error}")
                    return
                asked = (asked + 1) % len(topics)
                self.completed += 1

    def stream(self, http, body):
        before = None  # count waits within a completion, but not the wait for its first token
        with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if self.stopped:
                    return
                if line.startswith("data: {"):
                    now = time.monotonic()
                    self.arrived.append((now, 0.0 if before is None else now - before))
                    before = now

    def __enter__(self):
        self.threads = [threading.Thread(target=self.chat, args=(i,)) for i in range(self.count)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopped = True
        for thread in self.threads:
            thread.join()

    def wait_for(self, completions):
        """Waits until all clients together have received this number of completions."""
        while self.completed < completions and not self.faults:
            time.sleep(0.1)

    def figures(self, begin, end):
        waits = [wait for now, wait in self.arrived if begin <= now <= end]
        assert waits and not self.faults, self.faults
        speed = len(waits) / (end - begin)
        return f"{speed:,.0f} pieces/s, longest wait {max(waits) * 1e3:,.0f} ms"


def run(server, model, data, args):
    """Runs a job. Returns the log lines of the steps after the warm-up, and the times at which the
    warm-up and the job ended."""
    config = {
        "model_dir": str(model), "data_dir": str(data), "max_seq_length": args.length, "rank": 16,
        "iters": args.steps, "steps_per_report": 1, "steps_per_save": 0, "val_split": 0,
        **({"memory_budget_gb": args.budget} if args.budget else {}),
    }  # fmt: skip
    answer = server.http.post("/api/finetune/submit", json=config)
    assert answer.is_success, answer.text
    job, out, begin = answer.json()["job_id"], Path(answer.json()["adapter_path"]), None
    while (now := server.job(job))["status"] in ("queued", "running"):
        if begin is None and len(metrics(out)) >= WARM_UP:
            begin = time.monotonic()
        time.sleep(0.05)
    assert now["status"] == "done", now
    return metrics(out)[WARM_UP:], begin, time.monotonic()


def main():
    parser = argparse.ArgumentParser(description="Times a job while clients chat.")
    parser.add_argument("--model", default="minicpm5-1b", help="model folder, or a shape")
    parser.add_argument("--length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128, help="tokens per completion")
    parser.add_argument("--budget", type=float, help="memory budget of the job in GB")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if args.model in SHAPES:
            model, data = write_inputs(place, args.model, args.length)
        else:
            model, data = Path(args.model), place / "rows"
            data.mkdir()
            text = "\n".join(topics.values())
            # This many characters always give more than --length tokens, so every row is truncated
            # to --length tokens.
            size = 6 * args.length
            rows = [text[i : i + size] for i in range(0, len(text) - size, size // 8)]
            lines = [json.dumps({"text": row}) + "\n" for row in rows]
            (data / "train.jsonl").write_text("".join(lines))
        with Server(place, model.resolve(), "--root", place, "--root", model.parent) as server:
            run(server, model, data, args)
            steps, _, _ = run(server, model, data, args)
            alone = statistics.median(own["step_s"] for own in steps)
            options = LETTERS if args.model in SHAPES else {}
            with Clients(server.url, args.clients, args.tokens, options) as clients:
                clients.wait_for(args.clients)  # kernels are compiled for the first completions
                begin = time.monotonic()
                time.sleep(ALONE_S)
                without = clients.figures(begin, time.monotonic())
                steps, begin, end = run(server, model, data, args)
                beside = statistics.median(own["step_s"] for own in steps)
                during = clients.figures(begin, end)
    print(f"{Path(args.model).name}, rows of {args.length} tokens, {args.clients} clients")
    print(f"a step: {alone * 1e3:,.0f} ms alone, {beside * 1e3:,.0f} ms with clients", end="")
    print(f" ({beside / alone:.2f} times); peak {max(own['peak_gb'] for own in steps):.2f} GB")
    print(f"clients without the job: {without}; with it: {during}")


if __name__ == "__main__":
    main()
