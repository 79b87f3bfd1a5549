"""One unit of a source: read, fetch, normalise, and write as fragments that no reader sees yet. No Ray.

A unit leaves a folder <run>/units/<key>/ with its keys and, written last, done.json. Whatever happens before that is
made again; what has it is never made twice. So a run that was killed goes on where it was.
"""

import hashlib
import json
import resource
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import numpy as np
import pyarrow as pa
from lance.fragment import write_fragments
from pydantic import BaseModel, ConfigDict

from idem import schema, storage
from idem.text import parse_version
from pipelines import keys, replayed
from pipelines.normalize import Limits, Normalised, normalize_records
from pipelines.reading import readers
from pipelines.reading.fetch import Fetcher
from pipelines.reading.sources import Reading, Unit

T = TypeVar("T", bound=BaseModel)

DONE = "done.json"
SLAB_BYTES = 48 << 20  # items, or rejects, that wait to be written


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """What every unit of a run shares. Tables and `folder` (the run's) are URIs; near: perceptual hashes are compared too."""

    run: str
    folder: str
    items: str
    rejects: str
    reading: Reading
    limits: Limits
    buckets: int
    near: bool


class Staged(BaseModel):
    """What done.json says: fragments as Lance's JSON, counts, and what it cost."""

    model_config = ConfigDict(frozen=True)
    key: str
    name: str
    rows: int
    items: int
    images: int
    rejected: dict[str, int]
    deleted: int
    item_fragments: list[str]
    reject_fragments: list[str]
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_mb: float


def parsed(model: type[T], uri: str) -> T | None:
    """What the JSON at `uri` says; None where there is none, or a power cut has torn it: then it is made again."""
    if storage.exists(uri):
        with suppress(ValueError):
            return model.model_validate_json(storage.read_bytes(uri))
    return None


def key_of(unit: Unit) -> str:
    return hashlib.sha256(json.dumps(asdict(unit), sort_keys=True).encode()).hexdigest()[:16]


def folder_of(staging_folder: str, key: str) -> str:
    return storage.join(staging_folder, "units", key)


def read_done(staging_folder: str, key: str) -> Staged | None:
    uri = storage.join(folder_of(staging_folder, key), DONE)
    return parsed(Staged, uri)


class Collector:
    """The keys of a unit and its rejects, gathered while its items stream by."""

    def __init__(self, near: bool) -> None:
        self.near = near
        self.records = self.deleted = self.items = self.images = 0
        self.bytes = 0
        self.ids: list[pa.Table] = []
        self.products: list[pa.Table] = []
        self.pictures: list[pa.Table] = []
        self.dealt: list[np.ndarray] = []
        self.rejects: list[pa.Table] = []
        self.reasons: Counter[str] = Counter()

    def add(self, records: pa.Table, made: Normalised) -> None:
        rows = np.arange(self.items, self.items + made.items.num_rows)
        light = made.items.select(["item_id", "version", "record_hash", "content_hash", "phash", "source_row"])
        self.ids.append(light.append_column("row", pa.array(rows)).select(keys.IDS.names).cast(keys.IDS))
        if len(made.deleted):
            self.ids.append(tombstones(records.take(pa.array(made.deleted))))
        told = records.select(keys.PRODUCTS.names).take(pa.array(made.kept))
        as_kept = told.set_column(told.schema.get_field_index("product_id"), "product_id", made.items.column("product_id"))
        self.products.append(keys.products(as_kept))
        pictures, dealt = keys.pictures(light.append_column("image", made.items.column("image")), rows, self.near)
        self.pictures.append(pictures)
        self.dealt.append(dealt)
        self.rejects.append(made.rejects)
        self.reasons.update(made.rejects.column("reason").to_pylist())
        self.records += records.num_rows
        self.deleted += len(made.deleted)
        self.items += made.items.num_rows
        self.images += made.items.num_rows - made.items.column("image").null_count
        self.bytes += records.column("image").nbytes

    def take_rejects(self, at_least: int = 0) -> list[pa.Table]:
        """The rejects since the last call, if they hold that many bytes: pictures that cannot be used may be large."""
        if sum(table.nbytes for table in self.rejects) < at_least:
            return []
        taken, self.rejects = [table for table in self.rejects if table.num_rows], []
        return taken

    def save(self, folder: str, buckets: int) -> None:
        ids, products, pictures = (
            pa.concat_tables([keys.SCHEMAS[kind].empty_table(), *found])
            for kind, found in (("ids", self.ids), ("products", self.products), ("pictures", self.pictures))
        )
        keys.write(storage.join(folder, "ids.arrow"), ids, keys.of_texts(ids.column("item_id").to_pylist(), buckets), buckets)
        of_product = keys.of_texts(products.column("product_id").to_pylist(), buckets)
        keys.write(storage.join(folder, "products.arrow"), products, of_product, buckets)
        keys.write(
            storage.join(folder, "pictures.arrow"), pictures, np.concatenate([np.zeros(0, np.int64), *self.dealt]) % buckets, buckets
        )


def _version(text: str) -> int | None:
    """None too for what cannot be read: a deletion is not refused for its version."""
    with suppress(ValueError):
        return parse_version(text)
    return None


def tombstones(records: pa.Table) -> pa.Table:
    """IDS of records that take their item away."""
    told = {
        "row": pa.array(np.full(records.num_rows, -1)),
        "source_row": records.column("source_row"),
        "item_id": pa.array([text.strip() for text in records.column("item_id").to_pylist()]),
        "version": pa.array([_version(text) for text in records.column("version").to_pylist()], pa.int64()),
        "record_hash": pa.nulls(records.num_rows, pa.string()),
    }
    return pa.table(told, schema=keys.IDS)


def write(tables: Iterable[pa.Table], wanted: pa.Schema, uri: str) -> tuple[list[str], int]:
    """Write tables as fragments (Lance's JSON) of SLAB_BYTES or more, which nobody sees before a commit; also their size in bytes.

    Each is made before Lance is called, and not by a stream that Lance pulls at: that would run our code on its threads, which
    costs a tenth of the time, and would wrap our errors into words.
    """
    fragments: list[str] = []
    size = 0
    for slab in _slabs(tables):
        try:
            made = write_fragments(slab, uri, schema=wanted, mode="append", storage_options=storage.lance_options(uri))
        except OSError as error:
            raise OSError(f"cannot write to {uri}: {error}") from error
        fragments += [json.dumps(fragment.to_json()) for fragment in made]
        size += sum(file.file_size_bytes or 0 for fragment in made for file in fragment.files)
    return fragments, size


def _slabs(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    slab: list[pa.Table] = []
    held = 0
    for table in tables:
        if table.num_rows:
            slab.append(table)
            held += table.nbytes
        if held >= SLAB_BYTES:
            yield pa.concat_tables(slab)
            slab, held = [], 0
    if slab:
        yield pa.concat_tables(slab)


@dataclass
class _Rejected:
    """Where a unit's rejects go, a fragment whenever they have become many bytes."""

    staging: Staging
    fragments: list[str] = field(default_factory=list)
    bytes: int = 0

    def write(self, tables: list[pa.Table]) -> None:
        made, size = write(tables, schema.REJECTS, self.staging.rejects)
        self.fragments += made
        self.bytes += size


def _normalised(unit: Unit, staging: Staging, collected: Collector, rejected: _Rejected) -> Iterator[pa.Table]:
    fetcher = Fetcher(base=staging.reading.images, max_bytes=staging.limits.max_bytes)
    read = replayed.read_unit(unit) if unit.format == replayed.FORMAT else readers.read_unit(unit, staging.reading)
    for records in read:
        filled = fetcher.fill(records)
        made = normalize_records(filled, staging.limits, staging.run)
        collected.add(filled, made)
        rejected.write(collected.take_rejects(SLAB_BYTES))
        yield made.items


def stage(unit: Unit, staging: Staging) -> Staged:
    """Read one unit to its end, unless that was done before."""
    key = key_of(unit)
    if done := read_done(staging.folder, key):
        return done
    start = time.perf_counter()
    collected, rejected = Collector(staging.near), _Rejected(staging)
    items, items_bytes = write(_normalised(unit, staging, collected, rejected), schema.items(staging.reading.kept), staging.items)
    rejected.write(collected.take_rejects())
    folder = folder_of(staging.folder, key)
    collected.save(folder, staging.buckets)
    staged = Staged(
        key=key,
        name=unit.name,
        rows=collected.records,
        items=collected.items,
        images=collected.images,
        rejected=dict(collected.reasons),
        deleted=collected.deleted,
        item_fragments=items,
        reject_fragments=rejected.fragments,
        bytes_read=collected.bytes,
        bytes_written=items_bytes + rejected.bytes,
        seconds=round(time.perf_counter() - start, 3),
        peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    )
    storage.write_bytes(storage.join(folder, DONE), staged.model_dump_json().encode(), durable=False)
    return staged
