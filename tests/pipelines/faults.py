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
    """`n` records, one in ten of which cannot be used in one of several ways, and one in ten repeats the id of another."""
    made = []
    for k in range(start, start + n):
        row = {"image_id": f"i{k:05}", "product_id": f"p{k // 4}", "title": f"{title} {k}", "image": picture(k, side)}
        if k % 10 == 3:
            row |= [{"image": b"no picture"}, {"product_id": ""}, {"image": row["image"][:-200]}, {"image": None, "title": None}][
                k // 10 % 4
            ]
        if k % 10 == 7 and k > start + 2:
            row["image_id"] = f"i{k - 2:05}"
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


def balance(settings: ingest.IngestConfig, *loads: dict[str, list[dict]]) -> None:
    """The oracle, for runs that each read some sources: of every id the last usable record is the item, the others of its run and
    the unusable ones are open rejects, all with the contents that the pure function gives; an item of an earlier run is replaced.
    """
    wanted: dict[str, tuple[str, int]] = {}
    rejected: set[tuple[str, int]] = set()
    for sources in loads:
        newest: dict[str, tuple[str, int]] = {}
        for name, made in sources.items():
            for place, row in enumerate(made):
                item = expected(name, place, row, settings.limits())
                if item is None:
                    rejected.add((name, place))
                    continue
                if item["item_id"] in newest:
                    rejected.add(newest[item["item_id"]])
                newest[item["item_id"]] = name, place
        wanted |= newest
    uri = storage.Layout(settings.root).items
    found = open_items(uri).table(["item_id", "source_file", "source_row", "content_hash", "title", "image"]).to_pylist()
    assert {row["item_id"]: (row["source_file"], row["source_row"]) for row in found} == wanted
    assert len(found) == len(wanted)
    aside = [(row["source_file"], row["source_row"]) for row in open_rejects(uri).light.to_pylist()]
    assert sorted(aside) == sorted(rejected)
    made = {name: records for sources in loads for name, records in sources.items()}
    for row in found:
        name, place = row["source_file"], row["source_row"]
        item = expected(name, place, made[name][place], settings.limits())
        assert item
        assert row["content_hash"] == item["content_hash"]
        assert hashlib.sha256(row["image"] + b"\0" + row["title"].encode()).hexdigest() == row["content_hash"]


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
        assert left == {"manifest.json", "report.html", "files.json", "commits"}


# Runs an ingest in a process of its own that kills itself, or is ended, at a point named by the first argument.
DRIVER = """
import os, signal, sys, threading
from idem import config
from pipelines import ingest, publish, table
point, number, run_file = sys.argv[1], float(sys.argv[2]), sys.argv[3]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

real_swap, real_spent, calls = table.swap, ingest.Budget.spent, []

def swap(opened, change, run, note=""):
    calls.append(run)
    if point == "before" or (point == "rejects" and len(calls) == 2):
        die()
    if point == "during":
        timer = threading.Timer(number, die)
        timer.start()
    made = real_swap(opened, change, run, note)
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
