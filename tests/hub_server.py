"""The endpoints of the Hugging Face hub that push and pull reach through huggingface_hub, over HTTP.

Repositories are histories of trees; large files live in a store by sha256; uploads go by LFS batch, PUT and
commits in NDJSON; downloads redirect to a content address and take ranges: as the hub does it. It refuses
writing without a token, a commit of a large file that was not uploaded or on top of another than the newest
commit, and content of another checksum.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_test"


@dataclass
class Repo:
    """`branches`: of each its (commit, files), oldest first."""

    private: bool
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=lambda: {"main": []})

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        history, tree = self.branches[branch], {**self.tree(branch), **files}
        names = "".join(f"{name}{hashlib.sha1(tree[name]).hexdigest()}" for name in sorted(tree))
        sha = hashlib.sha1(f"{branch}{len(history)}{names}".encode()).hexdigest()
        history.append((sha, tree))
        return sha

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A commit and its files, by branch or by commit."""
        if found := self.branches.get(revision):
            return found[-1]
        commits = (commit for history in self.branches.values() for commit in history)
        return next((commit for commit in commits if commit[0] == revision), None)

    def tree(self, revision: str = "main") -> dict[str, bytes]:
        found = self.find(revision)
        return found[1] if found else {}


class HubServer(ThreadingHTTPServer):
    """Attributes for tests.

    uploads_left: LFS uploads before the token expires.
    cut_after: bytes of the next large download after which the connection breaks.
    stall_after: the same, but it hangs, sets `stalled` and waits for `go_on`.
    failures: of (method, beginning of a path), those whose next request fails with 503.
    uploaded, downloads: by sha256, all that there were; of a download also its first byte.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.uploaded: list[str] = []
        self.downloads: list[tuple[str, int]] = []
        self.uploads_left: int | None = None
        self.cut_after: int | None = None
        self.stall_after: int | None = None
        self.failures: set[tuple[str, str]] = set()
        self.committing = threading.Lock()
        self.stalled, self.go_on = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def cdn(self) -> str:
        """Large files are on another host, as far as a client can see."""
        return f"http://localhost:{self.server_port}/cdn"


@contextmanager
def running_hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def is_large(name: str) -> bool:
    """What .gitattributes of a new data set repository says of a zip."""
    return name.endswith(".zip")


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._dispatch("GET")

    def do_HEAD(self) -> None:
        self._dispatch("HEAD")

    def do_POST(self) -> None:
        self._dispatch("POST")

    def do_PUT(self) -> None:
        self._dispatch("PUT")

    def _dispatch(self, method: str) -> None:
        # The body first, or what is left of it would be taken for the next request.
        self.body = self._read_body()
        path = urlsplit(self.path).path
        for failure in list(self.server.failures):
            if failure[0] == method and path.startswith(failure[1]):
                self.server.failures.discard(failure)
                return self._json({"error": "come back later"}, 503)
        for wanted, pattern, answer in _ROUTES:
            if (match := re.fullmatch(pattern, path)) and method in wanted:
                writes = method in ("POST", "PUT") and "cdn" not in pattern
                if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self._json({"error": "unauthorized"}, 401)
                return answer(self, *map(unquote, match.groups()))
        return self._json({"error": f"no such endpoint: {method} {path}"}, 404)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(
            json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})}
        )

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repo(self, name: str) -> Repo | None:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._json({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def create(self) -> None:
        asked = json.loads(self.body)
        assert asked["type"] == "dataset"
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.server.url}/datasets/{name}"
        if name in self.server.repos:
            return self._json({"error": "You already created this dataset repo", "url": url}, 409)
        repo = self.server.repos[name] = Repo(asked.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.zip filter=lfs diff=lfs merge=lfs -text\n"})
        return self._json({"url": url})

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        header = yaml.safe_load(content.split("---\n")[1])
        bad = not isinstance(header, dict) or header.get("license") == "not-a-license"
        self._json(
            {"errors": [{"message": "license must be one of ..."}] if bad else []}, 400 if bad else 200
        )

    def info(self, name: str, revision: str = "main") -> None:
        if (repo := self._repo(name)) is not None:
            if (found := repo.find(revision)) is None:
                return self._json({"error": "Invalid rev"}, 404, {"X-Error-Code": "RevisionNotFound"})
            self._json({"id": name, "sha": found[0], "private": repo.private})
        return None

    def tree(self, name: str, revision: str) -> None:
        if (repo := self._repo(name)) is not None:
            entries = [_entry(path, content) for path, content in sorted(repo.tree(revision).items())]
            self._json([*entries, {"type": "directory", "path": "shards", "oid": "0" * 40}])

    def branch(self, name: str, branch: str) -> None:
        if (repo := self._repo(name)) is not None:
            exists = branch in repo.branches
            repo.branches.setdefault(branch, list(repo.branches["main"]))
            self._json({}, 409 if exists else 200)

    def preupload(self, name: str, revision: str) -> None:
        if (repo := self._repo(name)) is not None:
            tree = repo.tree(revision)
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": _entry(file["path"], tree[file["path"]])["oid"] if file["path"] in tree else None,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._json({"files": files})

    def batch(self, _name: str) -> None:
        def answer(wanted: dict[str, Any]) -> dict[str, Any]:
            if wanted["oid"] in self.server.large:
                return wanted
            return {**wanted, "actions": {"upload": {"href": f"{self.server.cdn}/{wanted['oid']}"}}}

        self._json({"objects": [answer(wanted) for wanted in json.loads(self.body)["objects"]]})

    def upload(self, oid: str) -> None:
        if self.server.uploads_left == 0:
            return self._json({"error": "the signature has expired"}, 403)
        if self.server.uploads_left is not None:
            self.server.uploads_left -= 1
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._json({"error": "the content is another"}, 400)
        self.server.large[oid] = self.body
        self.server.uploaded.append(oid)
        return self._send(b"", 200, {})

    def commit(self, name: str, branch: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return None
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        assert header["key"] == "header"
        assert header["value"]["summary"]
        parent = header["value"].get("parentCommit")
        files: dict[str, bytes] = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] in self.server.large:
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                return self._json({"error": f"{value['path']} was not uploaded"}, 400)
        with self.server.committing:
            if parent not in (None, repo.branches[branch][-1][0]):
                return self._json(
                    {"error": "A commit has happened since. Please refresh and try again."}, 412
                )
            sha = repo.commit(files, branch)
        return self._json({"commitUrl": f"{self.server.url}/datasets/{name}/commit/{sha}", "commitOid": sha})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return None
        found = repo.find(revision)
        if found is None or (content := found[1].get(path)) is None:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        entry, headers = _entry(path, content), {"X-Repo-Commit": found[0]}
        if not is_large(path):
            return self._send(content, 200, {**headers, "ETag": f'"{entry["oid"]}"'})
        oid = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        # By what the tree holds: a test may have changed it.
        self.server.large.setdefault(oid, content)
        return self._send(b"", 302, {**headers, "Location": f"{self.server.cdn}/{oid}"})

    def download(self, oid: str) -> None:
        content = self.server.large[oid]
        first = int(re.fullmatch(r"bytes=([0-9]+)-.*", self.headers.get("Range", "bytes=0-"))[1])  # type: ignore[index]
        self.server.downloads.append((oid, first))
        status, headers = 200, {"ETag": f'"{oid}"'}
        if first:
            status = 206
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if self.server.cut_after is not None or self.server.stall_after is not None:
            wanted, stalls = self.server.cut_after or self.server.stall_after, self.server.cut_after is None
            self.server.cut_after = self.server.stall_after = None
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            self.wfile.write(content[first:][:wanted])
            if stalls:
                self.wfile.flush()
                self.server.stalled.set()
                self.server.go_on.wait(60)
            self.close_connection = True
            return None
        return self._send(content[first:], status, headers)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    pointer = content
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    if is_large(path):
        oid = hashlib.sha256(content).hexdigest()
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()
        )
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": len(pointer)}
    entry["oid"] = hashlib.sha1(f"blob {len(pointer)}\0".encode() + pointer).hexdigest()
    return entry


_NAME = r"([^/]+/[^/]+)"
_ROUTES = (
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("GET",), f"/api/datasets/{_NAME}", _Handler.info),
    (("GET",), f"/api/datasets/{_NAME}/revision/([^/]+)", _Handler.info),
    (("GET",), f"/api/datasets/{_NAME}/tree/([^/]+)", _Handler.tree),
    (("POST",), f"/api/datasets/{_NAME}/branch/([^/]+)", _Handler.branch),
    (("POST",), f"/api/datasets/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    (("POST",), f"/api/datasets/{_NAME}/commit/([^/]+)", _Handler.commit),
    (("POST",), rf"/datasets/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (("GET", "HEAD"), f"(?:/datasets)?/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (("PUT",), "/cdn/([0-9a-f]{64})", _Handler.upload),
    (("GET", "HEAD"), "/cdn/([0-9a-f]{64})", _Handler.download),
)
