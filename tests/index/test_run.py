import os
import signal
from pathlib import Path

import faiss
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from idem import manifest, storage
from index import plan, run, shard, tasks, vectors
from index.checking import Asked
from index.run import IndexConfig
from index.searcher import Searcher, Shard, exact
from pipelines.items import open_items
from train.embedder import Embedder


def config(root: str, **settings) -> IndexConfig:
    return IndexConfig(root=root, **settings)


def test_an_index_of_the_catalogue_pictures(root, without_ray):
    figures = run.run(config(root, shards=3))
    assert figures["gallery"] == figures["products"] == 40
    assert figures["rule"] == "rows with role catalog"
    assert figures["shard_sizes"] == [14, 13, 13]
    assert figures["recall@10"] == 1.0
    searcher = Searcher.open(manifest.current(storage.Layout(root).index, kind="index"))
    assert sorted(searcher.item_ids) == [f"p{p:03d}-0" for p in range(40)]


def test_a_picture_in_the_index_finds_itself_and_what_is_known_of_it(indexed):
    layout = storage.Layout(indexed)
    embedder = Embedder.load(manifest.current(layout.embedder, kind="embedder"))
    query = embedder.encode(open_items(layout.items).images(["p007-0"]), None)
    hit = Searcher.open(manifest.current(layout.index, kind="index")).search(query, 1)[0][0]
    assert (hit.item_id, hit.product_id, hit.family_id, hit.category, hit.title) == ("p007-0", "p007", "f003", "c1", "article 7")


def test_vectors_are_in_the_order_of_the_items_whatever_the_chunks(root, without_ray):
    run.run(config(root, gallery="role != 'x'", encoders=7))
    layout = storage.Layout(root)
    item_ids, matrix = vectors.read(storage.join(manifest.current(layout.vectors, kind="vectors"), vectors.NAME))
    items = open_items(layout.items).table(["item_id", "image", "title"])
    assert item_ids == items["item_id"].to_pylist()
    embedder = Embedder.load(manifest.current(layout.embedder, kind="embedder"))
    plain = embedder.encode(items["image"].to_pylist(), items["title"].to_pylist())
    np.testing.assert_allclose(matrix, plain, atol=1e-5)


def test_fields_image_reads_a_title_only_where_there_is_no_picture():
    assert vectors.texts_for("image", [b"x", None], ["a", "b"]) == ["", "b"]
    assert vectors.texts_for("both", [b"x", None], ["a", "b"]) == ["a", "b"]


def test_what_is_finished_is_skipped_and_what_is_damaged_is_made_again(indexed, monkeypatch):
    again = config(indexed, fields="image")
    assert run.run(again)["skipped"]
    folder = Path(manifest.current(storage.Layout(indexed).index, kind="index"))
    (folder / "shard-000.faiss").unlink()
    monkeypatch.setattr(vectors, "encode", lambda *a, **k: pytest.fail("the vectors were there"))
    assert "skipped" not in run.run(again)
    assert run.run(again)["skipped"]
    assert "skipped" not in run.run(config(indexed, fields="image", shards=4))


def test_recall_below_the_bar_publishes_nothing(root, without_ray):
    poor = config(root, gallery="true", factory="PQ1x2", min_recall=0.9)
    with pytest.raises(ValueError, match=r"recall@10 of PQ1x2 .* is 0\.\d+ of queries by gallery, below min_recall = 0.9"):
        run.run(poor)
    assert not Path(storage.Layout(root).index, "CURRENT").exists()
    assert not list(Path(storage.Layout(root).index).glob("*/*"))
    assert run.run(config(root, gallery="true", factory="PQ1x2", min_recall=0.0))["recall@10"] < 0.9


def test_an_item_in_no_shard_or_in_two_is_found_out(indexed):
    layout = storage.Layout(indexed)
    folder = manifest.current(layout.index, kind="index")
    dataset = lance.dataset(storage.join(manifest.current(layout.vectors, kind="vectors"), vectors.NAME))
    item_ids, matrix = vectors.read(dataset.uri)
    parts = plan.shards(item_ids, 2)
    asked = {"gallery": Asked(matrix, np.arange(40))}
    assert run.check(folder, parts, dataset, asked, 0)["recall@10"] == 1.0
    meta = pq.read_table(Path(folder, "shard-001.parquet"))
    shard.write(folder, 2, index=shard.make_index(np.zeros((1, matrix.shape[1])), factory="Flat"), meta=[meta.slice(0, 1)])
    with pytest.raises(ValueError, match=f"{meta['item_id'][0]} in 2"):
        run.check(folder, [*parts, parts[1][:1]], dataset, asked, 0)
    with pytest.raises(ValueError, match=f"{meta.num_rows} items are not in exactly one shard.* in 0"):
        run.check(folder, parts[:1], dataset, asked, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gallery": "role = 'nothing'"}, "keeps none"),
        ({"gallery": "colour = 'red'"}, "gallery = .* cannot be applied to the items.*colour"),
        ({"shards": 41}, "allowed are 1 to 40"),
    ],
)
def test_impossible_settings_are_refused_before_the_work(root, settings, message):
    with pytest.raises(ValueError, match=message):
        run.run(config(root, **settings))
    assert not Path(storage.Layout(root).vectors).exists()


def test_errors_of_encoders_come_back_together_and_nothing_is_committed(root, without_ray, monkeypatch):
    monkeypatch.setattr(Embedder, "encode", lambda *a, **k: (_ for _ in ()).throw(ValueError("out of paint")))
    with pytest.raises(ValueError, match=r"8 of 8 chunks could not be encoded: items at offsets 0\.\..*out of paint"):
        run.run(config(root))
    assert not list(Path(storage.Layout(root).vectors).glob("*/vectors.lance/_versions/*"))


def test_all_shards_begin_with_one_training_and_are_filled_piece_by_piece(root, without_ray, monkeypatch):
    monkeypatch.setattr(shard, "AT_ONCE", 7)
    run.run(config(root, shards=3, factory="IVF4,Flat", parameters="nprobe=4"))
    folder = manifest.current(storage.Layout(root).index, kind="index")
    assert sorted(path.name for path in Path(folder).iterdir()) == [
        "manifest.json",
        *sorted(name for n in range(3) for name in shard.names(n)),
    ]
    parts = [Shard.open(folder, number).index for number in range(3)]
    assert [part.ntotal for part in parts] == [14, 13, 13]
    coarse = [faiss.downcast_index(part.quantizer).reconstruct_n(0, 4) for part in parts]
    assert all((each == coarse[0]).all() for each in coarse)
    item_ids, matrix = vectors.read(storage.join(manifest.current(storage.Layout(root).vectors, kind="vectors"), vectors.NAME))
    found = Searcher.open(folder).search(matrix, 5)
    assert [[hit.item_id for hit in hits] for hits in found] == [[item_ids[i] for i in rows] for rows in exact(matrix, matrix, 5)[1]]


def test_what_is_trained_on_is_drawn_evenly_and_always_the_same(monkeypatch):
    assert shard.sampled(5).tolist() == [0, 1, 2, 3, 4]
    monkeypatch.setattr(shard, "TRAIN_ROWS", 1000)
    rows = shard.sampled(10**9)
    assert (rows == shard.sampled(10**9)).all()
    assert len(np.unique(rows)) == 1000
    assert abs(rows.mean() / 5e8 - 1) < 0.1


def build_or_die(marker: str, work: shard.Work):
    """Build a shard; the first time for shard 1 the worker kills itself, as the kernel would when memory is short."""
    with Path(f"{marker}-{work.number}").open("a") as calls:
        calls.write("x")
    if work.number == 1 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return shard.build_from(work)


def refuse(number: int) -> int:
    if number % 2:
        raise ValueError(f"no {number}")
    return number


@pytest.mark.ray
def test_the_job_in_ray_and_again(ray_session, root):
    figures = run.run(config(root, batch_size=16))
    assert (figures["gallery"], figures["recall@10"]) == (40, 1.0)
    dataset = lance.dataset(storage.join(manifest.current(storage.Layout(root).vectors, kind="vectors"), vectors.NAME))
    assert dataset.count_rows() == 40
    assert dataset.version == 1, "one commit"
    assert run.run(config(root, batch_size=16))["skipped"]


@pytest.mark.ray
def test_a_killed_builder_costs_its_own_shard_alone(ray_session, indexed, tmp_path, monkeypatch):
    monkeypatch.undo()  # the loops of `indexed`; what follows is Ray
    layout, items = storage.Layout(indexed), open_items(storage.Layout(indexed).items)
    uri = storage.join(manifest.current(layout.vectors, kind="vectors"), vectors.NAME)
    chosen = run.choose(items, "", 0)
    marker = str(tmp_path / "killed")
    parts = [np.arange(0, 20), np.arange(20, 40)]
    trained = shard.prepare(str(tmp_path / "trained.faiss"), uri, "Flat", "")
    source = {"vectors": uri, "items": layout.items, "version": items.version, "folder": str(tmp_path / "out"), "trained": trained}
    work = [shard.Work(number=n, rows=rows, offsets=chosen.offsets[rows], **source) for n, rows in enumerate(parts)]
    assert tasks.in_parallel(build_or_die, [(marker, each) for each in work], desc="shard") == [list(shard.names(0)), list(shard.names(1))]
    assert [Path(f"{marker}-{n}").read_text() for n in (0, 1)] == ["x", "xx"]
    _, matrix = vectors.read(uri)
    asked = {"gallery": Asked(matrix, np.arange(40))}
    assert run.check(str(tmp_path / "out"), parts, lance.dataset(uri), asked, 0)["recall@10"] == 1.0


@pytest.mark.ray
def test_errors_of_tasks_are_raised_once_together(ray_session):
    with pytest.raises(ValueError, match="2 of 4 failed: number 1: ValueError: no 1; number 3: ValueError: no 3"):
        tasks.in_parallel(refuse, [(n,) for n in range(4)], desc="number")


class Killed(BaseException):
    """Stands for SIGKILL of the driver: nothing of ours catches it."""


def test_a_killed_encoding_goes_on_behind_its_last_finished_chunk(root, without_ray, monkeypatch):
    plain, calls = Embedder.encode, []

    def dies(self, images, texts, **settings):
        calls.append(len(images))
        if len(calls) == 4:
            raise Killed
        return plain(self, images, texts, **settings)

    monkeypatch.setattr(Embedder, "encode", dies)
    with pytest.raises(Killed):
        run.run(config(root))
    orphan = next(Path(storage.Layout(root).vectors).glob("*/vectors.lance/data")) / "orphan.lance"
    orphan.write_bytes(b"of a worker that was killed before it told")
    assert sum(calls[:4]) == 20
    run.run(config(root))
    assert sum(calls[4:9]) == 25, "three of eight chunks were done"
    folder = Path(manifest.current(storage.Layout(root).vectors, kind="vectors"))
    assert not list(folder.rglob("orphan.lance"))
    assert not (folder / vectors.PARTS).exists()
    item_ids, matrix = vectors.read(str(folder / vectors.NAME))
    assert item_ids == [f"p{p:03d}-0" for p in range(40)]
    assert np.isfinite(matrix).all()


def test_only_what_changed_is_encoded_again(root, without_ray, items_again, embedder_again):
    layout = storage.Layout(root)

    def made() -> manifest.Manifest:
        run.run(config(root))
        return manifest.read(manifest.current(layout.vectors, kind="vectors"), kind="vectors")

    def matrix() -> np.ndarray:
        return vectors.read(storage.join(manifest.current(layout.vectors, kind="vectors"), vectors.NAME))[1]

    assert made().figures["reused"] == 0
    before = matrix()
    items_again(43)
    figures = made().figures
    assert (figures["encoded"], figures["reused"]) == (3, 40)
    np.testing.assert_array_equal(matrix()[:40], before)
    embedder_again(1)
    assert made().figures["reused"] == 0


def test_what_is_the_same_is_told_by_id_and_content():
    earlier = pa.table({"item_id": ["a", "b", "c", "d"], "content_hash": pa.array(["1", "2", None, "4"])})
    now = pa.table({"item_id": ["d", "b", "c", "x", "a"], "content_hash": ["4", "other", "3", "4", "1"]})
    assert vectors.same(now["item_id"], now["content_hash"], earlier).tolist() == [3, -1, -1, -1, 0]


def test_a_killed_build_keeps_the_shards_that_were_finished(root, without_ray, monkeypatch):
    plain, built = shard.build_from, []

    def dies(work):
        built.append(work.number)
        if len(built) == 3:
            raise Killed
        return plain(work)

    monkeypatch.setattr(shard, "build_from", dies)
    with pytest.raises(Killed):
        run.run(config(root, shards=4, factory="IVF4,Flat", parameters="nprobe=4"))
    figures = run.run(config(root, shards=4, factory="IVF4,Flat", parameters="nprobe=4"))
    assert built == [0, 1, 2, 2, 3]
    assert figures["recall@10"] == 1.0
    assert len(Searcher.open(manifest.current(storage.Layout(root).index, kind="index")).item_ids) == 40


def test_a_build_killed_between_its_check_and_the_manifest_builds_nothing_again(root, without_ray, monkeypatch):
    plain, build, built = manifest.Plan.write, shard.build_from, []

    def dies(self, **settings):
        if self.kind == "index":
            raise Killed
        return plain(self, **settings)

    monkeypatch.setattr(shard, "build_from", lambda work: built.append(work.number) or build(work))
    with monkeypatch.context() as patched:
        patched.setattr(manifest.Plan, "write", dies)
        with pytest.raises(Killed):
            run.run(config(root, shards=3, factory="IVF4,Flat", parameters="nprobe=4"))
    assert run.run(config(root, shards=3, factory="IVF4,Flat", parameters="nprobe=4"))["recall@10"] == 1.0
    assert built == [0, 1, 2]
    folder = manifest.current(storage.Layout(root).index, kind="index")
    assert not Path(folder, run.TRAINED).exists()


def test_a_damaged_index_is_built_anew_even_where_its_training_was_left(root, without_ray):
    again = config(root, shards=2)
    run.run(again)
    folder = Path(manifest.current(storage.Layout(root).index, kind="index"))
    (folder / run.TRAINED).write_bytes(b"of a run that was killed at its very end")
    cut = folder / "shard-001.faiss"
    cut.write_bytes(cut.read_bytes()[:100])
    assert "skipped" not in run.run(again)
    assert len(Searcher.open(str(folder)).item_ids) == 40
    (folder / run.TRAINED).write_bytes(b"again")
    assert run.run(again)["skipped"]
    assert not (folder / run.TRAINED).exists()


def test_finished_shards_outlive_an_embedder_that_cannot_be_loaded_for_the_check(root, without_ray, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(run, "asked_of", lambda *a: (_ for _ in ()).throw(ValueError("no embedder")))
        with pytest.raises(ValueError, match="no embedder"):
            run.run(config(root))
    monkeypatch.setattr(shard, "build_from", lambda work: pytest.fail("the shards were there"))
    assert run.run(config(root))["recall@10"] == 1.0


def test_settings_are_tuned_and_told_and_used(root, without_ray):
    figures = run.run(config(root, gallery="true", factory="IVF8,Flat", target_recall=0.95, min_recall=0.5))
    assert figures["parameters"].startswith("nprobe=")
    searcher = Searcher.open(manifest.current(storage.Layout(root).index, kind="index"))
    assert f"nprobe={faiss.downcast_index(searcher.shards[0].index).nprobe}" == figures["parameters"]


def test_an_index_is_checked_with_every_kind_of_query(indexed):
    figures = manifest.read(manifest.current(storage.Layout(indexed).index, kind="index"), kind="index").figures
    assert figures["recall_by"] == {"gallery": 1.0, "image": 1.0, "text": 1.0}
