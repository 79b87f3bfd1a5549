"""Fits the embedder: items in, an embedder with its prototypes out; Ray Train shards the prototypes over the workers."""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.train
import ray.train.torch
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file, save_file

from idem import cluster, folds, job, manifest, schema, storage
from idem.config import Table
from pipelines.items import open_items
from train import checkpoint, ray_train
from train.backbones.compact import Compact
from train.corpus import Corpus
from train.loop import LoopConfig, Trainer


class TrainConfig(Table):
    """`fractions`: shares of the training families for embedder, reranker and calibration (METHOD.md section 7)."""

    workers: Annotated[int, Field(ge=1, le=1024)] = 2
    use_gpu: bool = False
    fractions: tuple[float, float, float] = (0.7, 0.2, 0.1)
    held_back: Annotated[int, Field(ge=0)] = 300  # pictures of the calibration fold that the training curve is measured on
    cache_mb: Annotated[int, Field(ge=0)] = 1024  # decoded pictures a worker keeps
    max_failures: Annotated[int, Field(ge=0)] = 2
    loop: LoopConfig = LoopConfig()

    def model_post_init(self, _: Any) -> None:
        if min(self.fractions) < 0 or self.fractions[0] == 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions are shares of embedder (above 0), rerank and calibrate that sum to 1; found {self.fractions}")
        if self.loop.batch % (self.loop.per_id * self.workers):
            raise ValueError(
                f"loop.batch = {self.loop.batch} must divide by workers x loop.per_id = {self.workers} x {self.loop.per_id}, "
                f"so that every worker gets whole groups of one product"
            )


class Selection:
    """Which rows of the items are trained on: offsets, titles and labels, and the names of the labels."""

    def __init__(self, uri: str, version: int, config: TrainConfig) -> None:
        self.items = open_items(uri, version)
        table = self.items.table(["product_id", "family_id", "title", "id_split", "width"])
        products, families = (np.array(table[c].to_pylist(), dtype=object) for c in ("product_id", "family_id"))
        train = np.array(table["id_split"].to_pylist()) == "train"
        fold = np.where(train, folds.folds(families, config.fractions), "")
        self.offsets = np.flatnonzero(fold == "embedder")
        self.products, self.labels = np.unique(products[self.offsets].astype(str), return_inverse=True)
        if len(self.products) < 2:
            raise ValueError(
                f"training needs at least 2 products to tell apart, found {len(self.products)}: the items hold {len(set(products))} "
                f"products in {len(set(families))} families, {len(set(products[train]))} of them with id_split 'train', of whose families "
                f"a share of {config.fractions[0]} is dealt to the embedder (train.fractions)"
            )
        if config.workers > len(self.products):
            raise ValueError(f"{config.workers} workers cannot share {len(self.products)} products; allowed are at most as many workers")
        titles = np.array(table["title"].to_pylist(), dtype=object)
        self.titles = titles[self.offsets].tolist()
        self.has_image = np.array(table["width"].to_pylist())[self.offsets] > 0
        held = np.flatnonzero((fold == "calibrate") & (np.array(table["width"].to_pylist()) > 0))
        order = np.argsort(products[held].astype(str), kind="stable")[: config.held_back]  # whole products
        self.held_offsets, self.held_products = held[order], products[held][order].astype(str)

    def images(self, offsets: np.ndarray) -> list[bytes | None]:
        return self.items.take_rows(offsets, ["image"])["image"].to_pylist()

    def corpus(self, cache_mb: int) -> Corpus:
        held = (lambda: (self.images(self.held_offsets), self.held_products)) if len(self.held_offsets) else None
        return Corpus(
            fetch=lambda rows: self.images(self.offsets[rows]),
            titles=self.titles,
            has_image=self.has_image,
            labels=self.labels,
            held_fetch=held,
            cache_bytes=cache_mb << 20,
        )


def _worker(told: dict[str, Any]) -> None:
    """One Ray Train worker: restore, train, checkpoint, report."""
    config = TrainConfig(**told["config"])
    selection = Selection(told["items"], told["version"], config)
    shown = 0.0

    def report(figures: dict[str, Any], due: bool) -> None:
        nonlocal shown
        if trainer.rank == 0 and time.monotonic() - shown > 1:
            shown = time.monotonic()
            said = {k: v for k, v in figures.items() if k in ("progress", "step", "loss", "stage", "held_R@1")}
            told["board"].put.remote(said)
        if due:
            _report(trainer, figures)

    device = ray.train.torch.get_device() if config.use_gpu else "cpu"
    trainer = Trainer(config.loop, selection.corpus(config.cache_mb), report, device=device)
    if last := ray.train.get_checkpoint():
        with last.as_directory() as folder:
            checkpoint.restore(trainer, Path(folder))
    trained = trainer.run()
    _report(trainer, {"step": trained.step, "seconds": trained.seconds, **(trained.curves[-1] if trained.curves else {})})


def _report(trainer: Trainer, figures: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(trainer, Path(folder))
        ray.train.report(figures, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _publish(made: manifest.Plan, folder: Path, selection: Selection, config: TrainConfig) -> dict[str, Any]:
    """Turn the last checkpoint into the artifact: the embedder without its head, the prototypes as a table, the curves."""
    out = storage.local_path(made.folder)
    out.mkdir(parents=True, exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    if bad := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"the trained weights are not finite in {bad[:3]}")
    save_file(weights, out / "model.safetensors")
    torch.manual_seed(config.loop.seed)
    save_file(Compact(config.loop.model).state_dict(), out / "untrained.safetensors")
    said = {"model": config.loop.model.model_dump(), "fractions": config.fractions}
    (out / "config.json").write_text(json.dumps(said, indent=2))
    rows = F.normalize(checkpoint.whole_head(folder)["weight"], dim=1).numpy()
    table = {
        "prototype_id": np.arange(len(rows)),
        "product_id": selection.products,
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1]),
        "members": np.bincount(selection.labels),
    }
    pq.write_table(pa.table(table, schema=schema.prototypes(rows.shape[1])), out / "prototypes.parquet")
    state = json.loads((folder / "state.json").read_text())
    (out / "curves.json").write_text(json.dumps(state["curves"]))
    parameters = sum(v.numel() for v in weights.values())
    return {
        "products": len(rows),
        "pictures": int(selection.has_image.sum()),
        "steps": state["step"],
        "images_seen": state["step"] * config.loop.batch,
        "train_seconds": round(state["seconds"], 1),
        "parameters": parameters,
        "held_R@1": state["curves"][-1].get("held_R@1") if state["curves"] else None,
    }


def run(config: TrainConfig) -> dict[str, Any]:
    layout = storage.Layout(config.root)
    items = open_items(layout.items)
    made = manifest.Plan(parent=layout.embedder, kind="embedder", config=config.settings(), inputs={"items": items.id})
    if before := made.finished():
        return {**before.figures, "skipped": True}
    selection = Selection(layout.items, items.version, config)
    storage.require_free(config.root, 200 << 20)
    checkpoints = str(storage.local_path(storage.join(layout.embedder, "checkpoints")).absolute())
    cluster.connect(num_cpus=config.workers)
    told = {"config": config.model_dump(), "items": str(Path(layout.items).absolute()), "version": items.version}
    with ray_train.bar("training") as board:
        folder = ray_train.fit(
            _worker,
            {**told, "board": board},
            name=made.id,
            storage_path=checkpoints,
            workers=config.workers,
            use_gpu=config.use_gpu,
            max_failures=config.max_failures,
        )
    figures = _publish(made, folder, selection, config)
    names = ["config.json", "model.safetensors", "untrained.safetensors", "prototypes.parquet", "curves.json"]
    made.write(figures=figures, files=names)
    shutil.rmtree(Path(checkpoints) / made.id, ignore_errors=True)
    return figures


if __name__ == "__main__":
    sys.exit(job.main("train.run", "train", TrainConfig, run))
