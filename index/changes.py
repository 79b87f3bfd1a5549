"""The change log of a catalogue: what was put or deleted since a release, in the order of its sequence numbers.

One process writes, any number read. A change is acknowledged once it is on the disk (fsync), and is never lost after that. The log is
files `changes-<first sequence number>.log` in one folder outside the releases; a release says up to which number it holds
them. A record is a header and an Arrow stream of whole items, or of the ids that go: magic, bytes of the stream, CRC-32 of all that
follows it, first sequence number, count, operation; each item has a number of its own, from 1.

What a killed writer left unfinished at the end was never acknowledged: the next one puts it aside, into `changes-....torn`.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

import pyarrow as pa

from idem import schema

Operation = Literal["put", "delete"]
OPERATIONS: tuple[Operation, ...] = ("put", "delete")
MAGIC = b"IDMC"
FRONT, BACK = struct.Struct("<4sII"), struct.Struct("<QIB")  # magic, size, checksum; first, count, operation
HEADER = FRONT.size + BACK.size
SEGMENT = 64 << 20  # bytes after which a new file is begun
NAME = re.compile(r"changes-(\d{20})\.log")
log = logging.getLogger(__name__)
IDS = pa.schema([pa.field("item_id", pa.string(), nullable=False)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """rows (n,): whole items, or with `delete` their item_id alone; their sequence numbers are first .. first + n - 1."""

    first: int
    operation: Operation
    rows: pa.Table

    @property
    def last(self) -> int:
        return self.first + self.rows.num_rows - 1


def packed(change: Change) -> bytes:
    """A change as it stands in the log."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, change.rows.schema) as writer:
        writer.write_table(change.rows.combine_chunks())
    payload = sink.getvalue().to_pybytes()
    back = BACK.pack(change.first, change.rows.num_rows, OPERATIONS.index(change.operation))
    return FRONT.pack(MAGIC, len(payload), zlib.crc32(payload, zlib.crc32(back))) + back + payload


def unpacked(data: memoryview) -> tuple[Change, int] | None:
    """The change at the beginning of `data` and the bytes it takes; None where none is whole there."""
    if len(data) < HEADER:
        return None
    magic, size, checksum = FRONT.unpack_from(data)
    body = data[FRONT.size : HEADER + size]
    if magic != MAGIC or len(data) < HEADER + size or zlib.crc32(body) != checksum:
        return None
    first, _, operation = BACK.unpack_from(body)
    with pa.ipc.open_stream(pa.py_buffer(bytes(body[BACK.size :]))) as reader:
        return Change(first=first, operation=OPERATIONS[operation], rows=reader.read_all()), HEADER + size


def segments(folder: Path) -> list[tuple[int, Path]]:
    """Files of the log with the first sequence number of each, in their order."""
    return sorted((int(found[1]), path) for path in folder.glob("changes-*.log") if (found := NAME.fullmatch(path.name)))


def scanned(path: Path, *, begin: int = 0, open_ended: bool) -> Iterator[tuple[Change, int]]:
    """Changes from byte `begin` of a file, each with the byte it ends at.

    In the file that is still written (`open_ended`) the end may be unfinished, elsewhere it may not. ValueError, which names file and
    byte, where a record is damaged.
    """
    with path.open("rb") as file:
        file.seek(begin)
        data = memoryview(file.read())
    at = 0
    while at < len(data):
        if (found := unpacked(data[at:])) is None:
            if open_ended and not _whole_after(data, at):
                return
            raise ValueError(f"the change log {path} is damaged at byte {begin + at}: what was acknowledged there cannot be read")
        at += found[1]
        yield found[0], begin + at


def _whole_after(data: memoryview, at: int) -> bool:
    """Whether a whole record follows later, so that the one at `at` cannot be an unfinished end."""
    raw = bytes(data)
    place = raw.find(MAGIC, at + 1)
    while place >= 0:
        if unpacked(data[place:]) is not None:
            return True
        place = raw.find(MAGIC, place + 1)
    return False


class Tail:
    """Reads a log as it grows: each call of `news` gives what was acknowledged since the last one, from `after` on."""

    def __init__(self, folder: str | Path, after: int = 0) -> None:
        self.folder, self.seen = Path(folder), after
        self.file: Path | None = None
        self.at = 0

    def news(self) -> list[Change]:
        """ValueError where the log is damaged, or no longer goes back as far as was asked."""
        known = segments(self.folder)
        if known and known[0][0] > self.seen + 1:
            raise ValueError(f"the change log in {self.folder} begins at {known[0][0]}; changes from {self.seen + 1} on were asked for")
        found: list[Change] = []
        for i, (first, path) in enumerate(known):
            following = known[i + 1][0] if i + 1 < len(known) else None
            if following is not None and following <= self.seen + 1:
                continue
            begin = self.at if path == self.file else 0
            if path.stat().st_size == begin:
                continue
            for change, end in scanned(path, begin=begin, open_ended=following is None):
                self.file, self.at = path, end
                if change.last > self.seen:
                    found.append(_from(change, self.seen + 1))
                    self.seen = change.last
            if following is not None and self.seen + 1 != following:
                raise ValueError(f"the change log lacks {self.seen + 1} to {following - 1}: {path} (from {first}) ends before them")
        return found


def _from(change: Change, first: int) -> Change:
    """What of a change begins at `first`."""
    skipped = max(0, first - change.first)
    return Change(first=change.first + skipped, operation=change.operation, rows=change.rows.slice(skipped)) if skipped else change


def forget(folder: str | Path, folded: int) -> list[str]:
    """Remove files all of whose changes are numbered up to `folded`, which every release that is kept holds; their names.

    The last file stays, so that a writer may be at work meanwhile.
    """
    known = segments(Path(folder))
    gone = [path for (_, path), (following, _) in itertools.pairwise(known) if following <= folded + 1]
    for path in gone:
        path.unlink()
    return [path.name for path in gone]


class Writer:
    """The one that writes. ValueError where another process does, or the log is damaged. Its methods may be called by several threads."""

    def __init__(self, folder: str | Path, *, segment: int = SEGMENT) -> None:
        self.folder, self.segment = Path(folder), segment
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        self.owner = (self.folder / "writer.lock").open("a")
        try:
            fcntl.flock(self.owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.owner.close()
            raise ValueError(f"another process writes the change log in {self.folder}; a log has one writer") from error
        try:
            self.last = self._recover()
        except ValueError:
            self.owner.close()
            raise

    def _recover(self) -> int:
        """The last sequence number; an unfinished end is put aside."""
        known = segments(self.folder)
        if not known:
            self.file = self._begin(1)
            return 0
        first, path = known[-1]
        last, end = first - 1, 0
        for change, ended in scanned(path, open_ended=True):
            last, end = change.last, ended
        if torn := path.read_bytes()[end:]:
            (aside := path.with_suffix(f".{end}.torn")).write_bytes(torn)
            log.warning("the last %d bytes of %s were never acknowledged, or are damaged: put aside in %s", len(torn), path, aside.name)
        self.file = self._reopened(path, end)
        return last

    def _begin(self, first: int) -> BinaryIO:
        file = (self.folder / f"changes-{first:020d}.log").open("xb")
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the file's name may be lost with the power
        finally:
            os.close(folder)
        return file

    def put(self, items: pa.Table) -> int:
        """Upsert whole items (idem.schema.ITEMS, in any order of further columns); the sequence number of the last, once all are on disk.

        ValueError for a table that lacks columns of ITEMS.
        """
        if missing := [name for name in schema.ITEMS.names if name not in items.schema.names]:
            raise ValueError(f"whole items are put into the change log; these lack {', '.join(missing)}")
        return self._append("put", items)

    def delete(self, item_ids: Sequence[str]) -> int:
        """Delete items, known or not; the sequence number of the last, once all are on disk."""
        return self._append("delete", pa.table({"item_id": list(item_ids)}, schema=IDS))

    def _append(self, operation: Operation, rows: pa.Table) -> int:
        if not rows.num_rows:
            return self.last
        with self.lock:
            if self.file.tell() >= self.segment:
                self.file.close()
                self.file = self._begin(self.last + 1)
            change = Change(first=self.last + 1, operation=operation, rows=rows)
            begin = self.file.tell()
            try:
                self.file.write(packed(change))
                self.file.flush()
                os.fsync(self.file.fileno())
            except OSError:
                self._undo(begin)
                raise
            self.last = change.last
            return self.last

    def _undo(self, begin: int) -> None:
        """A full disk takes part of a record: off with it, so that the next one is readable."""
        with contextlib.suppress(OSError):  # what is buffered cannot be written either
            self.file.close()
        self.file = self._reopened(Path(self.file.name), begin)

    @staticmethod
    def _reopened(path: Path, end: int) -> BinaryIO:
        file = path.open("r+b")
        file.truncate(end)
        file.seek(end)
        os.fsync(file.fileno())
        return file

    def close(self) -> None:
        self.file.close()
        self.owner.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
