"""Which items are the gallery, and which shard each of them goes to; pure, so that it is tested without Ray."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from index import kinds

GALLERY_COLUMNS = ["item_id", "product_id", "role", "split", "id_split"]
PER_PRODUCT = 5
EVEN = 1 << 20
BLOCK = 1 << 20  # ids that are hashed at a time


@dataclass(frozen=True, slots=True)
class Gallery:
    """rows: ascending positions in the table that was asked; rule: which rule chose them, a sentence for people."""

    rows: np.ndarray
    rule: str


def _first_of_each(table: pa.Table, rows: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` of `rows` per product, the smallest item_ids; ascending. 0 is no limit."""
    if not limit or not len(rows):
        return rows
    chosen = table.select(["product_id", "item_id"]).take(pa.array(rows))
    order = pc.sort_indices(chosen, sort_keys=[("product_id", "ascending"), ("item_id", "ascending")]).to_numpy()
    products = chosen["product_id"].combine_chunks().dictionary_encode().indices.to_numpy()[order]
    starts = np.flatnonzero(np.r_[True, products[1:] != products[:-1]])
    rank = np.arange(len(products)) - np.repeat(starts, np.diff(np.r_[starts, len(products)]))
    return np.sort(rows[order[rank < limit]])


def _rows(mask: pa.ChunkedArray) -> np.ndarray:
    return np.flatnonzero(np.asarray(mask.combine_chunks().to_numpy(zero_copy_only=False)))


def _both_splits(table: pa.Table) -> bool:
    """Is there a product never trained on that has photos of split train (to index) and of split test (to ask with)?"""
    unseen = table.filter(pc.equal(table["id_split"], "dev_unseen"))
    train, test = (unseen.filter(pc.equal(unseen["split"], name))["product_id"].unique() for name in ("train", "test"))
    return bool(pc.any(pc.is_in(train, value_set=test)).as_py())


def choose_gallery(table: pa.Table, *, filter_was_given: bool, per_product: int) -> Gallery:
    """Rows of `table` (GALLERY_COLUMNS) that are indexed, at most `per_product` of a product, the smallest item_ids first.

    Where the caller has filtered the table, all of it is the gallery and 0 means no limit. Otherwise the first rule that
    applies: the rows with role `catalog`; where products never trained on have rows of split train and of split test,
    the rows of split train; else one row a product (any number with `per_product`). 0 then means 5, 5 and 1.
    ValueError for an empty table or a negative `per_product`.
    """
    if per_product < 0:
        raise ValueError(f"per_product is the most items of one product that are indexed, 0 for the rule's own; found {per_product}")
    if not table.num_rows:
        raise ValueError("no item to index: " + ("the filter `gallery` keeps none" if filter_was_given else "the items are empty"))
    everything = np.arange(table.num_rows)
    if filter_was_given:
        return Gallery(_first_of_each(table, everything, per_product), "rows that the filter `gallery` keeps")
    if len(catalog := _rows(pc.equal(table["role"], "catalog"))):
        return Gallery(_first_of_each(table, catalog, per_product or PER_PRODUCT), "rows with role catalog")
    if _both_splits(table):
        train = _rows(pc.equal(table["split"], "train"))
        return Gallery(_first_of_each(table, train, per_product or PER_PRODUCT), "rows of split train")
    return Gallery(_first_of_each(table, everything, per_product or 1), f"first {per_product or 1} rows of each product by item_id")


def hashes(item_ids: pa.Array) -> np.ndarray:
    """(n,) uint64 of ids (n,): the same for an id wherever it stands, and as good as random. ids are strings without null.

    Bytes are folded in column by column (as FNV-1a does), then mixed (the finaliser of splitmix64): numpy has no hash of strings.
    """
    made = np.full(len(item_ids), 0xCBF29CE484222325, np.uint64)
    for start in range(0, len(item_ids), BLOCK):
        known = item_ids.slice(start, BLOCK).cast(pa.binary())
        offsets = np.frombuffer(known.buffers()[1], np.int32, len(known) + 1, known.offset * 4)
        data, lengths = np.frombuffer(known.buffers()[2] or b"", np.uint8), np.diff(offsets)
        part, alike = made[start : start + BLOCK], len(lengths) > 0 and lengths.min() == lengths.max()
        for place in range(int(lengths.max(initial=0))):
            there = slice(None) if alike else np.flatnonzero(lengths > place)
            part[there] = (part[there] ^ data[offsets[:-1][there] + place]) * np.uint64(0x100000001B3)
    return mixed(made)


def mixed(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: uint64 (n,) in, of which any bit depends on all."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def shard_of(hashed: np.ndarray, count: int) -> np.ndarray:
    """The shard (n,) of each hash (n,) uint64: `count` equal ranges of hashes. Sizes deviate by about the root of their mean."""
    return np.minimum(((hashed >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32), np.uint64(count - 1)).astype(np.int64)


def check_count(count: int, items: int) -> None:
    """ValueError for a number of shards that cannot be."""
    if not 1 <= count <= items:
        raise ValueError(f"{count} shards were asked for; allowed are 1 to {items}, the number of items in the gallery")


def shards(item_ids: Sequence[str] | pa.ChunkedArray, count: int) -> list[np.ndarray]:
    """Deal positions of `item_ids` into `count` shards, ascending: every position once. The same ids give the same shards in any order.

    A shard has the items of a range of hashes, so that it is a random sample and has its share of every list. Up to EVEN items the
    ranges are cut so that sizes are within one of each other; beyond, where sorting costs and chance is even enough, they are equal.
    ValueError for fewer than one shard, more shards than items, or an id that occurs twice.
    """
    known = (item_ids if isinstance(item_ids, pa.ChunkedArray) else pa.chunked_array([pa.array(item_ids, pa.string())])).combine_chunks()
    check_count(count, len(known))
    if (repeated := len(known) - pc.count_distinct(known).as_py()) > 0:
        raise ValueError(f"item_id must be unique, found {repeated} repeated")
    hashed = hashes(known)
    if len(known) <= EVEN:
        return [np.sort(part) for part in np.array_split(np.argsort(hashed, kind="stable"), count)]
    mine = shard_of(hashed, count)
    return [np.flatnonzero(mine == number) for number in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What an index of `total` vectors of `dim` dimensions will be; lists: 0 where there are none; bytes_each: a vector, codes and all."""

    total: int
    dim: int
    factory: str
    shards: int
    lists: int
    bytes_each: float

    @property
    def shard_bytes(self) -> float:
        return self.bytes_each * -(-self.total // self.shards)

    def lines(self) -> list[str]:
        """For people, before the work."""
        rows = -(-self.total // self.shards)
        told = [
            f"{self.total:,} vectors of {self.dim} dimensions as {self.factory}: {self.shards} shards of up to {rows:,}",
            f"{self.bytes_each:,.0f} bytes a vector, {self.shard_bytes / 1e6:,.1f} MB a shard, beside what is known of its items",
        ]
        if self.lists:
            told.append(f"{self.lists:,} lists of {self.total / self.lists:,.0f} vectors")
        if (better := suggest(self.total, self.dim)).split(",")[0] != self.factory.split(",")[0]:
            told.append(f"a usual choice for so many: {better}")
        return told


def suggest(total: int, dim: int) -> str:
    """A sensible FAISS factory for `total` vectors: exact while that takes milliseconds; a graph; then lists of fast-scan codes of 4 bits
    for every second dimension, refined from half-precision vectors, with about 8 sqrt(total) lists, found by a graph where they are many.
    """
    if total <= 50_000:
        return "Flat"
    if total <= 500_000:
        return "HNSW32_SQfp16"
    lists = 1 << round(np.log2(8 * total**0.5))
    coarse = f"IVF{lists}" if lists <= 16_384 else f"IVF{lists}_HNSW32"
    return f"{coarse},PQ{dim // 2}x4fs,Refine(SQfp16)"


def outline(*, total: int, dim: int, factory: str, shards: int) -> Outline:
    """What is known of an index before it is built. ValueError for a factory that FAISS cannot read."""
    lists = re.search(r"IVF(\d+)", factory)
    return Outline(
        total=total, dim=dim, factory=factory, shards=shards, lists=int(lists[1]) if lists else 0, bytes_each=bytes_each(dim, factory)
    )


def bytes_each(dim: int, factory: str) -> float:
    """Bytes a vector takes in an index of this kind, as FAISS's own parts tell: codes, 8 of id in lists, links of a graph, refine store."""
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"FAISS cannot build {factory!r} for vectors of {dim} dimensions: {error}") from error
    taken = 0.0
    for layer in kinds.layers(index):
        if isinstance(layer, faiss.IndexRefine):
            taken += faiss.downcast_index(layer.refine_index).code_size
        elif isinstance(layer, faiss.IndexIVF):
            taken += layer.code_size + 8
        elif isinstance(layer, faiss.IndexHNSW):
            taken += faiss.downcast_index(layer.storage).code_size + 4 * layer.hnsw.nb_neighbors(0) + 16
        elif hasattr(layer, "code_size"):
            taken += layer.code_size
    return taken
