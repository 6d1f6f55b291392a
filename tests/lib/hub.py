"""A Hugging Face hub on this machine."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def serve_hub() -> Iterator[tuple[dict, str]]:
    """A Hugging Face hub that takes all files in its commits: what it was told, and its address."""
    told = {"files": {}, "authorization": set()}

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            told["authorization"].add(self.headers["authorization"])
            answer = {}
            if "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        told["files"][entry["value"]["path"]] = content
                answer = {"success": True, "commitUrl": f"{url}/me/mine/commit/1", "commitOid": "1"}
            elif "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(body)["files"]]
                how = {"uploadMode": "regular", "shouldIgnore": False}
                answer = {"files": [{"path": path, **how} for path in paths]}
            else:
                told[self.path] = json.loads(body)
                answer = {"url": f"{url}/me/mine"} if self.path == "/api/repos/create" else {}
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield told, url
        server.shutdown()
