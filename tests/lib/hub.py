"""Simulates a Hugging Face hub on this machine: downloads of models and data sets, and uploads."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

#: Files larger than this number of bytes are stored under their SHA-256 hashes, as in Git LFS.
SMALL = 10_000


@dataclass
class Repository:
    """A repository. `files` maps names to contents. Each new commit changes `commit`. A gated
    repository requires a known token."""

    files: dict[str, bytes]
    commit: str
    refs: dict[str, str] = field(default_factory=dict)  #: other names for commits
    readers: set[str] | None = None  #: tokens of users with read access; None allows everyone
    branches: dict[str, "Repository"] = field(default_factory=dict)  #: branches by name


@dataclass
class Hub:
    url: str = ""
    told: dict = field(default_factory=dict)  #: request bodies by path
    pushed: dict = field(default_factory=dict)  #: files by name
    authorization: set = field(default_factory=set)
    requests: list = field(default_factory=list)  #: ("GET", "/org/name/resolve/…", Range header)
    repositories: dict = field(
        default_factory=dict
    )  #: the keys are ("models" or "datasets", "org/name")
    breaks_after: int | None = None  #: closes a connection after sending this many bytes of a file
    pause_s: float = 0.0  #: delay between the parts of a file, in seconds
    sent: int = 0  #: total number of bytes of files sent
    searches_fail: bool = False
    says_more: int = 0  #: the reported size of large files is too large by this many bytes

    def add(self, name: str, source: "Path | dict[str, bytes]", kind: str = "models", **more):
        """Adds a repository, or a branch of an existing repository, with the files in `source`,
        which is a dict or a folder."""
        branch = more.pop("branch", None)
        files = source
        if isinstance(source, Path):
            paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
            files = {path.relative_to(source).as_posix(): path.read_bytes() for path in paths}
        text = json.dumps(
            [name, branch, *((k, hashlib.sha1(x).hexdigest()) for k, x in files.items())]
        )
        commit = hashlib.sha1(text.encode()).hexdigest()
        own = Repository(dict(files), commit, **more)
        if branch is None:
            self.repositories[kind, name] = own
        else:
            self.repositories[kind, name].branches[branch] = own
        return own

    def files_asked(self) -> list[str]:
        """Returns the names of all files that clients have downloaded."""
        asked = [path for method, path, _ in self.requests if method == "GET"]
        return [
            path.split("/resolve/")[1].partition("/")[2] for path in asked if "/resolve/" in path
        ]


def etag(content: bytes) -> str:
    """Returns the ETag of a git or LFS blob."""
    if len(content) > SMALL:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Broken(Exception):
    """Raised to close the connection immediately."""


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serves the repositories added to a hub, and accepts commits of any files."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            hub.authorization.add(self.headers["authorization"])
            answer = {}
            if "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        hub.pushed[entry["value"]["path"]] = content
                commit = {"commitUrl": f"{hub.url}/me/mine/commit/1", "commitOid": "1"}
                answer = {"success": True, **commit}
            elif "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(body)["files"]]
                how = {"uploadMode": "regular", "shouldIgnore": False}
                answer = {"files": [{"path": path, **how} for path in paths]}
            else:
                hub.told[self.path] = json.loads(body)
                answer = {"url": f"{hub.url}/me/mine"} if self.path == "/api/repos/create" else {}
            self.answer(answer)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            place = urlsplit(self.path).path
            hub.requests.append((self.command, unquote(place), self.headers["range"]))
            try:
                if place.startswith("/api/"):
                    self.about(place.removeprefix("/api/"))
                else:
                    self.file(place)
            except (Broken, ConnectionError):
                self.close_connection = True

        def search(self, kind):
            """Returns the repositories whose names contain the search words."""
            if hub.searches_fail:
                self.fault(503, "")
                return
            asked = parse_qs(urlsplit(self.path).query)
            words = asked["search"][0].lower().split()
            names = [own for of, own in hub.repositories if of == kind]
            found = [own for own in names if all(word in own.lower() for word in words)]
            found = found[: int(asked["limit"][0])]
            self.answer([{"id": name, "downloads": 1000} for name in found])

        def about(self, place):
            kind, *rest = map(unquote, place.split("/"))
            if kind in ("models", "datasets") and not rest:
                self.search(kind)
                return
            if kind not in ("models", "datasets"):  # not a request for a repository
                self.fault(404, "")
                return
            name, revision = "/".join(rest[:2]), "/".join(rest[3:]) or "main"
            own = self.repository(kind, name, revision)
            if own is None:
                return
            if rest[2:3] == ["tree"]:
                facts = [(name, len(x), etag(x)) for name, x in own.files.items()]
                tree = [{"type": "file", "path": n, "size": k, "oid": x} for n, k, x in facts]
                self.answer(tree)
                return
            files = [
                {"rfilename": name, "size": len(x), "blobId": etag(x)}
                for name, x in own.files.items()
            ]
            gated = "manual" if own.readers is not None else False
            self.answer({"id": name, "sha": own.commit, "siblings": files, "gated": gated})

        def file(self, place):
            path = [unquote(part) for part in place.strip("/").split("/")]
            kind = "datasets" if path[0] == "datasets" else "models"
            path = path[path[0] == "datasets" :]
            name, revision, file = "/".join(path[:2]), path[3], "/".join(path[4:])
            own = self.repository(kind, name, revision, gated=True)
            if own is None:
                return
            head = {"X-Repo-Commit": own.commit}
            content = own.files.get(file)
            if content is None:
                self.fault(404, "EntryNotFound", head)
                return
            size = len(content) + (hub.says_more if len(content) > SMALL else 0)
            head |= {"ETag": f'"{etag(content)}"', "X-Linked-Size": str(size)}
            head |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
            status, part = 200, content
            if given := self.headers["range"]:
                begin, _, end = given.removeprefix("bytes=").partition("-")
                first, last = int(begin), min(int(end or len(content)), len(content) - 1)
                if first >= len(content):
                    self.fault(416, "", head)
                    return
                status, part = 206, content[first : last + 1]
                head["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.start(status, head, len(part))
            if self.command == "HEAD":
                return
            left = len(part) if hub.breaks_after is None else min(len(part), hub.breaks_after)
            for start in range(0, left, 1 << 14):
                piece = part[start : min(start + (1 << 14), left)]
                self.wfile.write(piece)
                hub.sent += len(piece)
                threading.Event().wait(hub.pause_s)
            if left < len(part):
                raise Broken

        def repository(self, kind, name, revision, gated=False):
            hub.authorization.add(self.headers["authorization"])
            own = hub.repositories.get((kind, name))
            if own is None:
                # Like the real hub, this one does not tell clients without a token which
                # repositories exist.
                self.fault(404 if self.headers["authorization"] else 401, "RepoNotFound")
                return None
            for name, other in own.branches.items():
                if revision in (name, other.commit):
                    return other
            if revision not in ("main", own.commit, *own.refs):
                self.fault(404, "RevisionNotFound")
                return None
            token = (self.headers["authorization"] or "").removeprefix("Bearer ")
            if gated and own.readers is not None and token not in own.readers:
                self.fault(403 if token else 401, "GatedRepo")
                return None
            return own

        def start(self, status, head, length):
            self.send_response(status)
            for name, value in head.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def answer(self, value, status=200):
            body = json.dumps(value).encode()
            self.start(status, {"Content-Type": "application/json"}, len(body))
            self.wfile.write(body)

        def fault(self, status, code, head=None):
            self.start(status, {"X-Error-Code": code, "X-Error-Message": code, **(head or {})}, 0)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield hub
        server.shutdown()
