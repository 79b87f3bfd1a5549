"""The reader of the items: what later stages import of this package, and all they import. No Ray."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import lance
import numpy as np
import pyarrow as pa

from idem import storage
from pipelines import table as tables
from pipelines.table import IDS_A_QUERY, sql_list

ADDRESS = "_rowaddr"  # Lance's: the fragment in the upper half, the row in it, gone ones counted, in the lower


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), IDS_A_QUERY):
        yield values[start : start + IDS_A_QUERY]


def _some(values: Sequence[object]) -> str:
    return ", ".join(map(repr, values[:5])) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


@dataclass(frozen=True)
class Batch:
    """Some rows, without their pictures until these are asked for."""

    table: pa.Table
    _dataset: lance.LanceDataset = field(repr=False)
    _addresses: np.ndarray = field(repr=False)

    def numpy(self) -> dict[str, np.ndarray]:
        """Each column as an array; texts as objects."""
        return {name: self.table.column(name).to_numpy() for name in self.table.column_names}

    def images(self) -> list[bytes | None]:
        """The encoded pictures of these rows, in their order; fetched now."""
        if not len(self._addresses):
            return []
        some = f"{ADDRESS} IN ({sql_list(self._addresses.tolist())})"
        found = self._dataset.scanner(columns=["image"], filter=some, with_row_address=True).to_table()
        pictures = dict(zip(found.column(ADDRESS).to_pylist(), found.column("image").to_pylist(), strict=True))
        return [pictures[address] for address in self._addresses.tolist()]


@dataclass(frozen=True)
class Items:
    """One version of the items (rows of idem.schema.ITEMS, with `attributes` where a run keeps some).

    `id` tells the rows apart, whatever order they lie in. Columns that do not exist and filters that cannot be parsed give a
    ValueError. Not fork-safe: open in each process.
    """

    id: str
    version: int
    dataset: lance.LanceDataset

    def count(self, filter: str | None = None) -> int:
        """How many rows there are, or pass a SQL expression on columns."""
        try:
            return self.dataset.count_rows(filter=filter)
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read the items where {filter}: {error}") from error

    def table(self, columns: Sequence[str], filter: str | None = None) -> pa.Table:
        """These columns of the rows that pass `filter`, in scan order."""
        self._check(columns)
        try:
            return self.dataset.to_table(columns=list(columns), filter=filter, scan_in_order=True)
        except (ValueError, OSError) as error:  # which of the two a bad filter gives depends on what is wrong with it
            raise ValueError(f"cannot read the items where {filter}: {error}") from error

    def positions(self, filter: str) -> np.ndarray:
        """(n,) ascending: where the rows that pass `filter` are in the scan of all; what `take_rows` takes."""
        try:
            every, passed = (
                self.dataset.scanner(columns=[], filter=each, with_row_address=True, scan_in_order=True).to_table()[ADDRESS].to_numpy()
                for each in (None, filter)
            )
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read the items where {filter}: {error}") from error
        return np.flatnonzero(np.isin(every, passed, assume_unique=True))

    def batches(
        self, columns: Sequence[str], filter: str | None = None, *, batch_size: int = 1024, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """The same in batches of at most `batch_size` rows, so that memory stays bounded; `images()` of each fetches its pictures.

        shard: (n, of) takes the n-th of so many parts, n from 0. Parts are even but for the rows that are gone or filtered
        out, do not overlap, and are the same whatever is asked of them.
        """
        self._check(columns)
        number, of = shard
        if not 0 <= number < of:
            raise ValueError(f"shard is (n, of) with 0 <= n < of, found {shard}")
        try:
            yield from self._batches(list(columns), filter, batch_size, number, of)
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read the items where {filter}: {error}") from error

    def _batches(self, columns: list[str], filter: str | None, batch_size: int, number: int, of: int) -> Iterator[Batch]:
        fragments = self.dataset.get_fragments()
        ends = np.cumsum([fragment.physical_rows for fragment in fragments])
        total = int(ends[-1]) if len(ends) else 0
        start, end = total * number // of, total * (number + 1) // of
        before = {f.fragment_id: int(e) - f.physical_rows for f, e in zip(fragments, ends, strict=True)}
        mine = [f for f in fragments if before[f.fragment_id] < end and before[f.fragment_id] + f.physical_rows > start]
        if not mine:
            return
        scanner = self.dataset.scanner(
            columns=columns, filter=filter, batch_size=batch_size, fragments=mine, with_row_address=True, scan_in_order=True
        )
        for found in scanner.to_batches():
            addresses = found.column(ADDRESS).to_numpy().astype(np.int64)
            places = np.array([before[a >> 32] + (a & 0xFFFFFFFF) for a in addresses.tolist()], np.int64)
            inside = (places >= start) & (places < end)
            if inside.any():
                chosen = pa.Table.from_batches([found.filter(pa.array(inside))]).select(columns)
                yield Batch(chosen, self.dataset, addresses[inside])

    def take(self, item_ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """The rows of these items, in the order asked, repeats included; ValueError names ids that are not there."""
        self._check(columns)
        wanted = list(dict.fromkeys(item_ids))
        asked = list(dict.fromkeys(["item_id", *columns]))
        parts = [self.table(asked, f"item_id IN ({sql_list(ids)})") for ids in _chunks(wanted)]
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

    def keep(self, name: str) -> None:
        """Tag this version, so that no clean-up removes it as long as `name` is in use; ValueError where that is another version."""
        known = self.dataset.tags.list().get(name)
        if known and known["version"] != self.version:
            raise ValueError(f"the tag {name} names version {known['version']} of the items, not {self.version}")
        if not known:
            self.dataset.tags.create(name, self.version)

    def let_go(self, name: str) -> None:
        """Nothing needs the version that `keep` tagged with `name` any more; nothing happens where there is no such tag."""
        if name in self.dataset.tags.list():
            self.dataset.tags.delete(name)

    def _check(self, columns: Sequence[str]) -> None:
        names = self.dataset.schema.names
        if unknown := [name for name in columns if name not in names]:
            raise ValueError(f"items have no column {_some(unknown)}; they have {', '.join(names)}")

    def _empty(self, columns: Sequence[str]) -> pa.Table:
        return pa.schema([self.dataset.schema.field(name) for name in columns]).empty_table()


def open_items(uri: str, version: int | None = None) -> Items:
    """Open the newest items at `uri` (Layout.items), or an earlier `version` that is still kept.

    ValueError where nothing was published there yet, or the version is gone. What a running or broken ingest has written is
    never seen: every version is complete.
    """
    where = storage.join(uri, tables.ITEMS)
    newest = tables.open_table(where) if tables.exists(where) else None
    if newest is None or not tables.id_of(newest):
        asked = "no finished items at" if version is None else f"version {version} of the items is not at"
        raise ValueError(f"{asked} {uri}: nothing was published there yet; python -m pipelines.ingest does")
    if version is None or version == newest.version:
        return _items(newest)
    try:
        return _items(tables.open_table(where, version))
    except ValueError as error:
        raise ValueError(f"version {version} of the items at {uri} is not there; the latest is {newest.version}") from error


def _items(dataset: lance.LanceDataset) -> Items:
    made = tables.id_of(dataset)
    if not made:
        raise ValueError(f"version {dataset.version} holds no items yet")
    return Items(id=made, version=dataset.version, dataset=dataset)
