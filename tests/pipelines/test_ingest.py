import io
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lance.fragment import write_fragments
from PIL import Image

from idem import job, manifest, schema, storage
from pipelines import ingest
from pipelines.items import DATASET, REJECTS, open_items
from pipelines.normalize import OUTCOMES, RECORDS, Limits, normalize_records

ROWS = 60
BAD = {3: "image_undecodable", 10: "missing_id", 17: "duplicate_id", 31: "image_empty", 45: "empty_record", 59: "missing_id"}


def picture(seed: int, side: int = 40) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


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


def rejects(settings: ingest.IngestConfig, figures: dict) -> list[dict]:
    return lance.dataset(storage.join(settings.root, "items", REJECTS), version=figures["rejects_version"]).to_table().to_pylist()


def test_every_record_is_published_or_set_aside(settings: ingest.IngestConfig, figures: dict) -> None:
    items = open_items(storage.Layout(settings.root).items)
    table = items.table(schema.ITEMS.names)
    assert table.schema.equals(schema.ITEMS)
    told = rejects(settings, figures)
    key = lambda r: (r["source_file"], r["source_row"])  # noqa: E731
    kept, aside = set(map(key, table.to_pylist())), set(map(key, told))
    assert not kept & aside
    assert kept | aside == {(name, row) for name in ("a.parquet", "b.parquet") for row in range(ROWS // 2)}
    row = {("a.parquet", 0): 0, ("b.parquet", 0): ROWS // 2}
    assert {row[r["source_file"], 0] + r["source_row"]: r["reason"] for r in told} == BAD
    assert figures["by_reason"] == Counter(BAD.values())
    assert (figures["rows"], figures["committed"], figures["rejected"]) == (ROWS, ROWS - len(BAD), len(BAD))
    assert figures["not_read"] == ["queries.parquet"]
    assert (figures["products"], figures["products_train"] + figures["products_unseen"]) == (15, 15)
    assert figures["images"] == figures["committed"] - 1


def test_items_lie_in_the_order_of_the_source_and_as_normalised(settings: ingest.IngestConfig, figures: dict) -> None:
    items = open_items(storage.Layout(settings.root).items)
    assert items.version == figures["version"]
    assert items.table(["item_id"])["item_id"].to_pylist() == [f"i{k:02}" for k in range(ROWS) if k not in BAD]
    assert items.images(["i07", "i05"]) == [picture(7), None]
    (large,) = items.take(["i06"], ["image", "width", "height", "family_id"]).to_pylist()
    assert Image.open(io.BytesIO(large["image"])).size == (large["width"], large["height"]) == (256, 256)
    assert [r["family_id"] for r in items.take(["i00", "i06"], ["family_id"]).to_pylist()] == ["handles", "p1"]
    assert [index.name for index in items.dataset.describe_indices()] == ["item_id_idx"]


def test_a_finished_run_is_not_repeated(settings: ingest.IngestConfig, figures: dict) -> None:
    before = manifest.read(storage.Layout(settings.root).items, kind="items")
    assert ingest.run(settings) == {**figures, "skipped": True}
    assert manifest.read(storage.Layout(settings.root).items, kind="items") == before


def test_another_setting_makes_another_version(settings: ingest.IngestConfig, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"root": str(tmp_path)})
    first = ingest.run(settings)
    second = ingest.run(settings.model_copy(update={"max_side": 100}))
    assert "skipped" not in second
    uri = storage.Layout(str(tmp_path)).items
    new, old = open_items(uri), open_items(uri, version=first["version"])
    assert new.version > old.version
    assert new.id != old.id
    assert [i.take(["i06"], ["width"])["width"][0].as_py() for i in (old, new)] == [256, 100]


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_too_many_rejects_publish_nothing(settings: ingest.IngestConfig, figures: dict) -> None:
    before = files(Path(settings.root, "items"))
    with pytest.raises(ValueError, match=r"6 of 60 records .* cannot be used \(1 duplicate_id, 1 empty_record,.*at most 5% may be"):
        ingest.run(settings.model_copy(update={"max_reject_fraction": 0.05}))
    assert files(Path(settings.root, "items")) == before
    assert open_items(storage.Layout(settings.root).items).count() == figures["committed"]


def test_none_left_is_an_error(ray_session: None, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image_id": ["a"], "product_id": ["p"], "image": [b"no"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"1 of 1 records .* cannot be used \(1 image_unreadable\)"):
        ingest.run(ingest.IngestConfig(root=str(tmp_path), source=str(tmp_path / "a.parquet"), max_reject_fraction=1))
    with pytest.raises(ValueError, match="no finished items"):
        open_items(storage.Layout(str(tmp_path)).items)


def test_a_crash_before_the_manifest_leaves_the_old_version(
    settings: ingest.IngestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings.model_copy(update={"root": str(tmp_path)})
    first = ingest.run(settings)

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    changed = settings.model_copy(update={"max_side": 100})
    with monkeypatch.context() as patch:
        patch.setattr(ingest.manifest, "write", crash)
        with pytest.raises(RuntimeError, match="killed"):
            ingest.run(changed)
    uri = storage.Layout(str(tmp_path)).items
    assert open_items(uri).version == first["version"]
    assert open_items(uri).take(["i06"], ["width"])["width"][0].as_py() == 256
    ingest.run(changed)
    assert open_items(uri).take(["i06"], ["width"])["width"][0].as_py() == 100


def test_what_a_killed_ingest_left_is_removed_and_every_version_stays(settings: ingest.IngestConfig, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"root": str(tmp_path)})
    uri = storage.Layout(str(tmp_path)).items
    orphans = [Path(uri, name, "data", "left.lance") for name in (DATASET, REJECTS)]

    def kill_one() -> None:
        for orphan in orphans:
            orphan.parent.mkdir(parents=True, exist_ok=True)
            orphan.write_bytes(b"left")
        write_fragments(pa.table({"item_id": ["x"]}), storage.join(uri, DATASET), mode="overwrite", schema=pa.schema({"item_id": "string"}))

    kill_one()  # before there is any version, in the midst of the first commit
    Path(uri, DATASET, "_versions").mkdir()
    first = ingest.run(settings)
    before = {name: lance.dataset(storage.join(uri, name)).versions() for name in (DATASET, REJECTS)}
    kept = files(Path(uri, DATASET)) | files(Path(uri, REJECTS))
    kill_one()
    written = files(Path(uri, DATASET)) | files(Path(uri, REJECTS))
    assert len(written - kept) == 3
    ingest.run(settings.model_copy(update={"max_side": 100}))
    assert not (written - kept) & files(Path(uri))
    assert kept <= files(Path(uri))
    for name, versions in before.items():
        assert [v["version"] for v in lance.dataset(storage.join(uri, name)).versions()][: len(versions)] == [
            v["version"] for v in versions
        ]
    old = open_items(uri, version=first["version"])
    assert old.count() == first["committed"]
    assert old.images(["i07"]) == [picture(7)]


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


def test_a_damaged_file_is_named_and_publishes_nothing(ray_session: None, tmp_path: Path) -> None:
    path = catalogue(tmp_path / "source") / "b.parquet"
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(3).data_page_offset
    data[start : start + 400] = b"\xff" * 400
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"b.parquet cannot be read as parquet") as caught:
        ingest.run(ingest.IngestConfig(root=str(tmp_path), source=str(tmp_path / "source")))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no finished items"):
        open_items(storage.Layout(str(tmp_path)).items)


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


def test_gather_puts_what_workers_wrote_into_the_order_of_the_source(tmp_path: Path) -> None:
    empty = dict.fromkeys((f.name for f in RECORDS if f.type == pa.string()), "")
    made = []
    for name, row in (("b", 1), ("a", 20), ("b", 0), ("a", 3)):
        record = {**empty, "item_id": f"{name}{row}", "product_id": "p", "title": "t", "source_file": name, "source_row": row}
        bad = {**record, "item_id": "", "source_row": row + 100}
        table = pa.Table.from_pylist([{**r, "duplicate": False, "image": None} for r in (record, bad)], schema=RECORDS)
        made += ingest.write_outcomes(normalize_records(table, Limits()), str(tmp_path)).to_pylist()
    written = ingest.gather(made)
    assert (written.committed, written.rejected, written.by_reason) == (4, 4, {"missing_id": 4})
    assert not Path(tmp_path, DATASET, "_versions").exists()  # nothing is visible before the commit
    dataset, _ = ingest._publish(str(tmp_path), written, "id")
    assert dataset.to_table(columns=["item_id"])["item_id"].to_pylist() == ["a3", "a20", "b0", "b1"]
    assert ingest.write_outcomes(OUTCOMES.empty_table(), str(tmp_path)).num_rows == 0
