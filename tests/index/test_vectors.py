"""Bulk encoding that is killed and goes on, and vectors that are taken from earlier ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from idem import manifest, storage
from index import run, vectors
from pipelines.items import open_items
from pipelines.table import ID_KEY, ITEMS
from train.embedder import Embedder

PROJECT = Path(__file__).parents[2]

DRIVER = """
import os, signal, sys
import numpy as np
from idem import cluster
from index import run, vectors

def encode(offsets, source, *, folder, encoders):
    _, left = vectors.pieces(offsets, source, folder=folder, encoders=encoders)
    encoder = vectors.Encoder(source, folder)
    for each in left[:3]:
        assert not encoder({name: np.array([value]) for name, value in each.items()})["error"][0]
    encoder._write(np.array(left[3]["offsets"]), np.array(left[3]["known"]))  # a fragment that nothing tells of yet
    os.kill(os.getpid(), signal.SIGKILL)

cluster.connect, vectors.encode = lambda: None, encode
run.run(run.IndexConfig(root=sys.argv[1]))
"""


@pytest.fixture
def counted(monkeypatch):
    """(pictures,) of each call of the embedder by what encodes the gallery: queries of the check come without titles, or pictures."""
    plain, calls = Embedder.encode, []

    def encode(self, images, texts, **settings):
        if settings:
            calls.append(len(images))
        return plain(self, images, texts, **settings)

    monkeypatch.setattr(Embedder, "encode", encode)
    return calls


@pytest.fixture
def killed(root):
    """The folder of vectors that a driver has left that got SIGKILL behind its third of eight chunks."""
    died = subprocess.run([sys.executable, "-c", DRIVER, root], cwd=PROJECT, timeout=120, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    (folder,) = Path(storage.Layout(root).vectors).iterdir()
    return folder


def plainly(root: str) -> np.ndarray:
    """The gallery's vectors, encoded at once."""
    layout = storage.Layout(root)
    known = open_items(layout.items).table(["item_id", "image", "title"], "role = 'catalog'")
    embedder = Embedder.load(manifest.current(layout.embedder, kind="embedder"))
    return embedder.encode(known["image"].to_pylist(), known["title"].to_pylist())


def change(root: str, item_id: str) -> None:
    """Another version of the items, in which one has another title."""
    dataset = lance.dataset(storage.join(storage.Layout(root).items, ITEMS))
    rows = dataset.to_table().to_pylist()
    for row in rows:
        if row["item_id"] == item_id:
            row["title"], row["content_hash"] = "another title", "other"
    table = pa.Table.from_pylist(rows, schema=dataset.schema).replace_schema_metadata({ID_KEY: "of the change"})
    lance.write_dataset(table, dataset.uri, mode="overwrite")


def made(root: str) -> tuple[Path, manifest.Manifest]:
    folder = manifest.current(storage.Layout(root).vectors, kind="vectors")
    return Path(folder), manifest.read(folder, kind="vectors")


def test_a_driver_that_got_sigkill_goes_on_behind_its_finished_chunks(root, killed, without_ray, counted):
    assert not (killed / manifest.NAME).exists()
    assert len(list((killed / vectors.PARTS).glob("*.json"))) == 3
    assert len(list((killed / vectors.NAME / "data").iterdir())) == 4, "three, and one that nothing tells of"
    run.run(run.IndexConfig(root=root))
    assert counted == [5] * 5, "three of eight chunks were done"
    folder, told = made(root)
    assert folder == killed
    assert not (folder / vectors.PARTS).exists()
    assert len(list((folder / vectors.NAME / "data").iterdir())) == 8
    assert sorted(told.files) == sorted(str(path.relative_to(folder)) for path in (folder / vectors.NAME).rglob("*") if path.is_file())
    np.testing.assert_allclose(vectors.read(str(folder / vectors.NAME))[1], plainly(root), atol=1e-5)


@pytest.mark.parametrize("kept", [0.5, None])
def test_a_chunk_whose_fragment_is_not_whole_is_encoded_again(root, killed, without_ray, counted, kept):
    """As a power cut leaves it: what tells of the chunk was on the disk, what it tells of was not."""
    told = json.loads(next((killed / vectors.PARTS).glob("*.json")).read_text())
    path = killed / vectors.NAME / "data" / json.loads(told["fragments"])[0]["files"][0]["path"]
    path.unlink() if kept is None else path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    run.run(run.IndexConfig(root=root))
    assert counted == [5] * 6
    np.testing.assert_allclose(vectors.read(str(made(root)[0] / vectors.NAME))[1], plainly(root), atol=1e-5)


class Mortal(vectors.Encoder):
    """Kills its own process, once, as the kernel would when memory is short: where the middle chunk is written and nothing tells of it."""

    def _write(self, offsets, known):
        written = super()._write(offsets, known)
        with Path(self.folder, "calls").open("a") as calls:
            calls.write(f"{offsets[0]} ")
        if offsets[0] == self.items.dataset.count_rows() // 2 and not (marker := Path(self.folder, "killed")).exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return written


@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_its_chunk_alone_is_encoded_again(ray_session, root, tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "Encoder", Mortal)
    layout = storage.Layout(root)
    items = open_items(layout.items)
    offsets = np.arange(items.count())
    source = vectors.Source(
        embedder=manifest.current(layout.embedder, kind="embedder"), items=layout.items, version=items.version, fields="both", batch_size=16
    )
    folder = tmp_path / "vectors"
    folder.mkdir()
    vectors.encode(offsets, source, folder=str(folder), encoders=2)
    assert (folder / "killed").exists()
    starts = sorted(map(int, (folder / "calls").read_text().split()))
    chunks = [int(rows[0]) for rows in vectors.chunks_of(len(offsets), 2)]
    assert starts == sorted([*chunks, len(offsets) // 2])
    assert len(list((folder / vectors.NAME / "data").iterdir())) == len(chunks)
    item_ids, matrix = vectors.read(str(folder / vectors.NAME))
    known = items.table(["item_id", "image", "title"])
    assert item_ids == known["item_id"].to_pylist()
    plain = Embedder.load(source.embedder).encode(known["image"].to_pylist(), known["title"].to_pylist())
    np.testing.assert_allclose(matrix, plain, atol=1e-5)


class Killed(BaseException):
    """Stands for SIGKILL of the driver: nothing of ours catches it."""


def test_a_driver_killed_between_its_commit_and_the_manifest_encodes_nothing_again(root, without_ray, counted, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(manifest.Plan, "write", lambda *a, **k: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run.run(run.IndexConfig(root=root))
    assert counted == [5] * 8
    run.run(run.IndexConfig(root=root))
    assert counted == [5] * 8
    folder, told = made(root)
    assert told.figures["encoded"] == 40
    assert not (folder / vectors.PARTS).exists()
    dataset = lance.dataset(str(folder / vectors.NAME))
    assert (dataset.version, dataset.count_rows()) == (1, 40)


def test_vectors_of_which_a_file_is_missing_are_made_again(root, without_ray, counted):
    run.run(run.IndexConfig(root=root))
    folder = made(root)[0]
    next((folder / vectors.NAME / "data").iterdir()).unlink()
    (folder / vectors.PARTS).mkdir()  # of a run that was killed at its very end
    run.run(run.IndexConfig(root=root))
    assert counted == [5] * 16
    np.testing.assert_allclose(vectors.read(str(folder / vectors.NAME))[1], plainly(root), atol=1e-5)


def test_an_item_whose_content_changed_is_encoded_again_and_no_other(root, without_ray, counted):
    run.run(run.IndexConfig(root=root))
    before = vectors.read(str(made(root)[0] / vectors.NAME))[1]
    counted.clear()
    change(root, "p007-0")
    run.run(run.IndexConfig(root=root))
    folder, told = made(root)
    assert (told.figures["encoded"], told.figures["reused"], counted) == (1, 39, [1])
    after = vectors.read(str(folder / vectors.NAME))[1]
    assert np.flatnonzero((after != before).any(axis=1)).tolist() == [7]
    np.testing.assert_allclose(after, plainly(root), atol=1e-5)


def test_vectors_of_other_fields_and_those_without_contents_are_not_taken(root, without_ray, items_again):
    run.run(run.IndexConfig(root=root))
    run.run(run.IndexConfig(root=root, fields="image"))
    assert made(root)[1].figures["reused"] == 0
    parent, embedder = storage.Layout(root).vectors, made(root)[1].inputs["embedder"]
    source = vectors.Source(embedder="", items="", version=1, fields="both", batch_size=1)
    assert vectors.earlier_vectors(parent, source, embedder)
    assert not vectors.earlier_vectors(parent, source, "another")
    for path in Path(parent).glob(f"*/{vectors.NAME}"):
        old = lance.dataset(str(path)).to_table(["item_id", "vector", "embedder"])
        shutil.rmtree(path)
        lance.write_dataset(old, str(path))
        of = manifest.read(str(path.parent), kind="vectors")
        files = [str(each.relative_to(path.parent)) for each in path.rglob("*") if each.is_file()]
        manifest.write(str(path.parent), kind="vectors", config=of.config, inputs=of.inputs, figures={}, files=files)
    assert not vectors.earlier_vectors(parent, source, embedder), "as they were before contents were stored"


def test_damaged_earlier_vectors_stand_in_nobodys_way(root, without_ray, items_again, caplog):
    run.run(run.IndexConfig(root=root))
    (made(root)[0] / manifest.NAME).write_text("{")
    items_again(41)
    run.run(run.IndexConfig(root=root))
    assert made(root)[1].figures["reused"] == 0
    assert "earlier vectors are not used" in caplog.text


def test_ids_and_contents_of_many_items_need_not_fit_one_array():
    """Arrow ends one array of strings at 2 GiB; chunks stand for that much."""
    ids = pa.chunked_array([["a", "b"], ["c"], ["d"]])
    contents = pa.chunked_array([["1"], ["2", None], ["4"]])
    earlier = pa.table({"item_id": pa.chunked_array([["d"], ["b", "a"]]), "content_hash": pa.chunked_array([["4", "2"], ["9"]])})
    assert vectors.same(ids, contents, earlier).tolist() == [-1, 1, -1, 0]
