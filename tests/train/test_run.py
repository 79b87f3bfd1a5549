"""The training job on Ray Train, on a shop of a few products."""

import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from idem import manifest, storage
from pipelines import catalog, ingest
from train.backbones.compact import CompactConfig
from train.embedder import Embedder
from train.loop import LoopConfig
from train.run import TrainConfig, run

MODEL = CompactConfig(side=32, dim=16, widths=(8, 8, 16, 16), text_dim=16, text_layers=1)


def settings(root: str, steps: int = 40) -> TrainConfig:
    loop = LoopConfig(model=MODEL, minutes=60, steps=steps, batch=16, prefixes=(8, 16), refresh=10, checkpoint_seconds=3.0)
    return TrainConfig(root=root, fractions=(0.6, 0.2, 0.2), loop=loop)


@pytest.fixture(scope="module")
def root(ray_session, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("train"))
    catalog.run(catalog.CatalogConfig(root=folder, products=40, photos=2, side=48))
    ingest.run(ingest.IngestConfig(root=folder))
    return folder


def _kill_a_worker_after_a_checkpoint(root: str, killed: list[int]) -> None:
    checkpoints = Path(storage.Layout(root).embedder) / "checkpoints"
    until = time.monotonic() + 200
    while time.monotonic() < until:
        if list(checkpoints.glob("*/*/state.json")):
            workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
            if workers:
                workers[0].kill()
                killed.append(workers[0].pid)
                return
        time.sleep(0.1)


@pytest.mark.ray
def test_a_killed_worker_costs_steps_and_nothing_else(root):
    killed: list[int] = []
    assassin = threading.Thread(target=_kill_a_worker_after_a_checkpoint, args=(root, killed), daemon=True)
    assassin.start()
    figures = run(settings(root, steps=200))
    assassin.join(1)
    assert killed, "no worker was killed: the run was over before its first checkpoint"
    assert figures["steps"] == 200
    folder = manifest.current(storage.Layout(root).embedder, kind="embedder")
    embedder = Embedder.load(folder)
    vectors = embedder.encode(None, ["a red mug"])
    assert vectors.shape == (1, 16)
    assert not np.allclose(vectors, Embedder.load(folder, weights="untrained").encode(None, ["a red mug"]))
    prototypes = pq.read_table(Path(folder) / "prototypes.parquet")
    assert prototypes.num_rows == figures["products"]
    assert np.allclose(np.linalg.norm(np.stack(prototypes["vector"].to_numpy()), axis=1), 1, atol=1e-4)
    assert not list((Path(storage.Layout(root).embedder) / "checkpoints").iterdir())
    assert run(settings(root, steps=200))["skipped"]


@pytest.mark.ray
def test_products_never_to_be_trained_on_are_not(root):
    folder = manifest.current(storage.Layout(root).embedder, kind="embedder")
    known = set(pq.read_table(Path(folder) / "prototypes.parquet")["product_id"].to_pylist())
    from pipelines.items import open_items

    unseen = open_items(storage.Layout(root).items).table(["product_id"], "id_split = 'dev_unseen'")["product_id"].to_pylist()
    assert unseen
    assert not known & set(unseen)


@pytest.mark.ray
def test_one_product_only_is_refused_in_words(ray_session, tmp_path):
    catalog.run(catalog.CatalogConfig(root=str(tmp_path), products=1, photos=2, side=48))
    ingest.run(ingest.IngestConfig(root=str(tmp_path)))
    with pytest.raises(ValueError, match="at least 2 products to tell apart, found"):
        run(settings(str(tmp_path)))


def test_a_damaged_embedder_is_refused_by_name(tmp_path):
    made = manifest.Plan(parent=str(tmp_path), kind="embedder", config={}, inputs={})
    Path(made.folder).mkdir()
    (Path(made.folder) / "config.json").write_text("{}")
    made.write(figures={}, files=["config.json"])
    (Path(made.folder) / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json does not match its checksum"):
        Embedder.load(made.folder)
