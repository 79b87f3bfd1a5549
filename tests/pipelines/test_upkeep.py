from pathlib import Path

import pytest

from idem import storage
from pipelines import ingest, runs, table, upkeep
from pipelines.items import open_items
from tests.pipelines import faults

pytestmark = pytest.mark.ray


@pytest.fixture
def settings(ray_session: None, tmp_path: Path) -> ingest.IngestConfig:
    """Items of two ingests, in many small fragments."""
    made = ingest.IngestConfig(root=str(tmp_path / "run"), source=str(tmp_path / "source"), unit_rows=10)
    faults.write(tmp_path / "source", "a.parquet", faults.rows(40))
    ingest.run(made)
    faults.write(tmp_path / "source", "b.parquet", faults.rows(40, 30, title="mug"))
    ingest.run(made)
    return made


def config(settings: ingest.IngestConfig, **told: object) -> upkeep.UpkeepConfig:
    return upkeep.UpkeepConfig(root=settings.root, **told)


def test_compaction_changes_the_order_of_nothing_and_no_id(settings: ingest.IngestConfig) -> None:
    uri = storage.Layout(settings.root).items
    before = open_items(uri)
    told = upkeep.run(config(settings))
    after = open_items(uri)
    assert told["fragments_before"] == len(before.dataset.get_fragments()) > told["fragments"] == len(after.dataset.get_fragments())
    assert (after.id, after.count(), told["rows"]) == (before.id, before.count(), before.count())
    columns = ["item_id", "title", "image", "source_row"]
    assert after.table(columns).sort_by("item_id") == before.table(columns).sort_by("item_id")
    assert sum(f.num_deletions for f in after.dataset.get_fragments()) == 0
    assert {index.name for index in after.dataset.describe_indices()} >= {"item_id_idx"}
    assert after.images(["i00031"]) == before.images(["i00031"])
    assert ingest.run(settings)["skipped"]


def test_old_versions_go_and_tagged_ones_stay(settings: ingest.IngestConfig) -> None:
    uri = storage.Layout(settings.root).items
    bound = open_items(uri)
    bound.keep("release-x")
    told = upkeep.run(config(settings, keep_days=0, tag="clean"))
    assert told["versions_removed"] > 3
    assert told["bytes_removed"] > 0
    assert open_items(uri, bound.version).count() == bound.count()
    with pytest.raises(ValueError, match=r"version 2 of the items at .* is not there"):
        open_items(uri, 2)
    assert open_items(uri).dataset.tags.list()["clean"]["version"] == told["version"]
    assert open_items(uri).count() == bound.count()


def test_rolling_back_and_on_again(settings: ingest.IngestConfig) -> None:
    uri = storage.Layout(settings.root).items
    newest = open_items(uri)
    first = next(
        v["version"]
        for v in newest.dataset.versions()
        if len(table.runs_of(table.open_table(storage.join(uri, table.ITEMS), v["version"]))) == 1
    )
    old = open_items(uri, first)
    told = upkeep.run(config(settings, rollback_to=first))
    assert told["rows"] == old.count()
    back = open_items(uri)
    assert (back.id, back.table(["item_id", "title"])) == (old.id, old.table(["item_id", "title"]))
    again = ingest.run(settings)  # what was rolled back counts as not read
    assert (again["files_read"], again["files_skipped"]) == (1, 1)
    assert open_items(uri).table(["item_id", "title"]).sort_by("item_id") == newest.table(["item_id", "title"]).sort_by("item_id")
    with pytest.raises(ValueError, match=r"version 99 is not there to roll back to; there are 1, 2"):
        upkeep.run(config(settings, rollback_to=99))
    with pytest.raises(ValueError, match="version 1 holds no items yet"):
        upkeep.run(config(settings, rollback_to=1))


def test_nothing_to_keep(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing was ingested there yet"):
        upkeep.run(upkeep.UpkeepConfig(root=str(tmp_path)))


def test_one_upkeep_at_a_time(settings: ingest.IngestConfig) -> None:
    folder = runs.folder_of(storage.Layout(settings.root).items, "upkeep")
    with runs.held(folder), pytest.raises(ValueError, match="is being worked on by process"):
        upkeep.run(config(settings))
