"""What the records of a unit are compared by, dealt into buckets by hash, so that no process ever sees all ids.

Each unit writes one file a kind of key: an Arrow IPC file with one record batch a bucket. Whoever settles bucket b reads
batch b of every file, and nothing else.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from idem import storage, streams
from idem.text import MAX_TEXT, clean

BUCKET_KEYS = 50_000  # a bucket's ids are held at once: some tens of MB
MAX_BUCKETS = 1024  # every unit's file holds one batch for each
BANDS = 4  # of 16 bits: two hashes that differ in fewer than BANDS bits agree in one band at least

IDS = pa.schema(
    [
        pa.field("row", pa.int64()),  # of the unit's items; -1 for a tombstone, which has none
        pa.field("source_row", pa.int64()),
        pa.field("item_id", pa.string()),
        pa.field("version", pa.int64()),
        pa.field("record_hash", pa.string()),
    ]
)
PRODUCTS = pa.schema(
    [
        pa.field("source_row", pa.int64()),  # of the first record that says so
        pa.field("product_id", pa.string()),
        pa.field("family_id", pa.string()),  # these three as told, "" for nothing
        pa.field("coarse", pa.string()),
        pa.field("id_split", pa.string()),
    ]
)
PICTURES = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("source_row", pa.int64()),
        pa.field("band", pa.int8()),  # 0: the whole content; 1 to BANDS: that part of the perceptual hash
        pa.field("item_id", pa.string()),
        pa.field("content_hash", pa.string()),
        pa.field("phash", pa.int64()),
    ]
)

SCHEMAS = {"ids": IDS, "products": PRODUCTS, "pictures": PICTURES}


def bucket_count(rows: int) -> int:
    return int(np.clip(-(-rows // BUCKET_KEYS), 2, MAX_BUCKETS))


def of_texts(texts: Iterable[str], buckets: int) -> np.ndarray:
    """The bucket of each text; the same on every machine."""
    return np.fromiter((zlib.crc32(text.encode()) % buckets for text in texts), np.int64)


def bands_of(phash: np.ndarray) -> np.ndarray:
    """(n,) int64 -> (n, BANDS) of 16 bits each."""
    return phash.view(np.uint16).reshape(len(phash), BANDS)


def products(records: pa.Table) -> pa.Table:
    """PRODUCTS of a unit's records: one row for each thing said of a product, as clean as it is in the items."""
    first: dict[tuple[str, ...], int] = {}
    columns = [records.column(name).to_pylist() for name in PRODUCTS.names[1:]]
    for source_row, *said in zip(records.column("source_row").to_pylist(), *columns, strict=True):
        first.setdefault(tuple(said), source_row)
    rows = [
        dict(zip(PRODUCTS.names, (source_row, product_id, *(clean(text, MAX_TEXT) for text in said)), strict=True))
        for (product_id, *said), source_row in first.items()
    ]
    return pa.Table.from_pylist(rows, schema=PRODUCTS)


def pictures(items: pa.Table, rows: np.ndarray, near: bool) -> tuple[pa.Table, np.ndarray]:
    """PICTURES of a unit's items with a picture, and what each row is dealt by: equal for those that must meet.

    With `near`, a row for each band of the perceptual hash besides the one of the content.
    """
    seen = items.append_column("row", pa.array(rows)).filter(pc.is_valid(items.column("image")))
    parts, dealt = (
        [seen.append_column("band", pa.array(np.zeros(len(seen), np.int8)))],
        [of_content(seen.column("content_hash").to_pylist())],
    )
    hashed = seen.filter(pc.is_valid(seen.column("phash"))) if near else seen.slice(0, 0)
    bands = bands_of(hashed.column("phash").to_numpy().astype(np.int64, copy=False))
    for band in range(BANDS if near else 0):
        parts.append(hashed.append_column("band", pa.array(np.full(len(hashed), band + 1, np.int8))))
        dealt.append(bands[:, band].astype(np.int64) * BANDS + band)
    return pa.concat_tables([part.select(PICTURES.names) for part in parts]).cast(PICTURES), np.concatenate(dealt)


def of_content(hashes: Sequence[str]) -> np.ndarray:
    return np.fromiter((int(text[:12], 16) for text in hashes), np.int64)


def write(uri: str, table: pa.Table, bucket: np.ndarray, buckets: int) -> None:
    """An IPC file of `table` with batch b holding the rows of bucket b, in their order."""
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], np.arange(buckets), side="right")
    dealt = table.take(pa.array(order)).combine_chunks()
    whole = dealt.to_batches()[0] if len(dealt) else pa.RecordBatch.from_pylist([], schema=table.schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            writer.write_batch(whole.slice(start, end - start))
    storage.write_bytes(uri, sink.getvalue().to_pybytes(), durable=False)


def read(places: Iterable[tuple[str, int]]) -> Iterator[pa.RecordBatch]:
    """The batches at these places: a file, and the number of a batch in it."""
    for uri, number in places:
        with streams.open_random(uri) as stream, pa.ipc.open_file(stream) as file:
            yield file.get_batch(number)
