"""JSON lines and CSV -> records with their places in the file, whatever the lines hold. Any record's start is a place to begin."""

import csv
import gzip
import json
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from idem import streams
from pipelines.reading.units import is_gzip

MAX_RECORD = 16 << 20  # bytes: an open quote could swallow the file
BOM = b"\xef\xbb\xbf"
# What a stream that is damaged raises; its Unreachable, an OSError as well, is to be let through first.
DAMAGE = (OSError, EOFError, zlib.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Bytes of one record, from `start` to `end` in the file. values: of its fields, None where it cannot be read (`error` says why)."""

    start: int
    end: int
    raw: bytes
    values: Any = None
    error: str = ""


def open_lines(uri: str, offset: int = 0) -> IO[bytes]:
    """The text of a file from a byte offset on, unpacked; a packed one can only be read from its start."""
    stream = streams.open_stream(uri, offset)
    return gzip.GzipFile(fileobj=stream) if is_gzip(uri) else stream  # pyright: ignore[reportReturnType]


def _lines(stream: IO[bytes], start: int) -> Iterator[Record]:
    while raw := stream.readline(MAX_RECORD):
        end, error = start + len(raw), ""
        while not raw.endswith(b"\n") and (more := stream.readline(MAX_RECORD) if len(raw) >= MAX_RECORD else b""):
            end, error = end + len(more), f"the line has more than {MAX_RECORD:,} bytes"
            if more.endswith(b"\n"):
                break
        yield Record(start=start, end=end, raw=raw.removeprefix(BOM) if start == 0 else raw, error=error)
        start = end


def split_json(stream: IO[bytes], start: int = 0) -> Iterator[Record]:
    """The lines that are not blank, not yet parsed."""
    return (line for line in _lines(stream, start) if line.raw.strip() or line.error)


def parse_json(line: Record) -> Record:
    """The object on a line as `values`."""
    if line.error:
        return line
    try:
        values = json.loads(line.raw.decode())
        error = "" if isinstance(values, dict) else f"an object is needed, found {type(values).__name__}"
    except (ValueError, RecursionError) as problem:
        values, error = None, f"no JSON in UTF-8: {problem}"
    return Record(start=line.start, end=line.end, raw=line.raw, values=None if error else values, error=error)


def delimiter_of(name: str) -> str:
    return "\t" if ".tsv" in name.lower()[-7:] else ","


def _take(lines: Iterator[Record], waiting: deque[Record], taken: list[Record]) -> Iterator[str]:
    """Lines for the CSV reader, which asks for another one while a quote is open."""
    size = 0
    while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
        taken.append(line)
        size += len(line.raw)
        if line.error or size > MAX_RECORD:
            raise csv.Error(line.error or f"a quote is open for more than {MAX_RECORD:,} bytes")
        yield line.raw.decode(errors="surrogateescape")


def _record(taken: list[Record], fields: list[str] | None, error: str) -> Record:
    raw = b"".join(line.raw for line in taken)
    if not error:
        try:
            raw.decode()
        except UnicodeDecodeError as problem:
            fields, error = None, f"no UTF-8: {problem}"
    return Record(start=taken[0].start, end=taken[-1].end, raw=raw, values=fields, error=error)


def split_csv(stream: IO[bytes], delimiter: str, start: int = 0) -> Iterator[Record]:
    """Records with their fields. Where quotes do not close, one line is given up and reading goes on with the next."""
    csv.field_size_limit(MAX_RECORD)  # the default is 131,072 characters
    lines, waiting = _lines(stream, start), deque[Record]()
    while True:
        taken: list[Record] = []
        try:
            fields = next(csv.reader(_take(lines, waiting, taken), delimiter=delimiter, strict=True), None)
        except csv.Error as problem:
            waiting.extendleft(reversed(taken[1:]))
            yield _record(taken[:1], None, f"no CSV: {problem}")
            continue
        if fields is None:
            return
        if fields:  # a blank line has none
            yield _record(taken, fields, "")


def read_csv_header(stream: IO[bytes], delimiter: str) -> tuple[tuple[str, ...], int]:
    """Names of the columns, and where the first record starts; ((), 0) for an empty file."""
    first = next(split_csv(stream, delimiter), None)
    if first is None:
        return (), 0
    if first.error:
        raise ValueError(f"its first line is no header: {first.error}")
    names = tuple(name.strip() for name in first.values)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"its header names {', '.join(map(repr, twice))} more than once")
    return names, first.end


def parse_csv(record: Record, header: tuple[str, ...]) -> Record:
    """The fields of a record by the names of the header as `values`."""
    if record.error:
        return record
    if len(record.values) != len(header):
        error = f"{len(record.values)} fields where the header has {len(header)}"
        return Record(start=record.start, end=record.end, raw=record.raw, error=error)
    return Record(start=record.start, end=record.end, raw=record.raw, values=dict(zip(header, record.values, strict=True)))


def records(uri: str, kind: str, *, offset: int = 0, header: tuple[str, ...] = ()) -> Iterator[Record]:
    """Records of a jsonl or csv file from `offset` on, parsed. Damage raises one of DAMAGE after what could be read."""
    with open_lines(uri, offset) as stream:
        if kind == "jsonl":
            yield from map(parse_json, split_json(stream, offset))
            return
        if not header:
            header, offset = read_csv_header(stream, delimiter_of(uri))
            stream.seek(offset)
        for record in split_csv(stream, delimiter_of(uri), offset):
            yield parse_csv(record, header)


def starts(uri: str, kind: str, unit_rows: int) -> tuple[list[tuple[int, int, int]], tuple[str, ...]]:
    """(first byte, bytes, records) of units of `unit_rows` records, and the header of CSV: one pass over the file."""
    header: tuple[str, ...] = ()
    units: list[tuple[int, int, int]] = []
    with open_lines(uri) as stream:
        start = 0
        if kind == "csv":
            header, start = read_csv_header(stream, delimiter_of(uri))
            stream.seek(start)
        rows, end = 0, start
        for record in split_json(stream) if kind == "jsonl" else split_csv(stream, delimiter_of(uri), start):
            rows, end = rows + 1, record.end
            if rows == unit_rows:
                units.append((start, end - start, rows))
                start, rows = end, 0
    return [*units, (start, end - start, rows)] if rows else units, header
