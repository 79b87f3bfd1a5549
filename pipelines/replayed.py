"""Rejects as records again: with repairs, ready to be normalised once more. No Ray."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from idem import schema, storage
from pipelines.reading.sources import Unit
from pipelines.records import BATCH_ROWS, TEXTS, records_schema

FORMAT = "replay"  # of a unit: parquet in the form of records, written by `write_units`
RAW = ("record_unreadable", "source_damaged")  # reasons of rejects whose original is no picture

Repairs = Mapping[tuple[str, int], Mapping[str, Any]]  # by source file and row: our fields, with what they should hold


@dataclass(frozen=True, slots=True)
class Attributes:
    """Gives the columns kept for filters their types again, which JSON does not hold."""

    kept: pa.DataType | None

    def read(self, told: Any) -> tuple[Any, str]:
        """The value and "", or None and what is wrong with it."""
        if self.kept is None or told is None:
            return None, ""
        line = io.BytesIO(json.dumps({"value": told}).encode())
        options = pyarrow.json.ParseOptions(explicit_schema=pa.schema([("value", self.kept)]), unexpected_field_behavior="ignore")
        try:
            return pyarrow.json.read_json(line, parse_options=options).column("value")[0].as_py(), ""
        except pa.ArrowInvalid as error:
            return None, f"the attributes {told!r} do not fit {self.kept}: {error}"


def _texts(told: Mapping[str, Any]) -> dict[str, str]:
    return {name: "" if told.get(name) is None else str(told[name]) for name in TEXTS}


def record_of(reject: Mapping[str, Any], repair: Mapping[str, Any], attributes: Attributes) -> dict[str, Any]:
    """One row of REJECTS, and what is to be changed in it -> one row of records_schema. A repair lifts what reading held against it."""
    told = {**json.loads(reject["record"]), **repair}
    raw = reject["reason"] in RAW
    value, fault = attributes.read(told.get(schema.ATTRIBUTES))
    stays = raw and not repair
    record = {
        **_texts(told),
        "source_file": reject["source_file"],
        "source_row": reject["source_row"],
        "mime": str(told.get("mime") or ""),
        "deleted": bool(told.get("deleted")),
        "image": repair["image"] if "image" in repair else None if raw else reject["original"],
        "image_ref": told.get("image_ref"),
        "fault": reject["reason"] if stays else "attribute_type" if fault else "",
        "fault_message": reject["message"] if stays else fault,
        "original": reject["original"] if stays else None,
    }
    return record if attributes.kept is None else {**record, schema.ATTRIBUTES: value}


def write_units(folder: str, rejects: Iterator[pa.Table], repairs: Repairs, kept: pa.DataType | None) -> list[Unit]:
    """Write the rejects as records below `folder`, a file for each table; the units to read them by."""
    units = []
    attributes = Attributes(kept)
    for number, table in enumerate(rejects):
        rows = [record_of(row, repairs.get((row["source_file"], row["source_row"]), {}), attributes) for row in table.to_pylist()]
        made = pa.Table.from_pylist(rows, schema=records_schema(kept))
        sink = pa.BufferOutputStream()
        pq.write_table(made, sink)
        uri = storage.join(folder, "replay", f"{number:05}.parquet")
        storage.write_bytes(uri, sink.getvalue().to_pybytes())
        unit = {"uri": uri, "name": "rejects", "format": FORMAT, "number": number, "first_row": 0}
        units.append(Unit(**unit, rows=made.num_rows, bytes=made.nbytes))
    return units


def read_unit(unit: Unit) -> Iterator[pa.Table]:
    """The records of a unit that `write_units` wrote."""
    table = pq.read_table(io.BytesIO(storage.read_bytes(unit.uri)))
    for start in range(0, table.num_rows, BATCH_ROWS):
        yield table.slice(start, BATCH_ROWS)


def load_repairs(rows: Sequence[Mapping[str, Any]], known: Sequence[str]) -> Repairs:
    """Repairs by the record that they are for. ValueError for what names no record, and for fields that are none of ours."""
    repairs = {}
    for row in rows:
        if row.get("source_file") is None or row.get("source_row") is None:
            raise ValueError(f"a repair names its record by source_file and source_row; found {sorted(row)}")
        if unknown := sorted(set(row) - {*known, "source_file", "source_row"}):
            raise ValueError(f"a repair has no field {', '.join(unknown)}; allowed are {', '.join(known)}")
        values = {name: value for name, value in row.items() if value is not None and name in known}
        repairs[str(row["source_file"]), int(row["source_row"])] = values
    return repairs
