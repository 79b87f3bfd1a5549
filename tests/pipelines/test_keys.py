from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import keys


@settings(deadline=None, max_examples=40)
@given(texts=st.lists(st.text(max_size=8), max_size=30), buckets=st.integers(2, 7))
def test_every_row_is_in_the_bucket_of_its_text_and_in_its_order(texts: list[str], buckets: int, tmp_path_factory) -> None:
    uri = str(tmp_path_factory.mktemp("keys") / "k.arrow")
    bucket = keys.of_texts(texts, buckets)
    keys.write(uri, pa.table({"text": pa.array(texts, pa.string()), "row": np.arange(len(texts))}), bucket, buckets)
    found = [next(keys.read([(uri, number)])).to_pylist() for number in range(buckets)]
    for number, rows in enumerate(found):
        assert rows == [{"text": t, "row": k} for k, (t, b) in enumerate(zip(texts, bucket, strict=True)) if b == number]


@settings(deadline=None)
@given(one=st.integers(-(2**63), 2**63 - 1), flips=st.sets(st.integers(0, 63), max_size=keys.BANDS - 1))
def test_hashes_that_differ_in_few_bits_meet_in_a_band(one: int, flips: set[int]) -> None:
    other = (one & (2**64 - 1)) ^ sum(1 << bit for bit in flips)
    bands = keys.bands_of(np.array([one & (2**64 - 1), other], np.uint64).view(np.int64))
    assert (bands[0] == bands[1]).any()
    assert [int(b) for b in bands[0]] == [(one >> (16 * k)) & 0xFFFF for k in range(keys.BANDS)]


def test_an_object_store_that_fails_now_and_then_loses_no_key(s3_server, flaky) -> None:
    """An answer of 500 is longer than a short piece that was asked for: the client gives up there and then (storage.patiently)."""
    uri, rows = f"{s3_server.uri}/k.arrow", pa.table({"row": np.arange(40)})
    keys.write(uri, rows, np.arange(40) % 8, 8)
    _, dice = flaky(s3_server.endpoint, 0.2, stall=0, seed=3)
    found = [batch.column("row").to_pylist() for batch in keys.read([(uri, number) for number in range(8)] * 4)]
    assert found == [list(range(number, 40, 8)) for number in range(8)] * 4
    assert dice.happened["error"] > 3


def test_buckets_hold_what_fits_in_memory() -> None:
    assert keys.bucket_count(10) == 2  # never all ids in one place
    assert keys.bucket_count(200_000) == 4
    assert keys.bucket_count(10**10) == keys.MAX_BUCKETS


def test_what_is_said_of_a_product_is_told_once_and_clean() -> None:
    rows = {
        "source_row": [7, 8, 9],
        "product_id": ["p", "p", "q"],
        "family_id": [" f ", " f ", ""],
        "coarse": [""] * 3,
        "id_split": ["train", "train", ""],
    }
    assert keys.products(pa.table(rows)).to_pylist() == [
        {"source_row": 7, "product_id": "p", "family_id": "f", "coarse": "", "id_split": "train"},
        {"source_row": 9, "product_id": "q", "family_id": "", "coarse": "", "id_split": ""},
    ]


def test_pictures_are_dealt_by_content_and_by_bands(tmp_path: Path) -> None:
    items = pa.table(
        {
            "item_id": ["a", "b", "c"],
            "content_hash": ["0" * 64, "f" * 64, "1" * 64],
            "phash": pa.array([5, None, 7], pa.int64()),
            "image": pa.array([b"x", b"y", None], pa.large_binary()),
            "source_row": [0, 1, 2],
        }
    )
    found, dealt = keys.pictures(items, np.arange(3), near=True)
    assert [(r["item_id"], r["band"]) for r in found.to_pylist()] == [("a", 0), ("b", 0), ("a", 1), ("a", 2), ("a", 3), ("a", 4)]
    assert len(dealt) == 6
    assert keys.pictures(items, np.arange(3), near=False)[0].num_rows == 2
