"""Changes folded into the items: what is handed to the ingest, and the whole of it as the jobs do it."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from idem import manifest, schema, storage
from index import compact, registry, release
from index.changes import Tail, Writer
from index.searcher import Searcher
from pipelines.items import open_items

PROJECT = Path(__file__).parents[2]


def item(item_id: str, title: str, **more) -> dict:
    texts = dict.fromkeys(("lang", "mime", "style", "split", "source_file", "content_hash"), "")
    known = {"product_id": f"of {item_id}", "family_id": item_id, "category": "c", "role": "catalog", "id_split": "train"}
    return {"item_id": item_id, "title": title, **texts, **known, "width": 0, "height": 0, "source_row": 0, **more}


def items(*rows: dict, attributes: pa.DataType | None = None) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=schema.items(attributes))


def test_records_win_over_the_items_that_they_change():
    kept = pa.struct([pa.field("price", pa.int64())])
    put = items(item("a", "x", attributes={"price": 3}), item("b", "y", version=9), item("c", "z"), attributes=kept)
    made = compact.records(put, ["d", "e"], {"a": 5, "b": 3, "c": None, "d": 7}, {"item_id": "image_id", "title": "name"})
    rows = made.to_pylist()
    assert [(r["image_id"], r["name"], r["price"], r["version"], r["deleted"]) for r in rows] == [
        ("a", "x", 3, 6, False),
        ("b", "y", None, 9, False),
        ("c", "z", None, None, False),
        ("d", None, None, 8, True),
        ("e", None, None, None, True),
    ]
    assert compact.records(None, ["d"], {}, {}).to_pylist() == [{"item_id": "d", "version": None, "deleted": True}]


def test_what_is_handed_over_is_written_once(indexed):
    release.run(release.ReleaseConfig(root=indexed))
    layout = storage.Layout(indexed)
    there, known = release.Release.open(layout.releases), open_items(layout.items)
    folder = Path(layout.changes)

    def handed_over():
        found = compact.handed_over(folder, there, known, compact.NAMES)
        assert found
        return found

    with Writer(folder) as writer:
        assert compact.handed_over(folder, there, known, compact.NAMES) is None
        writer.put(items(item("new", "x"), item("p003-0", "y")))
        writer.delete(["new", "p004-0"])
        path, last, counts = handed_over()
        assert (last, counts) == (4, {"put": 1, "deleted": 2})
        assert pq.read_table(path)["image_id"].to_pylist() == ["p003-0", "new", "p004-0"]
        before = path.stat().st_mtime_ns
        assert handed_over()[0].stat().st_mtime_ns == before
        writer.delete(["p005-0"])
        assert handed_over()[1] == 5


def test_a_release_holds_the_changes_of_its_own_items_and_no_later_ones(indexed, items_again):
    from index import run

    layout = storage.Layout(indexed)
    first = release.run(release.ReleaseConfig(root=indexed))
    with Writer(layout.changes, segment=1) as writer:
        for n in range(5):
            writer.delete([f"x{n}"])
    items_again(41)
    compact.mark(Path(layout.changes), open_items(layout.items).id, 4)
    run.run(run.IndexConfig(root=indexed, fields="image"))  # pyright: ignore[reportCallIssue]
    second = release.run(release.ReleaseConfig(root=indexed))
    assert (first["folded"], second["folded"]) == (0, 4)
    assert release.Release.open(layout.releases).folded == 4
    assert [change.first for change in Tail(layout.changes, 4).news()] == [5]
    assert registry.main(["gc", "--keep", "2", *run_file(indexed)]) == 0
    assert len(Tail(layout.changes).news()) == 5, "the first release needs them all"
    assert registry.main(["gc", "--keep", "1", *run_file(indexed)]) == 0
    with pytest.raises(ValueError, match="begins at 5"):
        Tail(layout.changes).news()


def run_file(root: str, extra: str = "") -> list[str]:
    path = Path(root, "run.toml")
    path.write_text(f'root = "{root}"\n[release]\n[index]\nshards = 2\ngallery = "true"\n[ingest]\n{extra}')
    return [str(path)]


def job(name: str, run: str, *sets: str) -> dict:
    words = [word for each in sets for word in ("--set", each)]
    done = subprocess.run([sys.executable, "-m", name, run, *words], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.flow
@pytest.mark.slow
def test_changes_are_folded_into_a_release_and_a_kill_between_the_jobs_changes_nothing(tmp_path, embedder_alone, monkeypatch):
    root = str(tmp_path)
    records = {
        "image_id": [f"i{n}" for n in range(30)],
        "product_id": [f"p{n}" for n in range(30)],
        "title": [f"thing {n}" for n in range(30)],
    }
    pq.write_table(pa.table({**records, "version": list(range(30))}), tmp_path / "records.parquet")
    (run,) = run_file(root, f'source = "{tmp_path}/records.parquet"\nnear_distance = -1\n')
    for name in ("pipelines.ingest", "index.run", "index.release"):
        job(name, run)
    layout = storage.Layout(root)
    with Writer(layout.changes) as writer:
        writer.put(items(item("i3", "another thing"), item("new", "a new thing"), item("gone", "put and deleted")))
        writer.delete(["gone", "i7"])
    plain = compact.started

    def dies(name, run, sets):
        if name == "index.run":
            raise KeyboardInterrupt
        return plain(name, run, sets)

    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(compact, "started", dies)
    with pytest.raises(KeyboardInterrupt):
        compact.compact(run, [])
    monkeypatch.setattr(compact, "started", plain)
    told = compact.compact(run, [])
    assert (told["put"], told["deleted"], told["rejected"], told["folded"]) == (2, 2, 0, 5)
    expected = sorted({f"i{n}" for n in range(30)} - {"i7"} | {"new"})
    assert sorted(open_items(layout.items).table(["item_id"])["item_id"].to_pylist()) == expected
    assert sorted(Searcher.open(layout.releases).item_ids) == expected
    assert open_items(layout.items).take(["i3"], ["title"])["title"].to_pylist() == ["another thing"]
    vectors = manifest.read(manifest.current(layout.vectors, kind="vectors"), kind="vectors").figures
    assert (vectors["encoded"], vectors["reused"]) == (2, 28)
    assert compact.compact(run, [])["skipped"]
