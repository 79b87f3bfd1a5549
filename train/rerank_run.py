"""Trains the reranker: candidates, items and an embedder in, a reranker out, or the identity where there is too little to learn from.

The pictures pass the frozen tower once; the workers of Ray Train share their tokens. What is served is chosen on the calibrate fold.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.train
import ray.train.torch
import torch
from safetensors.torch import load_file, save_file

from idem import cluster, folds, job, manifest, schema, storage
from pipelines.items import Items, open_items
from train import ray_train, rerank_loop, rerank_qwen_reader, rerank_qwen_train, rerank_select
from train import run as train_run
from train.backbones.qwen3vl import Qwen3VL
from train.embedder import Embedder
from train.rerank_blocks import Shape
from train.rerank_data import Known, Lists, Pool, lists, picture_tokens, places_shape, text_tokens, title_codes
from train.rerank_label import agreed
from train.rerank_loop import RerankConfig, State
from train.rerank_model import MODELS
from train.rerank_qwen_train import VIEWS, QwenPool

FOLDS = folds.RERANKER_FOLDS
READER = "reader"
FILES = ["config.json", "model.safetensors", "curves.json"]


def too_few(table: pa.Table, config: RerankConfig) -> str:
    """Why nothing can be learnt from these candidates, or an empty string."""
    for fold in FOLDS:
        of_fold = table.filter(pc.equal(table["fold"], fold))
        usable = sum(0 in levels and len(levels) > 1 for levels in of_fold["levels"].to_pylist())
        if usable < config.least_queries:
            return (
                f"fold {fold!r} has {len(of_fold)} queries, of which {usable} have a right answer among two or more candidates; "
                f"at least {config.least_queries} are needed (rerank.least_queries)"
            )
    return ""


def gather(
    table: pa.Table, items: Items, embedder: Embedder, reader: Embedder, config: RerankConfig, *, fields: str
) -> tuple[Pool, dict[str, Lists]]:
    """What `reader` sees of every item that the candidates name, and the lists of each fold in the table, with cosines of `embedder`.

    fields: what of an item the index holds (index.fields): `both`, or `image`, the title only where there is no picture.

    ValueError where the tokens would take more than rerank.tokens_mb, or a query is in both folds.
    """
    asked = table["query_id"].combine_chunks()
    if len(asked) != len(asked.unique()):
        raise ValueError(f"candidates name {len(asked) - len(asked.unique())} queries twice: a query belongs to one fold and has one list")
    texts = {row["query_id"]: row["text"] for row in table.select(["query_id", "text"]).to_pylist() if row["text"] is not None}
    ids = sorted(set(asked.to_pylist()).difference(texts).union(*table["item_ids"].to_pylist()))
    if both := sorted(texts.keys() & set(ids)):
        raise ValueError(f"{len(both)} text queries are called as items are, {both[0]} for one: query_ids and item_ids must differ")
    qwen = reader.model if isinstance(reader.model, Qwen3VL) else None
    size = rerank_qwen_train.picture_bytes(qwen, VIEWS[config.model]) if qwen else int(np.prod(places_shape(reader, config.views))) * 2
    needed = (len(ids) + len(texts)) * size >> 20
    if needed > config.tokens_mb:
        raise ValueError(
            f"the tokens of {len(ids):,} pictures take {needed:,} MB, rerank.tokens_mb allows {config.tokens_mb:,}: "
            "raise it, or ask fewer queries"
        )
    pool, known = _read(ids, items, embedder, reader, config, fields, list(texts.values()))
    rows = {name: row for row, name in enumerate([*ids, *texts])}
    names = dict.fromkeys([*FOLDS, *table["fold"].unique().to_pylist()])
    return pool, {fold: lists(table.filter(pc.equal(table["fold"], fold)), rows, known) for fold in names}


def _read(
    ids: list[str], items: Items, embedder: Embedder, reader: Embedder, config: RerankConfig, fields: str, texts: Sequence[str] = ()
) -> tuple[Pool, Known]:
    """Of the items `ids`, then of the queries `texts`, which are none."""
    assert fields in ("both", "image"), fields
    told = items.take(ids, ["product_id", "family_id", "title", "image"])
    pictures, titles = [*told["image"].to_pylist(), *[None] * len(texts)], [title.strip() for title in [*told["title"].to_pylist(), *texts]]
    if isinstance(reader.model, Qwen3VL):
        pool: Pool = rerank_qwen_train.qwen_pool(reader.model, pictures, titles, views=VIEWS[config.model], progress="pictures")
    else:
        places, pictured = picture_tokens(reader, pictures, views=config.views, progress="picture tokens")
        read = np.zeros((len(titles), config.text_length), np.int16)
        tokens = text_tokens(reader, titles, config.text_length).numpy()
        read[:, : tokens.shape[1]] = tokens
        pool = Pool(places=places, pictured=pictured, texts=read)
    seen = [data if there else None for data, there in zip(pictures, pool.pictured, strict=True)]
    both = _vectors(embedder, seen, titles, "vectors")
    kept = ["" if there else title for title, there in zip(titles, pool.pictured, strict=True)]
    known = Known(
        products=np.append(np.unique(told["product_id"].to_pylist(), return_inverse=True)[1], [-1] * len(texts)),
        families=np.append(np.unique(told["family_id"].to_pylist(), return_inverse=True)[1], [-1] * len(texts)),
        titles=title_codes(titles, config.text_length),
        both=both,
        text=_vectors(embedder, None, titles, ""),
        indexed=both if fields == "both" else _vectors(embedder, seen, kept, "indexed"),
    )
    return pool, known


def _vectors(embedder: Embedder, pictures: list[bytes | None] | None, titles: list[str], progress: str) -> np.ndarray:
    """(n, D); zero for what has nothing to encode."""
    some = [i for i, title in enumerate(titles) if title or (pictures and pictures[i])]
    vectors = np.zeros((len(titles), embedder.dim), np.float32)
    if some:
        vectors[some] = embedder.encode([pictures[i] for i in some] if pictures else None, [titles[i] for i in some], progress=progress)
    return vectors


def own_reader(config: RerankConfig, embedder: str, folder: str) -> str:
    """Train the reranker's own tower below `folder`, or find it trained; the folder of its artifact. embedder: that of the retrieval,
    whose settings and products it has."""
    told = manifest.read(embedder, kind="embedder").config
    loop = {**told["loop"], "seed": told["loop"]["seed"] + 1, "minutes": config.reader_minutes}
    train_run.run(train_run.TrainConfig(**{**told, "root": config.root, "loop": loop, "start_from": ""}), folder)
    return manifest.current(folder, kind="embedder")


def _worker(told: dict[str, Any]) -> None:
    """One worker of Ray Train: restore, train, report."""
    config = RerankConfig(**told["config"])
    pool: Any = ray.get(told["pool"])
    train: Any = ray.get(told["rerank"])
    calibrate: Any = ray.get(told["calibrate"])
    context = ray.train.get_context()
    if isinstance(pool, QwenPool):
        state: State = rerank_qwen_train.start(config, Path(told["reader"]), pool)
    else:
        state = rerank_loop.start(config, Shape(**told["shape"]), pool, train, told["head"])
    if last := ray.train.get_checkpoint():
        with last.as_directory() as folder:
            state.restore(Path(folder))
    shown = 0.0

    def report(figures: dict[str, Any], due: bool) -> None:
        nonlocal shown
        rank = context.get_world_rank()
        if rank == 0 and time.monotonic() - shown > 1:
            shown = time.monotonic()
            told["board"].put.remote({k: v for k, v in figures.items() if k in ("progress", "step", "loss")})
        if due:
            _report(state, figures, rank)

    rerank_loop.train(state, config, pool, train, calibrate, rank=context.get_world_rank(), world=context.get_world_size(), report=report)


def _report(state: State, figures: dict[str, Any], rank: int) -> None:
    """Every worker reports; worker 0 alone has files to give, since all hold the same weights."""
    if rank:
        ray.train.report(figures)
        return
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder))
        ray.train.report(figures, checkpoint=ray.train.Checkpoint.from_directory(folder))


def fit(config: RerankConfig, reader: Embedder, path: str, pool: Pool, made: dict[str, Lists], *, name: str, storage_path: str) -> Path:
    """Run Ray Train; the folder of its last checkpoint (see State.save). A run of the same name goes on where it was cut off.
    path: the reader's artifact."""
    with ray_train.bar("reranker") as board:
        qwen = isinstance(pool, QwenPool)
        use_gpu = qwen and torch.cuda.is_available()
        told = {"config": config.model_dump(), "board": board, "pool": ray.put(pool)}
        if qwen:
            told["reader"] = str(storage.local_path(path).absolute())
        else:
            told |= {"shape": config.shape(reader).model_dump(), "head": reader.image_head()}
        return ray_train.fit(
            _worker,
            {**told, **{fold: ray.put(made[fold]) for fold in FOLDS}},
            name=name,
            storage_path=storage_path,
            workers=1 if use_gpu else config.workers,  # the loop's workers agree by tensors of the CPU, which NCCL does not carry
            use_gpu=use_gpu,
            max_failures=config.max_failures,
        )


def publish(made: manifest.Plan, said: dict[str, Any], weights: dict[str, Any] | None, curves: list[dict[str, Any]]) -> None:
    """weights: None where they are written already."""
    out = storage.local_path(made.folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(said, indent=1))
    (out / "curves.json").write_text(json.dumps(curves))
    if weights is not None:
        save_file(weights, out / "model.safetensors")


def _train(
    config: RerankConfig, made: manifest.Plan, table: pa.Table, items: Items, embedder: Embedder, path: str, place: str, fields: str
) -> dict[str, Any]:
    """path: of the embedder. place: of the reranker's own reader below the artifact's folder, empty where it reads with the embedder."""
    reader = Embedder.load(place) if place else embedder
    pool, fold_lists = gather(table, items, embedder, reader, config, fields=fields)
    checkpoints = storage.local_path(storage.join(made.parent, "checkpoints")).absolute()
    cluster.connect(num_cpus=config.workers)
    folder = fit(config, reader, place or path, pool, fold_lists, name=made.id, storage_path=str(checkpoints))
    state = json.loads((folder / "state.json").read_text())
    if state["failed"]:
        raise ValueError(f"reranker training failed: {state['failed']} in {folder / 'best.safetensors'}; a smaller rerank.lr may help")
    weights = load_file(folder / "best.safetensors")
    if isinstance(pool, QwenPool):
        out = storage.local_path(made.folder)
        more = rerank_qwen_reader.save(rerank_qwen_train.trained(config, storage.local_path(place or path), pool, weights), out)
        # As it will be served: adapters are merged, in the precision of the weights.
        rows = rerank_qwen_train.RowReranker(rerank_qwen_reader.load(out, config.model), pool)
        settings = rerank_select.judge(rows, config, pool, fold_lists["calibrate"], rerank_qwen_train.scored)
        backbone: dict[str, Any] = {"backbone": "qwen3-vl"}
    else:
        shape, more = config.shape(reader), []
        model = MODELS[config.model](shape)
        model.load_state_dict(weights)
        settings = rerank_select.judge(model.eval(), config, pool, fold_lists["calibrate"])
        backbone = {"backbone": "compact", "shape": shape.model_dump()}
    figures = {
        "identity": False,
        "queries": {fold: len(fold_lists[fold]) for fold in FOLDS},
        "pictures": int(pool.pictured.sum()),
        "steps": state["step"],
        "best_step": state["best_step"],
        "train_seconds": round(state["seconds"], 1),
        "parameters": sum(value.numel() for value in weights.values()),
        **{kind: rerank_select.summary(served) for kind, served in settings.items()},
    }
    read = storage.join(READER, reader.id) if place else ""
    said = {"identity": False, "model": config.model, "embedder": embedder.id, "reader": read, "chunk": config.chunk}
    chosen = {kind: served.model_dump() for kind, served in settings.items()}
    publish(made, {**said, **backbone, "served": chosen}, None if more else weights, state["curves"])
    of_reader = [*manifest.read(place, kind="embedder").files, manifest.NAME] if place else []
    made.write(
        figures=figures, files=[*FILES, *(name for name in more if name not in FILES), *(storage.join(read, name) for name in of_reader)]
    )
    shutil.rmtree(checkpoints / made.id, ignore_errors=True)
    return figures


def matching(candidates: manifest.Manifest, *, items: str, embedder: str) -> None:
    """ValueError unless the candidates were found in these items with this embedder, both given by id."""
    for kind, current in (("embedder", embedder), ("items", items)):
        if (found := candidates.inputs.get(kind, "unknown")) != current:
            raise ValueError(
                f"the candidates {candidates.id} were found with {kind} {found}, the current one is {current}: "
                "run index.run and index.candidates again"
            )
    if "fields" not in candidates.config:
        raise ValueError(f"the candidates {candidates.id} do not say what of an item was indexed: run index.candidates again")


def run(config: RerankConfig) -> dict[str, Any]:
    """Train the reranker of a run, or find it trained. ValueError where its candidates are of other items or of another embedder."""
    layout = storage.Layout(config.root)
    items = open_items(layout.items)
    candidates = manifest.current(layout.candidates, kind="candidates")
    embedder_path = manifest.current(layout.embedder, kind="embedder")
    embedder = Embedder.load(embedder_path)
    found = manifest.read(candidates, kind="candidates")
    matching(found, items=items.id, embedder=embedder.id)
    inputs = {"items": items.id, "embedder": embedder.id, "candidates": found.id}
    if config.judgements:
        if not storage.exists(config.judgements):
            raise ValueError(f"there is no file of judgements at {config.judgements} (rerank.judgements)")
        inputs["judgements"] = manifest.checksum(config.judgements).sha256[:16]
    made = manifest.Plan(parent=layout.reranker, kind="reranker", config=config.settings(), inputs=inputs)
    if before := made.finished():
        return {**before.figures, "skipped": True}
    (name,) = found.files
    table = pq.read_table(storage.local_path(storage.join(candidates, name)), schema=schema.CANDIDATES)
    if config.judgements:
        table = agreed(table, pq.read_table(storage.local_path(config.judgements)))
    if why := too_few(table, config):
        figures = {"identity": True, "reason": why}
        publish(made, {**figures, "embedder": embedder.id}, {}, [])
        made.write(figures=figures, files=FILES)
        return figures
    place = own_reader(config, embedder_path, storage.join(made.folder, READER)) if config.reader_minutes else ""
    return _train(config, made, table, items, embedder, embedder_path, place, found.config["fields"])


if __name__ == "__main__":
    sys.exit(job.main("train.rerank_run", "rerank", RerankConfig, run))
