"""Files anywhere as Python streams that tell a way that is broken (storage.Unreachable) from a file that is."""

import io

from idem import storage

REMOTE_BYTES = 8 << 20  # what one request reads ahead, where a stream is read from end to end
LOCAL_BYTES = 1 << 20


class _Raw(io.RawIOBase):
    """A file whose own errors are Unreachable: whatever else a reader on top of it raises is damage of what it reads.

    Arrow raises OSError for both; an exception of a Python file goes through Arrow as it is.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        filesystem, path = storage.open_filesystem(uri)
        with storage.reaching(uri):
            self.file = storage.patiently(lambda: filesystem.open_input_file(path))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        place = self.file.tell()

        def read() -> bytes:
            self.file.seek(place)
            return self.file.read(size if size >= 0 else None)

        try:
            with storage.reaching(self.uri):
                return storage.patiently(read)
        except storage.Unreachable:
            raise
        except OSError as error:  # it was open: what fails now is the way there, under whatever name
            raise storage.Unreachable(f"{self.uri} cannot be read any more: {error}") from error

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def open_random(uri: str) -> io.RawIOBase:
    """A file for reading here and there; FileNotFoundError where there is none, Unreachable from it and from every read."""
    return _Raw(uri)


def open_stream(uri: str, offset: int = 0) -> io.BufferedReader:
    """A file for reading from `offset` on, in large pieces; errors as of `open_random`."""
    raw = _Raw(uri)
    raw.seek(offset)
    return io.BufferedReader(raw, LOCAL_BYTES if storage.is_local(uri) else REMOTE_BYTES)
