"""The files that pictures come in, walked without decoding: what is picture in them is kept, the rest is left out.

Pillow never sees a stranger's metadata: EXIF, XMP, comments, previews, later frames and whatever follows the picture are
left out before it opens the rest, so none of them can cost memory, leak a place, or bring down the decoder.
"""

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

MAX_METADATA = 65_536  # bytes of a picture that are not pixels: tables, palettes, a colour profile
MAX_PARTS = 250_000  # segments, chunks or blocks of a file: walking millions of empty ones takes seconds
PIXELS_PER_BYTE = 512  # of a JPEG: each block of 64 takes at least one bit
MAX_SCANS = 100  # of a progressive JPEG; each costs a pass over all pixels, however few bytes it has

OTHERS = (
    (0, b"%PDF", "PDF"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"BM", "BMP"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"8BPS", "PSD"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftyp", "MP4"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"%!PS", "PostScript"),
    (0, b"PK\3\4", "ZIP"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"/9j/", "base64 text"),
    (0, b"iVBORw0KGgo", "base64 text"),
    (0, b"data:", "a data: URL"),
)
"""Where what stands, and what the file is then called in a message; first match wins."""


class ImageError(ValueError):
    """A picture that cannot be used; `reason` is a stable code, the message a sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.reason, str(self))


@dataclass(frozen=True, slots=True)
class Container:
    """A file without what is not picture; its pixels are bit by bit those of the original's first frame.

    size: width and height as the header says; orientation: EXIF's, 1 to 8; sound: the file is built so that every reader
    would decode `data` alike, and `data` ends where the picture does.
    """

    format: str
    data: bytes
    size: tuple[int, int]
    orientation: int
    sound: bool


def _orientation(exif: bytes) -> int:
    """The orientation in a TIFF header's first directory; 1 for what is missing or broken."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = "<" if exif[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, at)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _joined(parts: Sequence[bytes], data: bytes) -> bytes:
    joined = b"".join(parts)
    return data if joined == data else joined


# Neither a stuffed zero, nor a restart within a scan, nor a fill byte.
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_TABLES = frozenset((0xC4, 0xDB, 0xDD))
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PLAIN_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # arithmetic coding and lossless frames: few readers know them
_SCAN, _END, _JFIF, _EXIF, _ICC, _ADOBE = 0xDA, 0xD9, 0xE0, 0xE1, 0xE2, 0xEE
_METADATA = frozenset((*range(0xE0, 0xF0), 0xFE))


def _jpeg_metadata(marker: int, payload: bytes) -> bytes:
    """What is kept of an APPn segment or comment: that which decides about colours."""
    if marker == _JFIF and payload.startswith(b"JFIF\0") and len(payload) >= 14:
        return b"\xff\xe0\x00\x10" + payload[:12] + b"\0\0"  # without its preview
    if marker == _ADOBE and payload.startswith(b"Adobe") and len(payload) >= 12:
        return b"\xff\xee\x00\x0e" + payload[:12]
    if marker == _ICC and payload.startswith(b"ICC_PROFILE\0"):
        return b"\xff\xe2" + struct.pack(">H", len(payload) + 2) + payload
    return b""


@dataclass(slots=True)
class _Jpeg:
    """What a walk through a JPEG has met so far; plain: all its frames are such as every reader knows; tidy: so is the rest."""

    parts: list[bytes] = field(default_factory=lambda: [b"\xff\xd8"])
    scans: list[int] = field(default_factory=list)  # bytes of each
    sizes: list[tuple[int, int]] = field(default_factory=list)
    orientation: int = 1
    plain: bool = True
    tidy: bool = True

    def add(self, marker: int, segment: bytes) -> None:
        if marker in _METADATA:
            if marker == _EXIF and self.orientation == 1:
                self.orientation = _orientation(segment[4:])
            segment = _jpeg_metadata(marker, segment[4:])
        elif marker == _SCAN:
            self.scans.append(len(segment))
        elif marker in _FRAMES and len(segment) > 9:
            height, width = struct.unpack_from(">HH", segment, 5)
            self.sizes.append((width, height))
            self.plain = self.plain and marker in _PLAIN_FRAMES
        elif marker not in _TABLES:
            self.tidy = False
        self.parts.append(segment)

    def size(self) -> tuple[int, int]:
        return max(self.sizes, key=lambda size: size[0] * size[1], default=(0, 0))

    def refuse_bombs(self) -> None:
        (width, height), read = self.size(), sum(self.scans)
        if len(self.scans) > MAX_SCANS:
            raise ImageError("image_undecodable", f"a JPEG of {len(self.scans):,} scans; at most {MAX_SCANS} are allowed")
        if self.plain and width * height > PIXELS_PER_BYTE * read:
            told = f"{width} x {height} pixels in {read:,} bytes; at most {PIXELS_PER_BYTE} a byte are possible"
            raise ImageError("image_undecodable", f"a JPEG whose header promises {told}")


def _jpeg(data: bytes) -> Container:
    walk, at, ended = _Jpeg(), 2, False
    while found := _MARKER.search(data, at):
        start, marker = found.start(), data[found.start() + 1]
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
        ended = marker == _END
        if ended or end < start + 4 or end > len(data):
            break
        if len(walk.parts) > MAX_PARTS:
            raise ImageError("image_undecodable", f"a JPEG of more than {MAX_PARTS:,} segments; no more are allowed")
        if marker == _SCAN:
            end = after.start() if (after := _MARKER.search(data, end)) else len(data)
        walk.tidy = walk.tidy and start == at
        walk.add(marker, data[start:end])
        at = end
    walk.refuse_bombs()
    sound = ended and found is not None and found.start() == at and walk.tidy and walk.plain and len(walk.sizes) == 1
    parts = [*walk.parts, b"\xff\xd9" if ended else data[at:]]  # cut off or damaged: the decoder says what it misses
    if sum(map(len, parts)) - sum(walk.scans) > MAX_METADATA:
        parts, sound = [part for part in parts if not part.startswith(b"\xff\xe2")], False
    return Container("JPEG", _joined(parts, data), walk.size(), walk.orientation, sound)


_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_COLOURS = (b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"pHYs")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and all bytes of each PNG chunk to IEND; the last may be cut off."""
    at = 8
    for _ in range(MAX_PARTS):
        if at + 8 > len(data):
            return
        end = at + 12 + int.from_bytes(data[at : at + 4])
        name = data[at + 4 : at + 8]
        yield name, data[at:end]
        if name == b"IEND":
            return
        at = end


def _is_whole(chunk: bytes) -> bool:
    return len(chunk) == 12 + int.from_bytes(chunk[:4]) and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])


def _profile_is_small(chunk: bytes) -> bool:
    """Whether an iCCP chunk stays small when inflated."""
    inflate = zlib.decompressobj()
    try:
        inflate.decompress(chunk[8:-4].partition(b"\0")[2][1:], MAX_METADATA)
    except zlib.error:
        return False
    return inflate.eof


def _png(data: bytes) -> Container:
    parts, orientation, sound, name = [data[:8]], 1, True, b""
    for name, chunk in _chunks(data):
        whole = _is_whole(chunk)
        if name in _CRITICAL:
            parts.append(chunk)
            sound = sound and whole
        elif name == b"eXIf":
            orientation = _orientation(chunk[8:-4])
        elif name in _COLOURS and whole and len(chunk) <= (MAX_METADATA if name == b"iCCP" else 1024):
            if name != b"iCCP" or _profile_is_small(chunk):
                parts.append(chunk)
        elif not name[0] & 0x20:  # must be understood, says the standard, and is not
            sound = False
    if sum(len(part) for part in parts if part[4:8] != b"IDAT") > MAX_METADATA:
        parts, sound = [data[:8], *(part for part in parts[1:] if part[4:8] in _CRITICAL)], False
    size = struct.unpack(">II", data[16:24]) if data[12:16] == b"IHDR" and len(data) >= 24 else (0, 0)
    return Container("PNG", _joined(parts, data), size, orientation, sound and name == b"IEND")


# Left, top, and the steps right and down of Adam7's passes.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def pixels_fill(png: Container) -> bool:
    """Whether the pixel data of a sound PNG inflate to exactly its pixels: decoders stop there, so more could hide behind."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", png.data[16:29])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 0)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in _PASSES] if interlaced else [(width, height)]
    expected = sum(h * (1 + -(-w * bits // 8)) for w, h in sizes if w > 0 and h > 0)
    inflate = zlib.decompressobj()
    deflated = b"".join(chunk[8:-4] for name, chunk in _chunks(png.data) if name == b"IDAT")
    try:
        found = len(inflate.decompress(deflated, expected + 1))
    except zlib.error:
        return False
    return found == expected and inflate.eof and not inflate.unused_data


_WEBP_PICTURES = (b"ANMF", b"VP8 ", b"VP8L")
_WEBP_KEPT = (b"VP8X", b"ICCP", b"ALPH", b"ANIM", *_WEBP_PICTURES)
_WEBP_PLAIN = (b"VP8X", b"ICCP", b"VP8 ", b"VP8L")  # neither moving nor transparent


def _riff(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Name, length as told and payload of each chunk within the length that the file tells."""
    at, end = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    for _ in range(MAX_PARTS):
        if at + 8 > end:
            return
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        yield data[at : at + 4], length, data[at + 8 : min(at + 8 + length, end)]
        at += 8 + length + length % 2


def _webp_size(name: bytes, payload: bytes) -> tuple[int, int]:
    if name == b"VP8X" and len(payload) >= 10:
        return 1 + int.from_bytes(payload[4:7], "little"), 1 + int.from_bytes(payload[7:10], "little")
    if name == b"VP8 " and len(payload) >= 10:
        return int.from_bytes(payload[6:8], "little") & 0x3FFF, int.from_bytes(payload[8:10], "little") & 0x3FFF
    if name == b"VP8L" and len(payload) >= 5:
        bits = int.from_bytes(payload[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return 0, 0


def _webp(data: bytes) -> Container:
    """The first frame of an animation stays an animation of one."""
    parts, size, orientation, sound, pictured = [], (0, 0), 1, True, False
    for name, length, payload in _riff(data):
        if name == b"EXIF":
            orientation = _orientation(payload)
        if pictured or name not in _WEBP_KEPT:
            continue
        pictured = name in _WEBP_PICTURES
        sound = sound and len(payload) == length and name in _WEBP_PLAIN and (name != b"ICCP" or length <= MAX_METADATA)
        size = size if size != (0, 0) else _webp_size(name, payload)
        if name == b"VP8X" and payload:
            payload = bytes([payload[0] & ~0x0C]) + payload[1:]  # neither EXIF nor XMP follows now
        parts.append(name + struct.pack("<I", length) + payload + b"\0" * (length % 2))
    body = b"WEBP" + b"".join(parts)
    return Container("WEBP", _joined([b"RIFF", struct.pack("<I", len(body)), body], data), size, orientation, sound and pictured)


def _past_blocks(data: bytes, at: int) -> int:
    """Where a GIF's chain of blocks, each with its length before it, ends."""
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _gif(data: bytes) -> Container:
    """The first frame alone. Never sound: few readers of pictures take a GIF."""
    width, height, flags = struct.unpack_from("<HHB", data.ljust(13, b"\0"), 6)
    at = 13 + _palette_bytes(flags)
    parts = [data[:at]]
    for _ in range(MAX_PARTS):
        kind = data[at : at + 1]
        if kind == b"," and at + 10 <= len(data):
            left, top, w, h, flags = struct.unpack_from("<HHHHB", data, at + 1)
            width, height = max(width, left + w), max(height, top + h)
            parts += [data[at : _past_blocks(data, at + 11 + _palette_bytes(flags))], b";"]
            break
        if kind == b"!":
            end = _past_blocks(data, at + 2)
            if data[at + 1 : at + 2] == b"\xf9":  # says which colour is transparent
                parts.append(data[at:end])
            at = end
        elif kind in (b";", b",", b""):
            break
        else:
            at += 1
    return Container("GIF", b"".join(parts), (width, height), 1, False)


def walk(data: bytes) -> Container | None:
    """The container of an allowed format, None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _gif(data)
    return None


def kind(data: bytes) -> str:
    """What a file that is no allowed picture seems to be, "" for no idea."""
    for at, magic, name in OTHERS:
        if data[at : at + len(magic)] == magic:
            return name
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in text and text.startswith(b"<"):
        return "SVG"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")):
        return "HTML"
    return "XML" if text.startswith(b"<?xml") else "JSON" if text.startswith((b'{"', b"[{")) else ""
