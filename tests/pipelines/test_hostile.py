import hashlib
import importlib.util
import io
import json
import random
import subprocess
import sys
import time
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from idem import images, schema
from pipelines.normalize import REASONS, Limits, Normalised, normalize_picture, normalize_record, normalize_records
from pipelines.records import RECORDS

_SPEC = importlib.util.spec_from_file_location("hostile", Path(__file__).with_name("hostile.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
hostile = importlib.util.module_from_spec(_SPEC)
sys.modules["hostile"] = hostile  # dataclasses look their module up
_SPEC.loader.exec_module(hostile)

LIMITS = Limits()
CASES = hostile.hostile_cases()
ENDS = {"image/jpeg": b"\xff\xd9", "image/png": b"\0\0\0\0IEND\xaeB`\x82"}
# What a picture may say beside its pixels, by Pillow's names.
TOLD = {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi", "progressive", "progression", "adobe", "adobe_transform"}
TOLD |= {"loop", "background", "duration", "timestamp", "interlace", "icc_profile"}


def check_stored(data: bytes, mime: str, width: int, height: int, limits: Limits) -> None:
    """The oracle of pictures: all of it decodes, it is small, and it is nothing but picture."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = Image.open(io.BytesIO(data))
        image.load()
    assert Image.MIME[str(image.format)] == mime
    assert image.size == (width, height)
    assert 0 < max(image.size) <= limits.max_side
    assert not getattr(image, "is_animated", False)
    assert image.getexif().get(0x0112, 1) == 1
    assert set(image.info) <= TOLD
    assert data.endswith(ENDS[mime]) if mime in ENDS else len(data) == 8 + int.from_bytes(data[4:8], "little")
    assert images.examine(data).data == data  # stored bytes are a fixed point


def check_outcome(record: dict, outcome: dict, limits: Limits = LIMITS) -> None:
    """The oracle of records: one item, one reject, or a tombstone."""
    item, reject = outcome["item"], outcome["reject"]
    assert not (item and reject)
    assert item or reject or record["deleted"]
    if item:
        content = (item["image"] or b"") + b"\0" + item["title"].encode()
        assert item["content_hash"] == hashlib.sha256(content).hexdigest()
        assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in item["title"])
        assert (item["image"] is None) == (record["image"] is None)
        if item["image"] is not None:
            check_stored(item["image"], item["mime"], item["width"], item["height"], limits)
    if reject:
        assert reject["reason"] in REASONS
        assert reject["message"]
        assert reject["original"] == (record["original"] or record["image"])
        assert isinstance(json.loads(reject["record"]), dict)
        assert len(reject["record"]) < 100_000


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile_records_end_as_they_must(case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = normalize_record(case.record, LIMITS, "run")
    check_outcome(case.record, outcome)
    item, reject = outcome["item"], outcome["reject"]
    if case.reason:
        assert (reject["reason"] if reject else "deleted") == case.reason
        return
    assert item, reject
    assert (item["mime"], (item["width"], item["height"])) == (case.mime, case.size)
    if case.same is not None:
        assert (item["image"] == case.record["image"]) == case.same
    assert {name: item[name] for name in case.columns} == case.columns


def test_there_are_enough_of_them_and_their_names_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 100


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return pa.Table.from_pylist(hostile.hostile_records(), schema=RECORDS)


@pytest.fixture(scope="module")
def made(table: pa.Table) -> Normalised:
    return normalize_records(table, LIMITS, "run 7")


def test_every_row_is_accounted_for(table: pa.Table, made: Normalised) -> None:
    assert (made.items.schema, made.rejects.schema) == (schema.ITEMS, schema.REJECTS)
    rejected = made.rejects["source_row"].to_pylist()
    assert sorted([*made.kept.tolist(), *rejected, *made.deleted.tolist()]) == list(range(table.num_rows))
    assert made.items["source_row"].to_pylist() == made.kept.tolist()
    assert made.deleted.tolist() == [row for row, case in enumerate(CASES) if case.reason == "deleted"]
    assert set(made.rejects["run"].to_pylist()) == {"run 7"}


def test_the_table_says_the_same_as_record_by_record(made: Normalised) -> None:
    alone = [normalize_record(record, LIMITS, "run 7") for record in hostile.hostile_records()]
    assert made.items.to_pylist() == [{name: one["item"][name] for name in schema.ITEMS.names} for one in alone if one["item"]]
    assert made.rejects.to_pylist() == [one["reject"] for one in alone if one["reject"]]


@pytest.mark.parametrize(("mime", "name", "seems"), [("image/jpeg", "svg", "SVG"), ("jpg", "base64", "base64 text"), ("png", "bmp", "BMP")])
def test_messages_say_what_it_was_said_to_be_and_what_it_is(mime: str, name: str, seems: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    reject = normalize_record(case.record, LIMITS)["reject"]
    assert reject
    assert f"is {seems}," in reject["message"]
    assert reject["message"].endswith(f"said to be {mime}")
    assert "JPEG, PNG, WEBP, GIF" in reject["message"]


LONE = ("\ud800", "a\udfffb", "\ud83d cup")


@pytest.mark.parametrize("text", LONE)
@pytest.mark.parametrize("field", ["title", "item_id", "category", "lang", "version", "mime", "family_id"])
def test_halves_of_surrogate_pairs_reach_no_table(field: str, text: str) -> None:
    record = hostile.record(**{field: text}, image=b"<svg>" if field == "mime" else hostile.encoded(hostile.drawn(), "JPEG"))
    outcome = normalize_record(record, LIMITS)
    check_outcome(record, outcome)
    for name, wanted in (("item", schema.ITEMS), ("reject", schema.REJECTS)):
        if outcome[name]:
            pa.Table.from_pylist([outcome[name]], schema=wanted)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("extra", ["exif", "trailing"])
def test_what_is_left_out_of_a_picture_changes_no_pixel(name: str, extra: str) -> None:
    plain = hostile.encoded(hostile.drawn(), name)
    data = plain + b"PK\3\4" * 9 if extra == "trailing" else hostile.encoded(hostile.drawn(), name, exif=hostile.with_exif(1, "GPS"))
    stored = normalize_picture(data, LIMITS).data
    assert len(stored) < len(data)
    assert b"GPS" not in stored
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored))), np.asarray(Image.open(io.BytesIO(plain))))


@pytest.mark.parametrize("title", ["word " * 2_000_000, "e" + "\u0301" * 5_000_000, "\u202e" * 10_000_000, " " * 10_000_000 + "a"])
def test_ten_megabytes_of_text_take_no_time(title: str) -> None:
    began = time.perf_counter()
    normalize_record(hostile.record(title=title, item_id=""), LIMITS)
    normalize_record(hostile.record(title=title), LIMITS)
    assert time.perf_counter() - began < 2


MEASURE = """
import io, pathlib, resource, sys
from PIL import Image
from pipelines.normalize import Limits, normalize_record
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
data = pathlib.Path(sys.argv[1]).read_bytes()
texts = dict.fromkeys("family_id coarse category group lang role style id_split split version mime fault fault_message".split(), "")
record = {"source_file": "", "source_row": 0, "item_id": "i", "product_id": "p", "title": "t", "deleted": False, "image_ref": None}
warm = io.BytesIO()
Image.new("RGB", (300, 300)).save(warm, "PNG")
normalize_record({**texts, **record, "original": None, "image": warm.getvalue()}, Limits())
before = peak()
outcome = normalize_record({**texts, **record, "original": None, "image": data}, Limits())
print(peak() - before, (outcome["reject"] or {"reason": ""})["reason"])
"""
BOMBS = ("png of 30,000 x 30,000", "png of 30,000 x 30,000, cut", "png of billions a side", "gif of a giant screen", "text bomb")
BOMBS += ("profile bomb", "a million gif comments", "jpeg that promises too much", "huge profile", "more pixels than there are")


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_without_the_memory_that_they_ask_for(name: str, tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.name == name)
    (tmp_path / "picture").write_bytes(case.record["image"])
    told = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "picture")], capture_output=True, text=True, check=True, cwd=".")
    assert not told.stderr
    megabytes, _, reason = told.stdout.strip().partition(" ")
    assert reason == case.reason
    assert float(megabytes) < 100


SMALL = [hostile.encoded(hostile.drawn(0, 24, 16), kind, **options) for kind, options in (
    ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("GIF", {}),
    ("JPEG", {"exif": hostile.with_exif(6, "x")}), ("PNG", {"exif": hostile.with_exif(3)}), ("WEBP", {"exif": hostile.with_exif(8)}),
    ("GIF", {"save_all": True, "append_images": [hostile.drawn(1, 24, 16)]}),
    ("WEBP", {"save_all": True, "append_images": [hostile.drawn(1, 24, 16)]}),
    ("PNG", {"save_all": True, "append_images": [hostile.drawn(1, 24, 16)]}),
)]  # fmt: skip


def mutated(data: bytes, seed: int) -> bytes:
    """Bytes changed, taken out, put in twice, or cut off."""
    random_, out = random.Random(seed), bytearray(data)
    for _ in range(random_.choice((1, 1, 2, 5, 20))):
        at, length = random_.randrange(len(out) + 1), random_.choice((1, 2, 4, 30))
        kind = random_.randrange(5)
        if kind < 2 and at < len(out):
            out[at] = random_.choice((0, 0xFF, random_.randrange(256)))
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = out[at : at + length]
        elif kind == 4 and random_.random() < 0.2:
            del out[at:]
    return bytes(out)


def check_pixels(original: bytes) -> None:
    """Where a container may be kept, its pixels are those that Pillow finds in the bytes as they came, if it can read them."""
    container = images.examine(original)
    if not container.sound:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            there = np.asarray(Image.open(io.BytesIO(original)).convert("RGB"))
        except (OSError, ValueError, SyntaxError):  # stumbled over what is left out now
            return
    assert np.array_equal(there, np.asarray(Image.open(io.BytesIO(container.data)).convert("RGB")))


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SMALL), st.integers(0, 2**32))
def test_mutated_pictures_have_one_outcome(data: bytes, seed: int) -> None:
    record = hostile.record(image=mutated(data, seed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = normalize_record(record, Limits(max_pixels=1_000_000))
    check_outcome(record, outcome)
    if outcome["item"]:
        check_pixels(record["image"])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from((b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x40\0\0\0WEBPVP8 ", b"GIF89a")), st.binary(max_size=300))
def test_random_bytes_have_one_outcome(magic: bytes, data: bytes) -> None:
    record = hostile.record(image=magic + data)
    check_outcome(record, normalize_record(record, LIMITS))
