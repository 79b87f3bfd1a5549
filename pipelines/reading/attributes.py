"""Files that describe products (unique product_id, no pictures), read whole and joined to the records."""

import functools
from collections.abc import Mapping, Sequence

from idem import storage
from pipelines.reading import lines, typed
from pipelines.reading.fields import text, texts
from pipelines.reading.units import format_of
from pipelines.records import Columns

ATTRIBUTES = ("title", "family_id", "coarse", "category", "group", "id_split")


def read_columns(uri: str, names: Sequence[str]) -> Mapping[str, list[str]]:
    """These columns of a parquet, jsonl or csv file as texts, as far as it has them; ValueError names a file with a damaged part."""
    kind = format_of(uri)
    if kind == "parquet":
        with typed.open_parquet(uri) as file:
            there = [name for name in dict.fromkeys(names) if name in file.schema_arrow.names]
            table = file.read(columns=there)
        return {name: [value for chunk in table.column(name).chunks for value in texts(chunk)] for name in there}
    told = {name: list[str]() for name in names}
    have: set[str] = set()
    try:
        for number, record in enumerate(lines.records(uri, kind)):
            if record.error:
                raise ValueError(f"its record {number} cannot be read: {record.error}")
            have |= told.keys() & record.values.keys()
            for name, values in told.items():
                values.append(text(record.values.get(name)))
    except storage.Unreachable:
        raise
    except (*lines.DAMAGE, ValueError) as error:
        raise ValueError(f"{uri} cannot be read as {kind}: {error}") from error
    return {name: values for name, values in told.items() if name in have}


def is_unique(uri: str, column: str) -> bool:
    """Whether a column names each row: no value twice, none missing."""
    ids = read_columns(uri, [column])[column]
    return len(set(ids)) == len(ids) and "" not in ids


@functools.lru_cache(maxsize=4)
def load_attributes(files: tuple[str, ...], columns: Columns) -> Mapping[str, Mapping[str, str]]:
    """product_id -> what `files` say of it, of ATTRIBUTES; the first file that gives a value wins."""
    known: dict[str, dict[str, str]] = {}
    for uri in files:
        found = read_columns(uri, [columns.product_id, *(columns.get(field) for field in ATTRIBUTES)])
        values = {field: found[columns.get(field)] for field in ATTRIBUTES if columns.get(field) in found}
        for i, product_id in enumerate(found[columns.product_id]):
            told = known.setdefault(product_id, {})
            for field, column in values.items():
                told[field] = told.get(field) or column[i]
    return known
