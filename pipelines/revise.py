"""Carry out verdicts: a unit's fragments are written again without what goes and with what changes; rows that the table holds
already are taken out of their fragment, and come back changed where they only change. No Ray.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lance
import pyarrow as pa
from lance.file import LanceFileReader
from lance.fragment import FragmentMetadata

from idem import schema, storage
from pipelines import keys
from pipelines.resolve import UNCHANGED
from pipelines.stage import Staged, Staging, write
from pipelines.table import open_table, without

BATCH_ROWS = 128
SET = ("family_id", "id_split", "duplicate_of", "near_duplicate_of")
NOT_TOLD = (
    "image",
    "content_hash",
    "phash",
    "record_hash",
    "width",
    "height",
    "source_file",
    "source_row",
    "duplicate_of",
    "near_duplicate_of",
    "run",
)

Places = Sequence[tuple[str, int]]  # of verdicts: a file, and the number of a batch in it


@dataclass
class Orders:
    """The verdicts on one unit or fragment, by row. gone: reason and message; sets: new values; products: those for all its rows."""

    gone: dict[int, tuple[str, str]] = field(default_factory=dict)
    sets: dict[int, dict[str, str]] = field(default_factory=dict)
    products: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, places: Places) -> "Orders":
        orders = cls()
        rows = [row for batch in keys.read(places) for row in batch.to_pylist()]
        for row in sorted(rows, key=lambda row: -row["rank"]):  # the lowest rank is set last, and stays
            values = {name: row[name] for name in SET if row[name] is not None}
            if row["reason"]:
                orders.gone[row["row"]] = row["reason"], row["message"] or ""
            elif row["product_id"] is not None:
                orders.products[row["product_id"]] = values
            else:
                orders.sets.setdefault(row["row"], {}).update(values)
        return orders


@dataclass(frozen=True, kw_only=True)
class Revised:
    """What takes the place of a unit's fragments, or what is done to a fragment of the table. Fragments are Lance's JSON."""

    added: list[str]
    updated: list[str] = field(default_factory=list)
    rejects: list[str] = field(default_factory=list)
    rejected: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


def _changed(batch: pa.Table, values: Sequence[dict[str, str]]) -> pa.Table:
    """The batch with those values of each row."""
    for name in {name for row in values for name in row}:
        column = [row.get(name, old) for row, old in zip(values, batch.column(name).to_pylist(), strict=True)]
        place = batch.schema.get_field_index(name)
        batch = batch.set_column(place, batch.schema.field(place), pa.array(column, pa.string()))
    return batch


def _reject(item: dict[str, Any], reason: str, message: str, run: str) -> dict[str, Any]:
    told = {name: value for name, value in item.items() if name not in NOT_TOLD and value is not None}
    where = {name: item[name] for name in ("source_file", "source_row", "item_id")}
    record = json.dumps(told, ensure_ascii=False, default=str)
    return {**where, "reason": reason, "message": message, "original": item["image"], "record": record, "run": run}


def _read(uri: str, fragments: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """A unit's items as they were written, each table with the number of its first row."""
    row = 0
    for text in fragments:
        for file in FragmentMetadata.from_json(text).files:
            reader = LanceFileReader(storage.join(uri, "data", file.path), storage_options=storage.lance_options(uri))
            for batch in reader.read_all(batch_size=BATCH_ROWS).to_batches():
                yield row, pa.Table.from_batches([batch])
                row += batch.num_rows


class _Unit:
    """Applies the orders on a unit to its items as they stream by."""

    def __init__(self, staging: Staging, orders: Orders) -> None:
        self.staging, self.orders = staging, orders
        self.rejects: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()

    def revise(self, first: int, items: pa.Table) -> pa.Table:
        rows = range(first, first + items.num_rows)
        self._set_aside(items, rows)
        stay = [row not in self.orders.gone for row in rows]
        kept = items.filter(pa.array(stay))
        products = kept.column("product_id").to_pylist()
        staying = [row for row, stays in zip(rows, stay, strict=True) if stays]
        values = [
            {**self.orders.products.get(product, {}), **self.orders.sets.get(row, {})}
            for row, product in zip(staying, products, strict=True)
        ]
        for row in values:
            if "duplicate_of" in row:
                row.pop("near_duplicate_of", None)
            self.counts["duplicates"] += "duplicate_of" in row
            self.counts["near_duplicates"] += "near_duplicate_of" in row
        return _changed(kept, values)

    def _set_aside(self, items: pa.Table, rows: range) -> None:
        for row in rows:
            reason, message = self.orders.gone.get(row, (UNCHANGED, ""))
            if reason != UNCHANGED:
                (item,) = items.slice(row - rows.start, 1).to_pylist()
                self.rejects.append(_reject(item, reason, message, self.staging.run))


def revise_unit(staged: Staged, places: Places, staging: Staging) -> Revised:
    """Write the unit's items again as the verdicts want them; what goes for a reason becomes a reject."""
    unit = _Unit(staging, Orders.read(places))
    revised = (unit.revise(first, items) for first, items in _read(staging.items, staged.item_fragments))
    added, _ = write(revised, schema.items(staging.reading.kept), staging.items)
    rejects = [pa.Table.from_pylist(unit.rejects, schema=schema.REJECTS)] if unit.rejects else []
    fragments, _ = write(rejects, schema.REJECTS, staging.rejects)
    rejected = Counter(reject["reason"] for reject in unit.rejects)
    return Revised(added=added, rejects=fragments, rejected=dict(rejected), counts=dict(unit.counts))


def revise_fragment(number: int, places: Places, items: str, version: int) -> Revised:
    """Take rows out of one fragment of the table at `version`; those that only change are written anew."""
    orders = Orders.read(places)
    fragment = open_table(items, version).get_fragment(number)
    assert fragment, number
    changed = {row: values for row, values in orders.sets.items() if row not in orders.gone}
    left = without(items, fragment, [*orders.gone, *changed], version)
    return Revised(added=_rewritten(fragment, changed, items) if changed else [], updated=[left])


def _rewritten(fragment: lance.LanceFragment, changed: dict[int, dict[str, str]], items: str) -> list[str]:
    addresses = ", ".join(str(fragment.fragment_id << 32 | row) for row in sorted(changed))
    scanner = fragment.scanner(filter=f"_rowaddr IN ({addresses})", with_row_address=True, batch_size=BATCH_ROWS)

    def tables() -> Iterator[pa.Table]:
        for batch in scanner.to_batches():
            table = pa.Table.from_batches([batch])
            rows = [address & 0xFFFFFFFF for address in table.column("_rowaddr").to_pylist()]
            yield _changed(table.drop_columns(["_rowaddr"]), [changed[row] for row in rows])

    wanted = fragment.schema.remove_metadata()
    return write(tables(), wanted, items)[0]
