import json
import os
import time
from pathlib import Path

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from idem import storage
from pipelines.reading.sources import plan_source
from pipelines.records import Columns
from tests.pipelines.conftest import S3Server
from tests.pipelines.formats import FORMATS, csv_bytes, read_plan, read_source, tar_bytes, upload, write_rows

COLUMNS = Columns()


def write(path: Path, columns: dict[str, object], **options: object) -> str:
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def photos(path: Path, n: int = 4, start: int = 0, **columns: object) -> str:
    ids = [f"i{start + k}" for k in range(n)]
    return write(path, {"image_id": ids, "product_id": [f"p{k % 2}" for k in range(n)], "image": [b"x"] * n} | columns, row_group_size=3)


def texts(path: Path, n: int = 4, start: int = 0) -> str:
    rows = [{"image_id": f"i{k}", "product_id": f"p{k % 2}", "title": f"t{k}"} for k in range(start, start + n)]
    path.write_bytes(csv_bytes(rows) if path.suffix == ".csv" else "".join(json.dumps(row) + "\n" for row in rows).encode())
    return str(path)


def test_one_file(tmp_path: Path) -> None:
    plan = plan_source(photos(tmp_path / "a.parquet"), COLUMNS, unit_rows=3)
    assert [(u.number, u.first_row, u.rows, u.groups) for u in plan.units] == [(0, 0, 3, (0,)), (1, 3, 1, (1,))]
    assert (plan.rows, plan.reading.attributes, plan.not_read, plan.reading.images) == (4, (), (), str(tmp_path))
    assert [(f.name, f.format, f.rows, f.bytes) for f in plan.files] == [
        ("a.parquet", "parquet", 4, (tmp_path / "a.parquet").stat().st_size)
    ]
    assert plan.bytes == plan.files[0].bytes
    found = read_plan(plan).to_pylist()
    assert [(r["source_file"], r["source_row"], r["item_id"]) for r in found] == [("a.parquet", k, f"i{k}") for k in range(4)]


@pytest.mark.parametrize("unit_rows", [1, 3, 7, 1000])
def test_small_row_groups_make_one_unit(tmp_path: Path, unit_rows: int) -> None:
    sizes = [2, 2, 0, 5, 1, 1, 1]
    with pq.ParquetWriter(
        tmp_path / "a.parquet", pa.schema([("image_id", pa.int64()), ("product_id", pa.int64()), ("image", pa.binary())])
    ) as w:
        for size in sizes:
            w.write_table(pa.table({"image_id": range(size), "product_id": range(size), "image": [b"x"] * size}, schema=w.schema))
    plan = plan_source(str(tmp_path / "a.parquet"), COLUMNS, unit_rows=unit_rows)
    assert [g for u in plan.units for g in u.groups] == [0, 1, 3, 4, 5, 6]
    assert all(u.rows <= unit_rows or len(u.groups) == 1 for u in plan.units)
    assert all(a.rows + b.rows > unit_rows or len(b.groups) > 1 for a, b in zip(plan.units, plan.units[1:], strict=False))
    assert [u.first_row for u in plan.units] == [sum(v.rows for v in plan.units[:k]) for k in range(len(plan.units))]
    assert [r["source_row"] for r in read_plan(plan).to_pylist()] == list(range(12))


def test_a_folder_has_records_attributes_and_files_left_alone(tmp_path: Path) -> None:
    photos(tmp_path / "b.parquet", start=4)
    photos(tmp_path / "a.parquet")
    write(
        tmp_path / "products.parquet",
        {"product_id": ["p0", "p1"], "coarse": ["cups", None], "group": ["kitchen", ""], "title": ["A cup", "B"]},
    )
    write(tmp_path / "texts.parquet", {"product_id": ["p0", "p0"], "lang": ["en", "fr"]})
    (tmp_path / "README.md").write_text("about")
    plan = plan_source(str(tmp_path), COLUMNS)
    assert [u.name for u in plan.units] == ["a.parquet", "b.parquet"]
    assert [Path(a).name for a in plan.reading.attributes] == ["products.parquet"]
    assert plan.not_read == ("texts.parquet",)
    told = {r["product_id"]: (r["family_id"], r["coarse"], r["category"], r["title"], r["id_split"]) for r in read_plan(plan).to_pylist()}
    assert told == {"p0": ("", "cups", "kitchen", "A cup", ""), "p1": ("", "", "", "B", "")}


@pytest.mark.parametrize("attributes", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow"])
def test_attributes_may_come_in_another_format(tmp_path: Path, kind: str, attributes: str) -> None:
    rows = [{"image_id": f"i{k}", "product_id": k % 2, "image": b"x"} for k in range(4)]
    write_rows(tmp_path, kind, rows)
    products = [{"product_id": 0, "title": 'A "cup"'}, {"product_id": 1, "title": "B\nC"}]
    path = tmp_path / f"products.{attributes}"
    if attributes == "parquet":
        pq.write_table(pa.Table.from_pylist(products), path)
    else:
        path.write_bytes(csv_bytes(products) if attributes == "csv" else "".join(json.dumps(p) + "\n" for p in products).encode())
    assert [(r["item_id"], r["title"]) for r in read_source(tmp_path)] == [(f"i{k}", ['A "cup"', "B\nC"][k % 2]) for k in range(4)]


def test_what_a_record_says_goes_before_what_its_product_says(tmp_path: Path) -> None:
    photos(tmp_path / "a.parquet", title=["own", None, "", " "], coarse=["c"] * 4)
    write(tmp_path / "products.parquet", {"product_id": ["p0", "p1"], "title": ["of p0", "of p1"], "family_id": ["f0", None]})
    write(tmp_path / "second.parquet", {"product_id": ["p1"], "title": ["too late"], "family_id": ["f1"]})
    assert [(r["title"], r["family_id"]) for r in read_source(tmp_path)] == [
        ("own", "f0"),
        ("of p1", "f1"),
        ("of p0", "f0"),
        ("of p1", "f1"),
    ]


def test_endings_of_one_format_may_be_mixed(tmp_path: Path) -> None:
    texts(tmp_path / "a.jsonl")
    texts(tmp_path / "b.NDJSON", start=4)
    (tmp_path / "_hidden.jsonl").write_text("no json")
    assert [r["item_id"] for r in read_source(tmp_path)] == [f"i{k}" for k in range(8)]


def test_one_folder_is_one_format(tmp_path: Path) -> None:
    photos(tmp_path / "a.parquet")
    (tmp_path / "b.tar").write_bytes(tar_bytes([("1.jpg", b"x"), ("1.cls", b"1")]))
    with pytest.raises(ValueError, match=r"records in more than one format: a.parquet \(parquet\), b.tar \(webdataset\)"):
        plan_source(str(tmp_path), COLUMNS)
    assert [r["item_id"] for r in read_source(tmp_path, format="webdataset")] == ["1"]
    plan = plan_source(str(tmp_path), COLUMNS, format="parquet")
    assert [f.name for f in plan.files] == ["a.parquet"]


def test_formats_that_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"the name of .*a.xlsx does not say its format; allowed are parquet: .parquet; jsonl: .*lance"):
        plan_source(str(tmp_path / "a.xlsx"), COLUMNS)
    with pytest.raises(ValueError, match=r"holds no file of a known format; found a.xlsx; allowed are parquet: .parquet"):
        plan_source(str(tmp_path), COLUMNS)
    with pytest.raises(ValueError, match=r"the format 'excel' is unknown; allowed are parquet, jsonl, csv, webdataset, arrow, lance"):
        plan_source(str(tmp_path), COLUMNS, format="excel")
    photos(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"holds no file of the format csv; found a.parquet, a.xlsx"):
        plan_source(str(tmp_path), COLUMNS, format="csv")


def test_a_format_by_name(tmp_path: Path) -> None:
    path = tmp_path / "export.txt"
    Path(texts(tmp_path / "a.csv")).rename(path)
    assert [r["title"] for r in read_source(path, format="csv")] == ["t0", "t1", "t2", "t3"]


def test_a_folder_of_a_hugging_face_dataset(tmp_path: Path) -> None:
    structs = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for k in range(2):
        pictures = pa.array([{"bytes": b"x", "path": None}, {"bytes": None, "path": "y.png"}], structs)
        table = pa.table({"image_id": [2 * k, 2 * k + 1], "product_id": [1, 1], "image": pictures})
        with pa.OSFile(str(tmp_path / f"data-0000{k}-of-00002.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    plan = plan_source(str(tmp_path), COLUMNS)
    assert (len(plan.files), plan.not_read, plan.rows) == (2, (), 0)
    assert [(r["item_id"], r["image"], r["image_ref"]) for r in read_plan(plan).to_pylist()] == [
        ("0", b"x", None), ("1", None, "y.png"), ("2", b"x", None), ("3", None, "y.png"),
    ]  # fmt: skip


def test_lance_in_slices(tmp_path: Path) -> None:
    table = pa.table({"image_id": range(10), "product_id": [1] * 10, "image": [b"x"] * 10})
    lance.write_dataset(table, str(tmp_path / "shop.lance"), max_rows_per_file=6)
    plan = plan_source(str(tmp_path / "shop.lance"), COLUMNS, unit_rows=4)
    assert [(u.number, u.first_row, u.rows, u.offset) for u in plan.units] == [(0, 0, 4, 0), (1, 4, 2, 4), (2, 6, 4, 0)]
    assert (plan.files[0].name, plan.files[0].rows, plan.reading.images) == ("shop.lance", 10, str(tmp_path))
    assert plan.files[0].bytes > 0
    before = plan.files[0].fingerprint
    lance.write_dataset(table.slice(0, 1), str(tmp_path / "shop.lance"), mode="append")
    assert plan_source(str(tmp_path / "shop.lance"), COLUMNS).files[0].fingerprint != before
    with pytest.raises(ValueError, match=r"is a Lance dataset, but the format 'csv' is asked for"):
        plan_source(str(tmp_path / "shop.lance"), COLUMNS, format="csv")


def test_fingerprints_follow_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    photos(path)

    def prints() -> list[str]:
        return [f.fingerprint for f in plan_source(str(tmp_path), COLUMNS).files]

    first = prints()
    assert prints() == first
    assert [f.fingerprint for f in plan_source(str(path), COLUMNS).files] == first
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in first)
    os.utime(path, ns=(1, 1))
    touched = prints()
    photos(tmp_path / "b.parquet")
    both = prints()
    assert both[0] == touched[0]  # another file of records does not change it
    write(tmp_path / "products.parquet", {"product_id": ["p0"], "title": ["A"]})
    described = prints()
    assert len({*first, *touched, *both, *described}) == 5


@pytest.mark.parametrize("kind", FORMATS)
def test_files_that_are_done_are_left_out(tmp_path: Path, kind: str) -> None:
    rows = [{"image_id": f"i{k}", "product_id": 1, "image": b"x", "title": "t"} for k in range(4)]
    uri = write_rows(tmp_path, kind, rows)
    plan = plan_source(uri, COLUMNS)
    again = plan_source(uri, COLUMNS, done={plan.files[0].fingerprint})
    assert (again.units, again.rows, again.bytes) == ((), 0, 0)
    assert [f.fingerprint for f in again.files] == [f.fingerprint for f in plan.files]


def test_one_of_two_is_done(tmp_path: Path) -> None:
    photos(tmp_path / "a.parquet")
    photos(tmp_path / "b.parquet", start=4)
    plan = plan_source(str(tmp_path), COLUMNS)
    rest = plan_source(str(tmp_path), COLUMNS, done=[plan.files[0].fingerprint])
    assert ([u.name for u in rest.units], len(rest.files), rest.bytes) == (["b.parquet"], 2, plan.files[1].bytes)


def test_a_uri_is_as_good_as_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "with a space"
    folder.mkdir()
    photos(folder / "a.parquet")
    assert len(read_source(folder.as_uri())) == 4
    assert len(read_source((folder / "a.parquet").as_uri())) == 4


ALL = {"image_id": ["i"], "product_id": ["p"], "image": [b"x"]}


@pytest.mark.parametrize("missing", ALL)
def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path, missing: str) -> None:
    path = write(tmp_path / "a.parquet", {k: v for k, v in ALL.items() if k != missing} | {"color": ["red"]})
    exist = ", ".join([k for k in ALL if k != missing] + ["color"])
    with pytest.raises(ValueError, match=f"a.parquet has no column '{missing}'.*its columns are {exist}"):
        plan_source(path, COLUMNS)


def test_the_product_must_be_named_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([("1.jpg", b"x"), ("1.json", b'{"sku": 1}')]))
    with pytest.raises(
        ValueError, match=r"a.tar has no column 'product_id' \(for product_id\); its columns are sku, image_id, __key__, image"
    ):
        plan_source(str(tmp_path / "a.tar"), COLUMNS)
    assert [r["item_id"] for r in read_source(tmp_path / "a.tar", Columns(product_id="sku"))] == ["1"]


def test_texts_alone(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.csv")
    assert [(r["title"], r["image"], r["image_ref"]) for r in read_source(path)][:1] == [("t0", None, None)]
    with pytest.raises(ValueError, match=r"a.csv has no column 'image' \(for image\); its columns are image_id, product_id, title"):
        plan_source(path, Columns(image="image"))
    texts(tmp_path / "b.csv", start=4)
    (tmp_path / "products.csv").write_bytes(csv_bytes([{"product_id": "p0", "title": "other", "coarse": "c"}]))
    plan = plan_source(str(tmp_path), COLUMNS)
    assert ([f.name for f in plan.files], [Path(a).name for a in plan.reading.attributes]) == (["a.csv", "b.csv"], ["products.csv"])
    with pytest.raises(ValueError, match=r"no file in .* has a column 'image' \(for image\)"):
        plan_source(str(tmp_path), Columns(image="image"))


def test_a_column_asked_for_by_name_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'headline' \(for title\); its columns are image, image_id, product_id"):
        plan_source(write(tmp_path / "a.parquet", ALL), Columns(title="headline"))
    with pytest.raises(ValueError, match=r"no column 'price' to keep; the columns of its records are image, image_id, product_id"):
        plan_source(str(tmp_path / "a.parquet"), COLUMNS, keep=["price"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image": [7]}, "'image' .for image. is of type int64; binary, a struct of bytes and path, or paths or URLs as text is needed"),
        ({"title": [["a", "b"]]}, "'title' .for title. is of type list<.*a plain text or number is needed"),
    ],
)
def test_a_column_of_the_wrong_type(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_source(write(tmp_path / "a.parquet", ALL | changes), COLUMNS)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nope.parquet does not exist"):
        plan_source(str(tmp_path / "nope.parquet"), COLUMNS)
    with pytest.raises(ValueError, match=r"holds no file of a known format; found nothing"):
        plan_source(str(tmp_path), COLUMNS)
    for name, content in {"a.parquet": b"not parquet", "a.tar": b"no archive" * 99, "a.arrow": b"no stream", "a.csv": b"\xff\n"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as"):
            plan_source(str(tmp_path / name), COLUMNS)
    (tmp_path / "ds" / "_versions").mkdir(parents=True)
    (tmp_path / "ds" / "_versions" / "1.manifest").write_bytes(b"x")
    with pytest.raises(ValueError, match="ds cannot be read as a Lance dataset"):
        plan_source(str(tmp_path / "ds"), COLUMNS)


def test_sources_that_are_empty(tmp_path: Path) -> None:
    empty = {"image_id": pa.array([], pa.string()), "product_id": pa.array([], pa.string()), "image": pa.array([], pa.binary())}
    path = write(tmp_path / "a.parquet", empty)
    with pytest.raises(ValueError, match=r"the catalogue .*a.parquet is empty"):
        plan_source(path, COLUMNS)
    (tmp_path / "a.jsonl").write_bytes(b"\n")
    (tmp_path / "a.csv").write_bytes(b"image_id,product_id,title\n")
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(ValueError, match=f"the catalogue .*{name} is empty"):
            plan_source(str(tmp_path / name), COLUMNS)


def test_files_without_anything_we_know(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", {"word": ["x"]})
    with pytest.raises(ValueError, match=r"no file in .* has a column 'image'.*a.parquet: word; b.parquet: word"):
        plan_source(str(tmp_path), COLUMNS)


def test_a_csv_header_that_repeats(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"image_id,product_id,title,title\n1,1,a,b\n")
    with pytest.raises(ValueError, match=r"a.csv cannot be read as csv: its header names 'title' more than once"):
        plan_source(str(tmp_path / "a.csv"), COLUMNS)


def test_kept_columns_of_files_that_differ(tmp_path: Path) -> None:
    photos(tmp_path / "a.parquet", price=pa.array([1, 2, 3, 4], pa.int32()), size=["s"] * 4)
    photos(tmp_path / "b.parquet", start=4, price=pa.array([0.5, 1.5, None, 2.0]))
    plan = plan_source(str(tmp_path), COLUMNS, keep=["price", "size"])
    assert plan.reading.kept == pa.struct([("price", pa.float64()), ("size", pa.string())])
    found = read_plan(plan)["attributes"].to_pylist()
    assert found[3:6] == [{"price": 4.0, "size": "s"}, {"price": 0.5, "size": None}, {"price": 1.5, "size": None}]


def test_kept_columns_without_a_common_type(tmp_path: Path) -> None:
    photos(tmp_path / "a.parquet", price=[1, 2, 3, 4])
    photos(tmp_path / "b.parquet", start=4, price=["5", "six", None, "8"])
    found = read_source(tmp_path, keep=["price"])
    assert [r["attributes"]["price"] for r in found] == [1, 2, 3, 4, 5, None, None, 8]
    assert [r["fault"] for r in found] == ["", "", "", "", "", "attribute_type", "", ""]


@pytest.mark.parametrize(
    ("kind", "values", "kept"),
    [
        ("jsonl", [1, 2.5, None], pa.float64()),
        ("jsonl", [1, "two", 3], pa.int64()),  # what most are
        ("jsonl", [None, None], pa.string()),
        ("jsonl", [{"w": 1}, {"h": [1, None]}], pa.struct([("w", pa.int64()), ("h", pa.list_(pa.int64()))])),
        ("jsonl", ["2026-01-01"], pa.string()),
        ("csv", [1, "", 3], pa.int64()),
        ("csv", [1, 2.5, 'a "b"\nc'], pa.string()),
        ("csv", ["", ""], pa.string()),
        ("csv", ["true", "false"], pa.bool_()),
    ],
)
def test_types_of_kept_columns_are_inferred(tmp_path: Path, kind: str, values: list, kept: pa.DataType) -> None:
    rows = [{"image_id": k, "product_id": 1, "title": "t", "kept": value} for k, value in enumerate(values)]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(csv_bytes(rows) if kind == "csv" else "".join(json.dumps(row) + "\n" for row in rows).encode())
    assert plan_source(str(path), COLUMNS, keep=["kept"]).reading.kept == pa.struct([("kept", kept)])
    faults = [r["fault"] for r in read_source(path, keep=["kept"])]
    assert faults == ["attribute_type" if kept == pa.int64() and value == "two" else "" for value in values]


def test_planning_does_not_read_pictures(tmp_path: Path) -> None:
    n = 200
    photos(tmp_path / "a.parquet", n, image=[os.urandom(1_000_000) for _ in range(n)])
    start = time.process_time()
    plan_source(str(tmp_path), COLUMNS)
    assert time.process_time() - start < 0.5


def test_a_folder_on_s3(tmp_path: Path, s3_server: S3Server) -> None:
    photos(tmp_path / "a.parquet")
    (tmp_path / "products.csv").write_bytes(csv_bytes([{"product_id": "p0", "title": "A"}]))
    uri = storage.join(s3_server.uri, "shop")
    upload(tmp_path, uri)
    plan = plan_source(uri, COLUMNS)
    assert plan.reading.images == uri
    assert [(f.uri, f.rows) for f in plan.files] == [(f"{uri}/a.parquet", 4)]
    assert [r["title"] for r in read_plan(plan).to_pylist()] == ["A", "", "A", ""]
    done = {plan.files[0].fingerprint}
    assert plan_source(uri, COLUMNS, done=done).units == ()
    with pytest.raises(ValueError, match=r"s3://.*/nothing does not exist"):
        plan_source(storage.join(s3_server.uri, "nothing"), COLUMNS)


@pytest.mark.data
def test_the_public_sets(shared_data: Path) -> None:
    grocery = plan_source(str(shared_data / "grocery"), COLUMNS)
    assert (grocery.rows, len(grocery.reading.attributes), grocery.not_read) == (3490, 1, ())
    first = read_plan(grocery).slice(0, 1).to_pylist()[0]
    assert (first["coarse"], first["category"], first["id_split"]) == ("Apple", "Fruit", "train")
    emoji = plan_source(str(shared_data / "emoji"), COLUMNS)
    assert (emoji.rows, emoji.not_read) == (17533, ("qrels.parquet", "queries.parquet", "texts.parquet"))
