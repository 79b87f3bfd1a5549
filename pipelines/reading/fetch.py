"""Pictures that records only point to: paths and URLs -> bytes, or the reason why not. No Ray.

What is wrong with a reference is the record's fault; a place that does not answer, or lets nobody in, is storage.Unreachable.
"""

import functools
import posixpath
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import httpx
import pyarrow as pa
import pyarrow.compute as pc

from idem import images, storage, streams

MAX_REDIRECTS = 5
LONGEST_PAUSE_S = 20.0
# A server that gives a byte now and then is not stalled, and yet would never end.
SLOWEST = 10
AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529))
NO_ENTRY = frozenset((401, 403, 407))
SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*(?=://)|(?i:data)(?=:))")


class _Fault(Exception):
    """What is wrong with a reference: a code of rejects, and a sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Again(Exception):
    """An attempt that failed, and may not the next time."""


@functools.lru_cache(maxsize=4)
def _client(timeout_s: float, threads: int) -> httpx.Client:
    """One a process, so that connections are used again."""
    limits = httpx.Limits(max_connections=threads, max_keepalive_connections=threads)
    # Packed answers would be unpacked beyond any limit before we saw them.
    headers = {"Accept-Encoding": "identity", "User-Agent": "idem-ingest"}
    # As long for a connection of the pool as the slowest download may hold it.
    timeout = httpx.Timeout(timeout_s, pool=SLOWEST * timeout_s)
    return httpx.Client(timeout=timeout, limits=limits, headers=headers, follow_redirects=True, max_redirects=MAX_REDIRECTS)


def _outside(ref: str, base: str) -> _Fault:
    return _Fault("image_outside", f"{ref[:200]!r} leads outside {base}, where the pictures of this source are")


def _missing(ref: str, why: str) -> _Fault:
    return _Fault("image_missing", f"{ref[:200]!r}: {why}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetcher:
    """base: URI where relative paths start, and that no path may leave; max_bytes: of a picture; attempts: how often a URL is
    tried; timeout_s: how long it may stand still; threads: how many are fetched at a time."""

    base: str
    max_bytes: int = images.MAX_BYTES
    attempts: int = 5
    timeout_s: float = 20.0
    threads: int = 8

    def fill(self, records: pa.Table) -> pa.Table:
        """The same records; those with image_ref, no image and no fault have their image now, or a fault that says why not.

        Unreachable where a place does not answer after all attempts.
        """
        wanted = pc.and_(pc.and_(records["image_ref"].is_valid(), records["image"].is_null()), pc.equal(records["fault"], ""))
        rows = [i for i, yes in enumerate(wanted.to_pylist()) if yes]
        if not rows:
            return records
        refs = records["image_ref"].take(pa.array(rows)).to_pylist()
        found: dict[int, bytes | _Fault] = dict(zip(rows, self._fetch_all(refs), strict=True))
        n = records.num_rows
        new: dict[str, pa.Array] = {"image": pa.array([_bytes(found.get(i)) for i in range(n)], pa.large_binary())}
        new["fault"] = pa.array([_code(found.get(i)) for i in range(n)], pa.string())
        new["fault_message"] = pa.array([_message(found.get(i)) for i in range(n)], pa.string())
        filled = {"image": pc.coalesce(records["image"], new["image"])}
        filled |= {name: pc.coalesce(new[name], records[name]) for name in ("fault", "fault_message")}
        return pa.table({name: filled.get(name, records[name]) for name in records.column_names}, schema=records.schema)

    def _fetch_all(self, refs: list[str]) -> list[bytes | _Fault]:
        pool = ThreadPoolExecutor(min(self.threads, len(refs)), thread_name_prefix="fetch")
        try:
            return list(pool.map(self._fetch, refs))
        finally:
            pool.shutdown(cancel_futures=True)  # where one is unreachable, the others need not be tried

    def _fetch(self, ref: str) -> bytes | _Fault:
        try:
            return self._download(target) if (target := self._target(ref)).startswith(("http://", "https://")) else self._read(ref, target)
        except _Fault as fault:
            return fault

    def _target(self, ref: str) -> str:
        """The URL, or the URI of a file within base. _Fault for what is neither."""
        scheme = SCHEME.match(ref)
        if scheme and scheme[1].lower() in ("http", "https"):
            return f"{scheme[1].lower()}{ref[len(scheme[1]) :]}"
        if scheme and scheme[1].lower() not in ("s3", "file"):
            raise _Fault("image_scheme", f"{ref[:200]!r} has the scheme {scheme[1][:50]!r}; allowed are http, https, s3, file, or a path")
        if storage.is_local(self.base):
            return self._local(ref)
        # S3 and URLs know no parent folders; what looks like one could be, to whatever is behind them.
        base = self.base.rstrip("/")
        path = ref.removeprefix(f"{base}/")
        if SCHEME.match(path) or path.startswith("/") or posixpath.normpath(path).split("/")[0] == "..":
            raise _outside(ref, self.base)
        path = posixpath.normpath(path)
        return storage.join(base, quote(path, safe="/%?=&") if base.startswith("http") else path)

    def _local(self, ref: str) -> str:
        base = storage.local_path(self.base).resolve()
        if ref.startswith("s3://"):
            raise _outside(ref, self.base)
        path = unquote(ref.removeprefix("file://").removeprefix("localhost")) if ref.startswith("file://") else ref
        try:
            resolved = (base / path).resolve()  # follows links
            inside, regular = resolved.is_relative_to(base), resolved.is_relative_to(base) and resolved.is_file()
        except PermissionError as error:
            raise storage.Unreachable(f"{base / path} cannot be read: {error}") from error
        except (ValueError, OSError, RuntimeError) as error:  # a zero byte, a name too long, links in a circle
            raise _missing(ref, f"is no usable path: {error}") from error
        if not inside:
            raise _outside(ref, self.base)
        if not regular:
            raise _missing(ref, "is a folder or no regular file" if resolved.exists() else f"there is no such file in {self.base}")
        return str(resolved)

    def _too_many(self, ref: str) -> _Fault:
        return _Fault("image_too_many_bytes", f"{ref[:200]!r} has more than the {self.max_bytes:,} bytes that are allowed")

    def _read(self, ref: str, uri: str) -> bytes:
        try:
            with Path(uri).open("rb") if storage.is_local(uri) else streams.open_random(uri) as stream:
                data = stream.read(self.max_bytes + 1) or b""
        except PermissionError as error:
            raise storage.Unreachable(f"{uri} cannot be read: {error}") from error
        except (FileNotFoundError, IsADirectoryError) as error:
            raise _missing(ref, f"there is no such file in {self.base}") from error
        except OSError as error:
            raise error if isinstance(error, storage.Unreachable) else storage.Unreachable(f"{uri} cannot be read: {error}") from error
        if len(data) > self.max_bytes:
            raise self._too_many(ref)
        return data

    def _download(self, url: str) -> bytes:
        last = ""
        for attempt in range(self.attempts):
            if attempt:
                # Jitter, so that many workers do not come back all at once.
                time.sleep(random.uniform(0.5, 1.0) * min(LONGEST_PAUSE_S, 0.25 * 2**attempt))
            try:
                return self._attempt(url)
            except _Again as problem:
                last = str(problem)
        raise storage.Unreachable(
            f"{url} cannot be reached: tried {self.attempts} times, with a timeout of {self.timeout_s:g} s; last: {last}"
        )

    def _attempt(self, url: str) -> bytes:
        until = time.monotonic() + SLOWEST * self.timeout_s
        try:
            with _client(self.timeout_s, self.threads).stream("GET", url) as response:
                self._check_status(url, response.status_code)
                data = bytearray()
                for piece in response.iter_bytes():
                    data += piece
                    if len(data) > self.max_bytes:
                        raise self._too_many(url)
                    if time.monotonic() > until:
                        raise _Again(f"not done after {SLOWEST * self.timeout_s:g} s")
                return bytes(data)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
            raise _missing(url, f"is no URL that can be asked for: {error}") from error
        except httpx.TooManyRedirects as error:
            raise _missing(url, f"it was redirected more than {MAX_REDIRECTS} times") from error
        except httpx.DecodingError as error:
            raise _missing(url, f"the answer cannot be unpacked: {error}") from error
        except httpx.TransportError as error:
            raise _Again(f"{type(error).__name__}: {error}") from error

    def _check_status(self, url: str, status: int) -> None:
        if status in NO_ENTRY:
            raise storage.Unreachable(f"{url} cannot be read: HTTP {status}, tried once; credentials are needed, or other ones")
        if status in AGAIN or status >= 500:
            raise _Again(f"HTTP {status}")
        if status != 200:
            raise _missing(url, f"HTTP {status}")


def _bytes(found: bytes | _Fault | None) -> bytes | None:
    return found if isinstance(found, bytes) else None


def _code(found: bytes | _Fault | None) -> str | None:
    return found.code if isinstance(found, _Fault) else None


def _message(found: bytes | _Fault | None) -> str | None:
    return str(found) if isinstance(found, _Fault) else None
