import io
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lance.fragment import write_fragments
from PIL import Image

from idem import job, manifest, schema, storage
from pipelines import ingest, runs, table
from pipelines.items import open_items
from pipelines.rejects import open_rejects
from tests.pipelines import hostile
from tests.pipelines.catalogues import opened, picture, write

ROWS = 60
BAD = {3: "image_undecodable", 10: "missing_id", 2: "superseded", 31: "image_empty", 45: "empty_record", 59: "missing_id"}


def catalogue(folder: Path, rows: int = ROWS) -> Path:
    """`rows` records in two files of several row groups, those of BAD unusable, row 5 without a picture."""
    records = [{"image_id": f"i{k:02}", "product_id": f"p{k // 4}", "title": f"cup {k}", "image": picture(k)} for k in range(rows)]
    records[5]["image"] = None
    records[6]["image"] = picture(6, 400)
    for row, changes in {
        3: {"image": picture(3)[:-200]},
        10: {"image_id": None},
        17: {"image_id": "i02"},
        31: {"image": b""},
        45: {"image": None, "title": ""},
        59: {"product_id": ""},
    }.items():
        records[row].update(changes)
    folder.mkdir(exist_ok=True)
    half = rows // 2
    for name, part in (("a.parquet", records[:half]), ("b.parquet", records[half:])):
        pq.write_table(pa.Table.from_pylist(part), folder / name, row_group_size=8)
    pq.write_table(pa.table({"product_id": ["p0"], "family_id": ["handles"], "category": ["kitchen"]}), folder / "products.parquet")
    pq.write_table(pa.table({"query": ["cup"]}), folder / "queries.parquet")
    return folder


@pytest.fixture(scope="module")
def settings(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> ingest.IngestConfig:
    root = tmp_path_factory.mktemp("run")
    return ingest.IngestConfig(root=str(root), source=str(catalogue(root / "source")))


@pytest.fixture(scope="module")
def figures(settings: ingest.IngestConfig) -> dict:
    return ingest.run(settings)


pytestmark = pytest.mark.ray


def test_every_record_is_published_or_set_aside(settings: ingest.IngestConfig, figures: dict) -> None:
    items = open_items(storage.Layout(settings.root).items)
    found = items.table(schema.ITEMS.names)
    assert found.schema.equals(schema.ITEMS)
    told = open_rejects(storage.Layout(settings.root).items).light.to_pylist()
    key = lambda r: (r["source_file"], r["source_row"])  # noqa: E731
    kept, aside = set(map(key, found.to_pylist())), set(map(key, told))
    assert not kept & aside
    assert kept | aside == {(name, row) for name in ("a.parquet", "b.parquet") for row in range(ROWS // 2)}
    row = {("a.parquet", 0): 0, ("b.parquet", 0): ROWS // 2}
    assert {row[r["source_file"], 0] + r["source_row"]: r["reason"] for r in told} == BAD
    assert figures["by_reason"] == Counter(BAD.values())
    assert (figures["rows"], figures["committed"], figures["rejected"]) == (ROWS, ROWS - len(BAD), len(BAD))
    assert figures["not_read"] == ["queries.parquet"]
    assert (figures["products"], figures["products_train"] + figures["products_unseen"]) == (15, 15)
    assert figures["images"] == figures["committed"]  # one has none, and one that has is superseded


def test_items_lie_in_the_order_of_the_source_and_as_normalised(settings: ingest.IngestConfig, figures: dict) -> None:
    items = open_items(storage.Layout(settings.root).items)
    assert items.version == figures["version"]
    assert items.table(["item_id"])["item_id"].to_pylist() == [f"i{2 if k == 17 else k:02}" for k in range(ROWS) if k not in BAD]
    assert items.images(["i07", "i05"]) == [picture(7), None]
    (large,) = items.take(["i06"], ["image", "width", "height", "family_id"]).to_pylist()
    assert Image.open(io.BytesIO(large["image"])).size == (large["width"], large["height"]) == (256, 256)
    assert [r["family_id"] for r in items.take(["i00", "i06"], ["family_id"]).to_pylist()] == ["handles", "p1"]
    assert {index.name for index in items.dataset.describe_indices()} == {
        f"{name}_idx" for name in ("item_id", "product_id", "content_hash", "phash")
    }


def test_a_finished_run_is_not_repeated(settings: ingest.IngestConfig, figures: dict, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before = opened(settings.root)
    assert ingest.run(settings) == {**figures, "skipped": True}
    after = opened(settings.root)
    assert (after.id, after.version) == (before.id, before.version)
    assert "nothing new in" in caplog.text


def test_another_setting_reads_all_again(settings: ingest.IngestConfig, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"root": str(tmp_path)})
    first = ingest.run(settings)
    second = ingest.run(settings.model_copy(update={"max_side": 100}))
    assert "skipped" not in second
    assert (second["inserted"], second["updated"], second["unchanged"]) == (0, 1, first["committed"] - 1)  # one picture is that large
    uri = storage.Layout(str(tmp_path)).items
    new, old = open_items(uri), open_items(uri, version=first["version"])
    assert new.version > old.version
    assert new.id != old.id
    assert [i.take(["i06"], ["width"])["width"][0].as_py() for i in (old, new)] == [256, 100]
    assert len(open_rejects(uri).addresses) == len(BAD)  # those of the first run are answered by the second


def test_only_new_files_are_read(settings: ingest.IngestConfig, tmp_path: Path) -> None:
    source = catalogue(tmp_path / "source")
    other = settings.model_copy(update={"root": str(tmp_path), "source": str(source)})
    ingest.run(other)
    more = [{"image_id": k, "product_id": "p0", "title": k, "image": picture(n)} for n, k in enumerate(("i07", "new"), 200)]
    pq.write_table(pa.Table.from_pylist(more), source / "c.parquet")
    told = ingest.run(other)
    assert (told["rows"], told["inserted"], told["updated"], told["files_read"], told["files_skipped"]) == (2, 1, 1, 1, 2)
    assert opened(tmp_path).images(["i07", "new"]) == [picture(200), picture(201)]
    assert opened(tmp_path).take(["new"], ["family_id"])["family_id"].to_pylist() == ["handles"]
    assert opened(tmp_path).count() == ROWS - len(BAD) + 1


def test_columns_kept_for_filters(ray_session: None, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    rows = [
        {"image_id": f"i{k}", "product_id": "p", "title": "t", "price": k * 1.5, "specs": {"colour": "red" if k % 2 else "blue"}}
        for k in range(6)
    ]
    write(source / "1.parquet", rows, price=pa.float64(), specs=pa.struct({"colour": pa.string()}))
    settings = ingest.IngestConfig(root=str(tmp_path), source=str(source), attributes=("price", "specs"))
    ingest.run(settings)
    items = opened(tmp_path)
    assert items.table(["item_id"], "attributes.price > 3 AND attributes.specs.colour = 'red'")["item_id"].to_pylist() == ["i3", "i5"]
    with pytest.raises(ValueError, match="holds other columns than this run gives: they differ in attributes"):
        ingest.run(settings.model_copy(update={"attributes": ()}))


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_too_many_rejects_publish_nothing(settings: ingest.IngestConfig, figures: dict) -> None:
    before = opened(settings.root)
    with pytest.raises(ValueError, match=r"5 of 60 records .* cannot be used \(.*1 empty_record,.*at most 5% may be") as caught:
        ingest.run(settings.model_copy(update={"max_reject_fraction": 0.05, "max_side": 99}))
    assert "report.html" in str(caught.value)
    after = opened(settings.root)
    assert (after.id, after.version, after.count()) == (before.id, before.version, figures["committed"])


def test_none_left_is_an_error(ray_session: None, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image_id": ["a"], "product_id": ["p"], "image": [b"no"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"1 of 1 records .* cannot be used \(1 image_unreadable\)"):
        ingest.run(ingest.IngestConfig(root=str(tmp_path), source=str(tmp_path / "a.parquet"), max_reject_fraction=1))
    with pytest.raises(ValueError, match="no finished items"):
        open_items(storage.Layout(str(tmp_path)).items)


def test_what_a_killed_ingest_left_is_removed_and_every_version_stays(settings: ingest.IngestConfig, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"root": str(tmp_path)})
    uri = storage.Layout(str(tmp_path)).items
    first = ingest.run(settings)
    kept = files(Path(uri, table.ITEMS)) | files(Path(uri, table.REJECTS))
    orphans = [Path(uri, name, "data", "left.lance") for name in (table.ITEMS, table.REJECTS)]
    for orphan in orphans:
        orphan.write_bytes(b"left")
    write_fragments(pa.table({"item_id": ["x"]}), storage.join(uri, table.ITEMS), mode="overwrite", schema=pa.schema({"item_id": "string"}))
    written = files(Path(uri, table.ITEMS)) | files(Path(uri, table.REJECTS))
    assert len(written - kept) == 3
    ingest.run(settings.model_copy(update={"max_side": 100}))
    assert not (written - kept) & files(Path(uri))
    assert kept <= files(Path(uri))
    old = open_items(uri, version=first["version"])
    assert old.count() == first["committed"]
    assert old.images(["i07"]) == [picture(7)]


def test_files_of_a_writer_at_work_stay(settings: ingest.IngestConfig, figures: dict, tmp_path: Path) -> None:
    uri = storage.Layout(settings.root).items
    runs.sweep(uri)  # what the run that was refused has left
    with runs.held(runs.folder_of(uri, "another")):
        fresh = Path(uri, table.ITEMS, "data", "fresh.lance")
        fresh.write_bytes(b"not committed yet")
        assert runs.sweep(uri) == 0
        assert fresh.exists()
    assert runs.sweep(uri) == 1
    assert not fresh.exists()


def test_a_family_on_both_sides_is_told(ray_session: None, tmp_path: Path) -> None:
    n = 6
    columns = {
        "image_id": [f"i{k}" for k in range(n)],
        "product_id": [f"p{k // 2}" for k in range(n)],
        "image": [picture(k) for k in range(n)],
    }
    splits = ["train", "train", "train", "dev_unseen", "train", None]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({**columns, "family_id": ["f", None, "f", "f", "g", None], "id_split": splits}), path, row_group_size=2)
    made = ingest.run(ingest.IngestConfig(root=str(tmp_path), source=str(path)))
    assert (made["split_conflicts"], made["families_in_both_splits"], made["families"]) == (1, 1, 2)
    assert (made["products_train"], made["products_unseen"]) == (2, 1)


def test_damaged_rows_are_set_aside_and_the_others_stay(ray_session: None, tmp_path: Path) -> None:
    path = catalogue(tmp_path / "source") / "b.parquet"
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(3).data_page_offset
    data[start : start + 400] = b"\xff" * 400
    path.write_bytes(data)
    told = ingest.run(ingest.IngestConfig(root=str(tmp_path), source=str(tmp_path / "source")))
    assert told["by_reason"]["source_damaged"] == 8
    assert told["rows"] == ROWS
    damaged = open_rejects(storage.Layout(str(tmp_path)).items, ["source_damaged"]).light
    assert damaged["source_row"].to_pylist() == list(range(8, 16))


def test_without_a_source_the_shop_drawn_last_is_taken(ray_session: None, tmp_path: Path) -> None:
    settings = ingest.IngestConfig(root=str(tmp_path))
    with pytest.raises(ValueError, match="no finished catalog below"):
        ingest.run(settings)
    shop = manifest.Plan(parent=storage.Layout(str(tmp_path)).catalog, kind="catalog", config={}, inputs={})
    Path(shop.folder).mkdir(parents=True)
    (catalogue(tmp_path / "source") / "a.parquet").rename(Path(shop.folder, "records.parquet"))
    shop.write(figures={})
    assert ingest.run(settings)["rows"] == ROWS // 2


def test_too_little_disk_is_said_before_anything_is_written(
    settings: ingest.IngestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"too little disk for .*items"):
        ingest.run(settings.model_copy(update={"root": str(tmp_path)}))
    assert not files(tmp_path)


@pytest.mark.data
def test_real_photos(ray_session: None, shared_data: Path, tmp_path: Path) -> None:
    figures = ingest.run(ingest.IngestConfig(root=str(tmp_path), source=str(shared_data / "grocery")))
    assert (figures["committed"], figures["rejected"], figures["images"]) == (3490, 0, 3490)
    assert (figures["products_train"], figures["products_unseen"]) == (48, 12)
    assert open_items(storage.Layout(str(tmp_path)).items).count("role = 'catalog'") == 60


def test_the_command_line(settings: ingest.IngestConfig, figures: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(f'root = "{settings.root}"\n[ingest]\nsource = "{settings.source}"\n')
    assert job.main("pipelines.ingest", "ingest", ingest.IngestConfig, ingest.run, [str(run_file)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["skipped"], said["committed"]) == (True, True, figures["committed"])
    missing = ["--set", "ingest.columns.image=photo"]
    assert job.main("pipelines.ingest", "ingest", ingest.IngestConfig, ingest.run, [str(run_file), *missing]) == 2
    assert "no file in" in json.loads(capsys.readouterr().out)["error"]


def test_hostile_records_all_end_somewhere(ray_session: None, tmp_path: Path) -> None:
    """Through the whole job: each is one item, one reject or a tombstone, and the report shows the rejects."""
    cases = [case for case in hostile.hostile_cases() if not case.record["fault"]]  # those are found by readers
    names = ("product_id", "title", "lang", "version", "deleted", "mime", "image", "family_id", "category")
    rows = []
    for number, case in enumerate(cases):
        item_id = case.record["item_id"]
        rows.append({"image_id": f"h{number:03}" if item_id == "i1" else item_id, **{name: case.record[name] for name in names}})
    columns = pa.schema([("image_id", pa.string()), *((name, pa.string()) for name in names if name not in ("deleted", "image"))])
    columns = columns.append(pa.field("deleted", pa.bool_())).append(pa.field("image", pa.large_binary()))
    pq.write_table(pa.Table.from_pylist(rows, schema=columns), tmp_path / "hostile.parquet", row_group_size=16)
    told = ingest.run(ingest.IngestConfig(root=str(tmp_path), source=str(tmp_path / "hostile.parquet"), max_side=64, max_reject_fraction=1))
    kept = {r["source_row"] for r in opened(tmp_path).table(["source_row"]).to_pylist()}
    aside = {r["source_row"]: r["reason"] for r in open_rejects(storage.Layout(str(tmp_path)).items).light.to_pylist()}
    gone = {row for row, case in enumerate(cases) if case.reason == "deleted"}
    assert len(cases) >= 100
    assert not kept & aside.keys()
    assert kept | aside.keys() | gone == set(range(len(cases)))
    assert {row: case.reason for row, case in enumerate(cases) if case.reason not in ("", "deleted")}.items() <= aside.items()
    assert (told["committed"], told["rejected"], told["deleted"]) == (len(kept), len(aside), len(gone))
    page = Path(runs.folder_of(storage.Layout(str(tmp_path)).items, told["run"]), "report.html").read_text()
    assert "image_undecodable" in page
    assert len(page) < 3_000_000


def test_an_empty_file_beside_others_is_no_trouble(ray_session: None, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    one = {"image_id": "a", "product_id": "p", "title": "t", "image": picture(1)}
    write(source / "a.parquet", [one])
    settings = ingest.IngestConfig(root=str(tmp_path), source=str(source))
    ingest.run(settings)
    write(source / "b.parquet", [])
    assert ingest.run(settings)["rows"] == 0
    write(source / "c.parquet", [{**one, "title": "older"}])
    assert ingest.run(settings)["updated"] == 1
    assert ingest.run(settings)["skipped"]


def test_a_torn_note_of_another_run_stops_nobody(settings: ingest.IngestConfig, figures: dict, tmp_path: Path) -> None:
    uri = storage.Layout(settings.root).items
    folder = Path(runs.folder_of(uri, "torn"), "units", "x")
    folder.mkdir(parents=True)
    for name in ("lease.json", "files.json"):
        Path(runs.folder_of(uri, "torn"), name).write_bytes(b"")
    runs.sweep(uri)
    (folder / "done.json").write_bytes(b"{")
    assert runs.sweep(uri) == 0
