"""One bucket of keys, end to end: gather it from all units, look up what the table holds, decide, and write the verdicts down.

Verdicts are dealt by what they are about, a unit or a fragment of the table, one batch each: so whoever revises that one reads
its own and no others. No Ray.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from idem import storage
from pipelines import contested, keys, resolve
from pipelines.stage import folder_of
from pipelines.table import IDS_A_QUERY, open_table, sql_list

FAMILIES = 1 << 20  # up to so many are counted exactly; beyond, from a sample by hash


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every bucket of a run needs. units: key and source file of each, in the order of the plan; version: of the items."""

    folder: str
    items: str
    version: int
    units: tuple[tuple[str, str], ...]
    unseen_fraction: float
    near_distance: int
    family_share: float = 1.0  # of the families, by hash, that are counted


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where the verdicts of a bucket are: target -> number of its batch in `uri`. Targets are "unit/3" or "fragment/7"."""

    uri: str
    targets: dict[str, int]
    counts: dict[str, int] = field(default_factory=dict)
    families: list[tuple[int, str]] = field(default_factory=list)  # hash of a family, and a split that it is in


def _load(work: Work, kind: str, bucket: int) -> pa.Table:
    """The keys of this kind in the bucket, with the place of their `unit` in the plan."""
    wanted = keys.SCHEMAS[kind].append(pa.field("unit", pa.int64()))
    parts = [wanted.empty_table()]
    for number, (key, _) in enumerate(work.units):
        uri = storage.join(folder_of(work.folder, key), f"{kind}.arrow")
        for batch in keys.read([(uri, bucket)]):
            parts.append(pa.Table.from_batches([batch]).append_column("unit", pa.array(np.full(batch.num_rows, number))))
    return pa.concat_tables(parts)


def _rows(work: Work, table: pa.Table) -> list[dict[str, Any]]:
    """As pipelines.resolve takes them."""
    return [{**row, "file": work.units[row["unit"]][1]} for row in table.to_pylist()]


def _look_up(table: lance.LanceDataset, column: str, values: pa.ChunkedArray, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of the table whose `column` is one of `values`; quick where the column has an index. `unit` is -1: they came before."""
    wanted = values.unique().drop_null().to_pylist() if table.count_rows() else []
    for start in range(0, len(wanted), IDS_A_QUERY):
        some = sql_list(wanted[start : start + IDS_A_QUERY])
        found = table.scanner(columns=list(columns), filter=f"{column} IN ({some})", with_row_address=True).to_table()
        for row in found.to_pylist():
            address = row.pop("_rowaddr")
            yield {**row, "address": address, "unit": -1, "source_row": address}


def _winners(work: Work, table: lance.LanceDataset, bucket: int) -> resolve.Resolved:
    ids = _load(work, "ids", bucket)
    found = _look_up(table, "item_id", ids.column("item_id"), ["item_id", "version", "record_hash"])
    there = {row["item_id"]: row for row in found}
    disputed, alone = contested.ids(ids, there.keys())
    resolved = resolve.winners(_rows(work, disputed), there)
    resolved.counts["inserted"] += alone
    return resolved


def _settled(work: Work, table: lance.LanceDataset, bucket: int) -> tuple[resolve.Resolved, list[tuple[int, str]]]:
    said = _load(work, "products", bucket)
    there: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in _look_up(table, "product_id", said.column("product_id"), ["product_id", "family_id", "id_split"]):
        there[row["product_id"]].append(row)
    resolved, places = resolve.settled(_rows(work, said), there, work.unseen_fraction)
    hashed = {(int.from_bytes(hashlib.blake2b(family.encode(), digest_size=8).digest()), split) for family, split in places}
    return resolved, sorted(pair for pair in hashed if pair[0] < work.family_share * 2**64)


def _alike(work: Work, table: lance.LanceDataset, bucket: int) -> resolve.Resolved:
    pictures = _load(work, "pictures", bucket)
    there: dict[int, dict[str, Any]] = {}
    for column, band in (("content_hash", 0), ("phash", 1)):
        values = pictures.filter(pc.equal(pictures.column("band"), band)).column(column)
        there |= {row["address"]: row for row in _look_up(table, column, values, ["item_id", "content_hash", "phash"])}
    contents, hashes = ({row[name] for row in there.values()} - {None} for name in ("content_hash", "phash"))
    disputed = contested.pictures(pictures, contents, hashes, work.near_distance)
    return resolve.alike(_rows(work, disputed), there.values(), work.near_distance)


def _target(verdict: resolve.Verdict) -> tuple[str, dict[str, Any]]:
    told = {name: value for name, value in asdict(verdict).items() if name in resolve.VERDICTS.names}
    if verdict.address < 0:
        return f"unit/{verdict.unit}", told
    return f"fragment/{verdict.address >> 32}", {**told, "row": verdict.address & 0xFFFFFFFF}


def _save(uri: str, verdicts: Sequence[resolve.Verdict]) -> dict[str, int]:
    dealt = [_target(verdict) for verdict in verdicts]
    targets = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in dealt))}
    if targets:
        table = pa.Table.from_pylist([told for _, told in dealt], schema=resolve.VERDICTS)
        keys.write(uri, table, np.array([targets[name] for name, _ in dealt]), len(targets))
    return targets


def resolve_bucket(bucket: int, work: Work) -> Outcome:
    """Decide on everything of one bucket, against one version of the items."""
    table = open_table(work.items, work.version)
    chosen, (places, families), seen = _winners(work, table, bucket), _settled(work, table, bucket), _alike(work, table, bucket)
    uri = storage.join(work.folder, "verdicts", f"{work.version}-{bucket}.arrow")
    targets = _save(uri, [*chosen.verdicts, *places.verdicts, *seen.verdicts])
    return Outcome(uri=uri, targets=targets, counts={**chosen.counts, **places.counts}, families=families)
