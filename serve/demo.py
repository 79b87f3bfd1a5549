"""The whole road on this machine: draw or take a catalogue, ingest, train, index, rerank, release, serve, measure, report.

One private Ray cluster, one job after another as a child process; a job whose work is done already says so and is
skipped, so that a second run resumes. At the end the service stays up until Ctrl-C (`--no-serve`: it ends with the report).
"""

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
from pydantic import ConfigDict

from idem import cluster, config, job, storage
from idem.memory import MemoryWatch
from serve import measured, stages
from serve.children import Child, JobFailed
from serve.port import require_port
from serve.stages import Noted, StageTime

CPUS = 4  # logical: on two cores the jobs' actors must fit side by side, waiting more than working
NEEDED_BYTES = 2 << 30  # for artifacts
NEEDED_TEMPORARY = 1 << 30  # for Ray's object store and logs
READY_S = 180.0


class Root(config.Table):
    """The root of the run alone; what the tables hold is the business of their jobs."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Endpoint(config.Table):
    """Where the service will be: of the table [serve] only this matters here."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One job. `background`: it goes on running, and is done once the service is ready."""

    job: str
    title: str
    settings: tuple[str, ...] = ()
    background: bool = False


def plan(*, catalog: str | None, endpoint: Endpoint) -> list[Stage]:
    """The stages in their order. With a catalogue of the caller's own nothing is drawn."""
    source = (f"ingest.source={json.dumps(str(Path(catalog).absolute()))}",) if catalog else ()
    drawn = [] if catalog else [Stage(job="pipelines.catalog", title="Draw the shop")]
    asked = (f"evaluate.url={json.dumps(endpoint.url)}",)
    return [
        *drawn,
        Stage(job="pipelines.ingest", title="Ingest the records", settings=source),
        Stage(job="train.run", title="Train the embedder"),
        Stage(job="index.run", title="Build the index"),
        Stage(job="index.candidates", title="Find candidates for the reranker"),
        Stage(job="train.rerank_run", title="Train the reranker"),
        Stage(job="index.release", title="Bind the release"),
        Stage(job="serve.run", title="Start the service", background=True),
        Stage(job="serve.measure", title="Measure the service", settings=asked),
        Stage(job="serve.report", title="Write the report"),
    ]


def say(text: str = "") -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def require_catalog(path: str | None) -> int:
    """Its size in bytes. ValueError where there is no parquet."""
    if path is None:
        return 0
    found = [Path(path)] if Path(path).is_file() else sorted(Path(path).glob("**/*.parquet"))
    if not found:
        raise ValueError(f"--catalog {path}: there is no parquet; a parquet file or a folder that holds some is needed")
    return sum(file.stat().st_size for file in found)


@contextmanager
def private_cluster() -> Iterator[dict[str, str]]:
    """A Ray cluster of our own (or the one that RAY_ADDRESS names); yields the environment by which jobs join it."""
    cluster.connect(num_cpus=max(CPUS, os.cpu_count() or 1))
    try:
        address = ray.get_runtime_context().gcs_address
        # Ray has put RAY_AUTH_MODE into our environment, and its token into a file: with both the jobs are let in.
        yield {**os.environ, "RAY_ADDRESS": address, **cluster.WORKER_ENV}
    finally:
        ray.shutdown()


class Road:
    """Runs stages one after another and notes what each took. `children` are those still running."""

    def __init__(self, run: str, root: str, settings: Sequence[str], env: Mapping[str, str], watch: MemoryWatch) -> None:
        self._run, self._root, self._settings, self._env, self._watch = run, root, tuple(settings), env, watch
        self._before = stages.load(root)
        self.done: list[StageTime] = []
        self.children: list[Child] = []

    def noted(self) -> Noted:
        return Noted(stages=self.done, peak_mb=round(self._watch.peak_mb, 1), memory=MemoryWatch.COUNTED)

    def go(self, stage: Stage, number: str, ready: Callable[[Child], None]) -> None:
        """Run one stage to its end (or until `ready` returns, in the background) and note its time. JobFailed where it fails."""
        say(f"\n[{number}] {stage.title}  ({stage.job})")
        start = time.perf_counter()
        arguments = [self._run, *(part for setting in (*self._settings, *stage.settings) for part in ("--set", setting))]
        child = Child(stage.job, arguments, self._env)
        self.children.append(child)
        if stage.background:
            ready(child)
            figures: dict[str, Any] = {}
        else:
            figures = child.result()
            self.children.remove(child)
        self.note(stage, time.perf_counter() - start, skipped=bool(figures.get("skipped")))

    def note(self, stage: Stage, seconds: float, *, skipped: bool = False) -> None:
        made_in = stages.since(self._before, stage.job) if skipped else None
        self.done.append(StageTime(job=stage.job, title=stage.title, seconds=round(seconds, 1), skipped=skipped, made_in=made_in))
        say(f"      {stages.said(self.done[-1])}")
        stages.save(self._root, self.noted())

    def stop(self) -> None:
        for child in reversed(self.children):
            child.stop()
        self.children.clear()


def wait_ready(url: str, child: Child) -> None:
    """Until the service says that all its parts are ready. JobFailed where it ends before; ValueError after READY_S."""
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        if child.ended():
            child.result()
            raise JobFailed(child.job, 1, "the service ended as soon as it was up")
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not up yet
        time.sleep(0.5)
    raise ValueError(f"the service at {url} was not ready after {READY_S:.0f} s")


def travel(road: Road, todo: Sequence[Stage], endpoint: Endpoint) -> None:
    for number, stage in enumerate(todo, 1):
        if stage.background:
            require_port(endpoint.host, endpoint.port)  # another may have taken it, whose answers would be measured as ours
        road.go(stage, f"{number}/{len(todo)}", lambda child: wait_ready(endpoint.url, child))


def conclude(road: Road, root: str, endpoint: Endpoint, *, stay: bool) -> dict[str, Any]:
    """The last tables; then the service until Ctrl-C, if it stays."""
    result, noted = measured.load(root), road.noted()
    report = str(storage.local_path(storage.join(root, "report.html")).absolute())
    say(f"\n{measured.told(result)}\n")
    say(f"{stages.table(noted)}\n")
    say(f"report   {report}")
    if stay:
        say(f"service  {endpoint.url}  (drop a photo there; Ctrl-C ends it)")
        _until_interrupted(road.children[-1])
    seconds = {stage.job: stage.seconds for stage in noted.stages}
    rows = {row.name: row.metrics for row in result.rows}
    return {"report": report, "measured": rows, "stages": seconds, "peak_mb": round(noted.peak_mb), "memory": noted.memory}


def _until_interrupted(service: Child) -> None:
    try:
        service.result()
    except KeyboardInterrupt:
        return
    raise JobFailed(service.job, 1, "the service ended by itself")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request otherwise
    settings = [*arguments.set, *([f"serve.port={arguments.port}"] if arguments.port else [])]
    root = config.load(arguments.run, "catalog", Root, settings).root
    endpoint = config.load(arguments.run, "serve", Endpoint, settings)
    require_port(endpoint.host, endpoint.port)  # better said now than after minutes of training
    storage.require_free(root, NEEDED_BYTES + 3 * require_catalog(arguments.catalog))
    storage.require_free(tempfile.gettempdir(), NEEDED_TEMPORARY)
    start = time.perf_counter()
    ray_stage = Stage(job="ray", title="Start Ray")
    say(ray_stage.title)
    with MemoryWatch() as watch, private_cluster() as env:
        signal.signal(signal.SIGTERM, _interrupt)  # Ray has set its own, which would leave our children behind
        road = Road(arguments.run, root, settings, env, watch)
        road.note(ray_stage, time.perf_counter() - start)
        try:
            travel(road, plan(catalog=arguments.catalog, endpoint=endpoint), endpoint)
            return conclude(road, root, endpoint, stay=not arguments.no_serve)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one Ctrl-C is enough: a second would leave processes behind
            say("ending what is left ...") if road.children else None
            road.stop()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve.demo", description=__doc__)
    parser.add_argument("run", help="run file (TOML)")
    parser.add_argument("--catalog", help="parquet file, or folder of them, to use instead of the shop that is drawn")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="change one setting of the run file")
    parser.add_argument("--port", type=int, help="port of the service (default: the run file's)")
    parser.add_argument("--no-serve", action="store_true", help="end the service once the report is written")
    arguments = parser.parse_args(argv)
    failed: list[int] = []

    def guarded() -> dict[str, Any]:
        try:
            return run(arguments)
        except JobFailed as error:
            failed.append(error.code)
            raise

    code = job.guarded("serve.demo", guarded)
    return failed[0] if failed else code


if __name__ == "__main__":
    sys.exit(main())
