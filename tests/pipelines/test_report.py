"""The report of an ingest says what is there, adds up, needs nothing outside of itself, and is safe to open whatever records hold."""

import base64
import io
import re
import struct
import tracemalloc
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageFile

from pipelines import normalize, report, report_page, thumbnails
from pipelines.report import Example, SourceTime

FULL = {
    "source": "s3://shop/2026-11",
    "run": "8c1f02d7",
    "version": 14,
    "rows": 240_000,
    "committed": 61_240,
    "inserted": 48_110,
    "updated": 13_130,
    "unchanged": 177_400,
    "deleted": 512,
    "rejected": 848,
    "by_reason": {"image_empty": 3, "image_undecodable": 784, "missing_id": 61},
    "duplicates": 1204,
    "near_duplicates": 3310,
    "conflicting_ids": 44,
    "files_read": 12,
    "files_skipped": 31,
    "bytes_read": 2_410_000_000,
    "bytes_written": 640_000_000,
    "seconds": 191.2,
    "rows_per_s": 1255.2,
    "mb_per_s": 12.6,
    "peak_mb": 1430.2,
    "worker_peak_mb": 402.7,
    "not_read": ["orders.csv"],
    "products": 60_111,
    "products_train": 48_012,
    "products_unseen": 12_099,
    "families": 31_877,
    "images": 239_000,
    "items": 1_200_000,
}
NO_REJECTS = {**FULL, "rows": 239_152, "rejected": 0, "by_reason": {}}
ALL_REJECTED = {"source": "x.parquet", "rows": 3, "committed": 0, "rejected": 3, "by_reason": {"image_empty": 3}}
SPARSE = {"rows": 3, "committed": 3}
FIGURES = {"full": FULL, "no rejects": NO_REJECTS, "all rejected": ALL_REJECTED, "sparse": SPARSE, "nothing": {}}
SOURCES = [SourceTime(name=f"part-{n:02d}.parquet", rows=20_000, bytes=200_000_000, seconds=16.0 + (n == 7) * 30) for n in range(14)]


def example(reason="image_undecodable", **changes):
    known = {
        "message": "it is broken",
        "source_file": "part-03.parquet",
        "source_row": 7,
        "item_id": "sku-1",
        "original": None,
        "record": "{}",
    }
    return Example(**{"reason": reason, **known, **changes})


def encoded(kind="JPEG", side=(320, 240), **options):
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(colours).resize(side, Image.Resampling.BICUBIC).save(stream, kind, **options)
    return stream.getvalue()


def png(width, height, body):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


class Tags(HTMLParser):
    """Every tag of a page, and whether all are closed in order."""

    VOID = ("meta", "link", "img")

    def __init__(self, page):
        super().__init__()
        self.open, self.found, self.attributes = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", FIGURES)
def test_table_and_page_show_whatever_is_there(name):
    figures = FIGURES[name]
    told, page = report.table(figures, SOURCES if name == "full" else []), report_page.page(figures, SOURCES, [example()])
    assert told.splitlines()[0] == report.verdict(figures)
    assert not re.search(r"\bNone\b(?! of)", told)
    assert not any(line != line.rstrip() for line in told.splitlines())
    tags = Tags(page)
    assert {"script", "iframe", "svg", "object", "form"} & set(tags.found) == set()
    assert not any(attribute.startswith("on") for attribute in tags.attributes)
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert not re.search(r"url\(|@import|https?:", page)
    for reason in figures.get("by_reason", {}):
        assert reason in told
        assert f"<code>{reason}</code>" in page


def test_the_table_of_a_full_run():
    told = report.table(FULL, SOURCES)
    for said in (
        "239,152 of 240,000 records were accepted (version 14); 848 (0.35 %) were set aside for 3 reasons.",
        "new items",
        "177,400",
        "1,255 records/s, 12.6 MB/s, 3 min 11 s",
        "1.40 GiB all processes, 0.39 GiB the largest worker",
        "12 files, 31 skipped as unchanged, 2.41 GB read, 640.0 MB written",
        "3,310 near-duplicates",
        "60,111 products",
        "1,200,000 items now",
        "orders.csv",
    ):
        assert said in told
    assert told.index("part-07") < told.index("part-00")
    assert "part-12" not in told, "ten sources are enough"


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        (NO_REJECTS, "All 239,152 records were accepted (version 14)."),
        (ALL_REJECTED, "None of the 3 records can be used; each was set aside with a reason."),
        (SPARSE, "All 3 records were accepted."),
        ({}, "No record was read."),
        ({"rows": 0, "files_skipped": 12, "version": 4}, "No record was read: 12 files unchanged, version 4 stands."),
        ({**FULL, "version": None, "error": "too many"}, "Nothing was published: 848 of 240,000 records (0.35 %) cannot be used."),
        ({**FULL, "skipped": True}, "Nothing to do: this source was ingested before, and version 14 holds it."),
    ],
)
def test_the_verdict_is_one_sentence(figures, sentence):
    assert report.verdict(figures) == sentence


def test_a_run_that_was_refused_says_why():
    refused = {**ALL_REJECTED, "error": "3 of 3 <b>records</b> cannot be used; at most 5 % may be"}
    assert "3 of 3 &lt;b&gt;records&lt;/b&gt; cannot be used; at most 5 % may be" in report_page.page(refused, [], [])
    assert refused["error"] in report.table(refused, [])


@pytest.mark.parametrize("name", FIGURES)
def test_the_bar_adds_up_to_the_records_read(name):
    figures = FIGURES[name]
    shown = [int(count) for count in re.findall(r"flex-grow:(\d+)", report_page.page(figures, [], []))]
    assert sum(shown) == sum(part.count for part in report.parts(figures)) == figures.get("rows", 0)


def test_books_that_do_not_balance_are_told():
    assert "unaccounted" not in report_page.page(FULL, [], []).partition("</style>")[2]
    lost = {**FULL, "rejected": 800}
    assert [part.count for part in report.parts(lost) if part.key == "unaccounted"] == [48]
    assert "unaccounted for" in report.table(lost, [])
    doubled = {**FULL, "unchanged": 177_500}
    assert "these are 240,100 of 240,000 records read" in report_page.page(doubled, [], [])


def test_new_and_updated_are_told_apart_only_where_they_make_up_what_was_committed():
    assert [part.key for part in report.parts({**FULL, "updated": None})][:2] == ["committed", "unchanged"]


@pytest.mark.parametrize(
    ("count", "total", "told"),
    [
        (0, 0, "0 %"),
        (0, 9, "0 %"),
        (9, 9, "100 %"),
        (1, 10**6, "< 0.01 %"),
        (10**6 - 1, 10**6, "> 99.99 %"),
        (1, 3, "33.3 %"),
        (848, 240_000, "0.35 %"),
        (997, 1000, "99.70 %"),
    ],
)
def test_a_share_is_0_or_100_only_where_it_is(count, total, told):
    assert report.share(count, total) == told


NASTY = '<script>alert(1)</script>"><img src=x onerror=alert(2)> \u202egnp.exe \ud800 \x1b[31m \0'


def test_what_strangers_wrote_is_shown_and_does_nothing():
    svg = b'<svg xmlns="x" onload="alert(3)"><script>alert(4)</script></svg>'
    figures = {**FULL, "source": NASTY, "run": NASTY, "not_read": [NASTY], "by_reason": {NASTY: 848}}
    shown = [example(NASTY, message=NASTY, source_file=NASTY, item_id=NASTY, record=NASTY, original=svg)]
    page = report_page.page(figures, [SourceTime(name=NASTY, rows=1, bytes=1, seconds=1.0)], shown)
    tags = Tags(page)
    assert {"script", "svg"} & set(tags.found) == set()
    assert tags.found.count("img") == 0
    assert not any(attribute.startswith("on") for attribute in tags.attributes)
    assert page.count("&lt;script&gt;alert(1)") >= 7
    told = report.table(figures, [SourceTime(name=NASTY, rows=1, bytes=1, seconds=1.0)] * 2)
    for text in (page, told):
        text.encode()  # a lone surrogate would fail
        assert not set(text) & set("\u202e\x1b\0")
        assert "\\u202e" in text
    assert "svg+xml" not in page


def test_every_reason_is_explained_and_has_some_examples():
    page = report_page.page(FULL, [], [example(source_row=row) for row in range(30)] + [example("unheard_of")])
    assert page.count('class="card"') == report_page.EXAMPLES
    assert "6 of 784" in page
    assert "61, none shown" in page
    assert normalize.REASONS["missing_id"] in page
    assert "unheard_of" not in page


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_a_truncated_picture_is_shown_as_far_as_it_goes(kind):
    data = encoded(kind, interlace=0)
    seen = thumbnails.look(data[: len(data) // 2])
    assert seen.url
    assert seen.told.startswith(f"{kind} 320 x 240, ")
    assert seen.told.endswith("decoded in part")
    shown = thumbnail(seen)
    whole = thumbnail(thumbnails.look(data))
    assert shown.shape == whole.shape == (132, 176, 3)
    assert np.abs(shown[:30] - whole[:30]).mean() < 3
    assert np.abs(shown[-30:] - 160).mean() < 15, "grey, not black"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def thumbnail(seen):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(seen.url.partition(",")[2])))).astype(int)


@pytest.mark.parametrize(
    ("original", "told"),
    [
        (None, "no picture"),
        (b"", "a picture of 0 bytes"),
        (b"\0\xff" * 20, "40 bytes; not drawn"),
        (b"%PDF-1.7 and so on", "18 bytes; not drawn"),
        (encoded()[:30], "not drawn"),
        (encoded("BMP"), "not drawn"),
        (encoded("WEBP")[:900], "not drawn"),
        (b"GIF89a" + b"\xff" * 100, "not drawn"),
    ],
)
def test_what_is_no_picture_is_shown_as_bytes(original, told):
    seen = thumbnails.look(original)
    assert seen.url is None
    assert told in seen.told
    page = report_page.page(ALL_REJECTED, [], [example("image_empty", original=original)])
    assert '<pre class="tile">' in page
    assert "<img" not in page


def test_a_hex_dump_shows_the_first_bytes_and_what_is_printable():
    assert thumbnails.hexdump(b"\x89PNG\r\n\x1a\nAB") == "89 50 4e 47 0d 0a 1a 0a  .PNG....\n41 42                    AB"
    assert len(thumbnails.hexdump(bytes(10_000)).splitlines()) == 8


HUGE = {
    "png from its header": lambda: png(30_000, 30_000, b"x"),
    "png below the ingest's limit": lambda: png(7_000, 7_000, zlib.compress(bytes(1_000_000))),
    "jpeg at the limit": lambda: encoded("JPEG", (4_000, 2_000)),
    "progressive jpeg": lambda: encoded("JPEG", (4_000, 2_000), progressive=True),
    "jpeg above it": lambda: encoded("JPEG", (4_000, 2_001)),
    "webp": lambda: encoded("WEBP", (3_000, 2_000)),
    "thin jpeg": lambda: encoded("JPEG", (65_000, 100)),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_picture_does_not_cost_memory(name, monkeypatch):
    original = HUGE[name]()
    held, load = [], ImageFile.ImageFile.load

    def noted(image):
        held.append(image.width * image.height)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noted)
    tracemalloc.start()
    seen = thumbnails.look(original)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(held, default=0) <= thumbnails.DECODED
    assert peak < 20e6
    assert bool(seen.url) == (name in ("jpeg at the limit", "progressive jpeg"))


def test_a_page_has_an_upper_size():
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 300, 3), np.uint8))
    stream = io.BytesIO()
    noise.save(stream, "PNG")
    reasons = {f"reason_{n:03d}" + "\U0001f600" * 300: 1000 for n in range(200)}
    long = "\U0001f600'&\"" * 10_000
    shown = [
        example(reason, message=long, record=long, source_file=long, item_id=long, original=stream.getvalue())
        for reason in list(reasons)[:60]
        for _ in range(6)
    ]
    sources = [SourceTime(name=long, rows=1, bytes=1, seconds=1.0)] * 100
    figures = {**FULL, "by_reason": reasons, "rejected": 200_000, "source": long, "not_read": [long] * 1000}
    page = report_page.page(figures, sources, shown)
    assert 2e6 < len(page.encode()) < 3e6
    assert "160 other reasons" in page
    sections = re.findall(r"<section.*?</section>", page)
    assert len(sections) == report.REASONS
    assert all('class="card"' in section for section in sections), "what there is room for is shared out"
    assert len(report.table(figures, sources)) < 100_000


def test_where_the_time_went():
    assert [source.name for source in report.slowest(SOURCES)][:2] == ["part-07.parquet", "part-00.parquet"]
    page = report_page.page(FULL, SOURCES, [])
    assert "0.35 x" in page  # 16 of 46 seconds
    assert "1,250 rows/s" in page
    assert "12.5 MB/s" in page
    report_page.page(FULL, [SourceTime(name="a", rows=0, bytes=0, seconds=0.0)], [])
