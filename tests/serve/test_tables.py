"""Reading galleries and queries: what is joined, kept, refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from idem.qrels import read_qrels
from serve import tables


def write(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    return write(
        tmp_path / "photos.parquet",
        image_id=[f"i{n}" for n in range(8)],
        product_id=["a", "a", "a", "b", "b", "c", "c", "c"],
        title=[f"title {n}" for n in range(8)],
        image=[bytes([n]) for n in range(8)],
        style=["x", "y"] * 4,
    )


def test_attributes_come_from_the_products_beside_the_file(photos, tmp_path):
    write(tmp_path / "products.parquet", product_id=["a", "b"], coarse=["f", "g"], group=["k", "k"])
    rows = tables.read(photos)
    assert rows.families.tolist() == ["f"] * 3 + ["g"] * 2 + [""] * 3
    assert rows.categories.tolist()[:4] == ["k"] * 4
    assert "products.parquet (coarse, group)" in rows.attributes


def test_named_products_win_over_columns_and_without_either_there_are_no_families(photos, tmp_path):
    assert set(tables.read(photos).families) == {""}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    named = write(elsewhere / "p.parquet", product_id=["a"], family_id=["f"])
    assert tables.read(photos, products=named).families.tolist()[:4] == ["f", "f", "f", ""]


def test_filters_are_sql_and_pictures_follow_the_rows(photos):
    rows = tables.read(photos, condition="style = 'y' AND product_id != 'b'")
    assert rows.ids.tolist() == ["i1", "i5", "i7"]
    assert rows.images([2, 0, 2]) == [b"\x07", b"\x01", b"\x07"]
    with pytest.raises(ValueError, match=r"no rows that meet .*style = 'z'.* \(of 8\)"):
        tables.read(photos, condition="style = 'z'")
    with pytest.raises(ValueError, match=r"'styles = 1' cannot be used.*Columns: image_id"):
        tables.read(photos, condition="styles = 1")


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_batches_bring_every_kept_row_once_with_its_own_picture(photos, monkeypatch, batch):
    monkeypatch.setattr(tables, "BATCH", batch)
    rows = tables.read(photos).keep(np.array([7, 0, 3, 4]))
    seen = {int(place): picture for places, pictures in rows.batches() for place, picture in zip(places, pictures, strict=True)}
    assert seen == {0: b"\x07", 1: b"\x00", 2: b"\x03", 3: b"\x04"}
    without = [int(place) for places, pictures in rows.batches(pictures=False) for place in places if not any(pictures)]
    assert sorted(without) == [0, 1, 2, 3]


def test_rows_per_product_are_bounded_and_drawn_by_the_seed(photos):
    rows = tables.read(photos)
    kept = tables.per_product(rows, 2, seed=1)
    assert sorted(kept.products.tolist()) == ["a", "a", "b", "b", "c", "c"]
    assert kept.ids.tolist() == tables.per_product(rows, 2, seed=1).ids.tolist()
    assert {tuple(tables.per_product(rows, 1, seed=s).ids) for s in range(9)} != {tuple(tables.per_product(rows, 1, seed=0).ids)}


def test_what_is_wrong_with_a_file_is_said(tmp_path, photos):
    with pytest.raises(ValueError, match="there is no such file"):
        tables.read(str(tmp_path / "nothing.parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        tables.read(str(tmp_path / "bad.parquet"))
    with pytest.raises(ValueError, match="lacks image_id or query_id and product_id; its columns are title"):
        tables.read(write(tmp_path / "t.parquet", title=["x"]))
    with pytest.raises(ValueError, match="holds no rows"):
        tables.read(write(tmp_path / "e.parquet", image_id=pa.array([], pa.string()), product_id=pa.array([], pa.string())))
    with pytest.raises(ValueError, match="lacks grade"):
        read_qrels(write(tmp_path / "q.parquet", query_id=["q"], product_id=["a"]))
    with pytest.raises(ValueError, match="grade 7"):
        read_qrels(write(tmp_path / "g.parquet", query_id=["q"], product_id=["a"], grade=[7]))


def test_pictures_as_hugging_face_writes_them_are_unwrapped(photos, tmp_path):
    plain = tables.read(photos)
    table = pq.read_table(photos)
    wrapped = [{"bytes": data, "path": None} for data in table["image"].to_pylist()]
    wrapped[3] = None
    at = table.column_names.index("image")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(table.set_column(at, "image", pa.array(wrapped, kind)), tmp_path / "wrapped.parquet")
    rows = tables.read(str(tmp_path / "wrapped.parquet"))
    assert rows.images([5, 3, 0]) == [plain.images([5])[0], None, plain.images([0])[0]]
    assert [p for _, pictures in rows.batches() for p in pictures] == [*plain.images([0, 1, 2]), None, *plain.images([4, 5, 6, 7])]


@pytest.mark.parametrize(("values", "kind"), [(["a.jpg"], "string"), ([{"path": "a.jpg"}], "struct<path: string>"), ([[1]], "list<")])
def test_an_image_column_of_another_type_is_named_with_its_type(tmp_path, values, kind):
    with pytest.raises(ValueError, match=f"column image must hold encoded pictures .* its type is {kind}"):
        tables.read(write(tmp_path / "t.parquet", image_id=["i"], product_id=["p"], image=values))


def test_queries_of_texts_alone_need_no_product(tmp_path):
    path = write(tmp_path / "queries.parquet", query_id=["q1"], query=["red mug"], lang=["en"])
    rows = tables.read(path, need_product=False)
    assert (rows.ids.tolist(), rows.texts.tolist(), rows.has_image) == (["q1"], ["red mug"], False)
    assert read_qrels(write(tmp_path / "q.parquet", query_id=["q1"] * 2, product_id=["a", "b"], grade=[3, 1])) == {"q1": {"a": 0, "b": 2}}
