"""Values as a source has them -> the fields of our records: texts, pictures or where they are, and columns kept for filters."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.records import TEXTS, Columns

TOLD = (*TEXTS, "mime", "deleted")
SURROGATES = re.compile("[\ud800-\udfff]")
BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
STRING = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a record cannot be used. code: as in rejects; original: its bytes, where it could not be read at all."""

    code: str
    message: str
    original: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A record of a format without types: values by their names in the source, the picture where the format has it aside."""

    number: int
    values: Mapping[str, Any]
    image: bytes | None = None
    mime: str = ""
    fault: Fault | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Some records of one file, a list a field (texts: of TOLD). `numbers`: their rows in the file."""

    numbers: Sequence[int]
    texts: Mapping[str, list[str]]
    images: pa.Array
    refs: list[str | None]
    kept: pa.StructArray | None
    faults: list[Fault | None]


def is_any(kind: pa.DataType, tests: Sequence[Any]) -> bool:
    return any(test(kind) for test in tests)


def is_image(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold pictures: their bytes, where they are, or both as dataset tools write it."""
    if pa.types.is_struct(kind):
        return any(kind.get_field_index(name) >= 0 for name in ("bytes", "path"))
    return is_any(kind, (*BINARY, *STRING))


def ending(path: str) -> str:
    """The ending of a path's or URL's last part, lower case and without its dot; "" for none."""
    name = re.split(r"[?#]", path, maxsplit=1)[0].rsplit("/", 1)[-1]
    return name.rsplit(".", 1)[1].lower() if "." in name else ""


def clean(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which no other form of text can."""
    return SURROGATES.sub("\ufffd", text)


def _times(column: pa.Array) -> list[str]:
    """Times as ISO 8601, with their offset from UTC where they say of what they are."""
    zone = "+00:00" if column.type.tz else ""
    plain = column.cast(pa.timestamp("us", column.type.tz), safe=False).cast(pa.int64()).cast(pa.timestamp("us"))
    try:
        return ["" if value is None else value.isoformat() + zone for value in plain.to_pylist()]
    except (ValueError, OverflowError):  # beyond the years that Python has
        return ["" if value is None else str(value) for value in column.cast(pa.int64()).to_pylist()]


def texts(column: pa.Array) -> list[str]:
    """Any plain column as str: "" for null, numbers as their digits, bytes that are not UTF-8 with replacement characters."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if isinstance(column, pa.ExtensionArray):
        return ["" if value is None else str(value) for value in column.to_pylist()]
    if pa.types.is_timestamp(column.type):
        return _times(column)
    if not is_any(column.type, BINARY):
        column = column.cast(pa.string())
    return ["" if value is None else value.decode(errors="replace").strip() for value in column.cast(pa.large_binary()).to_pylist()]


def text(value: Any) -> str:
    """A value of JSON or CSV as `texts` would have it."""
    if value is None:
        return ""
    if isinstance(value, str):
        return clean(value).strip()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return clean(json.dumps(value, ensure_ascii=False))


def _images(column: pa.Array) -> tuple[pa.Array, list[str | None], list[str]]:
    """Bytes, where the others are, and the endings that paths declare."""
    n = len(column)
    none = pa.nulls(n, pa.large_binary())
    if is_any(column.type, BINARY):
        return column.cast(pa.large_binary()), [None] * n, [""] * n
    if is_any(column.type, STRING):
        refs = texts(column)
        return none, [ref or None for ref in refs], [ending(ref) for ref in refs]
    parts = dict(zip([field.name for field in column.type], column.flatten(), strict=True))  # with the nulls of the struct itself
    data = parts["bytes"].cast(pa.large_binary()) if "bytes" in parts else none
    paths = texts(parts["path"]) if "path" in parts else [""] * n
    refs = [path if path and not valid else None for path, valid in zip(paths, data.is_valid().to_pylist(), strict=True)]
    return data, refs, [ending(path) for path in paths]


def _lossless(value: Any, kind: pa.DataType) -> bool:
    """Whether Arrow would keep all of a value: of an object it drops what its type has no field for."""
    if isinstance(value, dict) and pa.types.is_struct(kind):
        return all(kind.get_field_index(k) >= 0 and _lossless(v, kind.field(k).type) for k, v in value.items())
    if isinstance(value, list) and is_any(kind, (pa.types.is_list, pa.types.is_large_list)):
        return all(_lossless(v, kind.value_type) for v in value)
    return True


def clean_all(value: Any) -> Any:
    """`clean` for every text within a value of JSON."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(k): clean_all(v) for k, v in value.items()}
    return [clean_all(v) for v in value] if isinstance(value, list) else value


def _as(values: Sequence[Any] | pa.Array, kind: pa.DataType) -> pa.Array:
    """`values` in a type, or an error where any does not fit."""
    if isinstance(values, pa.Array):
        return (values.storage if isinstance(values, pa.ExtensionArray) and values.type != kind else values).cast(kind)
    if not all(_lossless(value, kind) for value in values):
        raise pa.ArrowInvalid("it has fields that the type has not")
    # Numbers and times in CSV are texts; where the type was found in the file's head, they are meant as such.
    if not pa.types.is_nested(kind) and not is_any(kind, STRING) and all(value is None or isinstance(value, str) for value in values):
        return pa.array(values, pa.string()).cast(kind)
    return pa.array(values, kind)


def fit(name: str, values: Sequence[Any] | pa.Array, kind: pa.DataType) -> tuple[pa.Array, dict[int, Fault]]:
    """`values` in the type of a kept column; those that do not fit are null, and a fault by their position."""
    values = values if isinstance(values, pa.Array) else [clean_all(value) for value in values]
    try:
        return _as(values, kind), {}
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        pass
    fitted, faults = [], {}
    for i in range(len(values)):
        one = values[i : i + 1]
        try:
            fitted.append(_as(one, kind))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            fitted.append(pa.nulls(1, kind))
            shown = repr(one[0].as_py() if isinstance(one, pa.Array) else one[0])[:100]
            faults[i] = Fault(code="attribute_type", message=f"column {name!r} holds {shown}, which is no {kind}: {error}")
    return pa.concat_arrays(fitted), faults


def _kept(
    columns: Mapping[str, Sequence[Any] | pa.Array], kept: pa.DataType | None, faults: list[Fault | None]
) -> tuple[pa.StructArray | None, list[Fault | None]]:
    if kept is None:
        return None, faults
    arrays = []
    for field in kept:
        array, bad = fit(field.name, columns.get(field.name, [None] * len(faults)), field.type)
        arrays.append(array)
        faults = [fault or bad.get(i) for i, fault in enumerate(faults)]
    return pa.StructArray.from_arrays(arrays, fields=list(kept)), faults


def of_batch(batch: pa.RecordBatch, first: int, columns: Columns, kept: pa.DataType | None) -> Fields:
    """Fields of a batch of a typed format; its first row is row `first` of the file."""
    have, n = batch.schema.names, batch.num_rows
    told = {field: texts(batch.column(columns.get(field))) if columns.get(field) in have else [""] * n for field in TOLD}
    images = batch.column(columns.image) if columns.image in have else pa.nulls(n, pa.large_binary())
    data, refs, endings = _images(images)
    told["mime"] = [(mime or end).lower() for mime, end in zip(told["mime"], endings, strict=True)]
    attributes = {name: batch.column(name) for name in have}
    struct, faults = _kept(attributes, kept, [None] * n)
    return Fields(numbers=range(first, first + n), texts=told, images=data, refs=refs, kept=struct, faults=faults)


def _ref(row: Row, columns: Columns) -> str:
    value = row.values.get(columns.image)
    return text(value.get("path") if isinstance(value, dict) else value) if row.image is None else ""


def of_rows(rows: Sequence[Row], columns: Columns, kept: pa.DataType | None) -> Fields:
    """Fields of records of a format without types."""
    told = {field: [text(row.values.get(columns.get(field))) for row in rows] for field in TOLD}
    refs = [_ref(row, columns) for row in rows]
    told["mime"] = [(own or row.mime or ending(ref)).lower() for own, row, ref in zip(told["mime"], rows, refs, strict=True)]
    attributes = {field.name: [_blank(row.values.get(field.name)) for row in rows] for field in kept or ()}
    struct, faults = _kept(attributes, kept, [row.fault for row in rows])
    return Fields(
        numbers=[row.number for row in rows],
        texts=told,
        images=pa.array([row.image for row in rows], pa.large_binary()),
        refs=[ref or None for ref in refs],
        kept=struct,
        faults=faults,
    )


def _blank(value: Any) -> Any:
    return None if value == "" else value
