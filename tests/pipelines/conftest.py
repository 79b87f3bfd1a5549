"""An S3-compatible server on loopback, and a proxy before it that fails as networks do."""

import contextlib
import http.client
import logging
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "catalogue"
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """The endpoint's URL, and the URI of an empty bucket there."""

    endpoint: str
    uri: str


@dataclass(slots=True, kw_only=True)
class Dice:
    """What happens to each request that comes: seeded, for all threads together."""

    fail_fraction: float
    stall: int
    random: random.Random
    lock: threading.Lock = field(default_factory=threading.Lock)
    next: list[str] = field(default_factory=list)  # told, in place of thrown
    over: threading.Event = field(default_factory=threading.Event)
    happened: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("ok", "error", "reset", "cut", "stall"), 0))

    def throw(self, method: str) -> str:
        with self.lock:
            happens = "ok"
            if self.next:
                happens = self.next.pop(0)
                self.happened[happens] += 1
                return happens
            # Not the first: it would stall what only looks whether the server is there.
            if self.stall and method == "GET" and self.happened["ok"] >= 3:
                self.stall -= 1
                happens = "stall"
            elif self.random.random() < self.fail_fraction:
                happens = self.random.choice(("error", "reset", "cut"))
            self.happened[happens] += 1
            return happens


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    dice: Dice
    host: str

    def reset(self) -> None:
        # Linger for no time: the peer gets RST instead of an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in HOP or (self.command == "HEAD" and name.lower() == "content-length"):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.wfile.flush()

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def forward(self) -> None:
        body = self.body()
        happens = self.dice.throw(self.command)
        if happens == "stall":
            self.dice.over.wait()
        if happens in ("stall", "reset"):
            return self.reset()
        if happens == "error":
            return self.answer(500, [("Content-Type", "text/plain")], b"the proxy was told to fail", cut=False)
        upstream = http.client.HTTPConnection(self.host, timeout=60)
        with contextlib.closing(upstream):
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
            upstream.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            response = upstream.getresponse()
            data = response.read()
        if happens == "cut" and len(data) < 2:
            return self.reset()  # done, but nobody hears of it
        self.answer(response.status, response.getheaders(), data, cut=happens == "cut")
        if happens == "cut":
            self.reset()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # the sockets that were reset


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server of `handler` on a free port of loopback; its URL."""
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def flaky_proxy(endpoint: str, fail_fraction: float, stall: int = 1, seed: int = 0) -> Iterator[tuple[str, Dice]]:
    """The URL of a proxy before `endpoint`, and its Dice, which count what happened.

    Of its requests, `fail_fraction` fail, by an error 500, a reset or an answer cut in two; `stall` of them are never answered.
    """
    dice = Dice(fail_fraction=fail_fraction, stall=stall, random=random.Random(seed))
    handler = type("Flaky", (Handler,), {"dice": dice, "host": urlsplit(endpoint).netloc})
    with serving(handler) as url:
        try:
            yield url, dice
        finally:
            dice.over.set()


def set_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """The environment that says where S3 is, for pyarrow, Lance and boto3 alike."""
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_server(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An S3 server with one empty bucket; the environment points there."""
    set_s3(monkeypatch, moto_endpoint)
    bucket = boto3.resource("s3", endpoint_url=moto_endpoint).Bucket(BUCKET)
    bucket.create()
    yield S3Server(endpoint=moto_endpoint, uri=f"s3://{BUCKET}")
    bucket.objects.all().delete()
    bucket.delete()


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[str, Dice]]]:
    """`flaky(endpoint, fail_fraction, stall=1, seed=0)`: flaky_proxy for the rest of the test; the environment points to it."""
    with contextlib.ExitStack() as stack:

        def start(endpoint: str, fail_fraction: float, stall: int = 1, seed: int = 0) -> tuple[str, Dice]:
            url, dice = stack.enter_context(flaky_proxy(endpoint, fail_fraction, stall, seed))
            set_s3(monkeypatch, url)
            return url, dice

        yield start
