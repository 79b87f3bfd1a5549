"""Which keys of a bucket need a decision at all: most are alone, and are told so by whole columns, without a look at each. Pure.

What is left out here would get no verdict from pipelines.resolve; what is let through needlessly costs time only.
"""

from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.keys import bands_of

WIDEST = 64  # pictures that share a band of their hash and are compared here; in a larger crowd all are let through


def _repeated(column: pa.ChunkedArray) -> pa.Array:
    """Whether a value is there more than once, row by row."""
    coded = column.combine_chunks().dictionary_encode()
    codes = coded.indices.to_numpy()
    return pa.array(np.bincount(codes, minlength=max(len(coded.dictionary), 1))[codes] > 1)


def _among(column: pa.ChunkedArray, values: Collection[object]) -> pa.Array | pa.ChunkedArray:
    return pc.is_in(column, pa.array(list(values), column.type))


def ids(keys: pa.Table, there: Collection[str]) -> tuple[pa.Table, int]:
    """The keys of items that came more than once, that the table holds, or that are to go; and how many others there are."""
    held = pc.or_(pc.or_(_repeated(keys.column("item_id")), _among(keys.column("item_id"), there)), pc.less(keys.column("row"), 0))
    found = keys.filter(held)
    return found, len(keys) - len(found)


def pictures(keys: pa.Table, contents: Collection[str], hashes: Collection[int], distance: int) -> pa.Table:
    """The keys of pictures with the content, or about the looks, of another one here or of those that the table holds."""
    whole = keys.filter(pc.equal(keys.column("band"), 0))
    again = pc.or_(_repeated(whole.column("content_hash")), _among(whole.column("content_hash"), contents))
    banded = keys.filter(pc.greater(keys.column("band"), 0))
    close = np.asarray(_close(banded, distance)) | np.asarray(_among(banded.column("phash"), hashes))
    return pa.concat_tables([whole.filter(again), banded.filter(pa.array(close))])


def _close(banded: pa.Table, distance: int) -> np.ndarray:
    """Whether a picture with the same band is at most `distance` bits away; True for all of a crowd."""
    count = len(banded)
    band, looks = banded.column("band").to_numpy(), banded.column("phash").to_numpy().astype(np.int64, copy=False)
    crowd = band.astype(np.int64) << 16 | bands_of(looks)[np.arange(count), band - 1] if count else np.zeros(0, np.int64)
    order = np.argsort(crowd, kind="stable")
    crowd, looks = crowd[order], looks[order]
    _, first, sizes = np.unique(crowd, return_index=True, return_counts=True)
    close = np.repeat(sizes > WIDEST, sizes)
    rank = np.arange(count) - np.repeat(first, sizes)
    size = np.repeat(sizes, sizes)
    for step in range(1, min(int(sizes.max(initial=1)), WIDEST)):
        here = np.flatnonzero(rank + step < size)
        near = here[np.bitwise_count((looks[here] ^ looks[here + step]).view(np.uint64)) <= distance]
        close[near] = close[near + step] = True
    found = np.empty(count, bool)
    found[order] = close
    return found
