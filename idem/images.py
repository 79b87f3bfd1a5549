"""Encoded pictures from strangers: walked by their container first (idem.containers), then decoded to RGB."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from idem.containers import Container, ImageError, kind, pixels_fill, walk

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 50_000_000
MAX_BYTES = 50_000_000
QUALITY = 90  # of JPEG

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What EXIF's orientation asks for; 1 is upright."""


def examine(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Container:
    """Walk the container without decoding; ImageError for what is empty, too large, of another format, or not a picture."""
    if not data:
        raise ImageError("image_empty", "the picture has no bytes")
    if len(data) > max_bytes:
        raise ImageError("image_too_many_bytes", f"the picture has {len(data):,} bytes; at most {max_bytes:,} are allowed")
    container = walk(data)
    if container is None:
        seems = f"is {name}, " if (name := kind(data)) else ""
        raise ImageError("image_unreadable", f"not a picture in {', '.join(FORMATS)} ({seems}first bytes {data[:8].hex(' ')})")
    width, height = container.size
    max_pixels = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)  # where Pillow begins to warn
    if width * height > max_pixels:
        raise ImageError("image_too_many_pixels", f"{width} x {height} pixels; at most {max_pixels:,} are allowed")
    if not width * height:
        raise ImageError("image_undecodable", f"{container.format} without a size in its header ({width} x {height} pixels)")
    return container


def open_container(container: Container) -> Image.Image:
    """Pillow's view of it, not decoded yet; ImageError where Pillow cannot read the header or finds another size in it."""
    try:
        image = Image.open(io.BytesIO(container.data), formats=FORMATS)
    except Exception as error:
        raise ImageError("image_undecodable", f"begins like {container.format}, but its header is damaged or cut off") from error
    if image.width * image.height > container.size[0] * container.size[1]:
        told = f"{container.size[0]} x {container.size[1]} and {image.width} x {image.height}"
        raise ImageError("image_undecodable", f"{container.format} with two sizes in its header ({told} pixels)")
    return image


def open_header(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Open without decoding; ImageError as `examine` and `open_container`."""
    return open_container(examine(data, max_pixels=max_pixels, max_bytes=max_bytes))


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits by its high bytes (Pillow's own conversion takes all above 255 for white); transparency white."""
    deep = np.asarray(image)
    grey = (deep >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[deep == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def render(image: Image.Image, orientation: int = 1, mode: str = "RGB", draft: int | None = None) -> Image.Image:
    """Decode an opened picture, upright, in `mode` RGB or L, transparency on white; `draft` lets JPEG decode at a size not below it."""
    try:
        if draft or mode == "L":
            image.draft(mode, (draft, draft) if draft else image.size)
        image.load()
        if image.mode.startswith("I"):
            image = _eight_bits(image)
        elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            clear = image.convert("RGBA")
            image = Image.new("RGB", image.size, "white")
            image.paste(clear, mask=clear)
        image = image if image.mode == mode else image.convert(mode)
        return image.transpose(TURNS[orientation]) if orientation in TURNS else image
    except Exception as error:
        raise ImageError("image_undecodable", f"{image.format or 'picture'} cannot be decoded: {error}") from error


def usable_as_it_is(container: Container, header: Image.Image, max_side: int) -> bool:
    """Whether every reader would show these bytes alike: upright, opaque, one frame, a common mode, small, nothing else within."""
    return (
        container.sound
        and container.orientation == 1
        and header.mode in ("RGB", "L", "P", "1")
        and "transparency" not in header.info
        and max(header.size) <= max_side
        and (container.format != "PNG" or pixels_fill(container))
    )


def shrunk(container: Container, header: Image.Image, max_side: int) -> tuple[bytes, Image.Image]:
    """A picture that was examined and opened as an upright, opaque JPEG, its longer side at most `max_side`, without anything else
    within; and its pixels."""
    picture = render(header, container.orientation, draft=max_side)
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    picture.info.clear()  # Pillow would write the comment and the profile again
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=QUALITY)
    return encoded.getvalue(), picture


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, draft: int | None = None) -> Image.Image:
    """Decode to an upright RGB picture, transparency on white; `draft` lets JPEG decode at a size not below it."""
    container = examine(data, max_pixels=max_pixels, max_bytes=max_bytes)
    return render(open_container(container), container.orientation, draft=draft)


def pixels(data: bytes, side: int) -> np.ndarray:
    """The picture squeezed to (side, side, 3) uint8: what every model here takes as input."""
    image = decode(data, draft=side).resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(image)


def batch(images: Sequence[bytes | None], side: int) -> np.ndarray:
    """(n, side, side, 3) uint8; a missing picture is mid-grey (models are told separately which are missing)."""
    grey = np.full((side, side, 3), 128, np.uint8)
    return np.stack([pixels(data, side) if data else grey for data in images]) if len(images) else np.zeros((0, side, side, 3), np.uint8)
