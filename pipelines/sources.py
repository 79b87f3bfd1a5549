"""Parquet from anyone -> a plan of what to read, and records in one form (RECORDS of pipelines.normalize). No Ray.

A source is one parquet file, or a folder of them as the public sets have it: files with an image column hold records; a
file without one whose product_id is unique describes products, and its attributes are joined to the records; anything else is
named as not read. Planning reads schemas and ids only, never pictures.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from pydantic import BaseModel

from idem import folds, storage
from pipelines.normalize import RECORDS

REQUIRED = ("item_id", "product_id", "image")
ATTRIBUTES = ("title", "family_id", "coarse", "category", "group", "id_split")
SETTLED = ("family_id", "coarse", "id_split")  # must be one for all records of a product, or folds and splits leak
BATCH_ROWS = 128


class Columns(BaseModel, frozen=True, extra="forbid"):
    """Which column of the source holds what. Those that are named explicitly must exist; of the others only REQUIRED must."""

    item_id: str = "image_id"
    product_id: str = "product_id"
    image: str = "image"
    title: str = "title"
    family_id: str = "family_id"  # else coarse, else the product itself
    coarse: str = "coarse"
    category: str = "category"  # else group
    group: str = "group"
    lang: str = "lang"
    role: str = "role"
    style: str = "style"
    id_split: str = "id_split"
    split: str = "split"

    def get(self, field: str) -> str:
        """The source's name of one of our fields."""
        return getattr(self, field)


TEXTS = tuple(name for name in Columns.model_fields if name != "image")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One row group of one file: the unit of work. `name` is the file's name in the source; `first_row` counts from 0 in the file."""

    uri: str
    name: str
    number: int
    first_row: int
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """groups: what to read, in order; attributes: URIs of files that describe products; not_read: names of files left alone;
    bytes: size on disk of what is read; fingerprint: changes with the names, sizes or times of those files."""

    uri: str
    columns: Columns
    groups: tuple[Group, ...]
    attributes: tuple[str, ...]
    not_read: tuple[str, ...]
    bytes: int
    fingerprint: str

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)


def _list(uri: str) -> list[tuple[str, pyarrow.fs.FileInfo]]:
    """The parquet files at `uri` (itself, or directly in that folder), by name, each with its URI."""
    filesystem, path = storage.open_filesystem(uri)
    found = filesystem.get_file_info(path)
    if found.type == pyarrow.fs.FileType.File:
        return [(uri, found)]
    if found.type == pyarrow.fs.FileType.NotFound:
        raise ValueError(f"the source {uri} does not exist; a parquet file or a folder of parquet files is needed")
    inside = sorted(filesystem.get_file_info(pyarrow.fs.FileSelector(path)), key=lambda info: info.base_name)
    files = [info for info in inside if info.extension == "parquet" and info.base_name[0] not in "._"]
    if not files:
        raise ValueError(f"the folder {uri} holds no .parquet file; found {', '.join(i.base_name for i in inside) or 'nothing'}")
    return [(storage.join(uri, info.base_name), info) for info in files]


@contextmanager
def _parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """The open file; ValueError that names it where it, or any part read of it, is not sound parquet."""
    filesystem, path = storage.open_filesystem(uri)
    try:
        with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{uri} cannot be read as parquet: {' '.join(str(error).split())}") from error


def _texts(column: pa.ChunkedArray | pa.Array) -> list[str]:
    """Any plain column as str: "" for null, numbers as their digits, bytes that are not UTF-8 with replacement characters."""
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        column = column.cast(pa.string())
    return ["" if value is None else value.decode(errors="replace").strip() for value in column.cast(pa.large_binary()).to_pylist()]


def _is_unique(uri: str, column: str) -> bool:
    with _parquet(uri) as file:
        ids = _texts(file.read(columns=[column]).column(column))
    return len(set(ids)) == len(ids) and "" not in ids


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):  # {bytes, path}, as some dataset tools write pictures
        return kind.get_field_index("bytes") >= 0
    return any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _check(uri: str, have: pa.Schema, columns: Columns) -> None:
    """ValueError unless the record file `uri` has what is required, in a usable type."""
    exist = f"its columns are {', '.join(have.names) or 'none'}"
    if missing := [f"{columns.get(f)!r} (for {f})" for f in REQUIRED if columns.get(f) not in have.names]:
        raise ValueError(f"{uri} has no column {', '.join(missing)}; {exist}. Name yours in [ingest.columns]")
    for field in Columns.model_fields:
        if (name := columns.get(field)) not in have.names:
            continue
        kind = have.field(name).type
        if not _is_image(kind) if field == "image" else pa.types.is_nested(kind):
            wanted = "encoded pictures as binary" if field == "image" else "a plain text or number"
            raise ValueError(f"{uri}: column {name!r} (for {field}) is of type {kind}; {wanted} is needed")


def _groups(uri: str, name: str) -> Iterator[Group]:
    first = 0
    with _parquet(uri) as file:
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            if group.num_rows:
                yield Group(uri=uri, name=name, number=number, first_row=first, rows=group.num_rows, bytes=group.total_byte_size)
            first += group.num_rows


def _kind(uri: str, have: pa.Schema, columns: Columns, *, alone: bool) -> str:
    if alone or columns.image in have.names:
        return "records"
    if columns.product_id in have.names and _is_unique(uri, columns.product_id):
        return "attributes"
    return "not_read"


def plan_source(uri: str, columns: Columns) -> SourcePlan:
    """Look at a file or a folder and say what would be read; ValueError says what is missing, where, and what there is."""
    files = _list(uri)
    schemas: dict[str, pa.Schema] = {}
    kinds: dict[str, str] = {}
    for file, _ in files:
        with _parquet(file) as opened:
            schemas[file] = opened.schema_arrow
        kinds[file] = _kind(file, schemas[file], columns, alone=len(files) == 1)
        if kinds[file] == "records":
            _check(file, schemas[file], columns)
    read = [(file, info) for file, info in files if kinds[file] != "not_read"]
    records = [(file, info) for file, info in read if kinds[file] == "records"]
    if not records:
        told = "; ".join(f"{info.base_name}: {', '.join(schemas[file].names)}" for file, info in files)
        raise ValueError(f"no file in {uri} has a column {columns.image!r} (for image). Found {told}")
    exist = {name for file, _ in read for name in schemas[file].names}
    if unknown := sorted(f"{columns.get(f)!r} (for {f})" for f in columns.model_fields_set if columns.get(f) not in exist):
        raise ValueError(f"{uri} has no column {', '.join(unknown)}; its columns are {', '.join(sorted(exist))}")
    groups = tuple(group for file, info in records for group in _groups(file, info.base_name))
    if not groups:
        raise ValueError(f"the catalogue {uri} is empty: {', '.join(info.base_name for _, info in records)} holds no rows")
    return SourcePlan(
        uri=uri,
        columns=columns,
        groups=groups,
        attributes=tuple(file for file, _ in read if kinds[file] == "attributes"),
        not_read=tuple(info.base_name for file, info in files if kinds[file] == "not_read"),
        bytes=sum(info.size for _, info in read),
        fingerprint=hashlib.sha256(repr([(i.base_name, i.size, i.mtime_ns) for _, i in read]).encode()).hexdigest()[:16],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What only all records together tell. Both dicts are by group (URI, number).

    duplicates: rows of the file whose item_id came earlier, in the order of the plan; settled: what holds for all records of
    a product (of SETTLED), for those products alone whose records differ; split_conflicts: how many products were given more
    than one id_split.
    """

    duplicates: Mapping[tuple[str, int], tuple[int, ...]]
    settled: Mapping[tuple[str, int], Mapping[str, Mapping[str, str]]]
    split_conflicts: int


def _settle(told: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """One answer from what the records of a product say of SETTLED: the first that is given, but training gives way."""
    given = {field: [value for value in values if value] for field, values in zip(SETTLED, zip(*told, strict=True), strict=True)}
    # A product that is trained on and then judged as unseen would flatter the figures; one that is left out costs little.
    given["id_split"].sort(key=lambda split: (split != "dev_unseen", split == "train"))
    return {field: values[0] if values else "" for field, values in given.items()}


def _read_ids(group: Group, columns: Columns, known: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """item_id, product_id and what is said of SETTLED, for each row of the group."""
    fields = ("item_id", "product_id", *SETTLED)
    with _parquet(group.uri) as file:
        have = [name for name in {columns.get(f) for f in fields} if name in file.schema_arrow.names]
        table = file.read_row_group(group.number, columns=have)
    texts = [_texts(table.column(columns.get(f))) if columns.get(f) in have else [""] * group.rows for f in fields]
    for item_id, product_id, *own in zip(*texts, strict=True):
        of_product = known.get(product_id, {})
        yield item_id, product_id, tuple(value or of_product.get(f, "") for f, value in zip(SETTLED, own, strict=True))


def survey(plan: SourcePlan) -> Survey:
    """Find ids that repeat, and settle what the records of a product tell differently.

    Reads the columns of ids, families and splits alone. It holds every id in memory: 170 bytes a record
    were measured with four records a product, 360 with one.
    """
    known = load_attributes(plan.attributes, plan.columns)
    seen: set[str] = set()
    first: dict[str, tuple[str, ...]] = {}
    differ: dict[str, dict[tuple[str, ...], None]] = {}  # dicts for sets that keep their order
    duplicates: dict[tuple[str, int], tuple[int, ...]] = {}
    products: dict[tuple[str, int], dict[str, None]] = {}
    for group in plan.groups:
        rows, inside = [], products.setdefault((group.uri, group.number), {})
        for row, (item_id, product_id, told) in enumerate(_read_ids(group, plan.columns, known), group.first_row):
            if item_id and item_id in seen:
                rows.append(row)
            seen.add(item_id)
            inside[product_id] = None
            if product_id and first.setdefault(product_id, told) != told:
                differ.setdefault(product_id, {first[product_id]: None})[told] = None
        if rows:
            duplicates[group.uri, group.number] = tuple(rows)
    settled = {product_id: _settle(told) for product_id, told in differ.items()}
    return Survey(
        duplicates=duplicates,
        settled={key: {p: settled[p] for p in inside if p in settled} for key, inside in products.items()},
        split_conflicts=sum(len({t[SETTLED.index("id_split")] for t in told} - {""}) > 1 for told in differ.values()),
    )


@functools.lru_cache(maxsize=4)
def load_attributes(files: tuple[str, ...], columns: Columns) -> Mapping[str, Mapping[str, str]]:
    """product_id -> what `files` say of it, of ATTRIBUTES; the first file that gives a value wins."""
    known: dict[str, dict[str, str]] = {}
    for uri in files:
        with _parquet(uri) as file:
            names = {f: columns.get(f) for f in ATTRIBUTES if columns.get(f) in file.schema_arrow.names}
            table = file.read(columns=[columns.product_id, *names.values()])
        values = {field: _texts(table.column(name)) for field, name in names.items()}
        for i, product_id in enumerate(_texts(table.column(columns.product_id))):
            told = known.setdefault(product_id, {})
            for field, column in values.items():
                told[field] = told.get(field) or column[i]
    return known


def _record(own: Mapping[str, str], known: Mapping[str, str], settled: Mapping[str, str], unseen_fraction: float) -> dict[str, str]:
    """What is settled for its product holds; what a record does not say comes from the product's attributes, then the fallbacks."""
    told = {**own, **{field: own[field] or known.get(field, "") for field in ATTRIBUTES}, **settled}
    told["family_id"] = told["family_id"] or told["coarse"] or told["product_id"]
    told["category"] = told["category"] or told["group"]
    # Whole families are dealt: a sibling in training would make an "unseen" product familiar.
    unseen = folds.uniform(told["family_id"], "unseen") < unseen_fraction
    told["id_split"] = told["id_split"] or ("dev_unseen" if unseen else "train")
    return told


def _images(column: pa.Array) -> pa.Array:
    column = column.field("bytes") if pa.types.is_struct(column.type) else column
    return column.cast(pa.large_binary())


def read_group(
    group: Group,
    *,
    columns: Columns,
    attributes: tuple[str, ...] = (),
    duplicates: tuple[int, ...] = (),
    settled: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    unseen_fraction: float = 0.2,
) -> Iterator[pa.Table]:
    """The records of one row group as tables of RECORDS with at most BATCH_ROWS rows, so that memory stays bounded.

    `duplicates` and `settled` are those of the group's Survey.
    """
    known = load_attributes(attributes, columns)
    again = frozenset(duplicates)
    row = group.first_row
    with _parquet(group.uri) as file:
        have = [name for name in {columns.get(f) for f in Columns.model_fields} if name in file.schema_arrow.names]
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group.number], columns=have, use_threads=False):
            empty = [""] * batch.num_rows
            texts = {f: _texts(batch.column(columns.get(f))) if columns.get(f) in have else empty for f in TEXTS}
            own = [dict(zip(texts, values, strict=True)) for values in zip(*texts.values(), strict=True)]
            told = [_record(o, known.get(o["product_id"], {}), settled.get(o["product_id"], {}), unseen_fraction) for o in own]
            table: dict[str, object] = {name: [t[name] for t in told] for name in RECORDS.names if name in TEXTS}
            table |= {"source_file": [group.name] * len(told), "source_row": range(row, row + len(told))}
            table |= {"duplicate": [r in again for r in range(row, row + len(told))], "image": _images(batch.column(columns.image))}
            yield pa.table({name: table[name] for name in RECORDS.names}, schema=RECORDS)
            row += batch.num_rows
