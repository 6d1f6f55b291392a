"""Serves OpenAI's routes on a local port, sends requests, and checks error responses."""

import asyncio
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import uvicorn
from fastapi import FastAPI

from lib.engines import END
from mlx_segtrain.serving.api.faults import add_handlers
from mlx_segtrain.serving.api.openai import router
from mlx_segtrain.serving.api.openai_responses import router as responses
from mlx_segtrain.serving.generation.engine import Engine
from mlx_segtrain.serving.roots import Outside

NEVER_ENDS = {"logit_bias": {str(END): -100}}
HELLO = [{"role": "user", "content": "Hello, who are you?"}]
CHAT = {"messages": HELLO, "max_tokens": 1}


class Server:
    """Serves OpenAI's routes with an engine on a local port. The routes use this object as their
    service."""

    def __init__(self, folder, policy="serve"):
        self.engine, self.trains, self.folder, self.policy = Engine(), False, folder, policy
        self.roots = self
        app = FastAPI()
        app.state.service = self
        app.include_router(router)
        app.include_router(responses)
        add_handlers(app)
        self.app = app
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    @property
    def waits(self):
        return self.policy == "refuse" and self.trains

    async def available(self):
        return [
            {**dict.fromkeys(("scale", "base_model")), "id": "a", "path": "/a", "rank": 2}
            | {"mounted": False}
        ]

    def resolve(self, text):
        path = (self.folder / text).resolve()
        if not path.is_relative_to(self.folder):
            raise Outside(f"{path} is not below a directory that this server may use.")
        return path

    def mount(self, *names):
        for name in names:
            answer = self.http.post("/v1/adapters", json={"id": name, "path": name})
            assert answer.status_code == 200, answer.text

    def call(self, fn):
        return asyncio.run(self.engine.call(fn))

    def idle(self, within_s=5.0):
        """Waits until the engine has no requests."""
        end = time.monotonic() + within_s
        while self.engine._active or self.engine._waiting:
            assert time.monotonic() < end, "generation continues after its client has disconnected"
            time.sleep(0.01)


@contextmanager
def serving(folder, model=None, **how):
    server = Server(folder, **how)
    if model:
        asyncio.run(server.engine.load(model))
    yield server
    server.http.close()
    server.server.should_exit = True
    server.thread.join()
    server.engine.close()


def chat_tokens(said, messages=HELLO):
    return said.tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def check(answer, status, says):
    """Checks the status, the format and the message of an error response. The message must be a
    single line."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code"} and "\n" not in error["message"]
    assert says in error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error
