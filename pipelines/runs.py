"""The folder of each ingest, <items>/runs/<id>/: who is at it, what it read, and what remains when it is done.

lease.json says which process works on a run, and is renewed while it does; files.json which source files it takes in;
commits/ what each try to commit would leave to do; units/ and verdicts/ are its work, removed at the end; manifest.json,
written last, says that it is finished.
"""

import os
import secrets
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
from pipelines.stage import Staged, parsed, read_done

NOTES = "commits"
BEAT_S = 15.0
SILENT_S = 90.0  # a lease that was not renewed for so long is void
PAUSED_S = 6 * 3600.0  # yet whoever held it may only have been paused: what it wrote is left alone for so long
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

    def alive(self, silent_s: float = SILENT_S) -> bool:
        """Of another machine only the last word is known: it counts for `silent_s`."""
        if self.host != socket.gethostname():
            return time.time() - self.beat < silent_s
        with suppress(psutil.NoSuchProcess):
            return abs(psutil.Process(self.pid).create_time() - self.born) < 1
        return False


class Files(BaseModel):
    """What a run takes in: the files of `source`, name by fingerprint, read with `settings`, the fingerprint of `config`."""

    model_config = ConfigDict(frozen=True)
    settings: str
    source: str
    files: dict[str, str]  # none for a replay
    images: str = ""  # where relative paths of pictures start
    config: dict[str, Any] = {}


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
    return parsed(Lease, storage.join(folder, "lease.json"))


def at_work(folder: str) -> bool:
    """Whether a process works on this run."""
    lease = lease_of(folder)
    return lease is not None and lease.alive()


class Hold:
    """A lease that this process holds."""

    renewed = 0.0

    def check(self) -> None:
        """ValueError where it could not be renewed for so long that others may have taken our files for leftovers."""
        if (silent := time.time() - self.renewed) > SILENT_S:
            raise ValueError(f"this run was paused, or could not renew its lease, for {silent:.0f} s: run it again")


@contextmanager
def held(folder: str) -> Iterator[Hold]:
    """Hold the lease of a run's folder. ValueError while another process does.

    Two that start in the same instant may both hold it: that costs work done twice, and no data, which rest on `table.swap`.
    """
    hold = Hold()
    if (other := lease_of(folder)) and other.alive():
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(other.started))
        raise ValueError(f"{folder} is being worked on by process {other.pid} on {other.host} since {since}; wait for it, or end it first")
    uri, born, started, over = storage.join(folder, "lease.json"), psutil.Process().create_time(), time.time(), threading.Event()

    def renew() -> None:
        lease = Lease(host=socket.gethostname(), pid=os.getpid(), born=born, started=started, beat=time.time())
        storage.write_bytes(uri, lease.model_dump_json().encode(), durable=False)
        hold.renewed = lease.beat

    def beat() -> None:
        while not over.wait(BEAT_S):
            with suppress(OSError):  # the next one may go through; a lease that lapses costs a refused twin, no data
                renew()

    renew()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield hold
    finally:
        over.set()
        thread.join()
        storage.remove(uri)


def note_files(folder: str, files: Files) -> None:
    storage.write_bytes(storage.join(folder, "files.json"), files.model_dump_json().encode())


def files_of(items: str, run: str) -> Files | None:
    return parsed(Files, storage.join(folder_of(items, run), "files.json"))


def taken_in(items: str, applied: Collection[str], settings: str) -> set[str]:
    """Fingerprints of the source files that the items hold already, read with these settings."""
    found = (files_of(items, run) for run in applied)
    return {name for files in found if files and files.settings == settings for name in files.files}


def note_commit(folder: str, commit: Commit) -> str:
    """Write down what a commit will leave to do; the note's name, which the commit is to carry. One that fails leaves it unused."""
    note = secrets.token_hex(8)
    storage.write_bytes(storage.join(folder, NOTES, f"{note}.json"), commit.model_dump_json().encode())
    return note


def commit_of(folder: str, note: str) -> Commit | None:
    return parsed(Commit, storage.join(folder, NOTES, f"{note}.json"))


def finished(folder: str) -> bool:
    return storage.exists(storage.join(folder, manifest.NAME))


def _staged(folder: str) -> Iterator[Staged]:
    for unit in _list(storage.join(folder, "units")):
        if done := read_done(folder, unit.base_name):
            yield done


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
        if lease and lease.alive(PAUSED_S):
            one_clock = lease.host == socket.gethostname() and storage.is_local(items)
            oldest = min(oldest, lease.started - (0 if one_clock else SKEW_S))
        elif finished(folder):
            clear(folder)
        elif now - (info.mtime.timestamp() if info.mtime else now) > ABANDONED_S:
            storage.remove_tree(folder)
        if not finished(folder):
            for staged in _staged(folder):
                kept[table.ITEMS] |= table.files_of(staged.item_fragments)
                kept[table.REJECTS] |= table.files_of(staged.reject_fragments)
            for written in _list(storage.join(folder, NOTES)):
                if commit := commit_of(folder, written.base_name.removesuffix(".json")):
                    kept[table.REJECTS] |= table.files_of(commit.rejects)
    removed = 0
    for name, keep in kept.items():
        uri = storage.join(items, name)
        if table.exists(uri):
            for path in table.orphans(table.open_table(uri), keep, oldest):
                storage.remove(storage.join(uri, path))
                removed += 1
    return removed


def name_of(items: str, wanted: str, applied: Collection[str]) -> str:
    """The name of a run that is to be made: `wanted`, or, where that run was made and then rolled back, one that is new."""
    rejects = storage.join(items, table.REJECTS)
    told = table.runs_of(table.open_table(rejects)) if table.exists(rejects) else ()
    while wanted not in applied and (wanted in told or finished(folder_of(items, wanted))):
        wanted = manifest.fingerprint("again", {}, {"run": wanted})
    return wanted


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
        if files and files.files and files.settings == settings and finished(folder):
            return dict(manifest.read(folder, kind="ingest").figures)
    return {}
