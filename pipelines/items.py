"""The reader of the items: what later stages import of this package, and all they import. No Ray."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import lance
import numpy as np
import pyarrow as pa

from idem import manifest, storage

DATASET = "items.lance"
REJECTS = "rejects.lance"
ID_KEY = "idem.id"  # in the schema's metadata of each version: the id of the manifest that was written for it
IDS_A_QUERY = 2000


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), IDS_A_QUERY):
        yield values[start : start + IDS_A_QUERY]


def _some(values: Sequence[object]) -> str:
    return ", ".join(map(repr, values[:5])) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


@dataclass(frozen=True)
class Items:
    """One version of the items (rows of idem.schema.ITEMS). `id` is that of the manifest written for this version.

    Columns that do not exist and filters that cannot be parsed give a ValueError. Not fork-safe: open in each process.
    """

    id: str
    version: int
    dataset: lance.LanceDataset

    def count(self, filter: str | None = None) -> int:
        """How many rows there are, or pass a SQL expression on columns."""
        if filter is None:
            return self.dataset.count_rows()
        return self.table(["item_id"], filter).num_rows

    def table(self, columns: Sequence[str], filter: str | None = None) -> pa.Table:
        """These columns of the rows that pass `filter`, in scan order."""
        self._check(columns)
        try:
            return self.dataset.to_table(columns=list(columns), filter=filter, scan_in_order=True)
        except (ValueError, OSError) as error:  # which of the two a bad filter gives depends on what is wrong with it
            raise ValueError(f"cannot read the items where {filter}: {error}") from error

    def take(self, item_ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """The rows of these items, in the order asked, repeats included; ValueError names ids that are not there."""
        self._check(columns)
        wanted = list(dict.fromkeys(item_ids))
        asked = list(dict.fromkeys(["item_id", *columns]))
        parts = [self.table(asked, f"item_id IN ({', '.join(map(_quoted, ids))})") for ids in _chunks(wanted)]
        found = pa.concat_tables(parts) if parts else self._empty(asked)
        place = {item_id: i for i, item_id in enumerate(found.column("item_id").to_pylist())}
        if unknown := [item_id for item_id in wanted if item_id not in place]:
            raise ValueError(f"no item {_some(unknown)} among the {self.count():,} of version {self.version}")
        return found.take(pa.array([place[item_id] for item_id in item_ids], pa.int64())).select(list(columns))

    def take_rows(self, offsets: Sequence[int] | np.ndarray, columns: Sequence[str]) -> pa.Table:
        """The rows at these positions of the scan without filter, in the order asked; ValueError for positions beyond it."""
        self._check(columns)
        rows = np.asarray(offsets, np.int64)
        if len(beyond := rows[(rows < 0) | (rows >= self.count())]):
            raise ValueError(f"no row {_some(beyond.tolist())}: the items have {self.count():,} rows")
        return self.dataset.take(rows.tolist(), columns=list(columns)) if len(rows) else self._empty(columns)

    def images(self, item_ids: Sequence[str]) -> list[bytes | None]:
        """The encoded pictures of these items, in the order asked; None for an item without one."""
        return self.take(item_ids, ["image"]).column("image").to_pylist()

    def _check(self, columns: Sequence[str]) -> None:
        names = self.dataset.schema.names
        if unknown := [name for name in columns if name not in names]:
            raise ValueError(f"items have no column {_some(unknown)}; they have {', '.join(names)}")

    def _empty(self, columns: Sequence[str]) -> pa.Table:
        return pa.schema([self.dataset.schema.field(name) for name in columns]).empty_table()


def open_items(uri: str, version: int | None = None) -> Items:
    """Open the items at `uri` (Layout.items) as the manifest has them, or an earlier `version` that is still kept.

    ValueError where no ingest has finished there yet, or the version is gone. What a running or broken ingest has
    committed without writing its manifest is never seen.
    """
    made = manifest.read(uri, kind="items")
    number = int(made.figures["version"]) if version is None else version
    try:
        dataset = lance.dataset(storage.join(uri, DATASET), version=number)
    except ValueError as error:
        raise ValueError(f"version {number} of the items at {uri} is not there; the latest is {made.figures['version']}") from error
    known = dataset.schema.metadata or {}
    return Items(id=known[ID_KEY.encode()].decode(), version=number, dataset=dataset)
