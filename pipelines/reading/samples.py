"""Tar archives as webdataset has them -> records: members with one stem are one sample."""

import tarfile
from collections.abc import Iterator
from contextlib import closing
from typing import IO, Any

from idem import images
from pipelines.reading import lines
from pipelines.reading.fields import Fault, Row
from pipelines.reading.units import PICTURES
from pipelines.records import Columns

KEY = "__key__"
DAMAGE = (*lines.DAMAGE, tarfile.TarError)
USED = (*PICTURES, "json", "txt", "cls")


class _Archive(tarfile.TarFile):
    problem = ""


class _Member(tarfile.TarInfo):
    """A header. tarfile takes one that is damaged, or missing, for the end of the archive; here it is remembered."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> "_Member":  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().fromtarfile(archive)  # pyright: ignore[reportReturnType]
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            raise
        except tarfile.HeaderError as error:
            archive.problem = f"{error} at byte {archive.offset:,}, where a member or the end mark should be"
            raise


class _Pieces:
    """A stream whose `read` gives what is there: before damage, a full buffer is never reached."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream

    def read(self, size: int) -> bytes:
        return self.stream.read1(size)  # pyright: ignore[reportAttributeAccessIssue]


def _split(name: str) -> tuple[str, str]:
    """Key and ending: all before and after the first dot of the last part."""
    folder, _, base = name.rpartition("/")
    stem, _, end = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, end.lower()


def _members(stream: IO[bytes]) -> Iterator[tuple[str, str, bytes, int]]:
    """Key, ending, content and size of the members that are used; ReadError where the archive is damaged."""
    pieces: Any = _Pieces(stream)
    with closing(_Archive.open(fileobj=pieces, mode="r|", bufsize=1 << 20, tarinfo=_Member)) as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it would keep one for each picture
            key, end = _split(member.name)
            hidden = key.rpartition("/")[2].startswith((".", "__")) or not key.rpartition("/")[2]
            if not member.isreg() or hidden or end not in USED:
                continue
            content = archive.extractfile(member) if member.size <= images.MAX_BYTES else None
            yield key, end, content.read() if content else b"", member.size
        if archive.problem:  # pyright: ignore[reportAttributeAccessIssue]
            raise tarfile.ReadError(archive.problem)  # pyright: ignore[reportAttributeAccessIssue]


def _values(key: str, parts: dict[str, bytes], columns: Columns) -> tuple[dict[str, Any], str]:
    """Values by name in the source, and why there are none."""
    values: dict[str, Any] = {}
    if "json" in parts:
        record = lines.parse_json(lines.Record(start=0, end=0, raw=parts["json"]))
        if record.error:
            return {}, f"the .json member of {key!r} cannot be read: {record.error}"
        values = record.values
    texts = {columns.title: "txt", columns.product_id: "cls"}
    for name, end in texts.items():
        if end in parts and values.get(name) in (None, ""):
            values[name] = parts[end].decode(errors="replace")
    if values.get(columns.item_id) in (None, ""):
        values[columns.item_id] = key
    return values | {KEY: key}, ""


def _row(number: int, key: str, parts: dict[str, bytes], sizes: dict[str, int], columns: Columns) -> Row:
    values, error = _values(key, parts, columns)
    if error:
        return Row(number=number, values={}, fault=Fault(code="record_unreadable", message=error, original=parts["json"]))
    picture = next((end for end in PICTURES if end in parts), "")
    fault = None
    if picture and sizes[picture] > images.MAX_BYTES:
        message = f"the picture has {sizes[picture]:,} bytes; at most {images.MAX_BYTES:,} are allowed"
        fault = Fault(code="image_too_many_bytes", message=message)
    return Row(number=number, values=values, image=parts[picture] if picture and not fault else None, mime=picture, fault=fault)


def read_samples(uri: str, columns: Columns) -> Iterator[Row]:
    """The samples of an archive in their order. Damage raises one of DAMAGE after those that are whole."""
    number, key, parts, sizes = 0, "", dict[str, bytes](), dict[str, int]()
    with lines.open_lines(uri) as stream:
        for name, end, content, size in _members(stream):
            if parts and (name != key or end in parts):
                yield _row(number, key, parts, sizes, columns)
                number, parts, sizes = number + 1, {}, {}
            key, parts[end], sizes[end] = name, content, size
        if parts:
            yield _row(number, key, parts, sizes, columns)
