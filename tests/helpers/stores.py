"""Object stores as real servers on this machine, and a proxy in which requests go wrong."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

BUCKET = "bucket"
# The account and the key that Azurite has, which everybody knows.
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
#: What each kind needs: packages, and a program.
NEEDED = {"s3": (("moto", "flask", "flask_cors", "s3fs"), None),
          "abfs": (("adlfs",), "azurite-blob")}  # fmt: skip


def missing(kind: str) -> str:
    """Why a server of a kind cannot be started here; ``""`` if it can."""
    packages, program = NEEDED[kind]
    lacking = [name for name in packages if find_spec(name) is None]
    if program is not None and shutil.which(program) is None:
        lacking.append(program)
    if not lacking:
        return ""
    return f"no {', '.join(lacking)} here: make test-stores installs what these tests need"


@dataclass(frozen=True)
class Store:
    """How a store is reached.

    Attributes:
        kind: its protocol.
        endpoint: URL of the server, or of a proxy before it.
        secret: key that requests are signed with.
    """

    kind: str
    endpoint: str
    secret: str = _KEY

    def url(self, path: str = "", bucket: str = BUCKET) -> str:
        """The URL of what lies in the bucket."""
        return f"{self.kind}://{bucket}/{path}".rstrip("/")

    def connect(self, **options: Any) -> Any:
        """Let fsspec reach it from this process; the file system.

        Args:
            options: for the driver, beside those that lead there.
        """
        if self.kind == "s3":
            settings: dict[str, Any] = {
                "key": "key",
                "secret": self.secret,
                "endpoint_url": self.endpoint,
                "client_kwargs": {"region_name": "us-east-1"},
                "config_kwargs": {"retries": {"max_attempts": 1}},
            }
        else:
            settings = {
                "connection_string": f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};"
                f"AccountKey={self.secret};BlobEndpoint={self.endpoint}/{_ACCOUNT};"
            }
        fsspec.config.conf[self.kind] = settings | options
        return fsspec.filesystem(self.kind)


class Server:
    """A process that serves a store.

    Args:
        kind: of the store.
        folder: directory for what it keeps.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        if kind == "s3":
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        else:
            command = ["azurite-blob", "--blobHost", "127.0.0.1", "--blobPort", "0"]
            command += ["--skipApiVersionCheck", "--disableTelemetry", "--location", str(folder)]
        env = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": "100"}
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
        )
        self.store = Store(kind, self._address())
        # Else it waits for somebody to read what it says.
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        self._make_bucket()

    def _make_bucket(self) -> None:
        fs = self.store.connect()
        if self.store.kind == "s3":  # s3fs would name a region that this one does not take
            fs.call_s3("create_bucket", Bucket=BUCKET)
        else:
            fs.mkdir(BUCKET)

    def _address(self) -> str:
        said = ""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said += line
            match = re.search(r"(?:Running on|listens on) (http://127\.0\.0\.1:\d+)", line)
            if match:
                return match[1]
        raise AssertionError(f"the server does not start: {said}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for _ in self._process.stdout:
            pass

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._reading.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


# ---------------------------------------------------------------------- a proxy


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        number: of the request, from 1.
        method, path: of it, with the query.
    """

    number: int
    method: str
    path: str

    @property
    def writes(self) -> bool:
        """Whether it would change something."""
        return self.method in ("PUT", "POST", "DELETE")


#: What is done with a request: ``""`` sends it on; ``"cut"`` ends the connection before that and
#: ``"cut after"`` before the answer; a number answers with that status.
Rule = Callable[[Request], str]

_ERROR = '<?xml version="1.0"?><Error><Code>{}</Code><Message>so it is</Message></Error>'
_CODES = {"403": "AccessDenied", "503": "SlowDown", "500": "InternalError"}
_OF_ONE_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


class Proxy:
    """A server between a client and a store.

    Args:
        store: where requests go.

    Attributes:
        store: the same by way of the proxy.
        rule: see :data:`Rule`.
        seen: the requests so far.
    """

    def __init__(self, store: Store) -> None:
        self.rule: Rule = lambda request: ""
        self.seen: list[Request] = []
        self._lock = threading.Lock()
        address = urlsplit(store.endpoint)
        self._upstream = (str(address.hostname), int(address.port or 0))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.store = Store(store.kind, f"http://127.0.0.1:{self._server.server_port}", store.secret)

    def reset(self, rule: Rule = lambda request: "") -> None:
        """Count from 1 again, by another rule."""
        with self._lock:
            self.seen.clear()
            self.rule = rule

    def stop(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _count(self, method: str, path: str) -> str:
        with self._lock:
            request = Request(len(self.seen) + 1, method, path)
            self.seen.append(request)
            return self.rule(request)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                self.upstream = http.client.HTTPConnection(*proxy._upstream)

            def finish(self) -> None:
                self.upstream.close()
                super().finish()

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def serve(self) -> None:
                body = self.body()
                action = proxy._count(self.command, self.path)
                if action == "cut":
                    self.close_connection = True
                    return
                if action.isdigit():
                    text = _ERROR.format(_CODES[action]).encode()
                    self.answer(int(action), [("Content-Type", "application/xml")], text)
                    return
                headers = {
                    name: value
                    for name, value in self.headers.items()
                    if name.lower() not in _OF_ONE_CONNECTION
                }
                headers["Content-Length"] = str(len(body))
                self.upstream.request(self.command, self.path, body, headers)
                answer = self.upstream.getresponse()
                data = answer.read()
                if action == "cut after":
                    self.close_connection = True
                    return
                kept = [
                    (name, value)
                    for name, value in answer.getheaders()
                    if name.lower() not in _OF_ONE_CONNECTION or self.is_length(name)
                ]
                self.answer(answer.status, kept, data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve

            def is_length(self, name: str) -> bool:
                return self.command == "HEAD" and name.lower() == "content-length"

            def body(self) -> bytes:
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(data)))
                elif not any(self.is_length(name) for name, _ in headers):
                    self.send_header("Content-Length", "0")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        return Handler
