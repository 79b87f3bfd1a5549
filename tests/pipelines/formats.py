"""The same rows written in every format that we read."""

import csv
import gzip
import io
import json
import random
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pyarrow.parquet as pq

from idem import storage
from pipelines.reading.fetch import Fetcher
from pipelines.reading.readers import read_unit
from pipelines.reading.sources import SourcePlan, plan_source
from pipelines.records import BATCH_ROWS, Columns, records_schema

FORMATS = ("parquet", "jsonl", "jsonl.gz", "csv", "tsv.gz", "tar", "tar.gz", "arrow", "arrow_file", "lance")
Rows = Sequence[dict[str, Any]]


def _typed(rows: Rows) -> pa.Table:
    return pa.Table.from_pylist(list(rows))


def _lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_bytes(rows: Iterable[dict[str, Any]], delimiter: str = ",") -> bytes:
    """Texts are quoted: Python's writer, as pandas', would leave a carriage return without quotes, which is no CSV."""
    rows = list(rows)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def tar_bytes(members: Iterable[tuple[str, bytes]], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # pyright: ignore[reportArgumentType,reportCallIssue]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _samples(rows: Rows, pictures: Rows) -> Iterable[tuple[str, bytes]]:
    for i, row in enumerate(rows):
        yield f"{i:05}.json", json.dumps({k: v for k, v in row.items() if k != "image"}).encode()
        if pictures:
            yield f"{i:05}.jpg", pictures[i]["image"]


def write_rows(folder: Path, kind: str, rows: Rows) -> str:
    """One file, or dataset, of `kind` (of FORMATS) in a folder of its own; its path. `image` is a path for formats without bytes."""
    bare = [{k: v for k, v in row.items() if k != "image"} for row in rows]
    refs = [row | {"image": f"pictures/{i}.jpg"} for i, row in enumerate(bare)]
    path = folder / f"rows.{kind.replace('arrow_file', 'arrow')}"
    if kind == "parquet":
        pq.write_table(_typed(rows), path, row_group_size=100)
    elif kind == "lance":
        lance.write_dataset(_typed(rows), str(path), max_rows_per_file=150)
    elif kind.startswith("arrow"):
        table = _typed(rows)
        new = pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=150)
    elif kind.startswith("tar"):
        path.write_bytes(tar_bytes(_samples(bare, rows), "w:gz" if kind.endswith("gz") else "w"))
    else:
        data = _lines(refs) if kind.startswith("jsonl") else csv_bytes(refs, "\t" if kind.startswith("tsv") else ",")
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
        for i, row in enumerate(rows):
            (folder / "pictures").mkdir(exist_ok=True)
            (folder / "pictures" / f"{i}.jpg").write_bytes(row["image"])
    return str(path)


def upload(folder: Path, uri: str) -> None:
    """All files below a folder, under a URI."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_bytes(storage.join(uri, path.relative_to(folder).as_posix()), path.read_bytes())


def read_plan(plan: SourcePlan) -> pa.Table:
    """All records of a plan, with what holds for every table checked."""
    tables = [table for unit in plan.units for table in read_unit(unit, plan.reading)]
    wanted = records_schema(plan.reading.kept)
    for table in tables:
        assert table.schema == wanted
        assert 0 < table.num_rows <= BATCH_ROWS
        table.validate(full=True)
    return pa.concat_tables(tables) if tables else wanted.empty_table()


def read_source(uri: str | Path, columns: Columns | None = None, **options: Any) -> list[dict[str, Any]]:
    """All records of a source as dicts."""
    return read_plan(plan_source(str(uri), columns or Columns(), **options)).to_pylist()


N = 330


def make_rows(n: int = N) -> list[dict[str, Any]]:
    dice = random.Random(7)
    return [
        {
            "image_id": f"i{k}",
            "product_id": f"p{k // 3}",
            "image": dice.randbytes(dice.randrange(1, 900)),
            "title": dice.choice(["A cup", "Tasse à café", 'the 5" "best", one', "two\nlines", " trimmed\t", "杯子 🍵", ""]),
            "coarse": dice.choice(["cups", ""]),
            "lang": "en",
            "version": k,
            "deleted": k % 7 == 0,
            "price": k * 0.5,
        }
        for k in range(n)
    ]


def expected(rows: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    names = ("image_id", "product_id", "image", "title", "coarse", "lang")
    return [
        (k, *(r[n].strip() if isinstance(r[n], str) else r[n] for n in names), str(r["version"]), r["deleted"], {"price": r["price"]}, "")
        for k, r in enumerate(rows)
    ]


def seen(records: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    names = ("source_row", "item_id", "product_id", "image", "title", "coarse", "lang", "version", "deleted", "attributes", "fault")
    return [tuple(r[n] for n in names) for r in records]


def read_and_fetch(uri: str, **options: Any) -> list[dict[str, Any]]:
    plan = plan_source(uri, Columns(), keep=["price"], **options)
    return Fetcher(base=plan.reading.images).fill(read_plan(plan)).to_pylist()
