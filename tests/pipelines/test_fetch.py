import contextlib
import os
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from idem import storage
from pipelines.reading.fetch import Fetcher
from pipelines.records import RECORDS, TEXTS
from tests.pipelines.conftest import S3Server, serving


def records(refs: list[str | None], **columns: list[Any]) -> pa.Table:
    n = len(refs)
    table: dict[str, Any] = {name: [""] * n for name in (*TEXTS, "source_file", "mime", "fault", "fault_message")}
    table |= {"source_row": range(n), "deleted": [False] * n, "image": [None] * n, "original": [None] * n, "image_ref": refs} | columns
    return pa.table({name: table[name] for name in RECORDS.names}, schema=RECORDS)


def fetch(refs: list[str | None], base: str | Path, **options: Any) -> list[tuple[bytes | None, str]]:
    given = records(refs)
    filled = Fetcher(base=str(base), **({"timeout_s": 1.0, "attempts": 3} | options)).fill(given)
    assert filled.schema == given.schema
    filled.validate(full=True)
    same = [name for name in RECORDS.names if name not in ("image", "fault", "fault_message")]
    assert filled.select(same).equals(given.select(same))
    told = filled.to_pylist()
    assert all(bool(r["fault"]) == bool(r["fault_message"]) for r in told)
    return [(r["image"], r["fault"]) for r in told]


class Web(BaseHTTPRequestHandler):
    """/ok/X gives X; /NNN answers that status; /flaky/K fails K times; others as named."""

    protocol_version = "HTTP/1.1"
    asked: dict[str, int]

    def give(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        kind, _, rest = self.path.strip("/").partition("/")
        times = self.asked[self.path] = self.asked.get(self.path, 0) + 1
        if kind == "ok":
            self.give(200, rest.encode())
        elif kind.isdigit():
            self.give(int(kind))
        elif kind == "flaky":
            self.give(200, b"at last") if times > int(rest) else self.give(503)
        elif kind == "redirect":
            self.give(302, Location=f"/redirect/{int(rest) - 1}" if int(rest) > 1 else "/ok/there")
        elif kind == "elsewhere":
            self.give(302, Location="ftp://127.0.0.1/x")
        elif kind == "cut":
            self.send_response_only(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x")
            self.close_connection = True
        elif kind == "stall":
            time.sleep(30)
        elif kind in ("endless", "drip"):
            self.send_response_only(200)
            self.send_header("Connection", "close")
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x" * (1 if kind == "drip" else 65536))
                    self.wfile.flush()
                    time.sleep(0.05 if kind == "drip" else 0)
                    self.asked["bytes"] = self.asked.get("bytes", 0) + 65536
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[tuple[str, dict[str, int]]]:
    asked: dict[str, int] = {}
    with serving(type("OneWeb", (Web,), {"asked": asked})) as url:
        yield url, asked


def test_paths_below_the_base(tmp_path: Path) -> None:
    base = tmp_path / "pictures"
    (base / "in").mkdir(parents=True)
    (base / "in" / "a b.jpg").write_bytes(b"A")
    (base / "link.jpg").symlink_to(base / "in" / "a b.jpg")
    uri = (base / "in" / "a b.jpg").as_uri()
    refs = [
        "in/a b.jpg",
        "./in/../in/a b.jpg",
        "link.jpg",
        str(base / "in" / "a b.jpg"),
        uri,
        None,
        "in/nothing.jpg",
        "in",
        "a\0b",
        "x" * 5000,
    ]
    faults = [(None, "image_missing")] * 4
    assert fetch(refs, base) == [(b"A", "")] * 5 + [(None, "")] + faults
    assert fetch(["in/a b.jpg"], base.as_uri()) == [(b"A", "")]


def test_paths_that_lead_outside(tmp_path: Path) -> None:
    base = tmp_path / "pictures"
    base.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(b"not for you")
    (base / "out.jpg").symlink_to(secret)
    (base / "folder").symlink_to(tmp_path)
    refs = [
        "../secret",
        str(secret),
        "out.jpg",
        "folder/secret",
        secret.as_uri(),
        "a/../../secret",
        "s3://bucket/x",
        "../pictures-2/x",
        "/etc/passwd",
    ]
    assert fetch(refs, base) == [(None, "image_outside")] * len(refs)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    assert fetch(["pipe.jpg", "circle.jpg"], tmp_path) == [(None, "image_missing")] * 2


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(b"A")

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(storage.Unreachable, match=r"a.jpg cannot be read: .*Permission denied"):
        fetch(["a.jpg"], tmp_path)


@pytest.mark.parametrize("ref", ["ftp://host/x.jpg", "gopher://x", "data:image/png;base64,AAAA", "hdfs://x/y"])
def test_schemes_that_are_not_allowed(tmp_path: Path, ref: str) -> None:
    assert fetch([ref], tmp_path) == [(None, "image_scheme")]


def test_what_has_a_picture_or_a_fault_is_left_alone(tmp_path: Path) -> None:
    given = records(["nothing.jpg"] * 3, image=[b"here", None, None], fault=["", "source_damaged", ""], fault_message=["", "why", ""])
    filled = Fetcher(base=str(tmp_path)).fill(given).to_pylist()
    assert [(r["image"], r["fault"]) for r in filled] == [(b"here", ""), (None, "source_damaged"), (None, "image_missing")]
    assert filled[1]["fault_message"] == "why"
    empty = records([])
    assert Fetcher(base=str(tmp_path)).fill(empty).equals(empty)


def test_too_many_bytes(tmp_path: Path, web: tuple[str, dict[str, int]]) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x" * 100)
    (tmp_path / "b.jpg").write_bytes(b"x" * 101)
    url, asked = web
    refs = ["a.jpg", "b.jpg", f"{url}/ok/{'x' * 100}", f"{url}/ok/{'x' * 101}"]
    assert [f for _, f in fetch(refs, tmp_path, max_bytes=100)] == ["", "image_too_many_bytes"] * 2
    assert fetch([f"{url}/endless"], tmp_path, max_bytes=300_000) == [(None, "image_too_many_bytes")]
    time.sleep(0.2)
    assert asked["bytes"] < 20_000_000  # it stopped: what is more was under way already


def test_the_order_is_kept(tmp_path: Path, web: tuple[str, dict[str, int]]) -> None:
    url, _ = web
    refs: list[str | None] = [f"{url}/ok/{k}" if k % 3 else None for k in range(100)]
    assert fetch(refs, tmp_path) == [(str(k).encode() if k % 3 else None, "") for k in range(100)]


def test_answers_that_are_the_fault_of_the_record(tmp_path: Path, web: tuple[str, dict[str, int]]) -> None:
    url, asked = web
    refs = [f"{url}/404", f"{url}/410", f"{url}/400", f"{url}/204", "http://", "http://[::x/y", f"{url}/redirect/6", f"{url}/elsewhere"]
    assert fetch(refs, tmp_path) == [(None, "image_missing")] * len(refs)
    assert asked["/404"] == 1
    assert fetch([f"{url}/redirect/5"], tmp_path) == [(b"there", "")]


def test_servers_that_fail_are_asked_again(tmp_path: Path, web: tuple[str, dict[str, int]]) -> None:
    url, asked = web
    assert fetch([f"{url}/flaky/2"], tmp_path) == [(b"at last", "")]
    assert asked["/flaky/2"] == 3


@pytest.mark.parametrize(
    ("path", "said", "times"),
    [
        ("500", "tried 3 times.*HTTP 500", 3),
        ("429", "tried 3 times.*HTTP 429", 3),
        ("401", "HTTP 401, tried once", 1),
        ("403", "HTTP 403, tried once", 1),
        ("cut", "tried 3 times.*RemoteProtocolError", 3),
        ("stall", "tried 3 times, with a timeout of 0.3 s.*ReadTimeout", 3),
        ("drip", "tried 3 times.*not done after 3 s", 3),
    ],
)
def test_servers_that_do_not_answer(tmp_path: Path, web: tuple[str, dict[str, int]], path: str, said: str, times: int) -> None:
    url, asked = web
    start = time.monotonic()
    with pytest.raises(storage.Unreachable, match=f"{url}/{path} cannot be .*{said}"):
        fetch([f"{url}/{path}"], tmp_path, timeout_s=0.3)
    assert time.monotonic() - start < 20
    assert asked[f"/{path}"] == times


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with serving(Web) as url:
        pass
    start = time.monotonic()
    with pytest.raises(storage.Unreachable, match=f"{url}/ok/1 cannot be reached: tried 3 times.*ConnectError"):
        fetch([f"{url}/ok/1", *[f"{url}/ok/{k}" for k in range(2, 100)]], tmp_path)
    assert time.monotonic() - start < 20  # the others are not tried


def test_relative_to_a_url(web: tuple[str, dict[str, int]]) -> None:
    url, _ = web
    assert fetch(["a b", "../404", "x/../y"], f"{url}/ok/") == [(b"a%20b", ""), (None, "image_outside"), (b"y", "")]


def test_pictures_on_s3(s3_server: S3Server, flaky: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    base = storage.join(s3_server.uri, "pictures")
    for name in ("a b.jpg", "in/c%20d.jpg"):
        storage.write_bytes(storage.join(base, name), name.encode())
    storage.write_bytes(storage.join(s3_server.uri, "secret"), b"not for you")
    refs = [
        "a b.jpg",
        "in/c%20d.jpg",
        f"{base}/a b.jpg",
        "nothing.jpg",
        "in",
        "../secret",
        f"{s3_server.uri}/secret",
        "/secret",
        "file://" + "/x",
    ]
    outside = [(None, "image_outside")] * 4
    there = [(b"a b.jpg", ""), (b"in/c%20d.jpg", ""), (b"a b.jpg", "")]
    assert fetch(refs, base) == [*there, (None, "image_missing"), (None, "image_missing"), *outside]
    assert fetch(["a b.jpg"], base, max_bytes=3) == [(None, "image_too_many_bytes")]
    monkeypatch.setenv(storage.ATTEMPTS, "2")
    flaky(s3_server.endpoint, 1.0, stall=0)
    with pytest.raises(storage.Unreachable, match=r"s3://catalogue/pictures/a b.jpg cannot be reached"):
        fetch(["a b.jpg"], base)
