"""A client of `mlx-segtrain serve`: trains an adapter, merges it with itself, and chats with it.

    mlx-segtrain serve MODEL &
    python examples/client.py --model MODEL --data DATA

This script needs only httpx (pip install httpx). If the server needs a token, pass it with --token
or in MLX_SEGTRAIN_TOKEN.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

Event = dict[str, Any]


class Client:
    """Sends requests and follows jobs. If the server returns an error, the script ends."""

    def __init__(self, url: str, token: str | None = None):
        headers = {"authorization": f"Bearer {token}"} if token else {}
        # The first response may have to wait until a long prompt has been processed.
        self.http = httpx.Client(base_url=url, headers=headers, timeout=600)

    def post(self, route: str, /, **body: Any) -> dict[str, Any]:
        answer = self.http.post(route, json=body)
        found = answer.json()
        if answer.is_error:
            error = found["error"]  # in /v1, as in OpenAI's API, the error is an object
            sys.exit(f"{route}: {error if isinstance(error, str) else error['message']}")
        return found

    def follow(self, job: str, drop_every: int = 0) -> Iterator[Event]:
        """Yields each event of a job exactly once, even if the connection is lost.

        Each event has an id. A new connection sends the id of the last event that was received, and
        the server continues with the event after it. To demonstrate this, the connection is closed
        after every `drop_every` events.
        """
        last_id, wait_s = "", 0.5
        while True:
            headers = {"last-event-id": last_id} if last_id else {}
            try:
                with self.http.stream("GET", f"/api/jobs/{job}/stream", headers=headers) as stream:
                    stream.raise_for_status()
                    events = _events(stream.iter_lines())
                    for seen, (name, event, event_id) in enumerate(events, 1):
                        if name == "end":
                            return
                        last_id, wait_s = event_id or last_id, 0.5
                        yield event
                        if seen == drop_every:
                            break
            except httpx.HTTPError as error:  # the server is restarting or busy
                print(f"connection lost ({error}), trying again", file=sys.stderr)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, 10)


def _events(lines: Iterator[str]) -> Iterator[tuple[str, Event, str]]:
    """Yields the name, the data and the id of each event in a stream (text/event-stream)."""
    name, data, event_id = "message", "", ""
    for line in lines:
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if key == "event":
            name = value
        elif key == "data":
            data += value
        elif key == "id":
            event_id = value
        elif not line and data:
            yield name, json.loads(data), event_id
            name, data = "message", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    parser.add_argument("--url", default="http://localhost:8090")
    parser.add_argument("--token", default=os.environ.get("MLX_SEGTRAIN_TOKEN"))
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--drop-every", type=int, default=0, help="reconnect after every N events")
    parser.add_argument("--prompt", default="What does os.path.join do?")
    args = parser.parse_args()
    client = Client(args.url, args.token)

    job = client.post(
        "/api/finetune/submit",
        model_dir=str(args.model.resolve()),
        data_dir=str(args.data.resolve()),
        iters=args.iters,
        max_seq_length=args.max_seq_length,
        steps_per_report=1,
    )
    for event in client.follow(job["job_id"], args.drop_every):
        if event["type"] == "metric":
            print(f"step {event['step']:4d}  {event['kind']:5s}  loss {event['loss']:.4f}")
        elif event["type"] in ("failed", "cancelled"):
            sys.exit(event.get("error") or "the job was cancelled")
    adapter = job["adapter_path"]
    print(f"trained {adapter}")

    merged = client.post(
        "/api/finetune/merge", adapter_a=adapter, adapter_b=adapter, scales=[0.5, 0.5]
    )
    print(f"merged  {merged['merged_path']}: {merged['stats']['layersMerged']} linear layers")

    client.post("/v1/adapters", id="mine", path=adapter)
    client.post("/v1/adapters", id="merged", path=merged["merged_path"])
    for name in ("none", "mine", "merged"):
        answer = client.post(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": args.prompt}],
            max_tokens=args.max_tokens,
            temperature=0,
            adapter=name,
        )
        print(f"{name:7s} {answer['choices'][0]['message']['content']!r}")


class _Plain(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


if __name__ == "__main__":
    main()
