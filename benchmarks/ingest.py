"""The ingest against (a) a bare multiprocessing loop over the same record function and (b) Ray Data to Parquet without checks.

Each contender runs as processes of its own, one contender at a time, on 100, `--small` and `--large` records with pictures of
about 10 kB, and is measured from outside. Rates are slopes between the two sizes, so that what starting up costs cancels out.
"""

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.tools.ingest_records import BYTES_A_RECORD, TINY, Source, parquet_files, source, wanted, write_missing
from benchmarks.tools.measuring import (
    OURS,
    ROOT,
    Figure,
    Run,
    adopt_orphans,
    at_least,
    cpu_ms,
    measure,
    rounded,
    same,
    save,
    slope,
    surroundings,
    table,
    verdict,
)
from idem import job, storage

log = logging.getLogger("bench")
JOB = "benchmarks.ingest"
BARE, UNCHECKED = "multiprocessing", "raydata"
RATE_BAR, MEMORY_BAR, CPU_BAR = 0.8, 1.15, 1.20
COUNTS = ("rows", "committed")  # what every contender must say of all records
PACKAGES = ("ray", "pylance", "lance-ray", "pyarrow", "pillow", "numpy")

# --- The peers. What they need is imported where it is needed: the process that measures stays small.


def write_group(task: tuple[str, int, int], out: str) -> tuple[int, list[str]]:
    """One row group of a file -> its items as fragments of a Lance dataset, as JSON, and how many records it had."""
    from lance.fragment import write_fragments

    from pipelines.normalize import Limits, normalize_records
    from pipelines.records import RECORDS, TEXTS

    path, number, first = task
    with pq.ParquetFile(path) as file:
        read = file.read_row_group(number, use_threads=False)
    rows = read.num_rows
    known = {"item_id": "image_id", "product_id": "product_id", "title": "title", "category": "category"}
    empty = pa.array([""] * rows)
    columns: dict[str, Any] = {name: read.column(known[name]) if name in known else empty for name in TEXTS}
    columns |= {"source_file": [Path(path).name] * rows, "source_row": range(first, first + rows), "image": read.column("image")}
    columns |= {"mime": empty, "fault": empty, "fault_message": empty, "deleted": [False] * rows}
    columns |= {name: pa.nulls(rows, RECORDS.field(name).type) for name in ("image_ref", "original")}
    made = normalize_records(pa.table({name: columns[name] for name in RECORDS.names}).cast(RECORDS), Limits())
    assert made.items.num_rows == rows, made.rejects.column("message").to_pylist()[:3]
    return rows, [json.dumps(fragment.to_json()) for fragment in write_fragments(made.items, out, mode="overwrite")]


def bare(path: str, out: str, workers: int) -> dict[str, Any]:
    """(a): a pool of processes, a row group each at a time, one commit at the end."""
    import lance

    from idem import schema

    tasks, groups = [], [(file, pq.read_metadata(file)) for file in parquet_files(Path(path))]
    for file, known in groups:
        sizes = [known.row_group(n).num_rows for n in range(known.num_row_groups)]
        tasks += [(str(file), n, sum(sizes[:n])) for n in range(len(sizes))]
    rows, fragments = 0, []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for count, made in pool.imap_unordered(partial(write_group, out=out), tasks):
            rows += count
            fragments += made
    held = [lance.FragmentMetadata.from_json(text) for text in fragments]
    dataset = lance.LanceDataset.commit(out, lance.LanceOperation.Overwrite(schema.ITEMS, held))
    return {"rows": rows, "committed": dataset.count_rows()}


def unchecked(path: str, out: str, workers: int) -> dict[str, Any]:
    """(b): Ray Data reads and writes, and looks at nothing."""
    import ray.data

    from idem import cluster

    cluster.connect(num_cpus=workers)
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.read_parquet(path).write_parquet(out)
    rows = sum(pq.read_metadata(file).num_rows for file in Path(out).rglob("*.parquet"))
    return {"rows": rows, "committed": rows}


PEERS: Mapping[str, Callable[[str, str, int], dict[str, Any]]] = {BARE: bare, UNCHECKED: unchecked}

# --- What is made of the runs


def compare(runs: Mapping[tuple[str, str], Run]) -> list[Figure]:
    """The figures of all runs, by contender and size ("tiny", "small", "large")."""
    sizes = {name: (runs[name, "small"], runs[name, "large"]) for name in (OURS, *PEERS)}
    rows = {name: slope(*pair, lambda run: run.rows) for name, pair in sizes.items()}
    mb = {name: slope(*pair, lambda run: run.mb) for name, pair in sizes.items()}
    (small, large), tiny = sizes[OURS], runs[OURS, "tiny"]
    at_small = f"ours at {small.rows:,}"
    return [
        at_least(Figure(name="rows_per_s", value=rows[OURS], peer=BARE, peer_value=rows[BARE]), RATE_BAR),
        at_least(Figure(name="mb_per_s", value=mb[OURS], peer=BARE, peer_value=mb[BARE]), RATE_BAR),
        Figure(name="rows_per_s", value=rows[OURS], peer=UNCHECKED, peer_value=rows[UNCHECKED]),
        Figure(name="mb_per_s", value=mb[OURS], peer=UNCHECKED, peer_value=mb[UNCHECKED]),
        same(Figure(name="peak_mb", value=large.peak_mb, peer=at_small, peer_value=small.peak_mb), MEMORY_BAR),
        # The whole process's falls with size even where every record costs the same, as more share its start: the bar is on the rest.
        Figure(name="cpu_ms_a_record", value=cpu_ms(large), peer=at_small, peer_value=cpu_ms(small)),
        same(Figure(name="cpu_ms_a_record_less_start", value=cpu_ms(large, tiny), peer=at_small, peer_value=cpu_ms(small, tiny)), CPU_BAR),
        Figure(name="peak_mb", value=large.peak_mb, peer=BARE, peer_value=runs[BARE, "large"].peak_mb),
        Figure(name="cpu_ms_a_further_record", value=cpu_ms(large, small), peer=BARE, peer_value=cpu_ms(*reversed(sizes[BARE]))),
    ]


# --- The whole benchmark


def run_file(folder: Path, fed: Source, name: str) -> Path:
    """The smallest run file of an ingest; JSON strings are TOML strings."""
    path = folder / f"run-{name}.toml"
    path.write_text(f"root = {json.dumps(str(folder / 'made' / OURS))}\n\n[ingest]\nsource = {json.dumps(fed.path)}\n")
    return path


def command(contender: str, fed: Source, folder: Path, size: str, workers: int) -> list[str]:
    if contender == OURS:
        return ["pipelines.ingest", str(run_file(folder, fed, size))]
    out = str(folder / "made" / contender)
    return [JOB, "--peer", contender, "--source", fed.path, "--out", out, "--workers", str(workers)]


def sources(folder: Path, small: int, large: int, workers: int) -> dict[str, Source]:
    """The sources by size; made by a process of its own where they are missing, so that this one has started nothing."""
    storage.require_free(str(folder), large * BYTES_A_RECORD)
    files = [Path(part.path) for part in wanted(folder, small, large)]
    if not all(file.exists() for file in files):
        log.info("drawing %s records", f"{large:,}")
        arguments = ["--peer", "data", "--small", str(small), "--large", str(large), "--keep", str(folder), "--workers", str(workers)]
        subprocess.run([sys.executable, "-m", JOB, *arguments], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return {"tiny": source(files[-1]), "small": source(files[0]), "large": source(files[0].parent)}


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """All contenders on all sizes. ValueError for sizes without a slope, and where a contender fails."""
    if not TINY < arguments.small < arguments.large:
        raise ValueError(f"--small must lie between {TINY} and --large, found {arguments.small} and {arguments.large}")
    folder = Path(arguments.keep).resolve()
    fed = sources(folder, arguments.small, arguments.large, arguments.workers)
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that what runs is ended too
    runs: dict[tuple[str, str], Run] = {}
    for size, some in fed.items():
        for contender in (OURS, *PEERS):
            shutil.rmtree(folder / "made", ignore_errors=True)
            asked = command(contender, some, folder, size, arguments.workers)
            logs = folder / "logs" / f"{contender}-{size}"
            runs[contender, size] = measure(contender, asked, rows=some.rows, mb=some.mb, counts=COUNTS, logs=logs)
    shutil.rmtree(folder / "made", ignore_errors=True)
    figures = compare(runs)
    print(table(runs.values(), figures), file=sys.stderr)  # noqa: T201
    told = {
        "holds": verdict(figures),
        "figures": [rounded({**asdict(figure), "ratio": figure.ratio}) for figure in figures],
        "runs": [rounded({"size": size, **asdict(run)}) for (_, size), run in runs.items()],
        **surroundings(JOB, PACKAGES),
    }
    return {**told, "saved": save("ingest", told)} if arguments.save else told


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {JOB}", description=__doc__)
    parser.add_argument("--small", type=int, default=20_000, help="records of the smaller source, and of each file of the larger one")
    parser.add_argument("--large", type=int, default=200_000, help="records of the larger source")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of the peers; the ingest takes all cores")
    parser.add_argument("--keep", default="out/bench", help="folder that keeps the records drawn, for the next time")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/ingest_<cores>cpu_<date>.json as well")
    parser.add_argument("--peer", choices=(*PEERS, "data"), help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.peer == "data":
        files = wanted(Path(arguments.keep), arguments.small, arguments.large)
        return job.guarded(JOB, lambda: write_missing(files, arguments.workers))
    if arguments.peer:
        return job.guarded(JOB, lambda: PEERS[arguments.peer](arguments.source, arguments.out, arguments.workers))
    return job.guarded(JOB, lambda: bench(arguments))


if __name__ == "__main__":
    sys.exit(main())
