"""What a later file does to items that are there: newer and older versions, deletes, repeats, what is told of products."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from idem import storage
from pipelines import ingest
from pipelines.rejects import open_rejects
from tests.pipelines.catalogues import opened, picture, write

pytestmark = pytest.mark.ray


def test_versions_deletes_and_updates(ray_session: None, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    kinds = {"version": pa.timestamp("us"), "deleted": pa.bool_()}

    def row(item_id: str, day: int, title: str, deleted: bool = False) -> dict:
        when = np.datetime64(f"2026-01-{day:02}").astype("datetime64[us]").item()
        return {"image_id": item_id, "product_id": "p", "title": title, "version": when, "deleted": deleted}

    write(source / "1.parquet", [row("a", 5, "a5"), row("a", 3, "a3"), row("b", 1, "b1"), row("c", 1, "c1"), row("d", 1, "d1")], **kinds)
    settings = ingest.IngestConfig(root=str(tmp_path), source=str(source))
    first = ingest.run(settings)
    assert (first["inserted"], first["by_reason"]) == (4, {"superseded": 1})
    write(source / "2.parquet", [row("a", 4, "a4"), row("b", 2, "b2"), row("c", 9, "", deleted=True), row("d", 1, "d1")], **kinds)
    second = ingest.run(settings)
    assert {k: second[k] for k in ("inserted", "updated", "unchanged", "removed", "deleted", "rejected")} == {
        "inserted": 0,
        "updated": 1,
        "unchanged": 1,
        "removed": 1,
        "deleted": 1,
        "rejected": 1,
    }
    assert dict(opened(tmp_path).table(["item_id", "title"]).to_pandas().sort_values("item_id").itertuples(index=False)) == {
        "a": "a5",
        "b": "b2",
        "d": "d1",
    }
    rejected = open_rejects(storage.Layout(str(tmp_path)).items).light.to_pylist()
    assert [(r["source_file"], r["source_row"]) for r in rejected] == [("1.parquet", 1), ("2.parquet", 0)]
    assert "has version 1767571200000000, this one 1767484800000000" in rejected[1]["message"]
    write(source / "3.parquet", [row("c", 1, "c back")], **kinds)
    assert ingest.run(settings)["inserted"] == 1  # what is gone is not remembered


def test_repeats_are_flagged_and_stay(ray_session: None, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    side = 96
    colours = Image.fromarray(np.random.default_rng(5).integers(0, 255, (8, 8, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)

    def encoded(quality: int) -> bytes:
        stream = io.BytesIO()
        colours.save(stream, "JPEG", quality=quality)
        return stream.getvalue()

    one = {"image_id": "a", "product_id": "p", "title": "t", "image": encoded(90)}
    write(
        source / "1.parquet",
        [one, {**one, "image_id": "b"}, {**one, "image_id": "c", "image": encoded(60)}, {**one, "image_id": "d", "image": picture(9, 96)}],
    )
    told = ingest.run(ingest.IngestConfig(root=str(tmp_path), source=str(source)))
    assert (told["committed"], told["duplicates"], told["near_duplicates"]) == (4, 1, 1)
    write(source / "2.parquet", [{**one, "image_id": "e"}])
    assert ingest.run(ingest.IngestConfig(root=str(tmp_path), source=str(source)))["duplicates"] == 1
    flags = opened(tmp_path).table(["item_id", "duplicate_of", "near_duplicate_of"]).to_pylist()
    assert {f["item_id"]: (f["duplicate_of"], f["near_duplicate_of"]) for f in flags} == {
        "a": (None, None),
        "b": ("a", None),
        "c": (None, "a"),
        "d": (None, None),
        "e": ("a", None),
    }


def test_a_later_file_settles_the_rows_that_are_there(ray_session: None, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    kinds = {"family_id": pa.string(), "id_split": pa.string()}
    write(
        source / "1.parquet",
        [{"image_id": f"i{k}", "product_id": f"p{k // 2}", "title": "t", "id_split": "train"} for k in range(6)],
        **kinds,
    )
    settings = ingest.IngestConfig(root=str(tmp_path), source=str(source))
    ingest.run(settings)
    write(
        source / "2.parquet", [{"image_id": "new", "product_id": "p1", "title": "t", "family_id": "f", "id_split": "dev_unseen"}], **kinds
    )
    ingest.run(settings)
    found = opened(tmp_path).table(["item_id", "family_id", "id_split", "title"]).to_pylist()
    assert {r["item_id"]: (r["family_id"], r["id_split"]) for r in found} == {
        "i0": ("p0", "train"),
        "i1": ("p0", "train"),
        "i2": ("f", "dev_unseen"),
        "i3": ("f", "dev_unseen"),
        "i4": ("p2", "train"),
        "i5": ("p2", "train"),
        "new": ("f", "dev_unseen"),
    }


def test_records_that_are_all_older_are_taken_in_and_change_nothing(ray_session: None, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    one = {"image_id": "a", "product_id": "p", "title": "new", "version": 5}
    write(source / "a.parquet", [one], version=pa.int64())
    settings = ingest.IngestConfig(root=str(tmp_path), source=str(source))
    ingest.run(settings)
    write(source / "b.parquet", [{**one, "title": "old", "version": 4}], version=pa.int64())
    assert ingest.run(settings)["by_reason"] == {"superseded": 1}
    assert opened(tmp_path).table(["title"])["title"].to_pylist() == ["new"]
    assert ingest.run(settings)["skipped"]


def test_a_later_file_may_look_as_if_it_had_other_types(ray_session: None, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "1.csv").write_text("image_id,product_id,title,price\na,p,t,9.99\n")
    settings = ingest.IngestConfig(root=str(tmp_path), source=str(source), attributes=("price",))
    ingest.run(settings)
    (source / "2.csv").write_text("image_id,product_id,title,price\nb,p,t,10\nc,p,t,cheap\n")
    assert ingest.run(settings)["by_reason"] == {"attribute_type": 1}
    assert opened(tmp_path).table(["item_id"], "attributes.price >= 10")["item_id"].to_pylist() == ["b"]
