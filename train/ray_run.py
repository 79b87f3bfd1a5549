"""The embedder's training on Ray Train: a worker's part, its checkpoints, and pictures that Ray Data decodes for its streams."""

import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import ray.train.torch

from idem import cluster
from pipelines.items import Items, open_items
from train import checkpoint, ray_train
from train.corpus import Block, Corpus, decode
from train.local import SHOWN
from train.loop import Trainer
from train.selection import Selection

if TYPE_CHECKING:
    from train.run import TrainConfig

TOGETHER = 128  # rows of a block


def fit(config: "TrainConfig", selection: Selection, uri: str, version: int, *, checkpoints: Path, name: str) -> Path:
    """Train on `config.workers` workers; the folder of the last checkpoint. A run of the same name goes on where it was cut off."""
    if config.workers > len(selection.names):
        raise ValueError(f"{config.workers} workers cannot share {len(selection.names)} products; allowed are at most as many workers")
    needed = config.workers + (config.decoders if _streamed(config, selection) else 0)
    cluster.connect(num_cpus=needed)
    if (there := ray.cluster_resources().get("CPU", 0)) < needed:
        raise ValueError(
            f"train.workers = {config.workers}, and train.decoders = {config.decoders} where rows are streamed, need {needed} CPUs; "
            f"the cluster has {there:g}, so train.workers has to be smaller"
        )
    (checkpoints / name).mkdir(parents=True, exist_ok=True)
    with ray_train.bar("training") as board:
        told = {
            "config": anywhere(config).model_dump(),
            "items": uri,
            "version": version,
            "folder": str(checkpoints / name),
            "board": board,
        }
        return ray_train.fit(
            _worker,
            told,
            name=name,
            storage_path=str(checkpoints),
            workers=config.workers,
            use_gpu=config.use_gpu,
            max_failures=config.max_failures,
            datasets=datasets(config, selection, uri, version),
        )


def anywhere(config: "TrainConfig") -> "TrainConfig":
    """Paths made absolute: Ray Train gives each worker a directory of its own."""

    def absolute(path: str) -> str:
        return str(Path(path).absolute()) if path else path

    texts = tuple(source.model_copy(update={"file": absolute(source.file)}) for source in config.texts)
    head = config.loop.head.model_copy(update={"folder": absolute(config.loop.head.folder)})
    loop = config.loop.model_copy(update={"head": head})
    return config.model_copy(
        update={"assignments": absolute(config.assignments), "start_from": absolute(config.start_from), "texts": texts, "loop": loop}
    )


def _worker(told: dict[str, Any]) -> None:
    """One Ray Train worker: restore, train, checkpoint, report."""
    from train.run import TrainConfig

    config = TrainConfig(**told["config"])
    selection = config.selection(told["items"], told["version"])
    shown = 0.0

    def report(figures: dict[str, Any], due: bool) -> None:
        nonlocal shown
        if trainer.rank == 0 and time.monotonic() - shown > 1:
            shown = time.monotonic()
            told["board"].put.remote({k: v for k, v in figures.items() if k in ("progress", *SHOWN)})
        if due:
            _report(trainer, figures)

    device = ray.train.torch.get_device() if config.use_gpu else "cpu"
    corpus = selection.corpus(config.cache_mb)
    corpus.streams = {name: functools.partial(_shard, corpus, name) for name in _streamed(config, selection)}
    trainer = Trainer(config.loop, corpus, report, device=device)
    if trainer.rank == 0:
        told["board"].say.remote(str(trainer.capacity))
    checkpoint.begin(trainer, Path(told["folder"]), config.start_from)
    trained = trainer.run()
    _report(trainer, {"step": trained.step, "seconds": trained.seconds, **(trained.curves[-1] if trained.curves else {})})


def _report(trainer: Trainer, figures: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(trainer, Path(folder))
        ray.train.report(figures, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _streamed(config: "TrainConfig", selection: Selection) -> dict[str, np.ndarray]:
    """Offsets of the rows of each stream of train.corpus that is worth starting Ray Data for."""
    streams = {"members": selection.offsets, "held": selection.held_offsets}
    return {name: offsets for name, offsets in streams.items() if len(offsets) >= config.stream_rows}


def datasets(config: "TrainConfig", selection: Selection, uri: str, version: int) -> dict[str, ray.data.Dataset]:
    """The streams, decoded by CPU tasks."""
    side, world = config.loop.model.side, config.workers
    return {name: _decoded(offsets, uri, version, side=side, world=world) for name, offsets in _streamed(config, selection).items()}


def _decoded(offsets: np.ndarray, uri: str, version: int, *, side: int, world: int) -> ray.data.Dataset:
    """Rows with their pictures, as many for each worker: Ray Train cuts off what does not divide, so rows that do not count fill it up."""
    padded = np.arange(-(-len(offsets) // world) * world)
    rows = padded % len(offsets)
    table = pa.table({"row": rows, "counted": padded < len(offsets), "offset": offsets[rows]})
    blocks = [table.slice(start, TOGETHER) for start in range(0, len(table), TOGETHER)]
    told = {"uri": uri, "version": version, "side": side}
    return ray.data.from_arrow(blocks).map_batches(
        _decode,  # pyright: ignore[reportArgumentType]
        batch_size=TOGETHER,
        batch_format="numpy",
        fn_kwargs=told,
    )


@functools.lru_cache(maxsize=2)
def _items(uri: str, version: int) -> Items:
    return open_items(uri, version)


def _decode(batch: dict[str, np.ndarray], uri: str, version: int, side: int) -> dict[str, np.ndarray]:
    """Adds the pictures, (n, side, side, 3) uint8; black where a row has none."""
    found = _items(uri, version).take_rows(batch["offset"], ["item_id", "image"])
    data, names = found["image"].to_pylist(), found["item_id"].to_pylist()
    pictured = [i for i, encoded in enumerate(data) if encoded]
    pixels = np.zeros((len(data), side, side, 3), np.uint8)
    pixels[pictured] = decode([data[i] for i in pictured], [f"item {names[i]}" for i in pictured], side)
    return {"row": batch["row"], "counted": batch["counted"], "pixels": pixels}


def _shard(corpus: Corpus, name: str, side: int) -> Iterator[Block]:
    """This worker's share of a stream."""
    shard = ray.train.get_dataset_shard(name)
    assert shard
    return blocks(shard, corpus.has_image if name == "members" else None, side)


def blocks(shard: ray.data.DataIterator, has_image: np.ndarray | None, side: int) -> Iterator[Block]:
    """Blocks of what `datasets` yields; `has_image` by row, None where all have one."""
    for batch in shard.iter_batches(batch_size=TOGETHER, batch_format="numpy", prefetch_batches=1):
        rows, counted, pixels = (np.array(batch[name]) for name in ("row", "counted", "pixels"))
        assert pixels.shape[1] == side
        yield Block(rows, counted, pixels if has_image is None else pixels[has_image[rows]])
