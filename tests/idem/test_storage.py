import errno
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from idem import storage, streams
from tests.pipelines.conftest import S3Server, flaky, moto_endpoint, s3_server

__all__ = ["flaky", "moto_endpoint", "s3_server"]


@pytest.fixture(params=["path", "file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder to write in."""
    if request.param == "s3":
        return request.getfixturevalue("s3_server").uri + "/a folder"
    folder = tmp_path / "a folder"
    folder.mkdir()
    return str(folder) if request.param == "path" else folder.as_uri()


def test_what_is_written_is_there(root: str) -> None:
    uri = storage.join(root, "x", "y.json.gz")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two" * 1000)
    assert storage.exists(uri)
    assert storage.exists(storage.join(root, "x"))
    assert storage.read_bytes(uri) == b"two" * 1000  # neither packed nor unpacked because of its name
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))
    storage.remove_tree(storage.join(root, "x"))
    assert not storage.exists(uri)
    storage.remove_tree(storage.join(root, "x"))


def test_streams_start_anywhere(root: str) -> None:
    uri = storage.join(root, "data")
    data = bytes(range(256)) * 10
    storage.write_bytes(uri, data)
    with streams.open_stream(uri, 100) as stream:
        assert stream.read(10) == data[100:110]
        assert stream.read() == data[110:]
    with streams.open_random(uri) as stream:
        stream.seek(2500)
        assert (stream.read(1000), stream.tell()) == (data[2500:], 2560)
    with pytest.raises(FileNotFoundError):
        streams.open_random(storage.join(root, "nothing"))


def test_many_parts(s3_server: S3Server) -> None:
    data = bytes(range(256)) * 100_000
    storage.write_bytes(storage.join(s3_server.uri, "large"), data)
    assert storage.read_bytes(storage.join(s3_server.uri, "large")) == data


def test_a_network_that_fails(s3_server: S3Server, flaky: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.TIMEOUT, "1")
    _, dice = flaky(s3_server.endpoint, 0.2, stall=1, seed=1)
    for k in range(40):
        uri = storage.join(s3_server.uri, str(k))
        storage.write_bytes(uri, b"x" * k)
        assert storage.read_bytes(uri) == b"x" * k
    storage.remove_tree(storage.join(s3_server.uri, "nothing"))
    assert dice.happened["stall"] == 1
    assert dice.happened["error"] + dice.happened["reset"] + dice.happened["cut"] > 10


ASKS: dict[str, Callable[[str], object]] = {
    "exists": storage.exists,
    "read_bytes": storage.read_bytes,
    "write_bytes": lambda uri: storage.write_bytes(uri, b"x"),
    "remove_tree": storage.remove_tree,
    "open_stream": streams.open_stream,
}


@pytest.mark.parametrize("ask", ASKS)
def test_a_server_that_is_gone_is_named(ask: str, s3_server: S3Server, flaky: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.ATTEMPTS, "3")
    flaky(s3_server.endpoint, 1.0, stall=0)
    start = time.monotonic()
    with pytest.raises(storage.Unreachable, match=r"s3://catalogue/x cannot be reached \(up to 3 attempts, 10 s .*: .*AWS Error"):
        ASKS[ask](storage.join(s3_server.uri, "x"))
    assert time.monotonic() - start < 20


def test_a_stream_whose_server_goes_away(s3_server: S3Server, flaky: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = storage.join(s3_server.uri, "x")
    storage.write_bytes(uri, b"x" * 100)
    monkeypatch.setenv(storage.ATTEMPTS, "2")
    _, dice = flaky(s3_server.endpoint, 0.0, stall=0)
    with streams.open_stream(uri) as stream:
        dice.fail_fraction = 1.0
        with pytest.raises(storage.Unreachable, match=uri):
            stream.read(10)


@pytest.mark.parametrize(
    ("error", "is_way"),
    [
        (PermissionError(errno.EACCES, "no"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(errno.EIO, "disk"), True),
        (OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28"), True),
        (OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."), True),
        (ValueError("LanceError(IO): Generic S3 error: Error performing GET - HTTP error: error sending request"), True),
        (FileNotFoundError(errno.ENOENT, "nothing"), False),
        (OSError("Couldn't deserialize thrift: TProtocolException: Invalid data"), False),
        (OSError("Expected to be able to read 301240 bytes for message body, got 301140"), False),
        (ValueError("LanceError(IO): Generic LocalFileSystem error: failed to fill whole buffer"), False),
        (ValueError("Dataset at path nope was not found"), False),
    ],
)
def test_a_way_that_is_broken_is_told_from_a_file_that_is(error: Exception, is_way: bool) -> None:
    assert storage.no_answer(error) == is_way
    with pytest.raises(storage.Unreachable if is_way else type(error)), storage.reaching("s3://b/x"):
        raise error


def test_an_error_longer_than_what_was_asked_for(s3_server: S3Server, flaky: Callable) -> None:
    """Amazon's client does not try again then, whatever its strategy."""
    uri = storage.join(s3_server.uri, "x")
    storage.write_bytes(uri, b"1234")
    _, dice = flaky(s3_server.endpoint, 0.0, stall=0)
    with streams.open_random(uri) as stream:
        dice.next = ["error", "error"]
        assert stream.read(2) == b"12"
        dice.next = ["error"]
        assert stream.read() == b"34"
    dice.next = ["ok", "error"]
    assert storage.read_bytes(uri) == b"1234"
    assert dice.happened["error"] == 4


def test_options_for_lance(monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.lance_options("/a/path") is None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    options = storage.lance_options("s3://b/x")
    assert options
    assert (options["allow_http"], options["client_max_retries"], options["timeout"]) == ("true", "10", "30s")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://other")
    assert storage.lance_options("s3://b/x") != options
