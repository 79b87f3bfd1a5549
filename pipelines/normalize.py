"""Records as strangers wrote them -> items fit for training and search, or rejects that say why. Pure: no disk, no Ray.

A record becomes exactly one item or exactly one reject; nothing is dropped and nothing raises for bad data. Reason codes
are stable: missing_id, duplicate_id, empty_record, and those of idem.images.ImageError (image_empty, image_unreadable,
image_too_many_pixels, image_too_many_bytes, image_undecodable).
"""

import hashlib
import io
import json
import unicodedata
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from idem import images, schema

MAX_TITLE = 1000
QUALITY = 90
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright

RECORDS = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("item_id", "product_id", "family_id", "category", "title", "lang")),
        *(pa.field(name, pa.string(), nullable=False) for name in ("role", "style", "id_split", "split", "source_file")),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("duplicate", pa.bool_(), nullable=False),  # an earlier record has the same item_id
        pa.field("image", pa.large_binary()),
    ]
)
"""What `normalize_records` takes; "" stands for a text that is missing."""

OUTCOMES = pa.schema([pa.field("item", pa.struct(list(schema.ITEMS))), pa.field("reject", pa.struct(list(schema.REJECTS)))])
"""What it gives: one row a record, with either `item` or `reject` null."""

COPIED = tuple(name for name in RECORDS.names if name in schema.ITEMS.names and name not in ("title", "image"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """max_side: the longer side of a picture, in pixels, after normalising; max_pixels: of a picture as it comes."""

    max_side: int = 256
    max_pixels: int = images.MAX_PIXELS


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    data: bytes
    mime: str
    width: int
    height: int


def clean_title(title: str) -> str:
    """NFC, one space for any run of white space, no control characters, at most MAX_TITLE characters."""
    printable = "".join(c for c in title if c.isspace() or unicodedata.category(c) != "Cc")
    return " ".join(unicodedata.normalize("NFC", printable).split())[:MAX_TITLE].strip()


def _usable_as_it_is(header: Image.Image, max_side: int) -> bool:
    """Whether every reader would show these bytes alike, but for their orientation: opaque, one frame, a common mode, small."""
    return (
        header.format in ("JPEG", "PNG", "WEBP")
        and header.mode in ("RGB", "L", "P", "1")
        and "transparency" not in header.info
        and not getattr(header, "is_animated", False)
        and max(header.size) <= max_side
    )


def normalize_picture(data: bytes, limits: Limits) -> Picture:
    """Check a picture by decoding all of it; its bytes are kept wherever possible, for a second JPEG pass costs detail.

    ImageError for whatever cannot be decoded or is over a limit.
    """
    header = images.open_header(data, max_pixels=limits.max_pixels)
    keep = _usable_as_it_is(header, limits.max_side)
    picture = images.decode(data, max_pixels=limits.max_pixels, draft=None if keep else limits.max_side)
    # Asked after decoding: Pillow decodes a PNG to look for its EXIF, which damaged ones do not survive.
    if keep and header.getexif().get(ORIENTATION, 1) == 1:
        return Picture(data=data, mime=Image.MIME[str(header.format)], width=picture.width, height=picture.height)
    picture.thumbnail((limits.max_side, limits.max_side), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=QUALITY)
    return Picture(data=encoded.getvalue(), mime="image/jpeg", width=picture.width, height=picture.height)


def _fault(record: dict[str, Any], title: str) -> tuple[str, str] | None:
    """Reason and message where the record is unusable whatever its picture shows."""
    if not record["item_id"] or not record["product_id"]:
        return "missing_id", f"{'item_id' if not record['item_id'] else 'product_id'} is null or empty"
    if record["duplicate"]:
        return "duplicate_id", f"an earlier record has the item_id {record['item_id']!r}"
    if record["image"] is None and not title:
        return "empty_record", "there is neither an image nor a title"
    return None


def _item(record: dict[str, Any], title: str, picture: Picture | None) -> dict[str, Any]:
    data = picture.data if picture else None
    shape = {"mime": picture.mime, "width": picture.width, "height": picture.height} if picture else {"mime": "", "width": 0, "height": 0}
    # The zero byte separates: a clean title has none, so no two pairs run together.
    content = hashlib.sha256((data or b"") + b"\0" + title.encode()).hexdigest()
    return {**{name: record[name] for name in COPIED}, "title": title, "image": data, **shape, "content_hash": content}


def _reject(record: dict[str, Any], reason: str, message: str) -> dict[str, Any]:
    told = {name: record[name] for name in RECORDS.names if name not in ("image", "duplicate", "source_file", "source_row")}
    return {
        "source_file": record["source_file"],
        "source_row": record["source_row"],
        "item_id": record["item_id"] or None,
        "reason": reason,
        "message": message,
        "original": record["image"],
        "record": json.dumps(told, ensure_ascii=False),
    }


def normalize_record(record: dict[str, Any], limits: Limits) -> dict[str, dict[str, Any] | None]:
    """One row of RECORDS -> one row of OUTCOMES."""
    title = clean_title(record["title"])
    if fault := _fault(record, title):
        return {"item": None, "reject": _reject(record, *fault)}
    try:
        picture = normalize_picture(record["image"], limits) if record["image"] is not None else None
    except images.ImageError as error:
        return {"item": None, "reject": _reject(record, error.reason, str(error))}
    return {"item": _item(record, title, picture), "reject": None}


def normalize_records(records: pa.Table, limits: Limits) -> pa.Table:
    """A table of RECORDS -> a table of OUTCOMES, row by row."""
    return pa.Table.from_pylist([normalize_record(record, limits) for record in records.to_pylist()], schema=OUTCOMES)


def _unnest(outcomes: pa.Table, name: str, wanted: pa.Schema) -> pa.Table:
    rows = outcomes.column(name).drop_null()
    return pa.table([rows.combine_chunks().field(i) for i in range(len(wanted))], schema=wanted)


def split(outcomes: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The items (ITEMS) and the rejects (REJECTS) in a table of OUTCOMES."""
    return _unnest(outcomes, "item", schema.ITEMS), _unnest(outcomes, "reject", schema.REJECTS)
