"""Which items are the gallery, and which shard each of them goes to; pure, so that it is tested without Ray."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from idem import folds

GALLERY_COLUMNS = ["item_id", "product_id", "role", "split", "id_split"]
PER_PRODUCT = 5


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


def shards(item_ids: list[str], count: int) -> list[np.ndarray]:
    """Deal positions of `item_ids` into `count` shards: every position once, sizes within one of each other.

    Items are ordered by a hash of their id and cut into equal parts: every shard is a random sample, so that each
    has its share of every list, at the price of random reads. The same ids give the same shards in any order of input.
    ValueError for fewer than one shard, more shards than items, or an id that occurs twice.
    """
    if not 1 <= count <= len(item_ids):
        raise ValueError(f"{count} shards were asked for; allowed are 1 to {len(item_ids)}, the number of items in the gallery")
    if len(set(item_ids)) != len(item_ids):
        raise ValueError(f"item_id must be unique, found {len(item_ids) - len(set(item_ids))} repeated")
    order = sorted(range(len(item_ids)), key=lambda i: (folds.uniform(item_ids[i], "shard"), item_ids[i]))
    return [np.sort(part) for part in np.array_split(np.array(order, np.int64), count)]
