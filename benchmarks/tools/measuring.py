"""What benchmarks share: contenders as processes measured from outside, figures beside a peer's with their bars, tables, the place."""

import ctypes
import json
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

log = logging.getLogger("bench")
ROOT = Path(__file__).resolve().parents[2]
CPU_EVERY_S, MEMORY_EVERY_S = 1.0, 5.0  # a look at memory walks every mapping of every process
PATIENCE_S = 30.0  # for what a contender leaves behind to end by itself
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
OURS = "ours"  # the contender that the others are there for

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
        import psutil  # here, because benchmarks that measure no process tree run where it is not installed

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
    import psutil

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


def used_by_children() -> float:
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


def measure(contender: str, arguments: Sequence[str], *, rows: int, mb: float, counts: Sequence[str], logs: Path) -> Run:
    """Run one contender, a Python module with `arguments`, on a source of `rows` records and `mb` MB.

    counts: the figures of its JSON line that must be `rows`. ValueError where one is not, and where it fails.
    """
    logs.parent.mkdir(parents=True, exist_ok=True)
    log.info("%s: %s records", contender, f"{rows:,}")
    before = used_by_children()
    seconds, seen, code = watch(arguments, logs)
    waited = used_by_children() - before
    figures = said(logs)
    if code or not figures.get("ok") or any(figures.get(name) != rows for name in counts):
        last = "\n".join(logs.with_suffix(".err").read_text(errors="replace").splitlines()[-15:])
        raise ValueError(f"{contender} was to bring {rows:,} records through, ended with code {code} and said {figures}\n{last}")
    # Both miss some: the kernel what nobody waited for, the samples what came after the last. So the larger is nearer.
    by = "kernel (RUSAGE_CHILDREN)" if waited >= seen.cpu_s else f"samples every {CPU_EVERY_S:.0f} s"
    cpu_s = max(waited, seen.cpu_s)
    figures.pop("source", None)  # a path on this machine
    log.info("%s: %s records in %.1f s, %.1f CPU-s, %.0f MiB", contender, f"{rows:,}", seconds, cpu_s, seen.peak_mb)
    return Run(contender=contender, rows=rows, mb=mb, seconds=seconds, cpu_s=cpu_s, cpu_by=by, peak_mb=seen.peak_mb, figures=figures)


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
    return Figure(**{**asdict(figure), "bar": f">= {bar}", "holds": bool(figure.ratio >= bar)})


def same(figure: Figure, bar: float) -> Figure:
    """Neither more nor less than `bar` times the peer."""
    return Figure(**{**asdict(figure), "bar": f"{1 / bar:.2f} to {bar:.2f}", "holds": bool(1 / bar <= figure.ratio <= bar)})


def at_most(figure: Figure, bar: float) -> Figure:
    return Figure(**{**asdict(figure), "bar": f"<= {bar}", "holds": bool(figure.ratio <= bar)})


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


# --- Where it was made, and where it is kept


def _commit() -> str:
    if not shutil.which("git"):
        return "unknown"
    told = [
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain"))
    ]
    return (told[0] or "unknown") + (" with changes" if told[1] else "")


def surroundings(job: str, packages: Iterable[str]) -> dict[str, Any]:
    """Where and of what the figures of `job` are; packages: the distributions whose versions matter to them."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "command": f"python -m {job} {' '.join(sys.argv[1:])}".strip(),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} x {models[0] if models else platform.machine()}, {memory / 2**30:.0f} GiB",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def save(name: str, told: Mapping[str, Any], *, hardware: str = f"{os.cpu_count()}cpu") -> str:
    """Where the figures of benchmark `name` are kept; they name no folder of this machine."""
    path = ROOT / "benchmarks" / "results" / f"{name}_{hardware}_{time.strftime('%Y-%m-%d')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(told, indent=1).replace(f"{ROOT}/", "") + "\n")
    return str(path.relative_to(ROOT))


def rounded(told: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in told.items()}
