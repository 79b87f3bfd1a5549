"""Records that try to break an ingest, each with what must become of it. Made by code; nothing here is a test.

Load it by its path: with `--import-mode=importlib` the folders of tests are no packages.
"""

import functools
import io
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 90, 60
HUGE = 30_000


@dataclass(frozen=True)
class Case:
    """reason: of the reject, "" for an item and "deleted" for a tombstone. Of an item: its mime, its size, whether its bytes are
    those that came (None: not looked at), and further columns of it."""

    name: str
    record: dict[str, Any]
    reason: str = ""
    mime: str = ""
    size: tuple[int, int] = (0, 0)
    same: bool | None = None
    columns: dict[str, Any] = field(default_factory=dict)


def record(**changes: Any) -> dict[str, Any]:
    """A record as the readers give it, with nothing wrong but what is changed."""
    texts = ("family_id", "coarse", "category", "group", "lang", "role", "style", "id_split", "split", "version")
    known = {"source_file": "hostile.parquet", "source_row": 0, "item_id": "i1", "product_id": "p1", "title": "A cup"}
    picture = {"mime": "", "deleted": False, "image": None, "image_ref": None, "fault": "", "fault_message": "", "original": None}
    return {**known, **dict.fromkeys(texts, ""), **picture, **changes}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@functools.cache
def drawn(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Soft coloured patches."""
    patches = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2, interlaced: int = 0, extra: bytes = b"") -> bytes:
    """A PNG of these bytes of pixels, each row with its filter byte, whatever they are worth."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


@functools.cache
def huge_png() -> bytes:
    """A PNG of 30,000 x 30,000 pixels, valid to the last one, in about a tenth of a megabyte."""
    deflate = zlib.compressobj(9)
    rows = bytes((HUGE // 8 + 1) * 1000)
    pixels = b"".join(deflate.compress(rows) for _ in range(HUGE // 1000)) + deflate.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", HUGE, HUGE, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def with_chunk(data: bytes, name: bytes, payload: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    return data[:33] + chunk(name, payload) + data[33:]


def with_segment(data: bytes, marker: int, payload: bytes, times: int = 1) -> bytes:
    """A JPEG with one more segment, or several, at its front."""
    return data[:2] + (bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload) * times + data[2:]


def with_exif(orientation: int, maker: str = "") -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if maker:
        exif[0x010F] = maker
    return exif


def with_frame_size(jpeg: bytes, width: int, height: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def with_gif_screen(gif: bytes, width: int, height: int) -> bytes:
    return gif[:6] + struct.pack("<HH", width, height) + gif[10:]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def item(name: str, image: bytes, mime: str = "image/jpeg", size: tuple[int, int] = (WIDTH, HEIGHT), same: bool | None = None) -> Case:
    return Case(name, record(image=image), mime=mime, size=size, same=same)


def reject(name: str, image: bytes, reason: str, **changes: Any) -> Case:
    return Case(name, record(image=image, **changes), reason)


def odd_pictures() -> list[Case]:
    """Strange, and still pictures."""
    jpeg, image = encoded(drawn(), "JPEG"), drawn()
    deep = (np.asarray(image.convert("L")).astype(np.uint16) << 8) + 77
    turned = [
        item(f"orientation {n}", encoded(image, "JPEG", exif=with_exif(n)), size=(HEIGHT, WIDTH) if n > 4 else (WIDTH, HEIGHT), same=False)
        for n in range(1, 9)
    ]
    return [
        *turned,
        item("plain jpeg", jpeg, same=True),
        item("plain png", encoded(image, "PNG"), "image/png", same=True),
        item("plain webp", encoded(image, "WEBP"), "image/webp", same=True),
        item("lossless webp", encoded(image, "WEBP", lossless=True), "image/webp", same=True),
        item("progressive", encoded(image, "JPEG", progressive=True), same=True),
        item("grey jpeg", encoded(image.convert("L"), "JPEG"), same=True),
        item("cmyk", encoded(image.convert("CMYK"), "JPEG"), same=False),
        item("16 bits grey", encoded(Image.fromarray(deep), "PNG")),
        item("16 bits colour", png(4, 4, (b"\0" + bytes(range(24))) * 4, depth=16), "image/png", (4, 4)),
        item("1 bit", encoded(image.convert("1"), "PNG"), "image/png", same=True),
        item("palette", encoded(image.convert("P"), "PNG"), "image/png", same=True),
        item("palette with transparency", encoded(image.convert("P"), "PNG", transparency=3)),
        item("grey with alpha", encoded(image.convert("LA"), "PNG")),
        item("alpha", encoded(image.convert("RGBA"), "PNG")),
        item("interlaced", png(1, 1, b"\0abc", interlaced=1), "image/png", (1, 1), same=True),
        item("1 x 1", encoded(image.resize((1, 1)), "PNG"), "image/png", (1, 1), same=True),
        item("1 x 20,000", encoded(image.resize((1, 20_000)), "PNG"), size=(1, 256)),
        item("20,000 x 1", encoded(image.resize((20_000, 1)), "JPEG"), size=(256, 1)),
        item("large", encoded(drawn(3, 1200, 800), "JPEG"), size=(256, 171)),
        item("gif", encoded(image, "GIF")),
        item("animated gif", encoded(image, "GIF", save_all=True, append_images=[drawn(1), drawn(2)])),
        item("animated webp", encoded(image, "WEBP", save_all=True, append_images=[drawn(1), drawn(2)])),
        item("animated png", encoded(image, "PNG", save_all=True, append_images=[drawn(1), drawn(2)]), "image/png", same=False),
        item("two pictures in one jpeg", encoded(image, "MPO", save_all=True, append_images=[drawn(1)]), same=False),
        item("corrupt exif", with_segment(jpeg, 0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f\1"), same=False),
        item("exif of nonsense", with_segment(jpeg, 0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1\x12\0\3" * 40), same=False),
        item("corrupt exif in webp", encoded(image, "WEBP", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), "image/webp", same=False),
        item("huge exif", with_segment(jpeg, 0xE1, b"Exif\0\0" + bytes(65_000), 20), same=False),
        item("exif with a place", encoded(image, "JPEG", exif=with_exif(1, "at 52.52 N 13.40 E")), same=False),
        item("huge comments", with_segment(jpeg, 0xFE, b"x" * 65_000, 50), same=False),
        item("huge profile", with_segment(jpeg, 0xE2, b"ICC_PROFILE\0\1\1" + bytes(60_000), 9), same=False),
        item("wrong extension", encoded(image, "PNG"), "image/png", same=True),
        item("text bomb", with_chunk(encoded(image, "PNG"), b"zTXt", b"k\0\0" + zlib.compress(bytes(100_000_000), 9)), "image/png"),
        item("profile bomb", with_chunk(encoded(image, "PNG"), b"iCCP", b"k\0\0" + zlib.compress(bytes(50_000_000), 9)), "image/png"),
        item("a million gif comments", encoded(image, "GIF")[:-1] + b"!\xfe\1x\0" * 1_000_000 + b";"),
        item("wrong checksum", flipped(encoded(image, "PNG"), -14), same=False),
        item("more pixels than there are", png(4, 4, bytes(13 * 4) + b"<script>" * 999), size=(4, 4), same=False),
        item("html in a data chunk of its own", with_chunk(encoded(image, "PNG"), b"prVt", b"<script>alert(1)</script>"), "image/png"),
    ]


def polyglots() -> list[Case]:
    """Pictures that are something else as well."""
    jpeg, image, archive = encoded(drawn(), "JPEG"), drawn(), b"PK\3\4" + bytes(400) + b"PK\5\6" + bytes(18)
    script = encoded(image, "GIF")
    return [
        item("jpeg + zip", jpeg + archive, same=False),
        item("jpeg + html", jpeg + b"<html><script>alert(1)</script></html>", same=False),
        item("html in a comment", with_segment(jpeg, 0xFE, b"<html><script>alert(1)</script>"), same=False),
        item("html in a jfif extension", with_segment(jpeg, 0xE0, b"JFXX\0<html><script>alert(1)</script>"), same=False),
        item("gif + jar", encoded(image, "GIF") + archive),
        item("gif + script", script + b"*/=1;alert(1);/*"),
        item("png + trailing", encoded(image, "PNG") + b"<?php system($_GET[0]); ?>", "image/png", same=False),
        item("webp + trailing", encoded(image, "WEBP") + archive, "image/webp", same=False),
        item("jpeg + jpeg", jpeg + jpeg, same=False),
    ]


def broken_pictures() -> list[Case]:
    jpeg, data = encoded(drawn(), "JPEG", quality=95), encoded(drawn(), "PNG")
    webp, gif, image = encoded(drawn(), "WEBP"), encoded(drawn(), "GIF"), drawn()
    cut = [
        reject(f"{name} cut at {part:.0%}", whole[: int(len(whole) * part)], "image_undecodable")
        for name, whole in (("jpeg", jpeg), ("png", data), ("webp", webp), ("gif", gif))
        for part in (0.05, 0.5, 0.9)
    ]
    begin, unreadable = "image_undecodable", "image_unreadable"
    return [
        *cut,
        reject("zero bytes", b"", "image_empty"),
        reject("one byte", b"\xff", unreadable),
        reject("only a beginning", b"\xff\xd8\xff", begin),
        reject("svg", b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", unreadable, mime="image/jpeg"),
        reject("html", b"<!DOCTYPE html><title>404 not found</title>", unreadable, mime="image/png"),
        reject("json", b'{"error": "no such picture"}', unreadable, mime="image/webp"),
        reject("base64", b"/9j/4AAQSkZJRgABAQAAAQABAAD", unreadable, mime="jpg"),
        reject("pdf", encoded(image, "PDF"), unreadable, mime="image/jpeg"),
        reject("bmp", encoded(image, "BMP"), unreadable, mime="png"),
        reject("tiff", encoded(image, "TIFF"), unreadable),
        reject("ico", encoded(image, "ICO"), unreadable),
        reject("psd", b"8BPS\0\1" + bytes(400), unreadable),
        reject("heic", b"\0\0\0\x18ftypheic" + bytes(400), unreadable, mime="image/jpeg"),
        reject("avif", b"\0\0\0\x20ftypavif" + bytes(400), unreadable),
        reject("zip", b"PK\3\4" + bytes(400), unreadable),
        reject("noise", np.random.default_rng(7).bytes(4000), unreadable),
        reject("wrong checksum of the header", flipped(data, 30), begin),
        reject("damaged pixels", flipped(data, len(data) // 2), begin),
        reject("no size", png(0, 0, b""), begin),
        reject("png of 30,000 x 30,000", huge_png(), "image_too_many_pixels"),
        reject("png of 30,000 x 30,000, cut", huge_png()[: len(huge_png()) // 2], "image_too_many_pixels"),
        reject("png of billions a side", png(2**31 - 1, 2**31 - 1, b""), "image_too_many_pixels"),
        reject("gif of a giant screen", with_gif_screen(gif, 60_000, 60_000), "image_too_many_pixels"),
        reject("jpeg that promises too much", with_frame_size(jpeg, 60_000, 60_000), begin),
        reject("jpeg that promises more", with_frame_size(jpeg, 6_000, 4_000), begin),
        reject("jpeg of millions of segments", with_segment(jpeg, 0xE5, b"", 1_000_000), begin),
        reject("jpeg of thousands of scans", jpeg[:-2] + jpeg[jpeg.index(b"\xff\xda") : -2] * 1000 + b"\xff\xd9", begin),
        reject("too many bytes", jpeg + bytes(50_000_000), "image_too_many_bytes"),
    ]


def told(name: str, reason: str = "", **changes: Any) -> Case:
    return Case(name, record(**changes), reason)


def texts_and_ids() -> list[Case]:
    long, picture = "word " * 2_000_000, encoded(drawn(), "JPEG")
    return [
        told("null everything", "missing_id", item_id=None, product_id=None, title=None, version=None, lang=None),
        told("no item_id", "missing_id", item_id=" \t"),
        told("no product_id", "missing_id", product_id=""),
        told("nul in the item_id", "bad_id", item_id="i\x001"),
        told("line break in the product_id", "bad_id", product_id="p\n1"),
        told("item_id that was no UTF-8", "bad_id", item_id="caf\ufffd"),
        told("very long id", "bad_id", item_id="i" * 513),
        told("item_id of megabytes", "bad_id", item_id="i" * 10_000_000),
        told("neither image nor title", "empty_record", title="\x00\u202e\ufeff \u00ad"),
        told("a reader's fault", "image_missing", fault="image_missing", fault_message="nothing at a.jpg", image_ref="a.jpg"),
        told("unreadable", "record_unreadable", item_id="", fault="record_unreadable", fault_message="line 7", original=b'{"item_id": '),
        told("fault of a record with a long title", "attribute_type", title=long, fault="attribute_type", fault_message="price: 'x'"),
        told("version of words", "bad_version", version="latest"),
        told("version of 30 digits", "bad_version", version="9" * 30),
        told("version of no month", "bad_version", version="2024-13-01"),
        told("version of nul", "bad_version", version="1\x00"),
        Case("id of the greatest length", record(item_id="i" * 512), columns={"item_id": "i" * 512}),
        Case("id with spaces around", record(item_id=" i 1\n"), columns={"item_id": "i 1"}),
        Case("text of megabytes", record(title=long), columns={"title": ("word " * 200).strip()}),
        Case("marks of megabytes", record(title="e" + "\u0301" * 5_000_000), columns={"product_id": "p1"}),
        Case("nul in the title", record(title="A\x00 c\x00up"), columns={"title": "A cup"}),
        Case("directions turned round", record(title="A \u202egpj.exe\u202c cup\u2066\u200e"), columns={"title": "A gpj.exe cup"}),
        Case("emoji of several", record(title="\U0001f468\u200d\U0001f469\u200d\U0001f467 set"), columns={"product_id": "p1"}),
        Case("nul in other texts", record(category="cu\x00ps", role="\x00", style="a\x01b"), columns={"category": "cups", "style": "ab"}),
        Case("a language of nonsense", record(lang="'; drop table items"), columns={"lang": ""}),
        Case("a language", record(lang="pt_BR"), columns={"lang": "pt-br"}),
        Case("version with a sign", record(version="-12"), columns={"version": -12}),
        Case("version of a time", record(version="1970-01-01T02:00:00.000001+01:00"), columns={"version": 3_600_000_001}),
        told("tombstone", "deleted", deleted=True, product_id="", title=""),
        told("tombstone whose picture is gone", "deleted", deleted=True, fault="image_missing", fault_message="nothing at a.jpg"),
        told("tombstone without an id", "missing_id", deleted=True, item_id=""),
        told("tombstone that another record outdid", "superseded", deleted=True, fault="superseded", fault_message="version 2 stays"),
        Case("a mime of megabytes", record(image=picture, mime="x" * 10_000_000), mime="image/jpeg", size=(WIDTH, HEIGHT), same=True),
    ]


@functools.cache
def hostile_cases() -> tuple[Case, ...]:
    """All cases; `source_row` is the place in the list."""
    cases = [*odd_pictures(), *polyglots(), *broken_pictures(), *texts_and_ids()]
    for row, case in enumerate(cases):
        case.record["source_row"] = row
    return tuple(cases)


def hostile_records() -> list[dict[str, Any]]:
    """The records alone, as rows of pipelines.records.RECORDS."""
    return [dict(case.record) for case in hostile_cases()]
