"""Where a run keeps its artifacts: one folder a stage under one root, which is a local path or an object-store URI."""

import errno
import functools
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

import pyarrow.fs

T = TypeVar("T")
ATTEMPTS = "AWS_MAX_ATTEMPTS"  # how often a request to S3 is sent, at most; the variable of Amazon's own tools
TIMEOUT = "IDEM_S3_TIMEOUT_S"  # how long a request to S3 may stand still
# What says that a place cannot be reached or must not be read; other numbers say that what is asked for is not there, or no file.
NO_ANSWER = frozenset(
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EIO", "ESTALE", "EMFILE", "ENFILE", "EPIPE", "ETIMEDOUT", "ECONNRESET", "ECONNREFUSED"),
        *("ECONNABORTED", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN", "EREMOTEIO"),
    )
    if hasattr(errno, name)
)


class Unreachable(OSError):
    """Storage that does not answer or does not let us in, after all attempts: it says nothing about what is stored there."""


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path behind a local URI; ValueError for any other."""
    if not is_local(uri):
        raise ValueError(f"a local path is needed here, found {uri!r}")
    return Path(unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri)


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def _s3_limits() -> tuple[int, float]:
    """How often a request is sent, and the seconds that it may stand still."""
    return int(os.environ.get(ATTEMPTS, "10")), float(os.environ.get(TIMEOUT, "10"))


@functools.lru_cache(maxsize=8)
def _s3(
    endpoint: str | None, region: str | None, attempts: int, timeout_s: float, _credentials: tuple[str | None, ...]
) -> pyarrow.fs.FileSystem:
    return pyarrow.fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        connect_timeout=timeout_s,
        request_timeout=timeout_s,
        allow_delayed_open=True,  # small files are one request, which can be repeated
    )


@functools.lru_cache(maxsize=64)
def _region_of(bucket: str) -> str:
    with reaching(f"s3://{bucket}"):
        return pyarrow.fs.resolve_s3_region(bucket)


def open_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Where `uri` is, and its path there. S3 is asked again where it fails, and is configured by Amazon's environment variables."""
    if is_local(uri):
        return pyarrow.fs.LocalFileSystem(), str(local_path(uri))
    if not uri.startswith("s3://"):
        return pyarrow.fs.FileSystem.from_uri(uri)
    path = uri.removeprefix("s3://").strip("/")
    have = os.environ.get
    endpoint = have("AWS_ENDPOINT_URL_S3") or have("AWS_ENDPOINT_URL")
    region = have("AWS_REGION") or have("AWS_DEFAULT_REGION") or (None if endpoint else _region_of(path.split("/")[0]))
    # Credentials are read by the client itself; they are named here so that other ones get another client.
    credentials = tuple(map(have, ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")))
    return _s3(endpoint, region, *_s3_limits(), credentials), path


def lance_options(uri: str) -> dict[str, str] | None:
    """`storage_options` of Lance for `uri`: the same patience as ours; the rest it reads from the same environment variables."""
    if not uri.startswith("s3://"):
        return None
    attempts, timeout_s = _s3_limits()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return {
        # Lance's limit is on the whole of a request, which may carry many megabytes.
        "timeout": f"{3 * timeout_s:.0f}s",
        "connect_timeout": f"{timeout_s:.0f}s",
        "client_max_retries": str(attempts),
        "client_retry_timeout": f"{3 * attempts * timeout_s:.0f}",
        "allow_http": str(endpoint.startswith("http://")).lower(),
    }


def no_answer(error: BaseException) -> bool:
    """Whether an error of pyarrow, Lance or the system is about reaching a place, rather than about what is there."""
    if isinstance(error, Unreachable | PermissionError | ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in NO_ANSWER:
        return True
    text = str(error)  # neither library has types for it
    if "AWS Error" in text or "Permission denied" in text:
        return True
    return "LanceError(IO)" in text and ("Generic S3 error" in text or "HTTP error" in text or "non-2xx status" in text)


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Unreachable, which names `uri`, in place of any error that is about reaching it; other errors go through."""
    try:
        yield
    except Unreachable:
        raise
    except Exception as error:
        if not no_answer(error):
            raise
        attempts, timeout_s = _s3_limits()
        tried = f" (up to {attempts} attempts, {timeout_s:g} s without an answer ended each)" if uri.startswith("s3://") else ""
        raise Unreachable(f"{uri} cannot be reached{tried}: {' '.join(str(error).split())}") from error


def patiently(read: Callable[[], T]) -> T:
    """What `read` gives, tried again where the client gives up on its own: it does on an error whose text is longer than what was
    asked for, which it takes for a fault of its buffer."""
    attempts, _ = _s3_limits()
    for attempt in range(1, attempts + 1):
        try:
            return read()
        except OSError as error:
            if attempt == attempts or "Failed to flush response stream" not in str(error):
                raise
            time.sleep(random.uniform(0.5, 1.0) * min(10.0, 0.2 * 2**attempt))
    raise AssertionError("at least one attempt")


def exists(uri: str) -> bool:
    filesystem, path = open_filesystem(uri)
    with reaching(uri):
        return filesystem.get_file_info(path).type != pyarrow.fs.FileType.NotFound


def read_bytes(uri: str) -> bytes:
    filesystem, path = open_filesystem(uri)

    def read() -> bytes:
        with filesystem.open_input_stream(path, compression=None) as stream:  # a name ending in .gz says nothing
            return stream.read()

    with reaching(uri):
        return patiently(read)


def write_bytes(uri: str, data: bytes, *, durable: bool = True) -> None:
    """Write all of `data` or nothing: a reader sees the old content or the new, also after a crash.

    Without `durable`, not after a power cut: for what can be made again, since waiting for a busy disk takes longer than that.
    """
    if not is_local(uri):
        filesystem, path = open_filesystem(uri)
        with reaching(uri), filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(data)
        return
    path = local_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        if durable:
            os.fsync(stream.fileno())
    partial.replace(path)


def remove(uri: str) -> None:
    """Remove a file; nothing happens where there is none."""
    filesystem, path = open_filesystem(uri)
    with reaching(uri):
        if filesystem.get_file_info(path).type == pyarrow.fs.FileType.File:
            filesystem.delete_file(path)


def remove_tree(uri: str) -> None:
    """Remove a folder and all below it; nothing happens where there is none."""
    filesystem, path = open_filesystem(uri)
    with reaching(uri):
        if filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory:
            filesystem.delete_dir(path)


def require_free(uri: str, needed_bytes: int) -> None:
    """ValueError unless the disk under a local `uri` has `needed_bytes` free; object stores are not asked."""
    if not is_local(uri):
        return
    folder = local_path(uri).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ValueError(
            f"too little disk for {uri}: about {needed_bytes / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free on {folder}"
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders of one run under its root.

    `items` holds one Lance dataset with its own versions. Under each of the others every artifact has a folder of its own,
    named by its id (see idem.manifest), so that making a new one never touches what a release has bound.
    """

    root: str

    @property
    def items(self) -> str:
        return join(self.root, "items")

    @property
    def catalog(self) -> str:
        return join(self.root, "catalog")

    @property
    def embedder(self) -> str:
        return join(self.root, "embedder")

    @property
    def vectors(self) -> str:
        return join(self.root, "vectors")

    @property
    def index(self) -> str:
        return join(self.root, "index")

    @property
    def candidates(self) -> str:
        return join(self.root, "candidates")

    @property
    def judgements(self) -> str:
        return join(self.root, "judgements")

    @property
    def reranker(self) -> str:
        return join(self.root, "reranker")

    @property
    def changes(self) -> str:
        return join(self.root, "changes")

    @property
    def releases(self) -> str:
        return join(self.root, "releases")
