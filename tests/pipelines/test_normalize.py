import io
import struct
import unicodedata
import zlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from idem import images, schema
from pipelines.normalize import MAX_TITLE, OUTCOMES, RECORDS, Limits, clean_title, normalize_picture, normalize_records, split

LIMITS = Limits(max_side=64)


def drawn(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be this large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def record(**changes: object) -> dict[str, object]:
    told = dict.fromkeys((f.name for f in RECORDS if f.type == pa.string()), "")
    known = {"item_id": "i1", "product_id": "p1", "family_id": "f1", "title": "A cup", "source_file": "a.parquet", "source_row": 7}
    return {**told, **known, "duplicate": False, "image": encoded(drawn(), "JPEG"), **changes}


def outcome(**changes: object) -> tuple[list[dict], list[dict]]:
    items, rejects = split(normalize_records(pa.Table.from_pylist([record(**changes)], schema=RECORDS), LIMITS))
    return items.to_pylist(), rejects.to_pylist()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_bytes_that_need_nothing_are_kept(kind: str) -> None:
    data = encoded(drawn(), kind)
    picture = normalize_picture(data, LIMITS)
    assert picture.data == data
    assert (picture.mime, picture.width, picture.height) == (f"image/{kind.lower()}", 40, 30)


CHANGED = {
    "too large": (encoded(drawn(400, 300), "JPEG"), (64, 48)),
    "tall": (encoded(drawn(300, 400), "PNG"), (48, 64)),
    "gif": (encoded(drawn(), "GIF"), (40, 30)),
    "cmyk": (encoded(drawn(mode="CMYK"), "JPEG"), (40, 30)),
    "alpha": (encoded(drawn(mode="RGBA"), "PNG"), (40, 30)),
    "palette with transparency": (encoded(drawn(mode="P"), "PNG", transparency=255), (40, 30)),
    "animated": (encoded(drawn(), "WEBP", save_all=True, append_images=[drawn(mode="L")]), (40, 30)),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_not_every_reader_shows_alike_is_made_plain_jpeg(name: str) -> None:
    data, size = CHANGED[name]
    picture = normalize_picture(data, LIMITS)
    again = Image.open(io.BytesIO(picture.data))
    assert (again.format, again.mode, again.size) == ("JPEG", "RGB", size)
    assert (picture.mime, picture.width, picture.height) == ("image/jpeg", *size)
    left, right = np.asarray(again)[:, :8].mean((0, 1)), np.asarray(again)[:, -8:].mean((0, 1))
    assert left[0] > left[2] + 150
    assert right[2] > right[0] + 150


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    picture = normalize_picture(encoded(drawn(), "JPEG", exif=exif), LIMITS)
    upright = Image.open(io.BytesIO(picture.data))
    assert upright.size == (picture.width, picture.height) == (30, 40)
    assert upright.getexif().get(0x0112, 1) == 1
    red, _, blue = upright.getpixel((15, 5))
    assert red > blue + 150  # what was left is now on top


def test_transparency_becomes_white() -> None:
    picture = normalize_picture(encoded(Image.new("RGBA", (20, 20), (255, 0, 0, 0)), "PNG"), LIMITS)
    assert np.asarray(Image.open(io.BytesIO(picture.data))).min() > 250


JPEG = encoded(drawn(200, 200), "JPEG", quality=95)
HOSTILE = {
    "zero bytes": (b"", "image_empty"),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "image_undecodable"),
    "truncated png": (encoded(drawn(), "PNG")[:-40], "image_undecodable"),
    "text": (b"<html>404 not found</html>", "image_unreadable"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image_unreadable"),
    "a format that is not allowed": (encoded(drawn(), "TIFF"), "image_unreadable"),
    "large header": (png_header(9000, 9000), "image_too_many_pixels"),
    "damaged pixels": (png_header(60, 60), "image_undecodable"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_set_aside_with_reason_and_original(name: str) -> None:
    data, reason = HOSTILE[name]
    items, rejects = outcome(image=data)
    assert not items
    assert rejects[0]["reason"] == reason
    assert rejects[0]["message"]
    assert rejects[0]["original"] == data
    assert '"title": "A cup"' in rejects[0]["record"]
    assert (rejects[0]["source_file"], rejects[0]["source_row"], rejects[0]["item_id"]) == ("a.parquet", 7, "i1")


def test_a_header_of_billions_of_pixels_is_set_aside() -> None:
    items, rejects = outcome(image=png_header(100_000, 100_000))
    assert not items
    assert rejects[0]["reason"].startswith("image_")


def test_the_limit_on_pixels_is_that_of_the_caller() -> None:
    with pytest.raises(images.ImageError, match="at most 100 "):
        normalize_picture(encoded(drawn(), "PNG"), Limits(max_pixels=100))


def test_a_text_only_item_has_no_picture() -> None:
    (item,), _ = outcome(image=None)
    assert item["image"] is None
    assert (item["mime"], item["width"], item["height"], item["title"]) == ("", 0, 0, "A cup")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": None, "title": " \t\x00"}, "empty_record"),
        ({"item_id": ""}, "missing_id"),
        ({"product_id": ""}, "missing_id"),
        ({"duplicate": True}, "duplicate_id"),
        ({"duplicate": True, "item_id": ""}, "missing_id"),
    ],
)
def test_records_that_are_no_item(changes: dict, reason: str) -> None:
    items, rejects = outcome(**changes)
    assert not items
    assert [r["reason"] for r in rejects] == [reason]


def test_content_hash_tells_pictures_and_titles_apart() -> None:
    other = encoded(drawn(20, 20), "JPEG")
    made = [outcome(**c)[0][0]["content_hash"] for c in ({}, {}, {"title": "A mug"}, {"image": other}, {"item_id": "i2"})]
    assert made[0] == made[1] == made[4]
    assert len(set(made)) == 3


@given(st.text(max_size=3000))
def test_titles_are_clean_and_cleaning_again_changes_nothing(title: str) -> None:
    cleaned = clean_title(title)
    assert len(cleaned) <= MAX_TITLE
    assert not any(unicodedata.category(c) == "Cc" for c in cleaned)
    assert cleaned == cleaned.strip()
    assert clean_title(cleaned) == cleaned


def test_titles_are_composed() -> None:
    assert clean_title("Cafe\u0301\n  au\x07 lait") == "Caf\u00e9 au lait"


def many() -> pa.Table:
    data = [d for d, _ in HOSTILE.values()] + [d for d, _ in CHANGED.values()] + [None]
    return pa.Table.from_pylist([record(item_id=f"i{n}", source_row=n, image=d) for n, d in enumerate(data)], schema=RECORDS)


def test_every_record_is_one_item_or_one_reject() -> None:
    records = many()
    outcomes = normalize_records(records, LIMITS)
    items, rejects = split(outcomes)
    assert outcomes.schema == OUTCOMES
    assert (items.schema, rejects.schema) == (schema.ITEMS, schema.REJECTS)
    assert sorted(items["source_row"].to_pylist() + rejects["source_row"].to_pylist()) == records["source_row"].to_pylist()
    assert rejects.num_rows == len(HOSTILE)


def test_nothing_in_gives_nothing_out() -> None:
    items, rejects = split(normalize_records(RECORDS.empty_table(), LIMITS))
    assert (items.num_rows, rejects.num_rows) == (0, 0)
    assert items.schema == schema.ITEMS


@pytest.mark.ray
def test_the_same_inside_ray_data(ray_session: None) -> None:
    import ray.data
    import ray.data.block

    records = many()
    made = ray.data.from_arrow(records).map_batches(
        normalize_records, batch_size=None, batch_format="pyarrow", fn_kwargs={"limits": LIMITS}
    )
    inside = pa.concat_tables(ray.data.block.BlockAccessor.for_block(b).to_arrow() for b in made.iter_batches(batch_format="pyarrow"))
    for here, there in zip(split(normalize_records(records, LIMITS)), split(inside), strict=True):
        assert there.sort_by("source_row").to_pylist() == here.to_pylist()
