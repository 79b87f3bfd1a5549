"""The training job on a shop of a few products: on Ray Train, without Ray, and by a table of assignments."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.train.v2.api.exceptions import WorkerGroupError

from idem import job, manifest, schema, storage
from pipelines import catalog, ingest
from pipelines.items import open_items
from tests.train.small import MODEL, ignore
from train import checkpoint, ray_train
from train.embedder import Embedder
from train.loop import Trainer
from train.run import LOCAL, TrainConfig, run
from train.selection import name_prototypes
from train.settings import LoopConfig


def settings(root: str, steps: int = 40, checkpoint_seconds: float = 3.0, patience: int = 0, tau: float = 0.1, **changes) -> TrainConfig:
    loop = LoopConfig(
        model=MODEL,
        minutes=60,
        steps=steps,
        batch=16,
        margin_batch=16,
        warm_up=0.4,
        prefixes=(8, 16),
        tau=tau,
        refresh=10,
        patience=patience,
        checkpoint_seconds=checkpoint_seconds,
    )
    return TrainConfig(root=root, fractions=(0.6, 0.2, 0.2), loop=loop, **changes)


@pytest.fixture(scope="module")
def root(ray_session, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("train"))
    catalog.run(catalog.CatalogConfig(root=folder, products=40, photos=2, side=48))
    ingest.run(ingest.IngestConfig(root=folder))
    return folder


def checkpoints(root: str) -> Path:
    return Path(storage.Layout(root).embedder) / "checkpoints"


def _flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _kill_a_worker_after_two_checkpoints(root: str, killed: list[int]) -> None:
    """And the newer one is damaged, so that the older has to do."""
    until = time.monotonic() + 200
    while time.monotonic() < until:
        kept = [folder for run in checkpoints(root).glob("*") for folder in checkpoint.found(run) if not checkpoint.damage(folder)]
        if len(kept) > 1:
            _flip_a_byte(kept[0] / checkpoint.MODEL)
            workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
            if workers:
                workers[0].kill()
                killed.append(workers[0].pid)
                return
        time.sleep(0.1)


@pytest.mark.ray
def test_a_killed_worker_costs_steps_and_nothing_else(root):
    """With both streams through Ray Data; and the newest checkpoint is damaged."""
    killed: list[int] = []
    assassin = threading.Thread(target=_kill_a_worker_after_two_checkpoints, args=(root, killed), daemon=True)
    assassin.start()
    figures = run(settings(root, steps=200, stream_rows=1))
    assassin.join(1)
    assert killed, "no worker was killed: the run was over before its second checkpoint"
    assert figures["steps"] == 200
    folder = manifest.current(storage.Layout(root).embedder, kind="embedder")
    embedder = Embedder.load(folder)
    vectors = embedder.encode(None, ["a red mug"])
    assert vectors.shape == (1, 16)
    assert not np.allclose(vectors, Embedder.load(folder, weights="untrained").encode(None, ["a red mug"]))
    prototypes = pq.read_table(Path(folder) / "prototypes.parquet")
    assert prototypes.num_rows == figures["products"]
    assert np.allclose(np.linalg.norm(np.stack(prototypes["vector"].to_numpy()), axis=1), 1, atol=1e-4)
    assert not list(checkpoints(root).iterdir())
    assert run(settings(root, steps=200, stream_rows=1))["skipped"]


@pytest.mark.ray
def test_products_never_to_be_trained_on_are_not(root):
    run(settings(root, steps=12, local=True))
    folder = manifest.current(storage.Layout(root).embedder, kind="embedder")
    known = set(pq.read_table(Path(folder) / "prototypes.parquet")["product_id"].to_pylist())
    unseen = open_items(storage.Layout(root).items).table(["product_id"], "id_split = 'dev_unseen'")["product_id"].to_pylist()
    assert unseen
    assert not known & set(unseen)


@pytest.mark.ray
def test_streams_of_ray_data_give_what_plain_reading_does(root):
    """The same rows and pictures, whatever their order; so the same centroids and the same R@1."""
    from train import ray_run

    config = settings(root, stream_rows=1, workers=4)
    layout = storage.Layout(root)
    items = open_items(layout.items)
    selection = config.selection(layout.items, items.version)
    streams = ray_run.datasets(config, selection, layout.items, items.version)
    plain, streamed = (Trainer(config.loop, selection.corpus(64), ignore) for _ in range(2))
    streamed.corpus.streams = {
        "members": lambda side: ray_run.blocks(streams["members"].iterator(), streamed.corpus.has_image, side),
        "held": lambda side: ray_run.blocks(streams["held"].iterator(), None, side),
    }
    blocks = list(streamed.corpus.members(0, 1, MODEL.side))
    rows, counted = (np.concatenate([getattr(b, name) for b in blocks]) for name in ("rows", "counted"))
    assert len(rows) % 4 == 0, "Ray Train cuts off what does not divide"
    assert sorted(rows[counted].tolist()) == list(range(len(selection.offsets)))
    assert blocks[0].pixels.dtype == np.uint8
    difference = float((plain.centroids() - streamed.centroids()).abs().max())
    print(f"largest difference of a centroid: {difference:.1e}")  # noqa: T201
    assert difference < 1e-5
    assert plain.encoder.held_recall() == streamed.encoder.held_recall()


@pytest.mark.ray
def test_one_product_only_is_refused_in_words(ray_session, tmp_path):
    catalog.run(catalog.CatalogConfig(root=str(tmp_path), products=1, photos=2, side=48))
    ingest.run(ingest.IngestConfig(root=str(tmp_path)))
    with pytest.raises(ValueError, match="at least 2 products to tell apart, found"):
        run(settings(str(tmp_path)))


@pytest.mark.ray
def test_a_run_without_ray_publishes_and_says_who_belongs_where(root):
    figures = run(settings(root, steps=24, checkpoint_seconds=1e-6, local=True, patience=20))
    folder = Path(manifest.current(storage.Layout(root).embedder, kind="embedder"))
    looks = [c["held_R@1"] for c in json.loads((folder / "curves.json").read_text()) if c.get("stage") == "margin" and "held_R@1" in c]
    assert len(looks) > 3
    assert figures["held_R@1"] == max(looks)
    made = manifest.read(str(folder), kind="embedder")
    assert made.figures == figures
    assert made.config["local"]
    assert {"README.md", "assignments.parquet", "prototypes.parquet", "curves.json", "untrained.safetensors"} <= set(made.files)
    table = pq.read_table(folder / "assignments.parquet")
    assert table.schema.equals(schema.ASSIGNMENTS)
    assert set(table["layer"].to_pylist()) == {"metadata"}
    prototypes = pq.read_table(folder / "prototypes.parquet")
    assert np.bincount(table["prototype_id"]).tolist() == prototypes["members"].to_pylist()
    of = dict(zip(prototypes["prototype_id"].to_pylist(), prototypes["product_id"].to_pylist(), strict=True))
    items = open_items(storage.Layout(root).items).take(table["item_id"].to_pylist(), ["product_id"])["product_id"].to_pylist()
    assert items == [of[u] for u in table["prototype_id"].to_pylist()]


@pytest.mark.ray
def test_a_run_that_fails_goes_on_from_its_checkpoint_also_elsewhere(root, monkeypatch):
    """Cut off without Ray after the centroids, ended by two workers."""
    keep, seen = checkpoint.keep, []

    def fail_after(trainer: Trainer, folder: Path) -> Path:
        seen.append(keep(trainer, folder))
        if len(seen) == 2:
            raise FloatingPointError("the loss is nan at step 16")
        return seen[-1]

    monkeypatch.setattr(checkpoint, "keep", fail_after)
    with pytest.raises(ValueError, match=r"the loss is nan at step 16\. Checkpoints are kept in"):
        run(settings(root, steps=41, checkpoint_seconds=1e9, local=True))
    assert [path.name for path in checkpoint.found(next(checkpoints(root).iterdir()))] == ["step-000000017"]
    monkeypatch.undo()
    figures = run(settings(root, steps=41, checkpoint_seconds=1e9))
    folder = Path(manifest.current(storage.Layout(root).embedder, kind="embedder"))
    assert figures["steps"] == 41
    curves = json.loads((folder / "curves.json").read_text())
    assert [c["stage"] for c in curves if "lr" in c][:3] == ["warm-up", "warm-up", "margin"]


def test_an_error_of_ours_is_found_behind_those_of_ray():
    ours, theirs = FloatingPointError("the loss is nan"), RuntimeError("a node is gone")
    wrapped = RuntimeError("in a task")
    wrapped.__cause__ = ours
    assert ray_train._ours(WorkerGroupError("failed", {0: theirs, 1: wrapped})) is ours
    assert ray_train._ours(alone := WorkerGroupError("failed", {0: theirs})) is alone


@pytest.mark.ray
@pytest.mark.slow
def test_an_error_of_ours_comes_out_of_ray_as_it_is(root):
    with pytest.raises(ValueError, match=r"^the loss is nan at step 0 \(warm-up\).* Checkpoints are kept in"):
        run(settings(root, max_failures=0, tau=1e-42))


def test_local_is_a_switch_of_the_command_line(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text('root = "out"\n[train]\nworkers = 3\n[train.loop]\nmargin_batch = 6\n')
    given = lambda argv: job.main("train.run", "train", TrainConfig, lambda c: {"local": c.local}, argv, switches={"--local": LOCAL})  # noqa: E731
    assert given([str(path), "--local", "--set", "train.loop.batch=128"]) == 0
    assert json.loads(capsys.readouterr().out)["local"] is True
    assert given([str(path), "--set", "train.loop.batch=126"]) == 0
    assert json.loads(capsys.readouterr().out)["local"] is False
    assert given([str(path)]) == 2, "128 does not divide by three workers"


@pytest.mark.ray
def test_labels_come_from_a_table_of_assignments_where_one_is_given(root, tmp_path):
    """Two products merged into one prototype, one split in two, one item left out."""
    layout = storage.Layout(root)
    config = settings(root, steps=12, local=True)
    selection = config.selection(layout.items, open_items(layout.items).version)
    labels = selection.labels.copy()
    labels[labels == 1] = 0
    labels[np.flatnonzero(labels == 2)[0]] = 99
    table = {
        "item_id": selection.item_ids[1:],
        "prototype_id": labels[1:],
        "confidence": np.full(len(labels) - 1, 0.5, np.float32),
        "layer": ["behaviour"] * (len(labels) - 1),
    }
    path = str(tmp_path / "assignments.parquet")
    pq.write_table(pa.table(table, schema=schema.ASSIGNMENTS), path)
    run(settings(root, steps=12, local=True, keep_checkpoint=True))
    (earlier,) = checkpoints(root).glob("*/step-000000012")
    figures = run(settings(root, steps=14, local=True, assignments=path, start_from=str(earlier)))
    assert figures["steps"] == 14
    assert figures["products"] == len(np.unique(labels[1:]))
    folder = Path(manifest.current(layout.embedder, kind="embedder"))
    kept = pq.read_table(folder / "assignments.parquet")
    assert kept["item_id"].to_pylist() == selection.item_ids[1:].tolist()
    assert set(kept["confidence"].to_pylist()) == {0.5}
    names = pq.read_table(folder / "prototypes.parquet")["product_id"].to_pylist()
    assert f"{selection.names[2]}#part-99" in names
    with pytest.raises(ValueError, match=r"no file of assignments at .*none"):
        run(settings(root, steps=13, local=True, assignments=str(tmp_path / "none.parquet")))
    with pytest.raises(ValueError, match="no finished checkpoint at"):
        run(settings(root, steps=13, local=True, start_from=str(tmp_path)))


def test_prototypes_are_named_by_what_most_of_their_members_are():
    names, labels = name_prototypes(np.array([7, 7, 7, 3, 3, 9]), ["b", "a", "b", "a", "a", "b"])
    assert names.tolist() == ["a", "b", "b#part-9"]
    assert labels.tolist() == [1, 1, 1, 0, 0, 2]


def test_a_damaged_embedder_is_refused_by_name(tmp_path):
    made = manifest.Plan(parent=str(tmp_path), kind="embedder", config={}, inputs={})
    Path(made.folder).mkdir()
    (Path(made.folder) / "config.json").write_text("{}")
    made.write(figures={}, files=["config.json"])
    (Path(made.folder) / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json does not match its checksum"):
        Embedder.load(made.folder)
