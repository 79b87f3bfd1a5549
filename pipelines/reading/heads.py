"""What planning looks at of a file: its schema, or its first megabyte where it has none, and where its units of work lie."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.csv

from idem import storage
from pipelines.reading import lines, samples, typed
from pipelines.reading.fields import clean_all, is_any
from pipelines.reading.units import SourceFile, Unit, is_gzip
from pipelines.records import Columns

HEAD_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """names: of the columns; types: of a format that has them; rows: values of the first records where it has none.

    `empty`: it has no records, so that nothing is known of its columns.
    """

    names: tuple[str, ...]
    types: pa.Schema | None = None
    rows: Sequence[dict[str, Any]] = ()
    empty: bool = False


def _names(rows: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for row in rows for name in row))


def _look_at_lines(uri: str, kind: str) -> Head:
    header: tuple[str, ...] = ()
    if kind == "csv":
        with lines.open_lines(uri) as stream:
            header, _ = lines.read_csv_header(stream, lines.delimiter_of(uri))
    found: list[lines.Record] = []
    problem: Exception | None = None
    try:
        for record in lines.records(uri, kind):
            if found and record.start > HEAD_BYTES:
                break
            found.append(record)
    except storage.Unreachable:
        raise
    except lines.DAMAGE as error:
        problem = error
    rows = [record.values for record in found if not record.error]
    if not rows and not header and (problem or found):
        raise ValueError(str(problem) if problem else f"none of its first {len(found)} lines holds an object: {found[0].error}")
    return Head(names=header or _names(rows), rows=rows, empty=not found)


def _look_at_samples(uri: str, columns: Columns) -> Head:
    rows: list[dict[str, Any]] = []
    size = 0
    try:
        for row in samples.read_samples(uri, columns):
            size += len(row.image or b"") + 1024  # a member takes some blocks of its own
            rows.append(dict(row.values) | ({columns.image: None} if row.mime else {}))
            if size > HEAD_BYTES:
                break
    except storage.Unreachable:
        raise
    except samples.DAMAGE as error:
        if not rows:
            raise ValueError(str(error)) from error
    return Head(names=_names(rows), rows=rows, empty=not rows)


def look(uri: str, kind: str, columns: Columns) -> Head:
    """The head of a file; ValueError names it where it cannot be read at all."""
    if kind == "parquet":
        with typed.open_parquet(uri) as file:
            return Head(names=tuple(file.schema_arrow.names), types=file.schema_arrow)
    if kind in ("arrow", "lance"):
        types = typed.read_schema(uri, kind)
        return Head(names=tuple(types.names), types=types)
    try:
        return _look_at_lines(uri, kind) if kind in ("jsonl", "csv") else _look_at_samples(uri, columns)
    except storage.Unreachable:
        raise
    except (*samples.DAMAGE, ValueError) as error:
        raise ValueError(f"{uri} cannot be read as {kind}: {error}") from error


def _sound(kind: pa.DataType) -> pa.DataType:
    """A type that every value of a column can have: nothing that a file's head had no example of, no dictionaries, no views."""
    if pa.types.is_null(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_dictionary(kind):
        return _sound(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _sound(field.type)) for field in kind])
    if is_any(kind, (pa.types.is_list,)):
        return pa.list_(_sound(kind.value_type))
    return kind


def _infer_json(values: Sequence[Any]) -> pa.DataType:
    values = [clean_all(value) for value in values]
    try:
        return pa.array(values).type
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        pass
    found: Counter[pa.DataType] = Counter()
    for value in values:
        try:
            found[pa.array([value]).type] += 1
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            found[pa.string()] += 0
    return found.most_common(1)[0][0]  # the others are faults of their records


def _infer_csv(name: str, values: Sequence[str]) -> pa.DataType:
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([[name], *([value] for value in values if value)])
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(io.BytesIO(buffer.getvalue().encode()), parse_options=parse).schema.field(0).type


def kept_type(head: Head, kind: str, name: str) -> pa.DataType | None:
    """The type of a column to be kept for filters; None where this file does not have it."""
    if name not in head.names:
        return None
    if head.types is not None:
        return _sound(head.types.field(name).type)
    values = [value for row in head.rows if (value := row.get(name)) is not None]
    return _sound(_infer_csv(name, values) if kind == "csv" else _infer_json(values))


def _parquet_units(file: SourceFile, unit_rows: int) -> Iterator[Unit]:
    with typed.open_parquet(file.uri) as opened:
        sizes = [(group.num_rows, group.total_byte_size) for group in map(opened.metadata.row_group, range(opened.num_row_groups))]
    first, number = 0, 0
    groups: list[int] = []
    for group, (size, _) in enumerate(sizes):
        if size:
            groups.append(group)
        rows = sum(sizes[i][0] for i in groups)
        if groups and (group + 1 == len(sizes) or rows + sizes[group + 1][0] > unit_rows):
            size = sum(sizes[i][1] for i in groups)
            yield replace(_blank_unit(file), number=number, first_row=first, rows=rows, bytes=size, groups=tuple(groups))
            first, number, groups = first + rows, number + 1, []


def _lines_units(file: SourceFile, unit_rows: int) -> Iterator[Unit]:
    first = 0
    cuts, header = lines.starts(file.uri, file.format, unit_rows)
    for number, (offset, size, rows) in enumerate(cuts):
        yield replace(_blank_unit(file), number=number, first_row=first, rows=rows, bytes=size, offset=offset, header=header)
        first += rows


def _lance_units(file: SourceFile, unit_rows: int) -> Iterator[Unit]:
    dataset = typed.open_lance(file.uri)
    with storage.reaching(file.uri):
        counts = [(fragment.fragment_id, fragment.count_rows()) for fragment in dataset.get_fragments()]
    first, number, total = 0, 0, sum(rows for _, rows in counts)
    for fragment, count in counts:
        base = replace(_blank_unit(file), groups=(fragment,), version=dataset.version)
        for offset in range(0, count, unit_rows):
            rows = min(unit_rows, count - offset)
            yield replace(base, number=number, first_row=first, rows=rows, bytes=file.bytes * rows // total, offset=offset)
            first, number = first + rows, number + 1


def _blank_unit(file: SourceFile, rows: int = 0) -> Unit:
    return Unit(uri=file.uri, name=file.name, format=file.format, number=0, first_row=0, rows=rows, bytes=file.bytes)


def units_of(file: SourceFile, unit_rows: int) -> Iterator[Unit]:
    """The units of work of a file, without empty ones."""
    if file.format == "parquet":
        return _parquet_units(file, unit_rows)
    if file.format == "lance":
        return _lance_units(file, unit_rows)
    if file.format in ("jsonl", "csv") and not is_gzip(file.uri):
        return _lines_units(file, unit_rows)
    return iter([_blank_unit(file, typed.count_arrow(file.uri) if file.format == "arrow" else 0)])
