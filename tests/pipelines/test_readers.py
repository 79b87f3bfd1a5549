import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from idem import images, storage
from pipelines.reading import lines, readers
from pipelines.reading.sources import plan_source
from pipelines.records import BATCH_ROWS, Columns
from tests.pipelines.conftest import S3Server
from tests.pipelines.formats import (
    FORMATS,
    csv_bytes,
    expected,
    make_rows,
    read_and_fetch,
    read_plan,
    read_source,
    seen,
    tar_bytes,
    upload,
    write_rows,
)

COLUMNS = Columns()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("unit_rows", [4096, 70])
def test_the_same_rows_give_the_same_records_in_every_format(tmp_path: Path, kind: str, unit_rows: int) -> None:
    rows = make_rows()
    path = write_rows(tmp_path, kind, rows)
    found = read_and_fetch(path, unit_rows=unit_rows)
    assert seen(found) == expected(rows)
    assert {r["source_file"] for r in found} == {Path(path).name}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_over_s3(tmp_path: Path, s3_server: S3Server, kind: str) -> None:
    rows = make_rows(200)
    path = Path(write_rows(tmp_path, kind, rows))
    uri = storage.join(s3_server.uri, "in a folder")
    upload(tmp_path, uri)
    assert seen(read_and_fetch(storage.join(uri, path.name), unit_rows=70)) == expected(rows)


TITLES = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(['"', '","', "\n", "a\r\nb", "\0", '5" cup', ";\t"])


@settings(deadline=None, max_examples=60)
@example(titles=["\r0"], unit_rows=1, kind="csv")
@given(titles=st.lists(TITLES, min_size=1, max_size=12), unit_rows=st.integers(1, 13), kind=st.sampled_from(["jsonl", "csv"]))
def test_units_of_any_size_give_the_same_records(
    tmp_path_factory: pytest.TempPathFactory, titles: list[str], unit_rows: int, kind: str
) -> None:
    path = tmp_path_factory.mktemp("lines") / f"a.{kind}"
    rows = [{"image_id": k, "product_id": "p", "title": title} for k, title in enumerate(titles)]
    path.write_bytes(csv_bytes(rows) if kind == "csv" else b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    plan = plan_source(str(path), COLUMNS, unit_rows=unit_rows)
    assert [unit.rows for unit in plan.units] == [min(unit_rows, len(rows) - k) for k in range(0, len(rows), unit_rows)]
    found = read_plan(plan).to_pylist()
    assert [(r["source_row"], r["item_id"], r["title"], r["fault"]) for r in found] == [
        (k, str(k), title.strip(), "") for k, title in enumerate(titles)
    ]


RAW = st.lists(
    st.sampled_from([b'"', b",", b"\n", b"\r", b"a", b"\0", b"\xff", b"1,p,t\n", b'2,p,"t\nu"\n', b'{"product_id": 1}\n']), max_size=25
)


@settings(deadline=None, max_examples=120)
@given(raw=RAW, unit_rows=st.integers(1, 5), kind=st.sampled_from(["jsonl", "csv"]))
def test_whatever_the_lines_hold(tmp_path_factory: pytest.TempPathFactory, raw: list[bytes], unit_rows: int, kind: str) -> None:
    head = b"image_id,product_id,title\n0,p,t\n" if kind == "csv" else b'{"image_id": 0, "product_id": 0, "title": "t"}\n'
    path = tmp_path_factory.mktemp("lines") / f"a.{kind}"
    path.write_bytes(head + b"".join(raw))
    whole = read_source(path)
    assert read_source(path, unit_rows=unit_rows) == whole
    assert [r["source_row"] for r in whole] == list(range(len(whole)))
    assert all((r["fault"] == "record_unreadable") == (r["original"] is not None) for r in whole)


def test_lines_that_cannot_be_read(tmp_path: Path) -> None:
    good = json.dumps({"image_id": "good", "product_id": "p", "title": "t"}).encode()
    bad = [b'{"image_id": ', b"[1, 2]", b'{"title": "\xff"}', b"[" * 100_000, b"9" * 5000, b"\0"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, *bad, b"", b"  ", good]) + b"\n")
    found = read_source(tmp_path / "a.jsonl")
    assert [r["fault"] for r in found] == ["", *["record_unreadable"] * len(bad), ""]
    assert [r["original"] for r in found[1:-1]] == [line + b"\n" for line in bad]
    assert {(r["item_id"], r["product_id"]) for r in found[1:-1]} == {("", "")}
    assert all(r["fault_message"] for r in found[1:-1])


def test_csv_that_cannot_be_read(tmp_path: Path) -> None:
    lines = [b"1,p,ok", b"2,p", b"3,p,t,more", b'4,p,"never closed', b"5,p,ok", b"6,p,\xff", b'7,p,"a"b', b"8,p,nul\0byte", b'9,p,5" cup']
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([b"image_id,product_id,title", *lines]) + b"\r\n")
    found = read_source(tmp_path / "a.csv")
    assert [r["item_id"] or r["original"][:1].decode() for r in found] == list("123456789")
    assert [k for k, r in enumerate(found, 1) if r["fault"]] == [2, 3, 4, 6, 7]
    assert (found[7]["title"], found[8]["title"]) == ("nul\0byte", '5" cup')
    assert "2 fields where the header has 3" in found[1]["fault_message"]


def test_a_line_without_end_is_one_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_RECORD", 1000)
    good = b'{"image_id": 1, "product_id": 1, "title": "t"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + b"x" * 5000 + b"\n" + good)
    (tmp_path / "a.csv").write_bytes(b'image_id,product_id,title\n1,1,t\n2,2,"open\n' + b"3,3,t\n" * 1000)
    found = read_source(tmp_path / "a.jsonl")
    assert [(r["fault"], len(r["original"] or b"")) for r in found] == [("", 0), ("record_unreadable", 1000), ("", 0)]
    found = read_source(tmp_path / "a.csv")
    assert (len(found), [k for k, r in enumerate(found) if r["fault"]]) == (1002, [1])


def test_lone_surrogates(tmp_path: Path) -> None:
    line = r'{"image_id": "a\ud800b", "product_id": "p", "title": "\udc00", "tags": ["\ud83d"], "image": "\ud83c\udf75.jpg"}'
    (tmp_path / "a.jsonl").write_text(line + "\n")
    (record,) = read_source(tmp_path / "a.jsonl", keep=["tags"])
    assert (record["item_id"], record["title"], record["attributes"]) == ("a\ufffdb", "\ufffd", {"tags": ["\ufffd"]})
    assert record["image_ref"] == "🍵.jpg"


def test_what_webdataset_says_without_json(tmp_path: Path) -> None:
    members = [
        ("train/0001.JPG", b"one"),
        ("train/0001.txt", "Tasse à café\n".encode()),
        ("train/0001.cls", b"17"),
        ("train/0001.npy", b"other"),
        ("train/0002.webp", b"two"),
        ("train/0002.cls", b"17"),
        ("train/._0002.jpg", b"of another system"),
        ("train/0003.json", b'{"image_id": "own", "product_id": "p", "title": "said", "mime": "image/PNG", "image": "elsewhere/x.png"}'),
        ("train/0003.txt", b"not said"),
        ("train/0004.json", b"{"),
        ("notes.md", b"about"),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    found = read_source(tmp_path / "a.tar")
    names = ("item_id", "product_id", "title", "image", "image_ref", "mime", "fault")
    assert [tuple(r[n] for n in names) for r in found] == [
        ("train/0001", "17", "Tasse à café", b"one", None, "jpg", ""),
        ("train/0002", "17", "", b"two", None, "webp", ""),
        ("own", "p", "said", None, "elsewhere/x.png", "image/png", ""),
        ("", "", "", None, None, "", "record_unreadable"),
    ]
    assert found[3]["original"] == b"{"


def test_a_picture_in_a_tar_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    members = [("a.jpg", b"x" * 1001), ("a.cls", b"1"), ("b.jpg", b"y"), ("b.cls", b"1")]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    assert [(r["item_id"], r["image"], r["fault"]) for r in read_source(tmp_path / "a.tar")] == [
        ("a", None, "image_too_many_bytes"),
        ("b", b"y", ""),
    ]


def test_packs_of_large_pictures_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PACK_BYTES", 3000)
    (tmp_path / "a.tar").write_bytes(tar_bytes([(f"{k}.{end}", b"1" * 1000) for k in range(9) for end in ("jpg", "cls")]))
    plan = plan_source(str(tmp_path / "a.tar"), COLUMNS)
    assert [t.num_rows for t in readers.read_unit(plan.units[0], plan.reading)] == [3, 3, 3]


def test_batches_are_small(tmp_path: Path) -> None:
    n = 2 * BATCH_ROWS + 1
    table = pa.table({"image_id": range(n), "product_id": ["p"] * n, "image": [b"x"] * n})
    pq.write_table(table, tmp_path / "a.parquet")
    plan = plan_source(str(tmp_path / "a.parquet"), COLUMNS)
    tables = list(readers.read_unit(plan.units[0], plan.reading))
    assert [t.num_rows for t in tables] == [BATCH_ROWS, BATCH_ROWS, 1]
    assert pa.concat_tables(tables)["source_row"].to_pylist() == list(range(n))


def test_values_of_many_types(tmp_path: Path) -> None:
    when = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
    structs = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = pa.array([{"bytes": b"x", "path": "a/x.JPG"}, {"bytes": None, "path": "b/y.png"}, None], structs)
    table = {
        "sku": [1, 2, None],
        "asin": pa.array(["p", "p", "q"]).dictionary_encode(),
        "photo": pictures,
        "name": pa.array([b"caf\xc3\xa9", b"\xff cup", None], pa.binary()),
        "version": pa.array([when, None, when], pa.timestamp("ns", "Europe/Paris")),
        "deleted": ["true", "1", "no"],
        "mime": [None, "IMAGE/PNG", ""],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    found = read_source(tmp_path / "a.parquet", Columns(item_id="sku", product_id="asin", image="photo", title="name"))
    names = ("item_id", "product_id", "image", "image_ref", "title", "version", "deleted", "mime")
    assert [tuple(r[n] for n in names) for r in found] == [
        ("1", "p", b"x", None, "café", "2026-03-01T12:30:00+00:00", True, "jpg"),
        ("2", "p", None, "b/y.png", "\ufffd cup", "", True, "image/png"),
        ("", "q", None, None, "", "2026-03-01T12:30:00+00:00", False, ""),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tar"])
def test_attributes_that_do_not_fit(tmp_path: Path, kind: str) -> None:
    rows = [{"image_id": k, "product_id": 1, "title": "t", "price": 1.5} for k in range(3000)]
    rows[2990]["price"] = "a lot"
    late = [f"{k}" for k in range(3000)]
    path = tmp_path / f"a.{kind}"
    for k, row in enumerate(rows):
        row["filler"] = late[k] + "x" * 400  # beyond the head
    if kind == "tar":
        path.write_bytes(tar_bytes((f"{k}.json", json.dumps(row).encode()) for k, row in enumerate(rows)))
    else:
        path.write_bytes(csv_bytes(rows) if kind == "csv" else b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    plan = plan_source(str(path), COLUMNS, keep=["price"])
    assert plan.reading.kept == pa.struct([("price", pa.float64())])
    found = read_plan(plan).to_pylist()
    assert [k for k, r in enumerate(found) if r["fault"]] == [2990]
    assert (found[2990]["fault"], found[2990]["attributes"], found[2990]["item_id"]) == ("attribute_type", {"price": None}, "2990")
    assert all(word in found[2990]["fault_message"] for word in ("'price'", "a lot", "double"))


def test_nested_attributes_stay_as_they_are(tmp_path: Path) -> None:
    kind = pa.struct([("tags", pa.list_(pa.string())), ("size", pa.struct([("w", pa.int32())]))])
    values = {"tags": [["a"], None], "size": [{"w": 1}, {"w": 2}]}
    base = {"image_id": [1, 2], "product_id": [1, 1], "image": [b"x", b"y"]}
    arrays = {name: pa.array(values[name], kind.field(name).type) for name in values}
    pq.write_table(pa.table(base | arrays), tmp_path / "a.parquet")
    plan = plan_source(str(tmp_path / "a.parquet"), COLUMNS, keep=["tags", "size"])
    assert plan.reading.kept == kind
    assert read_plan(plan)["attributes"].to_pylist() == [{"tags": ["a"], "size": {"w": 1}}, {"tags": None, "size": {"w": 2}}]
    extra = [{"image_id": 1, "product_id": 1, "title": "t", "size": {"w": 1}}, {"image_id": 2, "product_id": 1, "size": {"w": 1, "h": 2}}]
    (tmp_path / "a.jsonl").write_text(json.dumps(extra[0]) + "\n" + " " * 1_100_000 + "\n" + json.dumps(extra[1]))
    found = read_source(tmp_path / "a.jsonl", keep=["size"])
    assert [r["fault"] for r in found] == ["", "attribute_type"]
