"""Rejects that are repaired, or that a changed limit allows now, become items; the others stay as they are."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from idem import storage
from pipelines import ingest, replay, replayed, table, upkeep
from pipelines.items import Items, open_items
from pipelines.rejects import Rejects, open_rejects
from tests.pipelines import faults

pytestmark = pytest.mark.ray


@pytest.fixture
def settings(ray_session: None, tmp_path: Path) -> ingest.IngestConfig:
    """An ingest that set aside: 0 too large a picture, 1 no product, 2 damaged, 3 a superseded record."""
    rows = [
        {"image_id": "large", "product_id": "p", "title": "t", "image": faults.picture(1, 200)},
        {"image_id": "lost", "product_id": None, "title": "t", "image": faults.picture(2)},
        {"image_id": "broken", "product_id": "p", "title": "t", "image": faults.picture(3)[:-200]},
        {"image_id": "twice", "product_id": "p", "title": "first", "image": faults.picture(4)},
        {"image_id": "twice", "product_id": "p", "title": "second", "image": faults.picture(4)},
        {"image_id": "good", "product_id": "p", "title": "t", "image": faults.picture(5)},
    ]
    faults.write(tmp_path / "source", "a.parquet", rows)
    made = ingest.IngestConfig(root=str(tmp_path / "run"), source=str(tmp_path / "source"), max_pixels=10_000, max_reject_fraction=0.9)
    ingest.run(made)
    return made


def opened(settings: ingest.IngestConfig) -> tuple[Items, Rejects]:
    uri = storage.Layout(settings.root).items
    return open_items(uri), open_rejects(uri)


def open_rows(settings: ingest.IngestConfig) -> set[tuple[int, str]]:
    return {(row["source_row"], row["reason"]) for row in opened(settings)[1].light.to_pylist()}


def config(settings: ingest.IngestConfig, **told: object) -> replay.ReplayConfig:
    return replay.ReplayConfig(root=settings.root, **told)


LARGE, LOST, BROKEN, FIRST = (0, "image_too_many_pixels"), (1, "missing_id"), (2, "image_undecodable"), (3, "superseded")


def test_a_changed_limit_lets_in_what_it_allows_now(settings: ingest.IngestConfig) -> None:
    assert open_rows(settings) == {LARGE, LOST, BROKEN, FIRST}
    assert replay.run(config(settings), settings) == {"replayed": 0, "open": 4, "skipped": True}  # nothing would turn out otherwise
    allowing = settings.model_copy(update={"max_pixels": 100_000})
    told = replay.run(config(settings), allowing)
    assert (told["replayed"], told["committed"], told["rejected"], told["open"]) == (3, 1, 2, 3)
    items, _ = opened(settings)
    assert items.take(["large"], ["width", "source_file", "source_row"]).to_pylist() == [
        {"width": 200, "source_file": "a.parquet", "source_row": 0}
    ]
    assert open_rows(settings) == {LOST, BROKEN, FIRST}
    assert replay.run(config(settings), allowing)["skipped"]
    assert items.count() + 3 == 6


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_repaired_records(settings: ingest.IngestConfig, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"repaired.{kind}"
    rows = [{"source_file": "a.parquet", "source_row": 1, "product_id": "found"}]
    if kind == "parquet":
        image = {"source_file": "a.parquet", "source_row": 2, "product_id": None, "image": faults.picture(3)}
        pq.write_table(
            pa.Table.from_pylist(
                [*rows, image],
                schema=pa.schema({"source_file": "string", "source_row": "int64", "product_id": "string", "image": "binary"}),
            ),
            path,
        )
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    told = replay.run(config(settings, repaired=str(path)), settings)
    items, _ = opened(settings)
    assert items.take(["lost"], ["product_id"])["product_id"].to_pylist() == ["found"]
    assert items.images(["lost"]) == [faults.picture(2)]
    if kind == "parquet":
        assert items.take(["broken"], ["product_id"])["product_id"].to_pylist() == ["p"]
        assert open_rows(settings) == {LARGE, FIRST}
    else:
        assert told["committed"] == 1
        assert open_rows(settings) == {LARGE, BROKEN, FIRST}


def test_what_lost_to_another_record_is_replayed_when_asked_for(settings: ingest.IngestConfig) -> None:
    replay.run(config(settings, reasons=("superseded",)), settings)
    items, _ = opened(settings)
    assert items.take(["twice"], ["title"])["title"].to_pylist() == ["first"]


def test_a_roll_back_takes_the_replay_back_too(settings: ingest.IngestConfig) -> None:
    before, _ = opened(settings)
    replay.run(config(settings), settings.model_copy(update={"max_pixels": 100_000}))
    told = upkeep.run(upkeep.UpkeepConfig(root=settings.root, rollback_to=before.version))
    assert told["rolled_back_to"] == before.version
    after, _ = opened(settings)
    assert (after.id, after.count()) == (before.id, before.count())
    assert open_rows(settings) == {LARGE, LOST, BROKEN, FIRST}
    replay.run(config(settings), settings.model_copy(update={"max_pixels": 100_000}))
    assert open_rows(settings) == {LOST, BROKEN, FIRST}


def test_a_file_that_is_read_again_answers_its_rejects(settings: ingest.IngestConfig, tmp_path: Path) -> None:
    faults.write(tmp_path / "source", "a.parquet", [{"image_id": "lost", "product_id": "p", "title": "now", "image": faults.picture(2)}])
    ingest.run(settings)
    assert open_rows(settings) == set()


def test_repairs_that_fit_nothing(settings: ingest.IngestConfig, tmp_path: Path) -> None:
    path = tmp_path / "repaired.jsonl"
    for row, said in (
        (
            {"source_file": "a.parquet", "source_row": 5},
            r"1 repairs are for records that are not among the 4 open rejects: a.parquet row 5",
        ),
        ({"source_file": "a.parquet"}, r"names its record by source_file and source_row; found \['source_file'\]"),
        ({"source_file": "a.parquet", "source_row": 1, "colour": "red"}, "a repair has no field colour; allowed are item_id"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(ValueError, match=said):
            replay.run(config(settings, repaired=str(path)), settings)
    with pytest.raises(ValueError, match=r"repairs are read from parquet, jsonl, csv; found x.xls"):
        replay.run(config(settings, repaired="x.xls"), settings)


def test_the_command_line(settings: ingest.IngestConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    told = f'[ingest]\nsource = "{settings.source}"\nmax_pixels = 10000\nmax_reject_fraction = 0.9\n'
    path.write_text(f'root = "{settings.root}"\n{told}[replay]\nreasons = ["image_undecodable"]\n')
    assert replay.main([str(path)]) == 0  # it is damaged still
    said = json.loads(capsys.readouterr().out)
    assert (said["replayed"], said["committed"], said["open"]) == (1, 0, 4)
    assert replay.main([str(path), "--set", "ingest.max_pixels=100000", "--set", "replay.reasons=[]"]) == 0
    assert json.loads(capsys.readouterr().out)["committed"] == 1


def test_attributes_get_their_types_again() -> None:
    kept = pa.struct({"when": pa.timestamp("us"), "price": pa.float64(), "tags": pa.list_(pa.string())})
    value, fault = replayed.Attributes(kept).read({"when": "2026-01-05 10:00:00", "price": 3, "tags": ["a"]})
    assert (value["when"].year, value["price"], value["tags"], fault) == (2026, 3.0, ["a"], "")
    assert replayed.Attributes(kept).read(None) == (None, "")
    assert "do not fit" in replayed.Attributes(kept).read({"price": "cheap"})[1]
    assert replayed.Attributes(None).read({"price": 1}) == (None, "")


def test_rejects_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing was ingested there yet"):
        open_rejects(str(tmp_path / table.ITEMS))


def test_a_replay_is_of_one_source_and_finds_its_pictures_there(ray_session: None, tmp_path: Path) -> None:
    """Two shops name their pictures alike; what one lacked must not be taken from the other."""
    hows = []
    for shop, colour in (("a", 1), ("b", 2)):
        folder = tmp_path / shop
        folder.mkdir()
        (folder / "data.csv").write_text(f"image_id,product_id,title,image\n{shop}1,p{shop},t,1.jpg\n{shop}2,p{shop},t,2.jpg\n")
        (folder / "2.jpg").write_bytes(faults.picture(colour))
        hows.append(ingest.IngestConfig(root=str(tmp_path / "run"), source=str(folder / "data.csv")))
        ingest.run(hows[-1])
    (tmp_path / "b" / "1.jpg").write_bytes(faults.picture(9))
    told = replay.run(config(hows[1], reasons=("image_missing",)), hows[1])
    assert (told["replayed"], told["committed"], told["open"]) == (1, 1, 0)
    items, left = opened(hows[1])
    assert sorted(items.table(["item_id"])["item_id"].to_pylist()) == ["a2", "b1", "b2"]
    assert [row["item_id"] for row in left.light.to_pylist()] == ["a1"]
    assert replay.run(config(hows[0]), hows[0])["skipped"]


def test_yesterdays_record_does_not_go_over_todays(ray_session: None, tmp_path: Path) -> None:
    how = ingest.IngestConfig(root=str(tmp_path / "run"), source=str(tmp_path / "source"), max_pixels=10_000)
    good = {"image_id": "other", "product_id": "p", "title": "t", "image": faults.picture(1)}
    first = {"image_id": "x", "product_id": "p", "title": "yesterday", "image": faults.picture(2, 200)}
    faults.write(tmp_path / "source", "1.parquet", [good, first])
    ingest.run(how)
    faults.write(tmp_path / "source", "2.parquet", [{**first, "title": "today", "image": faults.picture(2)}])
    ingest.run(how)
    assert replay.run(config(how), how.model_copy(update={"max_pixels": 100_000}))["skipped"]
    assert opened(how)[0].take(["x"], ["title"])["title"].to_pylist() == ["today"]


def test_a_rerun_after_a_roll_back_has_rejects_of_its_own(ray_session: None, tmp_path: Path) -> None:
    how = ingest.IngestConfig(root=str(tmp_path / "run"), source=str(tmp_path / "source"))
    bad = {"image_id": "bad", "product_id": "p", "title": "t", "image": b"no picture"}
    good = {"image_id": "good", "product_id": "p", "title": "t", "image": faults.picture(1)}
    faults.write(tmp_path / "source", "1.parquet", [good])
    ingest.run(how)
    before, _ = opened(how)
    faults.write(tmp_path / "source", "2.parquet", [bad, {**good, "image_id": "more"}])
    for _ in range(2):
        ingest.run(how)
        assert open_rows(how) == {(0, "image_unreadable")}
        upkeep.run(upkeep.UpkeepConfig(root=how.root, rollback_to=before.version))
        assert open_rows(how) == set()
