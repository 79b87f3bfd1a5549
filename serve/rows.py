"""Bodies of items and of events -> rows of idem.schema. What the ingest does to records, it does to these once they are folded in."""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pyarrow as pa
from PIL import Image

from idem import images, schema
from idem.text import MAX_TEXT, clean, clean_title, language
from serve.bodies import Event, ItemBody
from serve.errors import ApiError, invalid

SOURCE = "api"
AHEAD = timedelta(days=1)  # by so much a clock may be wrong


def item_row(item_id: str, item: ItemBody, picture: bytes | None, *, max_side: int) -> pa.Table:
    """One row of schema.items. ApiError 422 for an item of nothing, and for a picture that cannot be decoded."""
    title = clean_title(item.title)
    if picture is None and not title:
        raise ApiError(422, "item_empty", "an item needs a title, an image, or both; found neither")
    data, mime, size = normalized(picture, max_side) if picture is not None else (None, "", (0, 0))
    row = {
        "item_id": item_id,
        "product_id": item.product_id,
        "family_id": item.family_id or item.product_id,
        "category": clean(item.category, MAX_TEXT),
        "title": title,
        "lang": language(item.lang),
        "image": data,
        "mime": mime,
        "width": size[0],
        "height": size[1],
        "role": clean(item.role, MAX_TEXT),
        "style": clean(item.style, MAX_TEXT),
        "id_split": item.id_split,
        "split": "",
        "content_hash": hashlib.sha256((data or b"") + b"\0" + title.encode()).hexdigest(),
        "source_file": SOURCE,
        "source_row": 0,
        "version": item.version,
    }
    columns = {field.name: pa.array([row.get(field.name)], field.type) for field in schema.ITEMS}
    if not item.attributes:
        return pa.table(columns, schema=schema.ITEMS)
    attributes = pa.array([item.attributes])
    return pa.table({**columns, schema.ATTRIBUTES: attributes}, schema=schema.items(attributes.type))


def normalized(data: bytes, max_side: int) -> tuple[bytes, str, tuple[int, int]]:
    """A picture upright and opaque, its longer side at most `max_side`, without metadata; its MIME type, and its width and height.

    One that is so already keeps its pixels: a second pass of JPEG costs detail.
    """
    try:
        container = images.examine(data)
        header = images.open_container(container)
        if images.usable_as_it_is(container, header, max_side):
            images.render(header)  # which is what finds damage
            return container.data, Image.MIME[container.format], header.size
        shrunk, picture = images.shrunk(container, header, max_side)
    except images.ImageError as error:
        raise ApiError(422, error.reason, str(error)) from error
    return shrunk, "image/jpeg", picture.size


def moment(event: Event, now: datetime) -> datetime:
    """When it happened, in UTC. ApiError 422 for what has not happened yet, and for before 1970."""
    at = (event.time or now).astimezone(UTC)
    if not datetime(1970, 1, 1, tzinfo=UTC) <= at <= now + AHEAD:
        raise invalid(f"time is {at.isoformat()}; allowed is 1970 to now ({now.isoformat(timespec='seconds')})")
    return at


def event_rows(events: Sequence[tuple[Event, datetime]]) -> pa.Table:
    """schema.EVENTS of events and when they happened."""
    made = [{"time": at, "kind": e.kind, "query_id": e.query_id, "item_id": e.item_id} for e, at in events]
    return pa.Table.from_pylist(made, schema=schema.EVENTS)
