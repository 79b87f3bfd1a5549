"""Draws the demo shop as ordinary parquet: for each product a catalogue picture, some user photos, and sellers' titles."""

import contextlib
import os
import signal
import sys
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from tqdm import tqdm

from idem import config, job, manifest, storage
from pipelines import shop
from pipelines.shop_drawing import OVERSAMPLE, catalogue_picture, cut_out, user_photo

NAME = "records.parquet"
CHUNK = 15  # products drawn by one call of a worker
ROW_GROUP = 20  # chunks
PICTURE_BYTES = 4_000  # of a row with a picture of 128 x 128, 2,400 as measured, rounded up
TEXTS = ("image_id", "product_id", "family_id", "category", "title")
LATER_TEXTS = ("role", "style", "id_split", "split", "source", "license")
RECORDS = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in TEXTS),
        pa.field("image", pa.binary()),
        pa.field("mime", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        *(pa.field(name, pa.string()) for name in LATER_TEXTS),
    ]
)


class CatalogConfig(config.Table):
    """products: how many; photos: user photos of each; side: of every picture, in pixels; seed: which shop."""

    products: int = Field(default=600, ge=1)
    photos: int = Field(default=5, ge=0)
    side: int = Field(default=128, ge=32, le=1024)
    seed: int = Field(default=0, ge=0)


def records(settings: CatalogConfig, index: int) -> list[dict[str, Any]]:
    """The rows of one product, catalogue picture first; they depend on seed, index, side and the number of the picture alone."""
    item = shop.product(settings.seed, index)
    cut = cut_out(item, settings.side * OVERSAMPLE)
    rows = []
    for number in range(settings.photos + 1):
        rng = shop.stream(settings.seed, shop.PICTURE, index, number)
        photo = number > 0
        rows.append(
            {
                "image_id": f"{item.product_id}-photo{number}" if photo else f"{item.product_id}-catalog",
                "product_id": item.product_id,
                "family_id": item.family_id,
                "category": item.kind,
                "title": shop.title(item, shop.stream(settings.seed, shop.TITLE, index, number)),
                "image": user_photo(cut, rng) if photo else catalogue_picture(cut, rng),
                "mime": "image/jpeg",
                "width": settings.side,
                "height": settings.side,
                "role": "photo" if photo else "catalog",
                "style": "phone" if photo else "studio",
                "id_split": item.id_split,
                "split": "test" if photo else "catalog",
                "source": f"idem demo shop, seed {settings.seed}",
                "license": "CC0-1.0",
            }
        )
    return rows


def draw_chunk(settings: CatalogConfig, start: int) -> pa.Table:
    """The rows of CHUNK products from `start` on, or of those that are left."""
    stop = min(start + CHUNK, settings.products)
    return pa.Table.from_pylist([row for index in range(start, stop) for row in records(settings, index)], schema=RECORDS)


def _leave_interrupts_to_the_driver() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def draw(settings: CatalogConfig, workers: int) -> Generator[pa.Table]:
    """The tables of all chunks in order, drawn by as many processes; with one worker, in this process."""
    starts = range(0, settings.products, CHUNK)
    if min(workers, len(starts)) == 1:
        yield from map(partial(draw_chunk, settings), starts)
        return
    pool = ProcessPoolExecutor(min(workers, len(starts)), get_context("spawn"), _leave_interrupts_to_the_driver)
    try:
        yield from pool.map(partial(draw_chunk, settings), starts)
    finally:
        pool.shutdown(cancel_futures=True)


def write(settings: CatalogConfig, path: Path, workers: int) -> dict[str, int]:
    """Write the shop to one parquet file; its bytes depend on the settings, not on the number of workers. Returns the figures."""
    unseen = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        contextlib.closing(draw(settings, workers)) as tables,
        pq.ParquetWriter(path, RECORDS) as writer,
        tqdm(total=settings.products, desc="drawing the shop", unit=" products", file=sys.stderr) as bar,
    ):
        pending: list[pa.Table] = []
        for table in tables:
            unseen += table["id_split"].to_pylist().count("dev_unseen")
            pending.append(table)
            if len(pending) == ROW_GROUP:
                writer.write_table(pa.concat_tables(pending))
                pending.clear()
            bar.update(table.num_rows // (settings.photos + 1))
        if pending:
            writer.write_table(pa.concat_tables(pending))
    rows_each = settings.photos + 1
    return {
        "products": settings.products,
        "families": shop.place(settings.seed, settings.products - 1)[0] + 1,
        "unseen_products": unseen // rows_each,
        "pictures": settings.products * rows_each,
        "bytes": path.stat().st_size,
    }


def run(settings: CatalogConfig) -> dict[str, Any]:
    """Draw the shop of these settings, unless it is there already."""
    plan = manifest.Plan(parent=storage.Layout(settings.root).catalog, kind="catalog", config=settings.settings(), inputs={})
    records_uri = storage.join(plan.folder, NAME)
    if made := plan.finished():
        return {**made.figures, "records": records_uri, "skipped": True}
    path = storage.local_path(records_uri)
    scale = max(1.0, (settings.side / 128) ** 2)
    storage.require_free(plan.folder, round(settings.products * (settings.photos + 1) * PICTURE_BYTES * scale))
    figures = write(settings, path, os.cpu_count() or 1)
    plan.write(figures=figures, files=[NAME])
    return {**figures, "records": records_uri, "skipped": False}


if __name__ == "__main__":
    sys.exit(job.main("pipelines.catalog", "catalog", CatalogConfig, run))
