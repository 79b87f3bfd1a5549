"""The folder of each ingest, <items>/runs/<id>/: who is at it, what it read, and what remains when it is done.

lease.json says which process works on a run, and is renewed while it does; files.json which source files it takes in;
units/ and verdicts/ are its work, removed at the end; manifest.json, written last, says that it is finished.
"""

import os
import socket
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pyarrow.fs
from pydantic import BaseModel, ConfigDict

from idem import manifest, storage
from pipelines import table
from pipelines.stage import DONE, Staged

BEAT_S = 15.0
SILENT_S = 90.0  # a lease on another machine that was not renewed for so long is void
SKEW_S = 300.0  # what the clocks of two machines may differ by
ABANDONED_S = 7 * 86400.0  # work of a run that was not finished is kept so long, to be gone on with


class Lease(BaseModel):
    """Times are seconds since 1970. born: when the process started, since its number may be given again."""

    model_config = ConfigDict(frozen=True)
    host: str
    pid: int
    born: float
    started: float
    beat: float

    def alive(self) -> bool:
        if self.host != socket.gethostname():
            return time.time() - self.beat < SILENT_S
        with suppress(psutil.NoSuchProcess):
            return abs(psutil.Process(self.pid).create_time() - self.born) < 1
        return False


class Files(BaseModel):
    """What a run takes in: the files of `source`, name by fingerprint, read with `settings` (a fingerprint)."""

    model_config = ConfigDict(frozen=True)
    settings: str
    source: str
    files: dict[str, str]


class Commit(BaseModel):
    """All that a run does, written before it is done, so that whoever finds it done can finish it: see pipelines.publish.

    Fragments are Lance's JSON; replaced: paths below the table of staged files whose rows were written again.
    """

    model_config = ConfigDict(frozen=True)
    figures: dict[str, Any]
    sources: list[dict[str, Any]]
    rejects: list[str]
    replaced: list[str]


def folder_of(items: str, run: str) -> str:
    return storage.join(items, "runs", run)


def _list(uri: str) -> list[pyarrow.fs.FileInfo]:
    filesystem, path = storage.open_filesystem(uri)
    return filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))


def lease_of(folder: str) -> Lease | None:
    uri = storage.join(folder, "lease.json")
    return Lease.model_validate_json(storage.read_bytes(uri)) if storage.exists(uri) else None


def at_work(folder: str) -> bool:
    """Whether a process works on this run."""
    lease = lease_of(folder)
    return lease is not None and lease.alive()


@contextmanager
def held(folder: str) -> Iterator[None]:
    """Hold the lease of a run's folder. ValueError while another process does.

    Two that start in the same instant may both hold it: that costs work done twice, and no data, which rest on `table.swap`.
    """
    if (other := lease_of(folder)) and other.alive():
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(other.started))
        raise ValueError(f"{folder} is being worked on by process {other.pid} on {other.host} since {since}; wait for it, or end it first")
    uri, born, started, over = storage.join(folder, "lease.json"), psutil.Process().create_time(), time.time(), threading.Event()

    def renew() -> None:
        lease = Lease(host=socket.gethostname(), pid=os.getpid(), born=born, started=started, beat=time.time())
        storage.write_bytes(uri, lease.model_dump_json().encode(), durable=False)

    def beat() -> None:
        while not over.wait(BEAT_S):
            with suppress(OSError):  # the next one may go through; a lease that lapses costs a refused twin, no data
                renew()

    renew()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        storage.remove(uri)


def note_files(folder: str, files: Files) -> None:
    storage.write_bytes(storage.join(folder, "files.json"), files.model_dump_json().encode())


def files_of(items: str, run: str) -> Files | None:
    uri = storage.join(folder_of(items, run), "files.json")
    return Files.model_validate_json(storage.read_bytes(uri)) if storage.exists(uri) else None


def taken_in(items: str, applied: Collection[str], settings: str) -> set[str]:
    """Fingerprints of the source files that the items hold already, read with these settings."""
    found = (files_of(items, run) for run in applied)
    return {name for files in found if files and files.settings == settings for name in files.files}


def note_commit(folder: str, commit: Commit) -> None:
    storage.write_bytes(storage.join(folder, "commit.json"), commit.model_dump_json().encode())


def commit_of(folder: str) -> Commit | None:
    uri = storage.join(folder, "commit.json")
    return Commit.model_validate_json(storage.read_bytes(uri)) if storage.exists(uri) else None


def finished(folder: str) -> bool:
    return storage.exists(storage.join(folder, manifest.NAME))


def _staged(folder: str) -> Iterator[Staged]:
    for unit in _list(storage.join(folder, "units")):
        uri = storage.join(folder, "units", unit.base_name, DONE)
        if storage.exists(uri):
            yield Staged.model_validate_json(storage.read_bytes(uri))


def sweep(items: str) -> int:
    """Remove what no run will use again, and nothing of a run at work; how many files went.

    A fragment is an orphan if no version names it, no unfinished run has noted it, and it is older than every run at work.
    """
    now = time.time()
    kept: dict[str, set[str]] = {table.ITEMS: set(), table.REJECTS: set()}
    oldest = now
    for info in _list(storage.join(items, "runs")):
        folder = storage.join(items, "runs", info.base_name)
        lease = lease_of(folder)
        if lease and lease.alive():
            oldest = min(oldest, lease.started - (0 if lease.host == socket.gethostname() else SKEW_S))
        elif finished(folder):
            clear(folder)
        elif now - (info.mtime.timestamp() if info.mtime else now) > ABANDONED_S:
            storage.remove_tree(folder)
        if not finished(folder):
            for staged in _staged(folder):
                kept[table.ITEMS] |= table.files_of(staged.item_fragments)
                kept[table.REJECTS] |= table.files_of(staged.reject_fragments)
            if commit := commit_of(folder):
                kept[table.REJECTS] |= table.files_of(commit.rejects)
    removed = 0
    for name, keep in kept.items():
        uri = storage.join(items, name)
        if table.exists(uri):
            for path in table.orphans(table.open_table(uri), keep, oldest):
                storage.remove(storage.join(uri, path))
                removed += 1
    return removed


def forget(folder: str, applied: Collection[str], run: str) -> None:
    """A run that was finished and then taken back by a roll-back starts anew."""
    if run not in applied and finished(folder):
        storage.remove(storage.join(folder, manifest.NAME))


def longest(items: str) -> float:
    """For how many seconds the run has been at work that has been for longest."""
    leases = (lease_of(storage.join(items, "runs", info.base_name)) for info in _list(storage.join(items, "runs")))
    return max((time.time() - lease.started for lease in leases if lease and lease.alive()), default=0.0)


def clear(folder: str) -> None:
    """Remove the work of a run that is finished; its manifest, files and report stay."""
    for name in ("units", "verdicts", "replay"):
        storage.remove_tree(storage.join(folder, name))


def last_figures(items: str, applied: Sequence[str], settings: str) -> dict[str, Any]:
    """The figures of the newest of these runs that was made with these settings; {} for none."""
    for run in reversed(applied):
        folder, files = folder_of(items, run), files_of(items, run)
        if files and files.settings == settings and finished(folder):
            return dict(manifest.read(folder, kind="ingest").figures)
    return {}
