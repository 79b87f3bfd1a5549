"""Encoded pictures from strangers: checked by their header first, then decoded to RGB."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 50_000_000
MAX_BYTES = 50_000_000


class ImageError(ValueError):
    """A picture that cannot be used; `reason` is a stable code, the message a sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.reason, str(self))


def open_header(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Open without decoding; ImageError for what is empty, too large, of another format, or not a picture."""
    if not data:
        raise ImageError("image_empty", "the picture has no bytes")
    if len(data) > max_bytes:
        raise ImageError("image_too_many_bytes", f"the picture has {len(data):,} bytes; at most {max_bytes:,} are allowed")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:  # Pillow's own limit, met before ours can be
        raise ImageError("image_too_many_pixels", f"{error}; at most {max_pixels:,} are allowed") from error
    except Exception as error:
        head = data[:8].hex(" ")
        raise ImageError("image_unreadable", f"not a picture in {', '.join(FORMATS)} (first bytes {head})") from error
    if image.width * image.height > max_pixels:
        raise ImageError("image_too_many_pixels", f"{image.width} x {image.height} pixels; at most {max_pixels:,} are allowed")
    return image


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, draft: int | None = None) -> Image.Image:
    """Decode to an upright RGB picture, transparency on white; `draft` lets JPEG decode at a size not below it."""
    image = open_header(data, max_pixels=max_pixels, max_bytes=max_bytes)
    try:
        if draft:
            image.draft("RGB", (draft, draft))
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as error:
        raise ImageError("image_undecodable", f"{image.format or 'picture'} cannot be decoded: {error}") from error


def pixels(data: bytes, side: int) -> np.ndarray:
    """The picture squeezed to (side, side, 3) uint8: what every model here takes as input."""
    image = decode(data, draft=side).resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(image)


def batch(images: Sequence[bytes | None], side: int) -> np.ndarray:
    """(n, side, side, 3) uint8; a missing picture is mid-grey (models are told separately which are missing)."""
    grey = np.full((side, side, 3), 128, np.uint8)
    return np.stack([pixels(data, side) if data else grey for data in images]) if len(images) else np.zeros((0, side, side, 3), np.uint8)
