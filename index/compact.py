"""Fold the changes since the current release into the items, and publish the release that holds them.

    python -m index.compact RUN

Net changes go to the ingest as a file of records (`root/changes/fold-<first>-<last>.parquet`), then the index is built again, of which
only what changed is encoded, and released with the number of the last change. Killed anywhere and started again, it goes on.
"""

import argparse
import json
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from idem import config, job, manifest, schema, storage
from index.changes import Tail
from index.live import net
from index.release import FOLDED, Release, ReleaseConfig
from pipelines.items import Items, open_items

JOB = "index.compact"
COLUMNS = ["product_id", "image", "title", "family_id", "category", "lang", "role", "style", "id_split", "split", "mime"]
NAMES = {"item_id": "image_id"}  # of columns in files of records, where the run file says no other


def records(put: pa.Table | None, deleted: Sequence[str], versions: dict[str, int | None], names: dict[str, str]) -> pa.Table:
    """The net changes as records for the ingest, which win over the items of these `versions` (None: the item has none); pure."""
    gone = pa.table({"item_id": pa.array(deleted, pa.string())})
    tables = []
    if put is not None:
        kept = pa.table({name: put[name] for name in ("item_id", *COLUMNS)})  # without the schema: deletions have these columns empty
        if schema.ATTRIBUTES in put.column_names:
            for field in put.schema.field(schema.ATTRIBUTES).type:
                kept = kept.append_column(field.name, pc.struct_field(put[schema.ATTRIBUTES], field.name))  # null where the struct is
        own = put["version"].to_pylist()
        tables.append(_versioned(kept, own, versions, deleted=False))
    tables.append(_versioned(gone, [None] * len(deleted), versions, deleted=True))
    made = pa.concat_tables(tables, promote_options="default")
    return made.rename_columns([names.get(name, name) for name in made.column_names])


def _versioned(table: pa.Table, own: Sequence[int | None], versions: dict[str, int | None], *, deleted: bool) -> pa.Table:
    there = [versions.get(item_id) for item_id in table["item_id"].to_pylist()]
    wins = [mine if old is None else max(old + 1, mine or 0) for mine, old in zip(own, there, strict=True)]
    table = table.append_column("version", pa.array(wins, pa.int64()))
    return table.append_column("deleted", pa.array(np.full(len(wins), deleted)))


def handed_over(folder: Path, release: Release, items: Items, names: dict[str, str]) -> tuple[Path, int, dict[str, int]] | None:
    """The file of records, the number of the last change in it, and how many it holds; None where there is no change."""
    news = Tail(folder, release.folded).news()
    if not news:
        return None
    put, deleted = net(news)
    last, counts = news[-1].last, {"put": put.num_rows if put is not None else 0, "deleted": len(deleted)}
    path = folder / f"fold-{release.folded + 1:020d}-{last:020d}.parquet"
    if not path.exists():  # written once: what is read again after a crash is the same file, and taken in once
        known = items.table(["item_id", "version"])
        touched = [*(put["item_id"].to_pylist() if put is not None else []), *deleted]
        known = known.filter(pc.is_in(known["item_id"], value_set=pa.array(touched, pa.string())))
        versions = dict(zip(known["item_id"].to_pylist(), known["version"].to_pylist(), strict=True))
        partial = path.with_suffix(".partial")
        pq.write_table(records(put, deleted, versions, names), partial)
        partial.replace(path)
    return path, last, counts


def started(name: str, run: str, sets: Sequence[str]) -> dict[str, Any]:
    """Run `python -m name run --set ...` to its end; the figures it told. ValueError with what it says is wrong."""
    words = [word for each in sets for word in ("--set", each)]
    done = subprocess.run([sys.executable, "-m", name, run, *words], stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    told = json.loads(lines[-1]) if lines else {}
    if done.returncode or not told.get("ok"):
        raise ValueError(f"{name} failed: {told.get('error') or f'it ended with code {done.returncode}'}")
    return told


def compact(run: str, sets: Sequence[str]) -> dict[str, Any]:
    """ValueError where a job fails; what was done until then stays, and is not done again."""
    root = config.load(run, "release", ReleaseConfig, sets).root
    layout = storage.Layout(root)
    folder = storage.local_path(layout.changes)
    release = Release.open(manifest.current(layout.releases, kind="release"))
    columns = tomllib.loads(Path(run).read_text()).get("ingest", {}).get("columns", {})
    found = handed_over(folder, release, open_items(layout.items), NAMES | columns) if folder.is_dir() else None
    if found is None:
        return {"folded": release.folded, "release": release.name, "skipped": True}
    path, last, counts = found
    ingest = started("pipelines.ingest", run, [*sets, f"ingest.source={path}", "ingest.format=parquet", "ingest.max_reject_fraction=1.0"])
    mark(folder, open_items(layout.items).id, last)
    index = started("index.run", run, sets)
    made = started("index.release", run, sets)
    told = {"rejected": ingest.get("rejected", 0), "gallery": index.get("gallery"), "release": made["release"]}
    return {**counts, **told, "folded": last}


def mark(folder: Path, items_id: str, last: int) -> None:
    """Note that these items hold all changes up to `last`."""
    path = folder / FOLDED
    known = json.loads(path.read_text()) if path.exists() else {}
    storage.write_bytes(str(path), json.dumps({**known, items_id: max(last, known.get(items_id, 0))}, indent=1).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog=f"python -m {JOB}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run file (TOML)")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="change one setting of the run file")
    arguments = parser.parse_args()
    sys.exit(job.guarded(JOB, lambda: compact(arguments.run, arguments.set)))
