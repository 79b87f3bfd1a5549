"""Records as strangers wrote them -> items fit for training and search, or rejects that say why. Pure: no disk, no Ray.

A record becomes exactly one item, one reject or one tombstone; nothing is dropped and nothing raises for bad data.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from idem import images, schema
from idem.text import MAX_ID, MAX_TEXT, clean, clean_title, id_fault, language, parse_version
from pipelines import records as rows
from pipelines.phash import phash

HASHED_SIDE = 64  # a picture is decoded for its hash at no less, where its format allows less than all
MAX_TOLD = 10_000  # characters of each text in a reject

REASONS: dict[str, str] = {
    "record_unreadable": "The record could not be read from its source.",
    "attribute_type": "A column kept for filters holds something that its type does not.",
    "source_damaged": "The part of the source that holds the record is damaged.",
    "missing_id": "The record has no item_id or no product_id.",
    "bad_id": "An id is too long, or has control or replacement characters.",
    "bad_version": "The version is neither a whole number nor a date or time.",
    "empty_record": "The record has neither an image nor a title.",
    "duplicate_id": "An earlier record of the same source repeats this one exactly.",
    "superseded": "Another record of the same item came later or has a higher version.",
    "image_missing": "There is nothing at the path or URL of the image.",
    "image_outside": "The path of the image leads out of the folder that images may be read from.",
    "image_scheme": "The URL of the image has a scheme that is not allowed.",
    "image_empty": "The image has no bytes.",
    "image_too_many_bytes": "The image has more bytes than are allowed.",
    "image_too_many_pixels": "The image has more pixels than are allowed.",
    "image_unreadable": "The image is not a picture in an allowed format.",
    "image_undecodable": "The image begins like a picture and is damaged.",
}
"""What each reason code of a reject means; the codes are stable."""

COPIED = ("source_file", "source_row")
CLEANED = ("role", "style", "split")
HASHED = ("item_id", "product_id", "category", "lang", *CLEANED, "version")  # beside the content and the attributes
STRINGS = (*rows.TEXTS, "mime", "fault", "fault_message")
UNTOLD = (*COPIED, "image", "original", "fault", "fault_message")  # of a record; they have columns of their own in REJECTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """max_side: the longer side of a picture, in pixels, after normalising; max_pixels, max_bytes: of a picture as it comes.

    unseen_fraction: the share of families that are kept from training where the source does not say.
    """

    max_side: int = 256
    max_pixels: int = images.MAX_PIXELS
    max_bytes: int = images.MAX_BYTES
    unseen_fraction: float = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    data: bytes
    mime: str
    width: int
    height: int
    phash: int | None


@dataclass(frozen=True)
class Normalised:
    """items: schema.items of the records' attributes; rejects: schema.REJECTS; kept: for each item its row of the records;
    deleted: rows of the records that are tombstones. Both int64."""

    items: pa.Table
    rejects: pa.Table
    kept: np.ndarray
    deleted: np.ndarray


def normalize_picture(data: bytes, limits: Limits) -> Picture:
    """Check a picture by decoding all of it; its pixels are kept as they are wherever possible, for a second JPEG pass costs detail.

    ImageError for whatever cannot be decoded or is over a limit.
    """
    container = images.examine(data, max_pixels=limits.max_pixels, max_bytes=limits.max_bytes)
    header = images.open_container(container)
    if images.usable_as_it_is(container, header, limits.max_side):
        width, height = header.size
        hashed = phash(images.render(header, mode="L", draft=HASHED_SIDE))
        return Picture(data=container.data, mime=Image.MIME[container.format], width=width, height=height, phash=hashed)
    data, picture = images.shrunk(container, header, limits.max_side)
    return Picture(data=data, mime="image/jpeg", width=picture.width, height=picture.height, phash=phash(picture))


def _is_tombstone(record: Mapping[str, Any], item_id: str) -> bool:
    """A deletion holds whatever became of its picture or attributes, but not where the record itself was set aside."""
    standing = not record["fault"] or record["fault"].startswith(("image_", "attribute_"))
    return bool(record["deleted"]) and standing and id_fault("item_id", item_id) is None


def _item(record: Mapping[str, Any], texts: dict[str, Any], picture: Picture | None, unseen_fraction: float, run: str) -> dict[str, Any]:
    data = picture.data if picture else None
    told = {name: clean(record[name], MAX_TEXT) for name in rows.SETTLED}
    family, id_split = rows.family_and_split(texts["product_id"], told, unseen_fraction)
    # The zero byte separates: a clean title has none, so no two pairs run together.
    content = hashlib.sha256((data or b"") + b"\0" + texts["title"].encode()).hexdigest()
    said = [content, *(texts[name] for name in HASHED), record.get(schema.ATTRIBUTES)]
    return {
        **texts,
        **{name: record[name] for name in COPIED},
        "family_id": family,
        "id_split": id_split,
        "image": data,
        "mime": picture.mime if picture else "",
        "width": picture.width if picture else 0,
        "height": picture.height if picture else 0,
        "phash": picture.phash if picture else None,
        "content_hash": content,
        "record_hash": hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest(),
        "duplicate_of": None,
        "near_duplicate_of": None,
        "run": run,
    }


def _bounded(value: Any) -> Any:
    """A value for JSON whose texts are cut at MAX_TOLD characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) <= MAX_TOLD:
        return value
    return f"{text[:MAX_TOLD]}... (cut at {MAX_TOLD:,} of {len(text):,} characters)"


def _storable(text: str) -> str:
    """Arrow holds no half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode()


def _reject(record: Mapping[str, Any], reason: str, message: str, run: str) -> dict[str, Any]:
    told = {name: _bounded(value) for name, value in record.items() if name not in UNTOLD}
    return {
        **{name: record[name] for name in COPIED},
        "item_id": _storable(record["item_id"].strip()[:MAX_ID]) or None,
        "reason": reason,
        "message": _storable(_bounded(message)),
        "original": record["image"] if record["original"] is None else record["original"],
        "record": _storable(json.dumps(told, ensure_ascii=False, default=str)),
        "run": run,
    }


def _judged(record: Mapping[str, Any], item_id: str, limits: Limits, run: str) -> dict[str, Any] | tuple[str, str]:
    """The item, or reason and message of a reject."""
    if record["fault"]:
        return record["fault"], record["fault_message"] or REASONS.get(record["fault"], "")
    product_id = record["product_id"].strip()
    if fault := id_fault("item_id", item_id) or id_fault("product_id", product_id):
        return fault
    try:
        version = parse_version(record["version"])
    except ValueError as error:
        return "bad_version", str(error)
    title = clean_title(record["title"])
    if record["image"] is None and not title:
        return "empty_record", "there is neither an image nor a title"
    try:
        picture = normalize_picture(record["image"], limits) if record["image"] is not None else None
    except images.ImageError as error:
        said = f", said to be {record['mime'][:100]}" if record["mime"] and error.reason == "image_unreadable" else ""
        return error.reason, f"{error}{said}"
    texts = {
        "item_id": item_id,
        "product_id": product_id,
        "title": title,
        "category": clean(record["category"], MAX_TEXT) or clean(record["group"], MAX_TEXT),
        "lang": language(record["lang"]),
        "version": version,
        **{name: clean(record[name], MAX_TEXT) for name in CLEANED},
    }
    return _item(record, texts, picture, limits.unseen_fraction, run)


def normalize_record(record: Mapping[str, Any], limits: Limits, run: str = "") -> dict[str, dict[str, Any] | None]:
    """One record -> {"item": a row of ITEMS or None, "reject": a row of REJECTS or None}; both None for a tombstone."""
    record = {**record, **{name: record[name] or "" for name in STRINGS}}
    item_id = record["item_id"].strip()
    if _is_tombstone(record, item_id):
        return {"item": None, "reject": None}
    outcome = _judged(record, item_id, limits, run)
    if isinstance(outcome, tuple):
        return {"item": None, "reject": _reject(record, *outcome, run)}
    return {"item": outcome, "reject": None}


def _attribute(value: pa.Scalar) -> Any:
    """A scalar in Python; as text where Python has nothing like it (nanoseconds, the year 10,000)."""
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        if isinstance(value, pa.StructScalar):
            return {name: _attribute(inner) for name, inner in value.items()}
        return str(value.cast(pa.int64()))


def _told(records: pa.Table) -> list[dict[str, Any]]:
    """The rows as dicts, whatever their attributes hold."""
    try:
        return records.to_pylist()
    except (ValueError, OverflowError):
        told = records.drop_columns([schema.ATTRIBUTES]).to_pylist()
        attributes = map(_attribute, records.column(schema.ATTRIBUTES))
        return [{**row, schema.ATTRIBUTES: value} for row, value in zip(told, attributes, strict=True)]


def _table(made: list[dict[str, Any]], wanted: pa.Schema) -> pa.Table:
    return pa.Table.from_arrays([pa.array([row[field.name] for row in made], field.type) for field in wanted], schema=wanted)


def normalize_records(records: pa.Table, limits: Limits, run: str = "") -> Normalised:
    """A table of records_schema(...) -> its items, its rejects, and which of its rows became what, each in the order of the rows."""
    outcomes = [normalize_record(record, limits, run) for record in _told(records)]
    kept = np.array([row for row, outcome in enumerate(outcomes) if outcome["item"]], np.int64)
    items = _table([outcome["item"] for outcome in outcomes if outcome["item"]], schema.ITEMS)
    if schema.ATTRIBUTES in records.column_names:  # as they came: their types need not survive Python
        attributes = records.column(schema.ATTRIBUTES)
        items = pa.Table.from_arrays([*items.columns, attributes.take(pa.array(kept))], schema=schema.items(attributes.type))
    return Normalised(
        items=items,
        rejects=_table([outcome["reject"] for outcome in outcomes if outcome["reject"]], schema.REJECTS),
        kept=kept,
        deleted=np.array([row for row, outcome in enumerate(outcomes) if not outcome["item"] and not outcome["reject"]], np.int64),
    )
