import decimal
import hashlib
import io
import json
import struct
import unicodedata
import zlib
from datetime import datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from idem import images, schema, text
from idem.text import MAX_TITLE, clean_title
from pipelines.normalize import REASONS, Limits, normalize_picture, normalize_record, normalize_records
from pipelines.records import RECORDS, SETTLED, TEXTS, family_and_split, records_schema

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
    known = {"item_id": "i1", "product_id": "p1", "family_id": "f1", "title": "A cup", "source_file": "a.parquet", "source_row": 7}
    whole = {"deleted": False, "image_ref": None, "mime": "", "fault": "", "fault_message": "", "original": None}
    return {**dict.fromkeys(TEXTS, ""), **known, **whole, "image": encoded(drawn(), "JPEG"), **changes}


def outcome(**changes: object) -> tuple[list[dict], list[dict]]:
    made = normalize_records(pa.Table.from_pylist([record(**changes)], schema=RECORDS), LIMITS)
    return made.items.to_pylist(), made.rejects.to_pylist()


def item(**changes: object) -> dict:
    (made,), _ = outcome(**changes)
    return made


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
        ({"item_id": " \n"}, "missing_id"),
        ({"item_id": "a\tb"}, "bad_id"),
        ({"product_id": "p\ufffd"}, "bad_id"),
        ({"product_id": "p" * 513}, "bad_id"),
        ({"version": "1.5"}, "bad_version"),
        ({"version": str(2**63)}, "bad_version"),
        ({"fault": "duplicate_id", "fault_message": "row 3 is the same"}, "duplicate_id"),
        ({"fault": "image_outside", "item_id": ""}, "image_outside"),
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


def test_a_fault_of_the_reader_is_told_with_the_original() -> None:
    damaged = {"item_id": "", "image": None, "original": b'{"item', "fault": "record_unreadable", "fault_message": "line 7 is cut off"}
    _, (reject,) = outcome(**damaged)
    assert (reject["reason"], reject["message"], reject["original"]) == ("record_unreadable", "line 7 is cut off", b'{"item')
    assert reject["item_id"] is None


def test_every_reason_has_a_sentence() -> None:
    assert all(sentence.endswith(".") and sentence[0].isupper() for sentence in REASONS.values())
    assert {"missing_id", "bad_id", "bad_version", "empty_record", "duplicate_id", "superseded", "source_damaged"} <= set(REASONS)


def test_texts_in_a_reject_are_bounded_and_say_so() -> None:
    attributes = {"note": "y" * 2_000_000}
    reject = normalize_record({**record(item_id="", title="x" * 5_000_000), "attributes": attributes}, LIMITS)["reject"]
    assert reject
    told = json.loads(reject["record"])
    assert len(reject["record"]) < 30_000
    assert told["title"].endswith("... (cut at 10,000 of 5,000,000 characters)")
    assert told["attributes"].startswith('{"note": "yyy')


@pytest.mark.parametrize("told", [{}, {"coarse": "mugs"}, {"family_id": "f", "coarse": "mugs"}, {"id_split": "dev_unseen"}])
@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_families_and_splits_are_those_of_the_records_module(told: dict[str, str], fraction: float) -> None:
    made = normalize_record({**record(family_id=""), **told}, Limits(unseen_fraction=fraction))["item"]
    assert made
    expected = family_and_split("p1", {**dict.fromkeys(SETTLED, ""), **told}, fraction)
    assert (made["family_id"], made["id_split"]) == expected


def test_a_group_stands_in_for_a_category() -> None:
    assert item(category="Cups", group="Kitchen")["category"] == "Cups"
    assert item(category=" ", group="Kitchen")["category"] == "Kitchen"


@pytest.mark.parametrize(
    ("told", "version"),
    [
        ("", None),
        (" ", None),
        ("0", 0),
        ("+7", 7),
        ("-0012", -12),
        (str(2**63 - 1), 2**63 - 1),
        (str(-(2**63)), -(2**63)),
        ("1970-01-02", 86_400_000_000),
        ("1970-01-01T00:00:01Z", 1_000_000),
        ("1970-01-01 00:00:01.5", 1_500_000),
        ("1970-01-01T00:00:00-02:00", 7_200_000_000),
        ("1969-12-31T23:59:59.999999", -1),
        ("0001-01-01T00:00:00+12:00", -62_135_596_800_000_000 - 43_200_000_000),
    ],
)
def test_versions(told: str, version: int | None) -> None:
    assert text.parse_version(told) == version
    assert item(version=told)["version"] == version


@pytest.mark.parametrize(
    "told", ["v1", "1.0", "1e3", "1_000", "\u0661", "0x10", "2024-02-30", "9999-99-99", "now", "1" * 35, "1" * 5000, "--1", "1 2"]
)
def test_versions_that_are_none(told: str) -> None:
    with pytest.raises(ValueError, match=r"the version is .*; allowed are"):
        text.parse_version(told)


@pytest.mark.parametrize(
    ("told", "kept"),
    [("EN", "en"), ("pt_BR", "pt-br"), (" zh-Hant-TW ", "zh-hant-tw"), ("english", ""), ("e", ""), ("../etc", ""), ("de-", ""), ("", "")],
)
def test_languages(told: str, kept: str) -> None:
    assert text.language(told) == kept


def test_titles_keep_what_scripts_and_emoji_need() -> None:
    needed = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f469\u200d\U0001f373 \U0001f3f4\U000e0067\U000e0062\U000e007f"
    assert clean_title(needed) == needed
    assert clean_title("so\u00adft \u202eturned\u202c \u2066x\u2069 \ufeffmark") == "soft turned x mark"


@pytest.mark.parametrize("length", [MAX_TITLE - 2, MAX_TITLE - 1, MAX_TITLE, MAX_TITLE + 1])
def test_titles_are_not_cut_between_a_letter_and_its_mark(length: int) -> None:
    cut = clean_title("a" * length + "q\u0323\u0301b")
    assert cut in ("a" * length + "q\u0323\u0301b"[: max(0, MAX_TITLE - length)], "a" * min(length, MAX_TITLE))
    assert not cut.endswith(("q", "q\u0323"))


def test_record_hash_tells_an_update_from_a_repeat() -> None:
    same = [{}, {"source_row": 8}, {"source_file": "b"}, {"family_id": "f2"}, {"coarse": "c"}, {"id_split": "train"}, {"mime": "jpg"}]
    other = [{"title": "A mug"}, {"category": "c"}, {"group": "g"}, {"lang": "de"}, {"role": "photo"}, {"style": "s"}, {"split": "test"}]
    other += [{"version": "3"}, {"product_id": "p2"}, {"image": None}, {"image": encoded(drawn(20, 20), "JPEG")}]
    assert len({item(**changes)["record_hash"] for changes in same}) == 1
    assert len({item(**changes)["record_hash"] for changes in ({}, *other)}) == len(other) + 1


def test_a_phash_goes_with_a_picture_that_shows_something() -> None:
    assert item(image=None)["phash"] is None
    assert item(image=encoded(Image.new("RGB", (40, 30), "white"), "PNG"))["phash"] is None
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    assert isinstance(item(image=encoded(noise, "PNG"))["phash"], int)


ATTRIBUTES = pa.struct([("price", pa.decimal128(9, 2)), ("seen", pa.timestamp("ns")), ("tags", pa.list_(pa.string()))])


def with_attributes(values: list[object], kind: pa.StructType = ATTRIBUTES) -> pa.Table:
    rows = [{**record(source_row=n), "attributes": value} for n, value in enumerate(values)]
    return pa.Table.from_pylist(rows, schema=records_schema(kind))


def test_attributes_stay_what_they_were_and_count_as_said() -> None:
    first = {"price": decimal.Decimal("1.50"), "seen": datetime(2024, 1, 2), "tags": ["a", None]}
    records = with_attributes([first, None, first, {**first, "tags": []}])
    made = normalize_records(records, LIMITS)
    assert made.items.schema == schema.items(ATTRIBUTES)
    assert made.items["attributes"].to_pylist() == records["attributes"].to_pylist()
    a, b, c, d = made.items["record_hash"].to_pylist()
    assert a == c
    assert len({a, b, d}) == 3


def test_times_that_python_does_not_know_do_not_stop_a_batch() -> None:
    kind = pa.struct([("seen", pa.timestamp("us"))])
    far = pa.array([0, 300_000_000_000_000_000, 300_000_000_000_000_001], pa.int64()).cast(pa.timestamp("us"))
    records = with_attributes([None] * 3, kind)
    records = records.set_column(records.num_columns - 1, "attributes", pa.StructArray.from_arrays([far], fields=list(kind)))
    made = normalize_records(records, LIMITS)
    assert made.items["attributes"].combine_chunks().equals(records["attributes"].combine_chunks())
    assert len(set(made.items["record_hash"].to_pylist())) == 3


def many() -> pa.Table:
    data = [d for d, _ in HOSTILE.values()] + [d for d, _ in CHANGED.values()] + [None]
    return pa.Table.from_pylist([record(item_id=f"i{n}", source_row=n, image=d) for n, d in enumerate(data)], schema=RECORDS)


def test_every_record_is_one_item_or_one_reject() -> None:
    records = many()
    made = normalize_records(records, LIMITS, run="r1")
    assert (made.items.schema, made.rejects.schema) == (schema.ITEMS, schema.REJECTS)
    assert made.kept.tolist() == made.items["source_row"].to_pylist()
    assert sorted(made.kept.tolist() + made.rejects["source_row"].to_pylist()) == records["source_row"].to_pylist()
    assert made.rejects.num_rows == len(HOSTILE)
    assert set(made.rejects["run"].to_pylist()) == {"r1"}
    assert made.deleted.tolist() == []


def test_cutting_a_table_anywhere_changes_nothing() -> None:
    records = many()
    whole = normalize_records(records, LIMITS)
    parts = [normalize_records(records.slice(start, 3), LIMITS) for start in range(0, records.num_rows, 3)]
    assert pa.concat_tables(part.items for part in parts).equals(whole.items)
    assert pa.concat_tables(part.rejects for part in parts).equals(whole.rejects)


def test_a_tombstone_is_neither_item_nor_reject() -> None:
    rows = [
        record(source_row=0),
        record(source_row=1, deleted=True, image=None, title="", product_id="", version="?"),
        record(source_row=2),
    ]
    made = normalize_records(pa.Table.from_pylist(rows, schema=RECORDS), LIMITS)
    assert (made.kept.tolist(), made.deleted.tolist(), made.rejects.num_rows) == ([0, 2], [1], 0)
    assert (made.kept.dtype, made.deleted.dtype) == (np.int64, np.int64)


@pytest.mark.parametrize("kind", [None, ATTRIBUTES])
def test_nothing_in_gives_nothing_out(kind: pa.DataType | None) -> None:
    made = normalize_records(records_schema(kind).empty_table(), LIMITS)
    assert (made.items.num_rows, made.rejects.num_rows, len(made.kept), len(made.deleted)) == (0, 0, 0, 0)
    assert made.items.schema == schema.items(kind)


def test_content_hash_is_that_of_the_stored_picture_and_title() -> None:
    made = item(image=encoded(drawn(), "GIF"))
    assert made["content_hash"] == hashlib.sha256(made["image"] + b"\0A cup").hexdigest()
