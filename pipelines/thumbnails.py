"""Pictures that were refused, shown all the same: as far as they can be decoded, in bounded memory, and drawn anew."""

import base64
import io
import warnings
from dataclasses import dataclass

from PIL import Image

from idem import images
from pipelines.report import size

THUMB = 176  # pixels, the longer side
DECODED = 2_000_000  # pixels held at once for a thumbnail; what would need more is not drawn
SCALED = 8_000_000  # pixels of a JPEG that is scaled while it is read: with many scans all its coefficients are held, 6 bytes a pixel
LOOKED_AT = 16_000_000  # bytes of a picture; its walk copies them
MISSING = "#9aa2ac"  # drawn where a picture ends too soon


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What can be shown of a picture: a data: URL or none, and what it is."""

    url: str | None
    told: str


def _drawn(image: Image.Image) -> str:
    image.thumbnail((THUMB, THUMB))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _as_far_as_it_goes(image: Image.Image) -> tuple[Image.Image, bool]:
    """Decode, grey where the bytes end too soon, and whether all of it was there. Pillow's own switch for this is one for all threads."""
    try:
        image.load()
        return image, True
    except Exception:
        image.tile = []  # pyright: ignore[reportAttributeAccessIssue]  # what was decoded so far is the picture
        box = image.getbbox()
        if not box:
            raise
    part = image.convert("RGB")
    part.paste(MISSING, (0, box[3], image.width, image.height))
    return part, False


def look(original: bytes | None) -> Seen:
    """A thumbnail of whatever can be decoded; never holds more than DECODED pixels, and nothing of `original` itself is embedded."""
    if not original:
        return Seen(url=None, told="no picture" if original is None else "a picture of 0 bytes")
    told = size(len(original))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on what is known to be bad
        try:
            container = images.examine(original, max_bytes=LOOKED_AT)
            told = f"{container.format} {container.size[0]:,} x {container.size[1]:,}, {told}"
            image = images.open_container(container)
            small = image.width * image.height <= (SCALED if container.format == "JPEG" else DECODED)
            image.draft("RGB", (THUMB, THUMB))
            if not small or image.width * image.height > DECODED:
                return Seen(url=None, told=f"{told}; too large to draw")
            found, whole = _as_far_as_it_goes(image)
            return Seen(url=_drawn(images.render(found, container.orientation)), told=told if whole else f"{told}; decoded in part")
        except Exception:
            return Seen(url=None, told=f"{told}; not drawn")


def hexdump(data: bytes, rows: int = 8, across: int = 8) -> str:
    """The first bytes in hexadecimal, with what of them is printable ASCII beside it."""
    lines = (data[start : start + across] for start in range(0, min(len(data), rows * across), across))
    return "\n".join(f"{line.hex(' ').ljust(across * 3)} {''.join(chr(b) if 32 <= b < 127 else '.' for b in line)}" for line in lines)
