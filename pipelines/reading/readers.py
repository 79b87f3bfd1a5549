"""Units of work -> tables of records, one function a format. No Ray.

What is damaged is told: of a unit whose rows are known each becomes a record with a fault, else one record stands for the rest.
A way to the data that is broken (storage.Unreachable) is never a fault of a record: it is raised.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import pyarrow as pa

from idem import schema, storage
from pipelines.reading import fields, lines, samples, typed
from pipelines.reading.attributes import ATTRIBUTES, load_attributes
from pipelines.reading.fields import Fault, Fields, Row
from pipelines.reading.units import Reading, Unit
from pipelines.records import BATCH_ROWS, TEXTS, Columns, records_schema

T = TypeVar("T")
PACK_BYTES = 64 << 20
SCAN_ROWS = 8 * BATCH_ROWS
TRUE = ("true", "1")


@dataclass(frozen=True, slots=True)
class _Damage:
    message: str


def _until_damage(pieces: Iterator[T], damage: tuple[type[Exception], ...]) -> Iterator[T | _Damage]:
    """The pieces, and where one cannot be read, a last one that says why."""
    try:
        yield from pieces
    except storage.Unreachable:
        raise
    except damage as error:
        yield _Damage(" ".join(str(error).split()) or type(error).__name__)


def _damaged(unit: Unit, rows: range, message: str) -> Iterator[Row]:
    for number in rows:
        yield Row(number=number, values={}, fault=Fault(code="source_damaged", message=f"{unit.name} is damaged: {message}"))


def _rest(unit: Unit, row: int, message: str) -> Iterator[Row]:
    """What stands for the rows of a unit from `row` on."""
    return _damaged(unit, range(row, unit.first_row + unit.rows if unit.rows else row + 1), message)


def _packs(rows: Iterator[Row]) -> Iterator[list[Row]]:
    pack: list[Row] = []
    size = 0
    for row in rows:
        pack.append(row)
        size += len(row.image or b"")
        if len(pack) == BATCH_ROWS or size >= PACK_BYTES:
            yield pack
            pack, size = [], 0
    if pack:
        yield pack


def _of_rows(rows: Iterator[Row], reading: Reading) -> Iterator[Fields]:
    return (fields.of_rows(pack, reading.columns, reading.kept) for pack in _packs(rows))


def _wanted(columns: Columns, kept: pa.DataType | None, have: list[str]) -> list[str]:
    names = [columns.get(field) for field in Columns.model_fields] + [field.name for field in kept or ()]
    return [name for name in dict.fromkeys(names) if name in have]


def _parquet(unit: Unit, reading: Reading) -> Iterator[Fields]:
    row = unit.first_row
    with typed.open_parquet(unit.uri) as file:
        names = _wanted(reading.columns, reading.kept, file.schema_arrow.names)
        for group in unit.groups:
            end = row + file.metadata.row_group(group).num_rows
            for batch in _until_damage(typed.parquet_batches(file, group, names), typed.DAMAGE):
                if isinstance(batch, _Damage):
                    yield from _of_rows(_damaged(unit, range(row, end), batch.message), reading)
                else:
                    yield fields.of_batch(batch, row, reading.columns, reading.kept)
                    row += batch.num_rows
            row = end


def _arrow(unit: Unit, reading: Reading) -> Iterator[Fields]:
    row = unit.first_row
    names = _wanted(reading.columns, reading.kept, typed.read_schema(unit.uri, "arrow").names)
    for batch in _until_damage(typed.arrow_batches(unit.uri, names), typed.DAMAGE):
        if isinstance(batch, _Damage):
            yield from _of_rows(_rest(unit, row, batch.message), reading)
        else:
            yield fields.of_batch(batch, row, reading.columns, reading.kept)
            row += batch.num_rows


def _spans(start: int, end: int, rows: int) -> list[tuple[int, int]]:
    return [(first, min(first + rows, end)) for first in range(start, end, rows)]


def _lance(unit: Unit, reading: Reading) -> Iterator[Fields]:
    dataset = typed.open_lance(unit.uri, unit.version)
    names = _wanted(reading.columns, reading.kept, dataset.schema.names)
    # Whatever limits it is given, a scan keeps most of what it reads in memory: some scans a unit bound it.
    spans = deque(_spans(unit.first_row, unit.first_row + unit.rows, SCAN_ROWS))
    while spans:
        row, last = spans.popleft()
        batches = typed.lance_batches(dataset, unit.uri, unit.groups[0], names, unit.offset + row - unit.first_row, last - row)
        for batch in _until_damage(batches, typed.LANCE_DAMAGE):
            if not isinstance(batch, _Damage):
                yield fields.of_batch(batch, row, reading.columns, reading.kept)
                row += batch.num_rows
            elif last - row > BATCH_ROWS:  # it gave up what it had read ahead: each piece is asked for alone
                spans.extendleft(reversed(_spans(row, last, BATCH_ROWS)))
            else:
                yield from _of_rows(_damaged(unit, range(row, last), batch.message), reading)


def _line_rows(unit: Unit) -> Iterator[Row]:
    row = unit.first_row
    records = lines.records(unit.uri, unit.format, offset=unit.offset, header=unit.header)
    for record in _until_damage(islice(records, unit.rows or None), lines.DAMAGE):
        if isinstance(record, _Damage):
            yield from _rest(unit, row, record.message)
            return
        fault = Fault(code="record_unreadable", message=record.error, original=record.raw) if record.error else None
        yield Row(number=row, values=record.values or {}, fault=fault)
        row += 1
    if row < unit.first_row + unit.rows:
        raise ValueError(f"{unit.uri} has changed since it was planned: row {row} is gone")


def _lines(unit: Unit, reading: Reading) -> Iterator[Fields]:
    return _of_rows(_line_rows(unit), reading)


def _sample_rows(unit: Unit, columns: Columns) -> Iterator[Row]:
    row = unit.first_row
    for sample in _until_damage(samples.read_samples(unit.uri, columns), samples.DAMAGE):
        if isinstance(sample, _Damage):
            yield from _rest(unit, row, sample.message)
        else:
            yield sample
            row += 1


def _samples(unit: Unit, reading: Reading) -> Iterator[Fields]:
    return _of_rows(_sample_rows(unit, reading.columns), reading)


READERS: Mapping[str, Callable[[Unit, Reading], Iterator[Fields]]] = {
    "parquet": _parquet,
    "jsonl": _lines,
    "csv": _lines,
    "webdataset": _samples,
    "arrow": _arrow,
    "lance": _lance,
}


def _table(unit: Unit, reading: Reading, found: Fields) -> pa.Table:
    """Records of `found`; what they do not say comes from the attributes of their products."""
    known = load_attributes(reading.attributes, reading.columns)
    told = {name: found.texts[name] for name in TEXTS}
    of_product = [known.get(product_id, {}) for product_id in told["product_id"]]
    for field in ATTRIBUTES:
        told[field] = [own or other.get(field, "") for own, other in zip(told[field], of_product, strict=True)]
    told["category"] = [category or group for category, group in zip(told["category"], told["group"], strict=True)]
    faults = found.faults
    columns: dict[str, object] = {
        **told,
        "source_file": [unit.name] * len(faults),
        "source_row": found.numbers,
        "mime": found.texts["mime"],
        "deleted": [text.lower() in TRUE for text in found.texts["deleted"]],
        "image": found.images,
        "image_ref": found.refs,
        "fault": [fault.code if fault else "" for fault in faults],
        "fault_message": [fault.message if fault else "" for fault in faults],
        "original": [fault.original if fault else None for fault in faults],
    }
    if found.kept is not None:
        columns[schema.ATTRIBUTES] = found.kept
    wanted = records_schema(reading.kept)
    return pa.table({name: columns[name] for name in wanted.names}, schema=wanted)


def read_unit(unit: Unit, reading: Reading) -> Iterator[pa.Table]:
    """The records of a unit as tables of records_schema(reading.kept) with at most BATCH_ROWS rows, so that memory stays bounded.

    Unreachable where the source does not answer; ValueError where it is no longer what was planned.
    """
    for found in READERS[unit.format](unit, reading):
        if found.faults:
            yield _table(unit, reading, found)
