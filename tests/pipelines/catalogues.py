"""Small catalogues, and the items that came of them."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from idem import storage
from pipelines.items import Items, open_items


def picture(seed: int, side: int = 40) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def opened(root: object) -> Items:
    return open_items(storage.Layout(str(root)).items)


def write(path: Path, rows: list[dict], **kinds: pa.DataType) -> Path:
    fields = {"image_id": pa.string(), "product_id": pa.string(), "title": pa.string(), "image": pa.binary(), **kinds}
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), path)
    return path
