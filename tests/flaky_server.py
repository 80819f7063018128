"""A folder over HTTP as bad servers send it: `python3 -m http.server`'s handler knows no Range; and worse."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class FlakyServer(ThreadingHTTPServer):
    """Attributes for tests.

    faults: by the end of a path, what befalls its next requests, one each: an HTTP status; "silent" before
        a byte; "drop" or "stall" after half of the body; "endless".
    lengths: whether replies have a Content-Length.
    pause: seconds between two blocks of 64 kB.
    got: paths of GET, in order.
    sent: bytes of endless bodies.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.faults: dict[str, list[int | str]] = {}
        self.lengths, self.pause = True, 0.0
        self.got: list[str] = []
        self.sent = 0
        self.go_on = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients go away here


@contextmanager
def serving(folder: Path) -> Iterator[FlakyServer]:
    server = FlakyServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


_WHEN = {
    "get_object": lambda method, path: method == "GET" and path.endswith(".zip"),
    "put_object": lambda method, path: method == "PUT" and path.endswith(".zip"),
    "upload_part": lambda method, path: method == "PUT" and "partNumber=" in path,
}


@contextmanager
def falling_silent(url: str, when: str) -> Iterator[str]:
    """Before an S3 at `url`: it takes requests of one kind, and answers in part or not at all."""
    go_on = threading.Event()

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do(self) -> None:
            self.close_connection = True
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            upstream = HTTPConnection(urlsplit(url).netloc)
            upstream.request(self.command, self.path, body, dict(self.headers))
            reply = upstream.getresponse()
            content = reply.read()
            silent = _WHEN[when](self.command, self.path)
            if silent and self.command == "PUT":
                go_on.wait(60)
                return
            self.send_response(reply.status)
            for name, value in reply.getheaders():
                if name.lower() not in ("connection", "date", "server", "transfer-encoding"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if silent else content)
            if silent:
                self.wfile.flush()
                go_on.wait(60)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = do

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients go away here
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        go_on.set()
        server.shutdown()
        server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    server: FlakyServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        if not self._fails((int,)):
            super().do_HEAD()

    def do_GET(self) -> None:
        self.server.got.append(self.path)
        if not self._fails((int, str)):
            super().do_GET()

    def _fails(self, kinds: tuple[type, ...]) -> bool:
        self.fault: int | str | None = None
        for end, faults in self.server.faults.items():
            if self.path.endswith(end) and faults and isinstance(faults[0], kinds):
                self.fault = faults.pop(0)
        if isinstance(self.fault, int):
            self.send_error(self.fault)
            return True
        if self.fault == "silent":
            self.server.go_on.wait(60)
        return self.fault == "silent"

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Content-Length" or (self.server.lengths and self.fault != "endless"):
            super().send_header(keyword, value)

    def copyfile(self, source: Any, outputfile: Any) -> None:
        content = source.read()
        while self.fault == "endless":
            outputfile.write(content)
            self.server.sent += len(content)
        if self.fault in ("drop", "stall"):
            outputfile.write(content[: len(content) // 2])
            outputfile.flush()
            if self.fault == "stall":
                self.server.go_on.wait(60)
            return
        for first in range(0, len(content), 2**16):
            outputfile.write(content[first : first + 2**16])
            time.sleep(self.server.pause)
