"""The ingest against (a) a bare multiprocessing loop over the same record function and (b) Ray Data to Parquet without checks.

Each contender runs as processes of its own, one contender at a time, on 100, `--small` and `--large` records with pictures of
about 10 kB, and is measured from outside. Rates are slopes between the two sizes, so that what starting up costs cancels out.
"""

import argparse
import ctypes
import io
import json
import logging
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from idem import job, storage

log = logging.getLogger("bench")
JOB = "benchmarks.ingest"
ROOT = Path(__file__).resolve().parents[1]
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

RATE_BAR, MEMORY_BAR, CPU_BAR = 0.8, 1.15, 1.20
CPU_EVERY_S, MEMORY_EVERY_S = 1.0, 5.0  # a look at memory walks every mapping of every process
PATIENCE_S = 30.0  # for what a contender leaves behind to end by itself
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
OURS, BARE, UNCHECKED = "ours", "multiprocessing", "raydata"

# --- The records


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
    known = [pq.read_metadata(file) for file in _files(path)]
    return Source(path=str(path), rows=sum(m.num_rows for m in known), mb=sum(int((m.metadata or {})[IMAGE_BYTES]) for m in known) / 1e6)


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


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

    tasks, groups = [], [(file, pq.read_metadata(file)) for file in _files(Path(path))]
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

# --- Measuring


@dataclass(frozen=True, kw_only=True)
class Run:
    """One contender on one source. seconds: wall; cpu_s: of all its processes, counted as `cpu_by` says; peak_mb: sum of their PSS, MiB."""

    contender: str
    rows: int
    mb: float
    seconds: float
    cpu_s: float
    cpu_by: str
    peak_mb: float
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Watch:
    """What all processes below this one used. Each counts once, by its number and start; what it used after the last look is missed."""

    peak_mb: float = 0.0
    _cpu: dict[tuple[int, float], float] = field(default_factory=dict)

    @property
    def cpu_s(self) -> float:
        return sum(self._cpu.values())

    def look(self, *, memory: bool, alive: int) -> None:
        """`alive`: the child that somebody else waits for; orphans that were handed to this process and ended are buried here."""
        pss = 0
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.status() == psutil.STATUS_ZOMBIE and process.pid != alive:
                    with suppress(ChildProcessError):
                        os.waitpid(process.pid, os.WNOHANG)
                    continue
                used = process.cpu_times()
                self._cpu[process.pid, process.create_time()] = used.user + used.system
                pss += process.memory_full_info().pss if memory else 0
        self.peak_mb = max(self.peak_mb, pss / 2**20)


def adopt_orphans() -> None:
    """Become the parent of whatever the children leave behind: Ray's daemons and workers, whose time is lost to others otherwise."""
    if sys.platform != "linux":
        raise ValueError(f"this benchmark measures process trees as Linux shows them; this is {sys.platform}")
    if ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def bury(patience: float) -> None:
    """Wait until nothing is left below this process; what outlives `patience` seconds is killed."""
    end = time.monotonic() + patience
    while psutil.Process().children():
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if time.monotonic() > end:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(0.05)


def _used_by_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def watch(arguments: Sequence[str], logs: Path) -> tuple[float, Watch, int]:
    """Run a Python module to its end: its wall seconds, what it used while it was watched, and its exit code."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    seen = Watch()
    with logs.with_suffix(".out").open("wb") as out, logs.with_suffix(".err").open("wb") as err:
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-m", *arguments], stdout=out, stderr=err, env=env, cwd=ROOT, stdin=subprocess.DEVNULL)
        try:
            next_memory = 0.0
            while True:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(CPU_EVERY_S)
                seconds = time.perf_counter() - start
                if child.returncode is not None:
                    seen.look(memory=False, alive=child.pid)  # what it leaves behind
                    return seconds, seen, child.returncode
                memory = seconds >= next_memory
                next_memory = seconds + MEMORY_EVERY_S if memory else next_memory
                seen.look(memory=memory, alive=child.pid)
        finally:
            stopped = child.returncode is None
            if stopped:
                child.kill()
                child.wait()
            bury(0 if stopped else PATIENCE_S)


def said(logs: Path) -> dict[str, Any]:
    """The JSON line of a job, {} where it said none."""
    for line in reversed(logs.with_suffix(".out").read_text(errors="replace").splitlines()):
        with suppress(ValueError):
            if isinstance(found := json.loads(line), dict):
                return found
    return {}


def measure(contender: str, arguments: Sequence[str], fed: Source, logs: Path) -> Run:
    """Run one contender on one source. ValueError where it fails or does not bring every record through."""
    logs.parent.mkdir(parents=True, exist_ok=True)
    log.info("%s: %s records", contender, f"{fed.rows:,}")
    before = _used_by_children()
    seconds, seen, code = watch(arguments, logs)
    waited = _used_by_children() - before
    figures = said(logs)
    if code or not figures.get("ok") or (figures.get("rows"), figures.get("committed")) != (fed.rows, fed.rows):
        last = "\n".join(logs.with_suffix(".err").read_text(errors="replace").splitlines()[-15:])
        raise ValueError(f"{contender} was to bring {fed.rows:,} records through, ended with code {code} and said {figures}\n{last}")
    # Both miss some: the kernel what nobody waited for, the samples what came after the last. So the larger is nearer.
    by = "kernel (RUSAGE_CHILDREN)" if waited >= seen.cpu_s else f"samples every {CPU_EVERY_S:.0f} s"
    cpu_s = max(waited, seen.cpu_s)
    figures.pop("source", None)  # a path on this machine
    log.info("%s: %s records in %.1f s, %.1f CPU-s, %.0f MiB", contender, f"{fed.rows:,}", seconds, cpu_s, seen.peak_mb)
    return Run(
        contender=contender, rows=fed.rows, mb=fed.mb, seconds=seconds, cpu_s=cpu_s, cpu_by=by, peak_mb=seen.peak_mb, figures=figures
    )


# --- What is made of it


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure beside its peer's of the same run. ratio: value / peer_value; bar: what it must keep to, "" for none; holds: whether."""

    name: str
    value: float
    peer: str
    peer_value: float
    bar: str = ""
    holds: bool | None = None

    @property
    def ratio(self) -> float:
        return self.value / self.peer_value if self.peer_value else float("nan")


def slope(small: Run, large: Run, what: Callable[[Run], float]) -> float:
    """How much more of `what` there is a second of the longer run. ValueError where the larger source did not take longer."""
    if large.seconds <= small.seconds:
        raise ValueError(
            f"{large.contender}: {large.rows:,} records took {large.seconds:.1f} s, {small.rows:,} took {small.seconds:.1f} s; "
            "the sizes are too close for a slope"
        )
    return (what(large) - what(small)) / (large.seconds - small.seconds)


def cpu_ms(run: Run, started: Run | None = None) -> float:
    """CPU milliseconds a record; of the records beyond those of `started`, and less its time, where it is given."""
    return 1e3 * (run.cpu_s - (started.cpu_s if started else 0)) / (run.rows - (started.rows if started else 0))


def at_least(figure: Figure, bar: float) -> Figure:
    return Figure(**{**asdict(figure), "bar": f">= {bar}", "holds": figure.ratio >= bar})


def same(figure: Figure, bar: float) -> Figure:
    """Neither more nor less than `bar` times the peer."""
    return Figure(**{**asdict(figure), "bar": f"{1 / bar:.2f} to {bar:.2f}", "holds": 1 / bar <= figure.ratio <= bar})


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
        same(Figure(name="cpu_ms_a_record", value=cpu_ms(large), peer=at_small, peer_value=cpu_ms(small)), CPU_BAR),
        same(Figure(name="cpu_ms_a_record_less_start", value=cpu_ms(large, tiny), peer=at_small, peer_value=cpu_ms(small, tiny)), CPU_BAR),
        Figure(name="peak_mb", value=large.peak_mb, peer=BARE, peer_value=runs[BARE, "large"].peak_mb),
        Figure(name="cpu_ms_a_further_record", value=cpu_ms(large, small), peer=BARE, peer_value=cpu_ms(*reversed(sizes[BARE]))),
    ]


def verdict(figures: Iterable[Figure]) -> bool:
    return all(figure.holds for figure in figures if figure.holds is not None)


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Cells in columns, the first `left` of them at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def table(runs: Iterable[Run], figures: Iterable[Figure]) -> str:
    """What was measured, then what was made of it, as aligned text."""
    head = ("contender", "records", "wall s", "CPU s", "CPU ms a record", "peak MiB")
    raw = [
        (r.contender, f"{r.rows:,}", f"{r.seconds:.1f}", f"{r.cpu_s:.1f}", f"{cpu_ms(r):.3f}", f"{r.peak_mb:,.0f}")
        for r in sorted(runs, key=lambda r: (r.rows, r.contender != OURS))
    ]
    said_of = {True: "holds", False: "FAILS", None: ""}
    made = [(f.name, f.peer, f"{f.value:,.2f}", f"{f.peer_value:,.2f}", f"{f.ratio:.2f}", f.bar, said_of[f.holds]) for f in figures]
    below = ("figure", "peer", "ours", "peer's", "ratio", "bar", "")
    return aligned([head, *raw], left=1) + "\n\n" + aligned([below, *made], left=2)


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


def _commit() -> str:
    told = [
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain"))
    ]
    return (told[0] or "unknown") + (" with changes" if told[1] else "")


def surroundings() -> dict[str, Any]:
    """Where and of what the figures are."""
    packages = ("ray", "pylance", "lance-ray", "pyarrow", "pillow", "numpy")
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "command": f"python -m {JOB} {' '.join(sys.argv[1:])}".strip(),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} x {models[0] if models else platform.machine()}, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def save(told: Mapping[str, Any]) -> str:
    """Where it is kept; it names no folder of this machine."""
    path = ROOT / "benchmarks" / "results" / f"ingest_{os.cpu_count()}cpu_{time.strftime('%Y-%m-%d')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(told, indent=1).replace(f"{ROOT}/", "") + "\n")
    return str(path.relative_to(ROOT))


def _rounded(told: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in told.items()}


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
            runs[contender, size] = measure(contender, asked, some, folder / "logs" / f"{contender}-{size}")
    shutil.rmtree(folder / "made", ignore_errors=True)
    figures = compare(runs)
    print(table(runs.values(), figures), file=sys.stderr)  # noqa: T201
    told = {
        "holds": verdict(figures),
        "figures": [_rounded({**asdict(figure), "ratio": figure.ratio}) for figure in figures],
        "runs": [_rounded({"size": size, **asdict(run)}) for (_, size), run in runs.items()],
        **surroundings(),
    }
    return {**told, "saved": save(told)} if arguments.save else told


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
