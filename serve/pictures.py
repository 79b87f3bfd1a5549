"""Pictures in requests: decoded here once, on a thread, so that no model meets one that it cannot read."""

import asyncio
import base64
import binascii
import io
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from idem import images
from idem.types import Query
from serve.errors import ApiError, invalid
from serve.fields import Pictured
from serve.intake import Limits

DECODERS = 2  # pictures decoded at once: each may take 150 MB at the limit of pixels
QUALITY = 95  # of what is left of a JPEG after a crop, whose pixels no reader here tells from the original's

JPEG_SIDE = 65_500  # pixels; the format has no more

Fetch = Callable[[str], Awaitable[bytes]]  # ApiError for what is not allowed or not there


@dataclass
class Room:
    """What the pictures of one request may still have, together."""

    bytes: int
    pixels: int


class Pictures:
    """Reads what requests bring. fetch: for image_url, which is refused without one."""

    def __init__(self, limits: Limits, fetch: Fetch | None) -> None:
        self.limits, self.fetch = limits, fetch
        self.decoders = asyncio.Semaphore(DECODERS)

    def room(self) -> Room:
        return Room(self.limits.max_many_bytes, self.limits.max_many_pixels)

    async def query(
        self, asked: Pictured, *, data: bytes | None = None, crop: Sequence[float] | None = None, room: Room | None = None
    ) -> Query:
        """The picture (`data` where a form brought it) and the text. ApiError 413 or 422 for what cannot be used."""
        found = await self.of(asked, data=data, crop=crop, room=room)
        if found is None and not asked.text.strip():
            raise ApiError(422, "query_empty", "a query needs an image, a text, or both; found neither")
        return Query(image=found, text=asked.text)

    async def of(
        self, asked: Pictured, *, data: bytes | None = None, crop: Sequence[float] | None = None, room: Room | None = None
    ) -> bytes | None:
        """The picture, checked by decoding it, and the part of it that `crop` names; None where there is none."""
        inline, url = asked.image, asked.image_url
        if bool(inline) + bool(url) + (data is not None) > 1:
            raise invalid("a picture comes as image or as image_url; found both")
        if inline[:8].lower().startswith(("http://", "https://")):  # as Jina's users write it
            inline, url = "", inline
        if url:
            data = await self._fetched(url)
        if data is None and not inline:
            if crop is not None:
                raise invalid("crop is a part of a picture; found no image")
            return None
        room = room or Room(self.limits.max_image_bytes, self.limits.max_pixels)
        async with self.decoders:
            return await asyncio.to_thread(self._read, data if data is not None else inline, crop, room)

    async def _fetched(self, url: str) -> bytes:
        if self.fetch is None:
            raise ApiError(422, "image_url_not_allowed", "this service fetches no image_url; send the picture itself")
        return await self.fetch(url)

    def _read(self, sent: bytes | str, crop: Sequence[float] | None, room: Room) -> bytes:
        data = unbase64(sent) if isinstance(sent, str) else sent
        try:
            bounds = {"max_pixels": self.limits.max_pixels, "max_bytes": self.limits.max_image_bytes}
            width, height = images.examine(data, **bounds).size
            _spend(room, len(data), width * height)
            if crop is None or list(crop) == [0, 0, 1, 1]:
                images.decode(data, **bounds, draft=64)
                return data
            return cropped(images.decode(data, **bounds), crop)
        except images.ImageError as error:
            raise ApiError(413 if error.reason == "image_too_many_bytes" else 422, error.reason, str(error)) from error


def unbase64(text: str) -> bytes:
    """The bytes of base64, or of a data: URL. ApiError 422 `image_not_base64`."""
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(422, "image_not_base64", f"image must be base64: {error}") from error


def _spend(room: Room, size: int, pixels: int) -> None:
    room.bytes, room.pixels = room.bytes - size, room.pixels - pixels
    if room.bytes < 0 or room.pixels < 0:
        what = "bytes" if room.bytes < 0 else "pixels"
        raise ApiError(413, f"images_too_many_{what}", f"the pictures of this request have too many {what} together; send fewer at once")


def cropped(picture: Image.Image, box: Sequence[float]) -> bytes:
    """The part of an upright picture within [left, top, right, bottom], fractions of its sides, widened to whole pixels; as JPEG."""
    across, down = (_span(box[i], box[i + 2], picture.size[i]) for i in range(2))
    part = picture.crop((across[0], down[0], across[1], down[1]))
    encoded = io.BytesIO()
    if max(part.size) > JPEG_SIDE:
        part.save(encoded, "PNG", compress_level=1)
    else:
        part.save(encoded, "JPEG", quality=QUALITY, subsampling=0)
    return encoded.getvalue()


def _span(start: float, end: float, size: int) -> tuple[int, int]:
    """Whole pixels of a side, at least one, whatever rounding makes of two fractions that are nearly the same."""
    first = min(int(start * size), size - 1)
    return first, max(math.ceil(end * size), first + 1)
