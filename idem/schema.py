"""Arrow schemas of every table that stages exchange. They are extended by adding columns, never by changing one."""

import pyarrow as pa

ITEMS = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("product_id", pa.string(), nullable=False),
        pa.field("family_id", pa.string(), nullable=False),  # near-siblings; the product itself where none is given
        pa.field("category", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("lang", pa.string(), nullable=False),
        pa.field("image", pa.large_binary()),  # as normalised: JPEG, PNG or WebP; null for a text-only item
        pa.field("mime", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("role", pa.string(), nullable=False),  # catalog, photo, render, ...
        pa.field("style", pa.string(), nullable=False),
        pa.field("id_split", pa.string(), nullable=False),  # train: may be trained on; dev_unseen: never
        pa.field("split", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),  # SHA-256 of image bytes and title, hexadecimal
        pa.field("source_file", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("version", pa.int64()),  # of the record, where its source gives one: a number, or a time in microseconds since 1970
        pa.field("phash", pa.int64()),  # perceptual hash of the image, 64 bits; null without one
        pa.field("record_hash", pa.string()),  # of all that the record said, to tell an update from a repeat
        pa.field("duplicate_of", pa.string()),  # the item that had the same content_hash first
        pa.field("near_duplicate_of", pa.string()),  # the item whose picture looked the same first
        pa.field("run", pa.string()),  # the ingest that brought this record
    ]
)

ATTRIBUTES = "attributes"


def items(attributes: pa.DataType | None = None) -> pa.Schema:
    """ITEMS, with the columns that a run keeps for filters as one struct (`attributes.price < 20`) where there are any."""
    return ITEMS.append(pa.field(ATTRIBUTES, attributes)) if attributes is not None else ITEMS


REJECTS = pa.schema(
    [
        pa.field("source_file", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("item_id", pa.string()),
        pa.field("reason", pa.string(), nullable=False),  # stable code, e.g. image_undecodable
        pa.field("message", pa.string(), nullable=False),  # a sentence for people
        pa.field("original", pa.large_binary()),  # the image bytes as they came, to look at or replay
        pa.field("record", pa.string(), nullable=False),  # the other columns as JSON
        pa.field("run", pa.string()),  # the ingest that set it aside; it counts once the items name that run as theirs
    ]
)

ASSIGNMENTS = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("prototype_id", pa.int64(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("layer", pa.string(), nullable=False),  # metadata, behaviour or inferred
    ]
)

CANDIDATES = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),  # item_id of the query, where `text` is null
        pa.field("fold", pa.string(), nullable=False),  # rerank, calibrate or test
        pa.field("item_ids", pa.list_(pa.string()), nullable=False),  # best first
        pa.field("scores", pa.list_(pa.float32()), nullable=False),  # cosine
        pa.field("levels", pa.list_(pa.int8()), nullable=False),  # 0 same product .. 3 irrelevant
        pa.field("text", pa.string()),  # what is asked, by a query that is no item
    ]
)

JUDGEMENTS = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("level", pa.int8(), nullable=False),
        pa.field("judge", pa.string(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
    ]
)

EVENTS = pa.schema(
    [
        pa.field("time", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # click, purchase
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
    ]
)


def vectors(dim: int) -> pa.Schema:
    """VECTORS: one L2-normalised embedding of `dim` float32 per item, with the id of the embedder that made it, and of what."""
    return pa.schema(
        [
            pa.field("item_id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), dim), nullable=False),
            pa.field("embedder", pa.string(), nullable=False),
            pa.field("content_hash", pa.string()),  # of the item that was encoded
        ]
    )


def prototypes(dim: int) -> pa.Schema:
    """PROTOTYPES: one L2-normalised centroid of `dim` float32 per instance ID, with the number of its members."""
    return pa.schema(
        [
            pa.field("prototype_id", pa.int64(), nullable=False),
            pa.field("product_id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), dim), nullable=False),
            pa.field("members", pa.int64(), nullable=False),
        ]
    )
