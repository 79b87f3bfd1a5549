"""Which items are the gallery, and which shard each of them goes to; pure, so that it is tested without Ray."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from index.sizes import EVEN
from index.sizes import outline as outline  # what a job says before its work

NAMES = ["item_id", "product_id"]
GALLERY_COLUMNS = [*NAMES, "role", "split", "id_split"]
PER_PRODUCT = 5
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
    chosen = names_at(table, rows)
    order = pc.sort_indices(chosen, sort_keys=[("product_id", "ascending"), ("item_id", "ascending")]).to_numpy()
    products = chosen["product_id"].combine_chunks().dictionary_encode().indices.to_numpy()[order]
    starts = np.flatnonzero(np.r_[True, products[1:] != products[:-1]])
    rank = np.arange(len(products)) - np.repeat(starts, np.diff(np.r_[starts, len(products)]))
    return np.sort(rows[order[rank < limit]])


def names_at(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """NAMES of `rows` (n,), positions in `table`, ascending."""
    if len(rows) == table.num_rows:
        return table.select(NAMES)
    # Arrow puts together what it takes of, and one array of strings ends at 2 GiB.
    return pa.table({name: table[name].cast(pa.large_string()) for name in NAMES}).take(pa.array(rows))


def _rows(mask: pa.ChunkedArray) -> np.ndarray:
    return np.flatnonzero(np.asarray(mask.combine_chunks().to_numpy(zero_copy_only=False)))


def _both_splits(table: pa.Table) -> bool:
    """Is there a product never trained on that has photos of split train (to index) and of split test (to ask with)?"""
    unseen = table.filter(pc.equal(table["id_split"], "dev_unseen"))
    train, test = (unseen.filter(pc.equal(unseen["split"], name))["product_id"].unique() for name in ("train", "test"))
    return bool(pc.any(pc.is_in(train, value_set=test)).as_py())


def choose_gallery(table: pa.Table, *, filter_was_given: bool, per_product: int) -> Gallery:
    """Rows of `table` (GALLERY_COLUMNS, or NAMES where a filter was given) that are indexed, at most `per_product` of a product, the
    smallest item_ids first.

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


def hashes(item_ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """(n,) uint64 of ids (n,): the same for an id wherever it stands, and as good as random. ids are strings without null.

    Bytes are folded in column by column (as FNV-1a does), then mixed (the finaliser of splitmix64): numpy has no hash of strings.
    Chunks stay apart, because one Arrow array of strings ends at 2 GiB.
    """
    made, at = np.full(len(item_ids), 0xCBF29CE484222325, np.uint64), 0
    for chunk in item_ids.chunks if isinstance(item_ids, pa.ChunkedArray) else [item_ids]:
        for start in range(0, len(chunk), BLOCK):
            _fold(chunk.slice(start, BLOCK).cast(pa.binary()), made[at + start : at + start + BLOCK][: len(chunk) - start])
        at += len(chunk)
    return mixed(made)


def _fold(known: pa.BinaryArray, made: np.ndarray) -> None:
    """Fold the bytes of `known` (n,) into `made` (n,), in place."""
    offsets = np.frombuffer(known.buffers()[1], np.int32, len(known) + 1, known.offset * 4)
    data, lengths = np.frombuffer(known.buffers()[2] or b"", np.uint8), np.diff(offsets)
    alike = len(lengths) > 0 and lengths.min() == lengths.max()
    for place in range(int(lengths.max(initial=0))):
        there = slice(None) if alike else np.flatnonzero(lengths > place)
        made[there] = (made[there] ^ data[offsets[:-1][there] + place]) * np.uint64(0x100000001B3)


def mixed(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: uint64 (n,) in, of which any bit depends on all."""
    made = numbers ^ (numbers >> np.uint64(30))
    made *= np.uint64(0xBF58476D1CE4E5B9)
    made ^= made >> np.uint64(27)
    made *= np.uint64(0x94D049BB133111EB)
    made ^= made >> np.uint64(31)
    return made


def distinct(ids: pa.ChunkedArray) -> int:
    """How many different ones there are of `ids` (n,), by their hashes: one in 2^64 pairs is taken for the same. Counting the ids
    themselves takes ten times the memory."""
    known = np.sort(hashes(ids))
    return int(np.count_nonzero(known[1:] != known[:-1])) + min(1, len(known))


def shard_of(hashed: np.ndarray, count: int) -> np.ndarray:
    """The shard (n,) of each hash (n,) uint64: `count` equal ranges of hashes. Sizes deviate by about the root of their mean.

    Twice as many shards halve each; one more moves half of all rows, which costs nothing extra: an index is built anew for it.
    """
    return (((hashed >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)).view(np.int64)


def moved(before: int, after: int) -> float:
    """The share of rows whose shard has another number when `before` shards become `after`: hashes outside both of its ranges."""
    return 1 - sum(max(0.0, min((i + 1) / before, (i + 1) / after) - max(i / before, i / after)) for i in range(min(before, after)))


def check_count(count: int, items: int) -> None:
    """ValueError for a number of shards that cannot be."""
    if not 1 <= count <= items:
        raise ValueError(f"{count} shards were asked for; allowed are 1 to {items}, the number of items in the gallery")


def repeats(item_ids: pa.ChunkedArray, hashed: np.ndarray) -> int:
    """How many of `item_ids` (n,) stand there again, by their hashes (n,): ids themselves are compared only where hashes are alike."""
    known = np.sort(hashed)
    alike = known[1:][known[1:] == known[:-1]]
    if not len(alike):
        return 0
    suspects = item_ids.filter(pa.array(np.isin(hashed, alike)))
    return len(suspects) - pc.count_distinct(suspects).as_py()


def shards(item_ids: Sequence[str] | pa.ChunkedArray, count: int) -> list[np.ndarray]:
    """Deal positions of `item_ids` into `count` shards, ascending: every position once. The same ids give the same shards in any order.

    A shard has the items of a range of hashes, so that it is a random sample and has its share of every list. Up to EVEN items the
    ranges are cut so that sizes are within one of each other; beyond, where sorting costs and chance is even enough, they are equal
    and a shard is told from its item alone (`shard_of`), without the others.
    ValueError for fewer than one shard, more shards than items, or an id that occurs twice.
    """
    known = item_ids if isinstance(item_ids, pa.ChunkedArray) else pa.chunked_array([pa.array(item_ids, pa.string())])
    check_count(count, len(known))
    hashed = hashes(known)
    if repeated := repeats(known, hashed):
        raise ValueError(f"item_id must be unique, found {repeated} repeated")
    if len(known) <= EVEN:
        return [np.sort(part) for part in np.array_split(np.argsort(hashed, kind="stable"), count)]
    mine = shard_of(hashed, count)
    return [np.flatnonzero(mine == number) for number in range(count)]


def placed(count: int, machines: int, copies: int = 1, *, earlier: np.ndarray | None = None) -> np.ndarray:
    """(count, copies): the machine of each copy of each shard, never one machine for two copies. ValueError for fewer machines than copies.

    What `earlier` (count, copies) says stays where that machine is there (-1: it is not) and holds no more than its even share; the
    rest goes to whichever has least. So a machine more takes its share from the others, and little else moves.
    """
    if not 1 <= copies <= machines:
        raise ValueError(f"{copies} copies of a shard need as many machines, and at least one; there are {machines}")
    made, load = np.full((count, copies), -1), np.zeros(machines, np.int64)
    known = made if earlier is None else np.where(earlier < machines, earlier, -1)
    even, over = divmod(count * copies, machines)
    room = np.full(machines, even)
    room[np.argsort(-np.bincount(known[known >= 0], minlength=machines), kind="stable")[:over]] += 1
    there = np.argwhere(known >= 0)
    turn = (there[:, 0] + there[:, 1] * count // copies) % count  # those that must go, the last, are of different shards
    for number, copy in there[np.argsort(turn, kind="stable")]:
        if load[machine := known[number, copy]] < room[machine]:
            made[number, copy] = machine
            load[machine] += 1
    for number, copy in np.argwhere(made < 0):
        taken = np.isin(np.arange(machines), made[number])
        made[number, copy] = machine = np.where(taken, count * copies + 1, load).argmin()
        load[machine] += 1
    return made
