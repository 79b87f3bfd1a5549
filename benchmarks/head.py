"""The prototype head's full step at 1e5 to 1e8 prototypes, beside a plain linear softmax and a row-sampled head.

Rows of 64 numbers in bf16, in a memory-mapped file (`--device cuda`: in device memory), every one of them really written. A step
is fetch, forward, backward, row update and write-back for 256 embeddings whose labels are uniform over all rows, the worst case
for caches; what rebuilding the index costs is dealt over the steps between two rebuilds. These are 200 at 1e5 rows and grow with
the rows, so that a row is touched as often between two rebuilds at every size. Steps before the timed ones bring the page cache
where a long run has it: 150 of them touch 95 % of the pages of 1e7 rows. From 1e8 on (1e7 on cuda) neighbours come from a
generator that draws them anywhere, and stand beside 1e5 rows fed likewise. Each contender is a process; they step in turns.
"""

import argparse
import json
import multiprocessing
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.tools.head_contenders import DIM, GENERATOR, INDEX, LINEAR, OURS, SAMPLED, Spec, serve
from benchmarks.tools.measuring import Figure, aligned, at_most, rounded, save, surroundings, verdict
from idem import job

JOB = "benchmarks.head"
PACKAGES = {"cpu": ("torch", "faiss-cpu", "numpy"), "cuda": ("torch", "numpy")}
BARS = {int(1e7): 1.5, int(1e8): 3.0}  # at most so many times the step at 1e5
BASE, MEMORY_BAR_MB = int(1e5), 8e9 / 2**20
INDEXED = {"cpu": int(1e7), "cuda": int(1e6)}  # rows up to which neighbours come from an index
FIT = {"cpu": {LINEAR: int(1e5), SAMPLED: int(1e6)}, "cuda": {LINEAR: int(1e6), SAMPLED: int(1e7)}}  # a step of seconds at most
ALL_TOUCHED = {"cpu": int(1e7), "cuda": int(1e8)}  # rows of which all have optimizer state: 1e8 of them would be 14.4 GB more of disk
SLOW_EVERY = 8  # peers step in one round of so many


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One contender: seconds of each step in turn, by the clock and of its CPU, and what it said of itself at the end."""

    spec: Spec
    seconds: Sequence[float]
    cpu: Sequence[float]
    said: Mapping[str, Any]

    @property
    def step_ms(self) -> float:
        """The median step, with its share of a rebuild."""
        return 1e3 * statistics.median(self.seconds) + self.refresh_ms

    @property
    def refresh_ms(self) -> float:
        return 1e3 * self.said.get("build_s", 0.0) / self.said.get("refresh", 1)

    def told(self) -> dict[str, Any]:
        """All of it, for the record; no folder of this machine."""
        kept = {"step_ms": self.step_ms, "cpu_ms": 1e3 * statistics.median(self.cpu), "steps_ms": [round(1e3 * s, 2) for s in self.seconds]}
        return rounded({**asdict(self.spec), "folder": "", **self.said, **kept})


class Contender:
    """A process that steps when told. ValueError with what it said when it could not."""

    def __init__(self, spec: Spec) -> None:
        context = multiprocessing.get_context("spawn")
        self.spec, (self.pipe, theirs) = spec, context.Pipe()
        self.steps: list[tuple[float, float]] = []
        self.process: BaseProcess = context.Process(target=serve, args=(spec, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> None:
        began = time.perf_counter()
        self._heard(str)
        sys.stderr.write(f"{self.spec.name}: ready after {time.perf_counter() - began:.0f} s\n")

    def step(self) -> None:
        self.pipe.send("step")
        self.steps.append(self._heard(tuple))

    def end(self, *, warm: int) -> Measured:
        self.pipe.send("tell")
        said = self._heard(dict)
        self.pipe.send("end")
        self.process.join()
        seconds, cpu = zip(*self.steps[warm:], strict=True)
        return Measured(spec=self.spec, seconds=seconds, cpu=cpu, said=said)

    def _heard(self, kind: type) -> Any:
        said = self._receive(self.pipe)
        if not isinstance(said, kind) or (kind is str and said != "ready"):
            raise ValueError(f"{self.spec.name} failed: {said}")
        return said

    def _receive(self, pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except EOFError:
            self.process.join()
            return f"its process ended with code {self.process.exitcode}"


def phases(sizes: Sequence[int], device: str, folder: str, neighbours: int, random: int) -> list[list[Spec]]:
    """Which contenders step in turns with which, smallest first.

    Those with an index are together; each size beyond has a turn of its own beside 1e5 rows fed likewise: its rows would otherwise
    push the others' out of the page cache, or off the device.
    """

    def ours(rows: int, source: str, place: str) -> Spec:
        return Spec(
            kind=OURS,
            rows=rows,
            source=source,
            device=device,
            storage="file" if device == "cpu" else "device",
            folder=f"{folder}/{place}-{rows}",
            neighbours=neighbours,
            random=random,
            touched=rows <= ALL_TOUCHED[device],
        )

    def peers(rows: int) -> list[Spec]:
        return [Spec(kind=kind, rows=rows, device=device) for kind in (LINEAR, SAMPLED) if rows <= FIT[device][kind]]

    made = [[spec for rows in sizes if rows <= INDEXED[device] for spec in (ours(rows, INDEX, "indexed"), *peers(rows))]]
    for rows in sizes:
        if rows > INDEXED[device]:
            made.append([ours(BASE, GENERATOR, f"beside-{rows}"), ours(rows, GENERATOR, "generated"), *peers(rows)])
    return made


@contextmanager
def room(parent: str, wanted: Sequence[Spec]) -> Iterator[str]:
    """A folder that is gone afterwards. ValueError where the disk has no room for the rows of all contenders."""
    needed = sum(spec.rows * (DIM * 2 * (2 if spec.touched else 1)) for spec in wanted if spec.kind == OURS and spec.storage == "file")
    Path(parent).mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(parent).free) < needed + (2 << 30):
        raise ValueError(
            f"rows of {', '.join(f'{s.rows:,}' for s in wanted if s.kind == OURS)} prototypes need {needed / 1e9:.1f} GB and 2 GB more; "
            f"{free / 1e9:.1f} GB are free below {parent} (--folder takes another place, --sizes fewer rows)"
        )
    folder = tempfile.mkdtemp(dir=parent, prefix="head-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(wanted: Sequence[Spec], rounds: int, warm: int) -> list[Measured]:
    """All contenders in turns; on the CPU set up one after the other, because setting up is busy."""
    contenders: list[Contender] = []
    try:
        for spec in wanted:
            contenders.append(Contender(spec))
            if spec.device == "cpu":
                contenders[-1].ready()
        for contender in (c for c in contenders if c.spec.device == "cuda"):
            contender.ready()
        for number in range(warm + rounds):
            for contender in contenders:
                if contender.spec.kind == OURS or number == 0 or (number >= warm and (number - warm) % SLOW_EVERY == 0):
                    contender.step()
        return [contender.end(warm=warm if contender.spec.kind == OURS else 1) for contender in contenders]
    finally:
        for contender in contenders:
            contender.process.kill()


def compare(phase: Sequence[Measured], device: str) -> list[Figure]:
    """Ours at each size beside ours at 1e5 that stepped in turns with it, and beside the peers of its size."""
    known = {(m.spec.kind, m.spec.rows): m for m in phase}
    base, figures = known[OURS, BASE], []
    for m in (m for m in phase if m.spec.kind == OURS):
        if m is not base:
            figure = Figure(name=f"step_ms {m.spec.name}", value=m.step_ms, peer=base.spec.name, peer_value=base.step_ms)
            figures.append(at_most(figure, BARS[m.spec.rows]) if device == "cpu" and m.spec.rows in BARS else figure)
        for kind in (LINEAR, SAMPLED):
            if peer := known.get((kind, m.spec.rows)):
                figures.append(Figure(name=f"step_ms {m.spec.name}", value=m.step_ms, peer=peer.spec.name, peer_value=peer.step_ms))
    return figures


def memory(measured: Sequence[Measured]) -> Figure:
    """The most anonymous memory that a process of ours held, beside its limit."""
    most = max(m.said["anonymous_mb"] for m in measured if m.spec.kind == OURS)
    return at_most(Figure(name="anonymous_mb", value=most, peer="8 GB", peer_value=MEMORY_BAR_MB), 1.0)


def table(measured: Sequence[Measured], figures: Sequence[Figure]) -> str:
    """What was measured, then what was made of it."""
    head = (
        "contender",
        "steps",
        "median ms",
        "least",
        "most",
        "CPU ms",
        "refresh ms",
        "rebuild s",
        "every",
        "columns",
        "anon MiB",
        "disk GB",
        "device GB",
    )
    raw = [
        (
            m.spec.name,
            str(len(m.seconds)),
            *(f"{1e3 * of(m.seconds):.1f}" for of in (statistics.median, min, max)),
            f"{1e3 * statistics.median(m.cpu):.1f}",
            f"{m.refresh_ms:.2f}",
            f"{m.said.get('build_s', 0):.1f}",
            f"{m.said.get('refresh', 0):,}",
            f"{m.said['columns']:,}",
            f"{m.said['anonymous_mb']:,.0f}",
            f"{m.said.get('disk_gb', 0):.2f}",
            f"{m.said.get('device_gb', 0):.2f}",
        )
        for m in measured
    ]
    said_of = {True: "holds", False: "FAILS", None: ""}
    made = [(f.name, f.peer, f"{f.value:,.2f}", f"{f.peer_value:,.2f}", f"{f.ratio:.3f}", f.bar, said_of[f.holds]) for f in figures]
    return aligned([head, *raw], left=1) + "\n\n" + aligned([("figure", "peer", "ours", "peer's", "ratio", "bar", ""), *made], left=2)


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """All contenders at all sizes. ValueError for sizes without 1e5, for too little disk, and where a contender fails."""
    sizes = sorted({int(float(size)) for size in arguments.sizes.split(",")})
    if BASE not in sizes or min(sizes) < 1000:
        raise ValueError(f"--sizes needs 1e5, which the others are compared with, and at least 1e3; found {arguments.sizes}")
    if min(arguments.rounds, arguments.warm) < 1:
        raise ValueError(f"--rounds and --warm are at least 1; found {arguments.rounds} and {arguments.warm}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the files go
    settings = (arguments.neighbours, arguments.random)
    wanted = [spec for phase in phases(sizes, arguments.device, "", *settings) for spec in phase]
    measured: list[Measured] = []
    figures: list[Figure] = []
    failed: list[str] = []
    with room(arguments.folder, wanted) as folder:
        for phase in phases(sizes, arguments.device, folder, *settings):
            try:
                found = measure(phase, arguments.rounds, arguments.warm)
            except ValueError as error:
                if arguments.device == "cpu" or not measured:
                    raise
                failed.append(str(error))  # what a device has no room for is a result too
                continue
            measured += found
            figures += compare(found, arguments.device)
    figures.append(memory(measured))
    sys.stderr.write(table(measured, figures) + "\n")
    told = {
        "holds": verdict(figures),
        "figures": [rounded({**asdict(figure), "ratio": figure.ratio}) for figure in figures],
        "runs": [m.told() for m in measured],
        **({"failed": failed} if failed else {}),
        **surroundings(JOB, PACKAGES[arguments.device]),
    }
    if not arguments.save:
        return told
    return {**told, "saved": save("head", told, **({"hardware": arguments.hardware} if arguments.hardware else {}))}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {JOB}", description=__doc__)
    parser.add_argument("--sizes", default="1e5,1e6,1e7,1e8", help="prototypes, 1e5 among them; 1e8 takes 13 GB of disk")
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of ours at each size")
    parser.add_argument("--warm", type=int, default=150, help="steps before, not timed; at least 1")
    parser.add_argument("--neighbours", type=int, default=16, help="neighbours a target")
    parser.add_argument("--random", type=int, default=2048, help="random prototypes a step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: rows in device memory, exact search")
    parser.add_argument("--folder", default="out/bench", help="where the files of rows go; they are gone afterwards")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/head_<hardware>_<date>.json as well")
    parser.add_argument("--hardware", default="", help="what the saved file calls this machine, <cores>cpu by default")
    parser.add_argument("--out", help="write the figures to this file as well (JSON)")
    arguments = parser.parse_args(argv)

    def measured() -> dict[str, Any]:
        told = bench(arguments)
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(told, indent=1) + "\n")
        return told

    return job.guarded(JOB, measured)


if __name__ == "__main__":
    sys.exit(main())
