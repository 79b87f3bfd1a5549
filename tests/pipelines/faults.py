"""What the tests of faults share: a catalogue, the books that must balance after whatever happened, and drivers that die."""

import hashlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from idem import storage
from idem.cluster import WORKER_ENV
from pipelines import ingest, runs, table
from pipelines.items import open_items
from pipelines.normalize import Limits, normalize_record
from pipelines.records import RECORDS
from pipelines.rejects import open_rejects

ROOT = Path(__file__).resolve().parents[2]


def picture(seed: int, side: int = 48) -> bytes:
    stream = io.BytesIO()
    colours = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def rows(n: int, start: int = 0, title: str = "cup", side: int = 48) -> list[dict]:
    """`n` records, one in ten of which cannot be used in one of several ways."""
    made = []
    for k in range(start, start + n):
        row = {"image_id": f"i{k:05}", "product_id": f"p{k // 4}", "title": f"{title} {k}", "image": picture(k, side)}
        if k % 10 == 3:
            row |= [{"image": b"no picture"}, {"product_id": ""}, {"image": row["image"][:-200]}, {"image": None, "title": None}][
                k // 10 % 4
            ]
        made.append(row)
    return made


def write(folder: Path, name: str, made: list[dict], group: int = 10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text, data = pa.string(), pa.binary()
    columns = pa.schema([("image_id", text), ("product_id", text), ("title", text), ("image", data)])
    pq.write_table(pa.Table.from_pylist(made, schema=columns), folder / name, row_group_size=group)
    return folder


def expected(name: str, place: int, row: dict, limits: Limits) -> dict | None:
    """The item that the pure function makes of a record, None for a reject."""
    record = {field.name: "" if field.type == pa.string() else None for field in RECORDS}
    told = {"item_id": row["image_id"], "product_id": row["product_id"], "title": row["title"] or "", "image": row["image"]}
    return normalize_record({**record, **told, "source_file": name, "source_row": place, "deleted": False}, limits)["item"]


def balance(settings: ingest.IngestConfig, sources: dict[str, list[dict]]) -> None:
    """The oracle: every record is one item or one open reject, no id is there twice, contents are those of the pure function."""
    uri = storage.Layout(settings.root).items
    items, rejects = open_items(uri), open_rejects(uri)
    found = items.table(["item_id", "source_file", "source_row", "content_hash", "title", "image"]).to_pylist()
    ids = [row["item_id"] for row in found]
    assert len(ids) == len(set(ids))
    kept = {(row["source_file"], row["source_row"]): row for row in found}
    aside = {(row["source_file"], row["source_row"]) for row in rejects.light.to_pylist()}
    assert len(kept) == len(found)
    assert len(aside) == rejects.light.num_rows
    assert not kept.keys() & aside
    assert kept.keys() | aside == {(name, place) for name, made in sources.items() for place in range(len(made))}
    for (name, place), row in kept.items():
        wanted = expected(name, place, sources[name][place], settings.limits())
        assert wanted
        assert row["content_hash"] == wanted["content_hash"]
        assert hashlib.sha256(row["image"] + b"\0" + row["title"].encode()).hexdigest() == row["content_hash"]
    for name, place in aside:
        assert expected(name, place, sources[name][place], settings.limits()) is None


def is_finished(settings: ingest.IngestConfig) -> None:
    """A second run does nothing, and nothing lies about."""
    layout = storage.Layout(settings.root)
    before = {name: table.open_table(storage.join(layout.items, name)).version for name in (table.ITEMS, table.REJECTS)}
    assert ingest.run(settings)["skipped"]
    runs.sweep(layout.items)
    for name, version in before.items():
        opened = table.open_table(storage.join(layout.items, name))
        assert opened.version == version
        assert table.orphans(opened, (), float("inf")) == []
    for run in table.runs_of(table.open_table(storage.join(layout.items, table.ITEMS))):
        left = {path.name for path in Path(runs.folder_of(layout.items, run)).iterdir()}
        assert left == {"manifest.json", "report.html", "files.json", "commit.json"}


# Runs an ingest in a process of its own that kills itself, or is ended, at a point named by the first argument.
DRIVER = """
import os, signal, sys, threading
from idem import config
from pipelines import ingest, publish, table
point, number, run_file = sys.argv[1], float(sys.argv[2]), sys.argv[3]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

real_swap, real_spent, calls = table.swap, ingest.Budget.spent, []

def swap(opened, change, run):
    calls.append(run)
    if point == "before" or (point == "rejects" and len(calls) == 2):
        die()
    if point == "during":
        timer = threading.Timer(number, die)
        timer.start()
    made = real_swap(opened, change, run)
    if point in ("after", "during"):
        die()
    return made

def spent(self, reasons, rows):
    calls.append(rows)
    if len(calls) > number:
        die()
    return real_spent(self, reasons, rows)

if point == "staging":
    ingest.Budget.spent = spent
elif point in ("index", "save_report"):
    setattr(publish, point, die)
elif point == "manifest":
    publish.manifest.write = die
else:
    table.swap = swap
ingest.run(config.load(run_file, "ingest", ingest.IngestConfig))
"""


def run_file(settings: ingest.IngestConfig, folder: Path) -> Path:
    path = folder / f"{Path(settings.source).name}.toml"
    told = f'source = "{settings.source}"\nunit_rows = {settings.unit_rows}\n'
    path.write_text(f'root = "{settings.root}"\n[ingest]\n{told}')
    return path


def environment(**more: str) -> dict[str, str]:
    """For a child that joins the Ray of this session."""
    import ray

    return {**os.environ, **WORKER_ENV, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(ROOT), **more}


def start(*arguments: str, env: dict[str, str], log: Path) -> subprocess.Popen:
    with log.open("ab") as stream:
        return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env, stdout=stream, stderr=stream)


def dies(settings: ingest.IngestConfig, folder: Path, point: str, number: float = 0.0) -> None:
    log = folder / "driver.log"
    driver = start("-c", DRIVER, point, str(number), str(run_file(settings, folder)), env=environment(), log=log)
    assert driver.wait(120) == -signal.SIGKILL, log.read_text()[-3000:]
