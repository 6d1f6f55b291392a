"""Fuzzes every reader and every route. No input may cause a crash, a response with status 500, a
hang, or a leak.

    INPUTS=100000 SEED=1 python tests/hostile/fuzz.py

runs the fuzzer outside of pytest, and prints a line after every 10,000 inputs. A file outside of
the server's roots contains a canary: its text must not appear in any response, message or log.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lib.folders import write_llama, write_rows
from lib.mutators import Mutator
from lib.served import Server
from mlx_segtrain import InputError
from mlx_segtrain.adapters.discovery import look
from mlx_segtrain.adapters.reading import read_stored
from mlx_segtrain.data.sources import rows_of, source_of
from mlx_segtrain.models.headers import read_shape
from mlx_segtrain.models.limits import check_files, check_model
from mlx_segtrain.models.snapshot import Snapshot
from mlx_segtrain.safetensors import read_header
from mlx_segtrain.serving import catalog
from mlx_segtrain.serving.confined.parent import Confined, Limits
from mlx_segtrain.serving.pools import Busy

CANARY = "canary-7f3a91c2"
#: The maximum number of seconds per input.
LONGEST_S = 5.0
#: The number of faults after which the fuzzer stops.
MOST_FAULTS = 20


def write_adapter_folder(path: Path) -> Path:
    import mlx.core as mx

    path.mkdir()
    weights = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": mx.zeros((3, 64)),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": mx.zeros((64, 3)),
    }
    mx.save_safetensors(str(path / "adapter_model.safetensors"), weights)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "rank_pattern": {"q_proj": 3}}
    (path / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {}}))
    return path


class Readers:
    """Mutates files of several kinds, and reads each file with the reader for its kind."""

    def __init__(self, place: Path, fuzzer: Mutator):
        self.fuzzer = fuzzer
        self.model = write_llama(place / "model", bits=4)
        self.adapter = write_adapter_folder(place / "adapter")
        self.data = write_rows(place / "data", 3) / "train.jsonl"
        self.kinds = {
            "config.json": (self.model / "config.json", self._config),
            "weights": (self.model / "model.safetensors", self._weights),
            "adapter_config.json": (self.adapter / "adapter_config.json", self._adapter),
            "adapter weights": (self.adapter / "adapter_model.safetensors", self._adapter),
            "train.jsonl": (self.data, lambda: list(rows_of(source_of(self.data)))),
            "tokenizer.json": (self.model / "tokenizer.json", self._tokenizer),
        }
        self.whole = {name: file.read_bytes() for name, (file, _) in self.kinds.items()}

    def one(self) -> str:
        """Changes one file and reads it. Returns the error, or an empty string."""
        # Tokenizers are rarely chosen: loading one starts a process, which takes a hundred times as
        # long as reading another file.
        names = [name for name in self.kinds if name != "tokenizer.json"]
        rare = self.fuzzer.chance.random() < 0.005
        name = "tokenizer.json" if rare else self.fuzzer.chance.choice(names)
        file, read = self.kinds[name]
        file.write_bytes(self._changed(name))
        try:
            read()
            return ""
        except (InputError, Busy) as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, (name, str(error)[:300])
            return str(error)
        finally:
            file.write_bytes(self.whole[name])

    def _changed(self, name: str) -> bytes:
        whole = self.whole[name]
        if name.endswith(".json"):
            return self.fuzzer.text(json.loads(whole))
        if name == "train.jsonl":
            rows = [json.loads(line) for line in whole.splitlines()]
            return b"\n".join([self.fuzzer.text(rows[0]), *map(self.fuzzer.text, rows[1:2])])
        return self.fuzzer.tensors(whole)

    def _config(self) -> None:
        assert catalog.models([self.model]) is not None
        read_shape(self.model)
        self._checked(self.model)

    def _weights(self) -> None:
        read_shape(self.model)
        read_header(self.model / "model.safetensors")

    def _checked(self, model: Path) -> None:
        check_files(model)
        try:
            check_model(Snapshot(model, whole=True))
        except (ValueError, RecursionError, AttributeError) as error:
            raise InputError(" ".join(str(error).split())[:300]) from None

    def _adapter(self) -> None:
        look(self.adapter)
        read_stored(self.adapter)

    def _tokenizer(self) -> None:
        confined = Confined(self.model)
        try:
            messages = [{"role": "user", "content": "Hello"}]
            limits, variables = Limits(2, 64 << 20), {"add_generation_prompt": True}
            confined.ask("chat", limits, "it", messages=messages, variables=variables, most=100)
        finally:
            confined.close()


def routes(place: Path, canary: Path) -> list[tuple[str, str, dict]]:
    """Returns the method, the path and a valid body of every route that accepts a body."""
    model, data, adapter = (str(place / name) for name in ("model", "data", "adapter"))
    evaluated = {"model_dir": model, "data_dir": data, "max_seq_length": 64}
    run = {**evaluated, "iters": 1, "rank": 8}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "adapter": "none"}
    sampled = {"temperature": 0.5, "top_p": 0.9, "stop": ["a"], "logit_bias": {"5": 1}, "seed": 1}
    return [
        ("POST", "/v1/chat/completions", {**chat, **sampled, "stream": True}),
        ("POST", "/v1/completions", {"prompt": "Hi", "max_tokens": 1, **sampled}),
        ("POST", "/v1/completions", {"prompt": [5, 6], "max_tokens": 1}),
        ("POST", "/v1/adapters", {"id": "a", "path": adapter}),
        ("POST", "/api/finetune/submit", {**run, "adapter_path": str(place / "out")}),
        ("POST", "/api/finetune/evaluate", {**evaluated, "split": "train"}),
        ("POST", "/api/finetune/plan", run),
        ("POST", "/api/finetune/merge", {"adapter_a": adapter, "adapter_b": adapter}),
        ("POST", "/api/finetune/export", {"adapter_path": adapter, "method": "peft"}),
        ("POST", "/api/finetune/push", {"repo_id": "a/b", "source_path": adapter}),
        ("POST", "/api/finetune/inspect-dataset", {"path": data, "model_dir": model}),
        ("POST", "/api/settings/hf-token", {"token": "hf_x"}),
        ("POST", "/api/models/serve", {"model_dir": str(canary)}),
        ("GET", "/api/jobs", {"limit": "5", "kind": "merge", "before": "9"}),
        ("GET", "/api/jobs/{}", {"": "job_0"}),
        ("GET", "/api/jobs/{}/stream", {"": "job_0"}),
        ("POST", "/api/jobs/{}/cancel", {"": "job_0"}),
        ("POST", "/api/jobs/{}/resume", {"": "job_0"}),
        ("DELETE", "/api/jobs/{}", {"": "job_0"}),
        ("GET", "/v1/models/{}", {"": "model"}),
        ("DELETE", "/v1/adapters/{}", {"": "a"}),
        ("GET", "/api/models", {"x": "y"}),
        ("GET", "/healthz", {"x": "y"}),
        ("POST", "/login", {"token": "x"}),
    ]


class Routes:
    """Sends mutated request bodies to a server."""

    def __init__(self, server: Server, fuzzer: Mutator, canary: Path):
        self.server, self.fuzzer = server, fuzzer
        self.routes = routes(server.cwd, canary)

    def one(self) -> str:
        method, path, body = self.fuzzer.chance.choice(self.routes)
        how: dict = {}
        if "{}" in path:
            word = str(self.fuzzer.chance.choice(self.fuzzer.odd))
            path = path.replace("{}", word.encode("utf-8", "replace").hex() or "a")
        elif method == "GET":
            changed = self.fuzzer.value(body)
            how["params"] = {
                str(k).encode("utf-8", "replace"): str(v).encode("utf-8", "replace")[:2000]
                for k, v in (changed if isinstance(changed, dict) else body).items()
            }
        else:
            how["content"] = self.fuzzer.text(body)
            kind = self.fuzzer.chance.choice(["application/json"] * 9 + ["text/plain"])
            how["headers"] = {"content-type": kind}
        answer = self.server.http.request(method, path, **how)
        assert answer.status_code not in (500, 502), (method, path, how, answer.text)
        assert answer.status_code < 500 or answer.status_code == 503, (path, answer.text)
        return answer.text


def fuzz(place: Path, inputs: int, seed: int, said=print) -> None:
    """Fuzzes readers and routes. Raises AssertionError with the inputs that caused a fault."""
    outside = place / "outside"
    (outside / "data").mkdir(parents=True)
    canary = outside / "canary.txt"
    canary.write_text(CANARY)
    (outside / "data" / "train.jsonl").write_text(json.dumps({"text": CANARY}))
    inside = place / "inside"
    inside.mkdir()
    write_llama(inside / "model", bits=4)
    write_adapter_folder(inside / "adapter")
    write_rows(inside / "data", 3)
    (inside / "sly").mkdir()
    (inside / "sly" / "train.jsonl").symlink_to(outside / "data" / "train.jsonl")
    (inside / "sly2").symlink_to(outside)
    links = (inside / "sly", inside / "sly2" / "data")
    fuzzer = Mutator(seed, map(str, (canary, outside / "data", *links, "/proc/self/environ")))
    readers = Readers(place, fuzzer)
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    args = (inside / "model", "--root", inside)
    with Server(inside, *args, cache=place / "cache", fresh=True, **nowhere) as server:
        asked = Routes(server, fuzzer, canary)
        slowest, refused, begun = 0.0, 0, time.monotonic()
        faults: list[str] = []
        for i in range(inputs):
            what = asked if i % 10 == 0 else readers
            started = time.monotonic()
            try:
                text = what.one()
                assert CANARY not in text, text
            except Exception as error:
                faults.append(f"input {i}: {type(error).__name__}: {error}"[:600])
                text = ""
            took = time.monotonic() - started
            slowest, refused = max(slowest, took), refused + bool(text)
            if took > LONGEST_S * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)):
                faults.append(f"input {i}: {took:.1f} s")
            if len(faults) > MOST_FAULTS or server.process.poll() is not None:
                break
            if (i + 1) % 10_000 == 0 or i + 1 == inputs:
                took = time.monotonic() - begun
                said(f"{i + 1} inputs, {refused} refused, {took:.0f} s, slowest {slowest:.2f} s")
        assert not faults, "\n".join([*faults, server.said[-2000:]])
        assert server.http.get("/healthz").json()["ok"]
        logs = [server.log, *(server.cache / "jobs").glob("*.log")]
        for log in logs:
            text = log.read_text(errors="replace")
            assert CANARY not in text and "Traceback" not in text, (log, text[-3000:])


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    try:
        fuzz(folder, int(os.environ.get("INPUTS", "10000")), int(os.environ.get("SEED", "0")))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
