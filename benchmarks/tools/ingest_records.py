"""The records that the ingest is measured on: drawn by seed and number, of products in fours, with pictures of about 10 kB."""

import io
import logging
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

log = logging.getLogger("bench")
SEED = 0
TINY = 100
ROW_GROUP = 1000
PER_PRODUCT = 4
SIDE = 192
QUALITY, GRAIN, CELLS = 85, 0.12, 8  # together about 10 kB; 8 x 8 colours at random give every picture another perceptual hash
BYTES_A_RECORD = 40_000  # on disk at once: as drawn, and as a contender writes it, perhaps twice
IMAGE_BYTES = b"image_bytes"
KINDS = ("mug", "lamp", "chair", "backpack", "kettle", "sneaker", "headphones", "notebook", "jacket", "vase", "clock", "pan")
MAKERS = ("Arvid", "Bellano", "Corvane", "Dunmore", "Elsk", "Fjorda", "Galant", "Hestia", "Ilmari", "Jovis")
MAKES = ("ceramic", "walnut", "brushed steel", "recycled nylon", "linen", "smoked glass", "merino", "bamboo")
COLOURS = ("teal", "sand", "charcoal", "rust", "ivory", "cobalt", "olive", "blush", "graphite", "mustard")
EXTRAS = ("free returns", "gift box included", "2-year warranty", "new in 2026", "dishwasher safe", "limited edition")


def picture(seed: int, index: int) -> bytes:
    """JPEG number `index` of a seed, SIDE x SIDE: a field of random colours, which tells it from all others, under grain for its size."""
    rng = np.random.default_rng((seed, index))
    colours = Image.fromarray(rng.integers(0, 256, (CELLS, CELLS, 3), np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grain = Image.frombytes("RGB", (SIDE, SIDE), rng.bytes(SIDE * SIDE * 3))
    stream = io.BytesIO()
    Image.blend(colours, grain, GRAIN).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def title(seed: int, index: int) -> tuple[str, str]:
    """What a seller would write of the product of record `index`, and its category."""
    of_product = np.random.default_rng((seed, index // PER_PRODUCT, 1))
    kind, maker, make, colour = (str(of_product.choice(words)) for words in (KINDS, MAKERS, MAKES, COLOURS))
    extra = EXTRAS[index % len(EXTRAS)]
    return f"{maker} {make} {kind}, {colour}, {of_product.integers(5, 95)} x {of_product.integers(5, 95)} cm, {extra}", kind


def records(seed: int, first: int, count: int) -> pa.Table:
    """Records `first` to `first + count`, the same whoever makes them."""
    numbers = range(first, first + count)
    titles, kinds = zip(*(title(seed, n) for n in numbers), strict=True)
    return pa.table(
        {
            "image_id": [f"photo-{n:08d}" for n in numbers],
            "product_id": [f"product-{n // PER_PRODUCT:07d}" for n in numbers],
            "title": titles,
            "category": kinds,
            "image": pa.array([picture(seed, n) for n in numbers], pa.binary()),
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One parquet file to be made: `rows` records from number `first` on, `group` of them in a row group."""

    path: str
    first: int
    rows: int
    group: int


def write_part(part: Part) -> None:
    """The file appears whole or not at all, and says in its metadata how many bytes its pictures have."""
    path = Path(part.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(f".{os.getpid()}")
    starts = range(part.first, part.first + part.rows, part.group)
    tables = (records(SEED, start, min(part.group, part.first + part.rows - start)) for start in starts)
    written, image_bytes = None, 0
    for table in tables:
        written = written or pq.ParquetWriter(partial_path, table.schema, compression="none", use_dictionary=False)
        written.write_table(table, row_group_size=part.group)
        image_bytes += sum(map(len, table.column("image").to_pylist()))
    assert written, part
    written.add_key_value_metadata({IMAGE_BYTES: str(image_bytes).encode()})
    written.close()
    partial_path.replace(path)


def parts(folder: Path, rows: int, a_file: int) -> list[Part]:
    """The files of a source of `rows` records: `a_file` in each, less in the last."""
    group = min(ROW_GROUP, max(1, a_file // 10))  # small trials too have something to share out
    starts = range(0, rows, a_file)
    return [
        Part(path=str(folder / f"part-{n:05d}.parquet"), first=start, rows=min(a_file, rows - start), group=group)
        for n, start in enumerate(starts)
    ]


def wanted(folder: Path, small: int, large: int) -> list[Part]:
    """The files of the larger source, whose first is the smaller one, then that of TINY records."""
    data = folder / "data"
    return [*parts(data / f"{SEED}-{small}-{large}", large, small), *parts(data / f"{SEED}-{TINY}", TINY, TINY)]


def write_missing(files: Sequence[Part], workers: int) -> dict[str, Any]:
    missing = [part for part in files if not Path(part.path).exists()]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for done, _ in enumerate(pool.imap_unordered(write_part, missing), 1):
            log.info("made %d of %d files", done, len(missing))
    return {"made": len(missing)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """path: a parquet file or a folder of them; mb: of its pictures, 10^6 bytes."""

    path: str
    rows: int
    mb: float


def source(path: Path) -> Source:
    known = [pq.read_metadata(file) for file in parquet_files(path)]
    return Source(path=str(path), rows=sum(m.num_rows for m in known), mb=sum(int((m.metadata or {})[IMAGE_BYTES]) for m in known) / 1e6)


def parquet_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]
