"""The books balance after every fault: every record is an item or a reject, none twice, and a second run does nothing."""

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import lance
import psutil
import pytest

from idem import storage
from pipelines import ingest, table, upkeep
from pipelines.items import open_items
from tests.pipelines import faults

pytestmark = pytest.mark.ray


def settings_for(folder: Path, **told: object) -> ingest.IngestConfig:
    return ingest.IngestConfig(root=str(folder / "run"), source=str(folder / "source"), **{"unit_rows": 10, **told})


def victims() -> list[psutil.Process]:
    """Ray's workers below this process that are at a unit."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::Map") or "ray::Map" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Killer:
    """Kills a worker at work every now and then, a few times."""

    def __init__(self, seed: int, times: int = 3) -> None:
        self.random, self.times, self.killed, self.over = random.Random(seed), times, 0, threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while self.killed < self.times and not self.over.wait(self.random.uniform(0.01, 0.15)):
            if at_work := victims():
                self.random.choice(at_work).send_signal(signal.SIGKILL)
                self.killed += 1

    def __enter__(self) -> "Killer":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_workers_are_killed(seed: int, ray_session: None, tmp_path: Path) -> None:
    sources = {"a.parquet": faults.rows(120, side=200), "b.parquet": faults.rows(120, 120, side=200)}
    for name, made in sources.items():
        faults.write(tmp_path / "source", name, made)
    settings = settings_for(tmp_path)
    with Killer(seed) as killer:
        figures = ingest.run(settings)
    assert killer.killed
    assert figures["rows"] == 240
    faults.balance(settings, sources)
    faults.is_finished(settings)


POINTS = [
    ("staging", 3),
    ("before", 0),
    ("during", 0.0),
    pytest.param("during", 0.004, marks=pytest.mark.slow),
    ("after", 0),
    ("rejects", 0),
    ("index", 0),
    pytest.param("save_report", 0, marks=pytest.mark.slow),
    ("manifest", 0),
]


@pytest.mark.parametrize(("point", "number"), POINTS)
def test_the_driver_is_killed(point: str, number: float, ray_session: None, tmp_path: Path) -> None:
    first, second = faults.rows(30), faults.rows(60, 10, title="mug")  # of the first, ten stay and twenty are replaced: two whole units
    settings = settings_for(tmp_path)
    faults.write(tmp_path / "source", "a.parquet", first)
    ingest.run(settings)
    before = open_items(storage.Layout(settings.root).items)
    held = before.table(["item_id", "content_hash"])
    faults.write(tmp_path / "source", "b.parquet", second)
    faults.dies(settings, tmp_path, point, number)
    assert open_items(storage.Layout(settings.root).items, before.version).table(["item_id", "content_hash"]) == held
    now = open_items(storage.Layout(settings.root).items)  # the last version can be read, be it the old or the new
    after = {row["image_id"] for k, row in enumerate(second) if faults.expected("b", k, row, settings.limits())}
    assert now.count() in (before.count(), len(after | set(held["item_id"].to_pylist())))
    ingest.run(settings)
    faults.balance(settings, {"a.parquet": first}, {"b.parquet": second})
    faults.is_finished(settings)


def test_a_run_that_was_killed_goes_on_where_it_was(ray_session: None, tmp_path: Path) -> None:
    made = faults.rows(80)
    settings = settings_for(tmp_path)
    faults.write(tmp_path / "source", "a.parquet", made)
    faults.dies(settings, tmp_path, "staging", 5)
    units = list(Path(settings.root).glob("items/runs/*/units/*/done.json"))
    assert len(units) >= 5
    times = {path: path.stat().st_mtime_ns for path in units}
    staged: dict[Path, int] = {}
    watch = threading.Event()

    def note() -> None:
        while not watch.wait(0.005):
            for path in Path(settings.root).glob("items/runs/*/units/*/done.json"):
                staged.setdefault(path, path.stat().st_mtime_ns)

    thread = threading.Thread(target=note)
    thread.start()
    try:
        ingest.run(settings)
    finally:
        watch.set()
        thread.join()
    assert times.items() <= staged.items()  # none of them was made again
    faults.balance(settings, {"a.parquet": made})
    faults.is_finished(settings)


def test_two_writers_and_a_compaction_at_once(ray_session: None, tmp_path: Path) -> None:
    base, one, two = faults.rows(40), faults.rows(80, 20, title="one"), faults.rows(80, 60, title="two")
    settings = settings_for(tmp_path)
    faults.write(tmp_path / "source", "base.parquet", base)
    ingest.run(settings)
    drivers = []
    for name, made in (("one", one), ("two", two)):
        faults.write(tmp_path / name, f"{name}.parquet", made)
        other = settings.model_copy(update={"source": str(tmp_path / name)})
        path = faults.run_file(other, tmp_path)
        drivers.append(faults.start("-m", "pipelines.ingest", str(path), env=faults.environment(), log=tmp_path / "driver.log"))
    uri = storage.join(storage.Layout(settings.root).items, table.ITEMS)
    compacted = 0
    until = time.monotonic() + 120
    while any(driver.poll() is None for driver in drivers) and time.monotonic() < until:
        figures = upkeep.run(upkeep.UpkeepConfig(root=settings.root, index=False))
        compacted += figures["fragments"] < figures["fragments_before"]
        time.sleep(0.2)
    assert [driver.wait(1) for driver in drivers] == [0, 0], (tmp_path / "driver.log").read_text()[-3000:]
    assert compacted
    held = {
        row["item_id"]: row
        for row in open_items(storage.Layout(settings.root).items).table(["item_id", "title", "source_file"]).to_pylist()
    }
    assert len(held) == lance.dataset(uri).count_rows()  # none twice
    usable = {
        (name, row["image_id"])
        for name, made in (("base", base), ("one", one), ("two", two))
        for k, row in enumerate(made)
        if faults.expected(name, k, row, settings.limits())
    }
    assert held.keys() == {item_id for _, item_id in usable}  # none lost
    for item_id, row in held.items():
        writers = {name for name, other in usable if other == item_id}
        last = {"one", "two"} & writers or {"base"}
        assert row["source_file"].removesuffix(".parquet") in last
    faults.is_finished(settings)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a small disk can be made by root only, where mounting is allowed")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_disk_is_full(small_disk: Path, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "require_free", lambda *_: None)  # it would say so before anything is written
    first, second = faults.rows(20), faults.rows(400, 20, side=256)
    settings = settings_for(tmp_path).model_copy(update={"root": str(small_disk / "run")})
    faults.write(tmp_path / "source", "a.parquet", first)
    ingest.run(settings)
    held = open_items(storage.Layout(settings.root).items)
    faults.write(tmp_path / "source", "b.parquet", second)
    with pytest.raises(OSError, match=r"cannot write to .*: .*No space left on device"):
        ingest.run(settings)
    now = open_items(storage.Layout(settings.root).items)
    assert (now.id, now.version, now.count()) == (held.id, held.version, held.count())
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    ingest.run(settings)
    faults.balance(settings, {"a.parquet": first}, {"b.parquet": second})
    faults.is_finished(settings)


def test_the_error_budget_is_spent(ray_session: None, tmp_path: Path) -> None:
    first, second = faults.rows(20), faults.rows(60, 20)
    settings = settings_for(tmp_path, max_reject_fraction=0.3)
    faults.write(tmp_path / "source", "a.parquet", first)
    ingest.run(settings)
    held = open_items(storage.Layout(settings.root).items)
    for row in second[::2]:
        row["image"] = b"broken"
    faults.write(tmp_path / "source", "b.parquet", second)
    with pytest.raises(ValueError, match=r"of 60 records of .* cannot be used .*at most 30% may be .*Nothing was published"):
        ingest.run(settings)
    now = open_items(storage.Layout(settings.root).items)
    assert (now.id, now.version) == (held.id, held.version)
    faults.balance(settings, {"a.parquet": first})
    allowed = settings.model_copy(update={"max_reject_fraction": 0.9})
    assert ingest.run(allowed)["rejected"] >= 30
    faults.balance(allowed, {"a.parquet": first}, {"b.parquet": second})
    faults.is_finished(allowed)


def test_the_same_run_twice_at_once_is_refused(ray_session: None, tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    faults.write(tmp_path / "source", "a.parquet", faults.rows(20))
    plan = ingest.plan_source(settings.source, settings.columns, unit_rows=10)
    with ingest.runs.held(str(tmp_path / "folder")), pytest.raises(ValueError, match=r"is being worked on by process \d+ on .* since"):
        ingest.runs.held(str(tmp_path / "folder")).__enter__()
    assert plan.rows == 20


def upload(folder: Path, uri: str) -> None:
    for path in folder.iterdir():
        storage.write_bytes(storage.join(uri, path.name), path.read_bytes())


def test_an_object_store_fails_now_and_then_and_stands_still_once(ray_session: None, s3_server, flaky, tmp_path: Path) -> None:
    """Source and items are both on S3; whoever checks the books goes to the server directly."""
    sources = {"a.parquet": faults.rows(60), "b.parquet": faults.rows(60, 60)}
    for name, made in sources.items():
        faults.write(tmp_path / "source", name, made)
    upload(tmp_path / "source", storage.join(s3_server.uri, "source"))
    settings = ingest.IngestConfig(root=storage.join(s3_server.uri, "run"), source=storage.join(s3_server.uri, "source"), unit_rows=10)
    url, dice = flaky(s3_server.endpoint, 0.05, stall=1, seed=1)
    env = faults.environment(AWS_ENDPOINT_URL=url, IDEM_S3_TIMEOUT_S="3")
    log = tmp_path / "driver.log"
    driver = faults.start("-m", "pipelines.ingest", str(faults.run_file(settings, tmp_path)), env=env, log=log)
    assert driver.wait(300) == 0, log.read_text()[-3000:]
    assert dice.happened["stall"] == 1
    assert sum(dice.happened[name] for name in ("error", "reset", "cut")) > 5
    flaky(s3_server.endpoint, 0.0, stall=0)
    faults.balance(settings, sources)
    before = open_items(storage.Layout(settings.root).items)
    assert ingest.run(settings)["skipped"]
    assert open_items(storage.Layout(settings.root).items).version == before.version


def test_an_object_store_that_is_gone_fails_the_job_by_name(ray_session: None, s3_server, flaky, tmp_path: Path) -> None:
    """Its records are not called bad, and what was there before stays."""
    first = faults.rows(20)
    settings = settings_for(tmp_path)
    faults.write(tmp_path / "source", "a.parquet", first)
    ingest.run(settings)
    faults.write(tmp_path / "more", "b.parquet", faults.rows(60, 20))
    upload(tmp_path / "more", storage.join(s3_server.uri, "more"))
    other = settings.model_copy(update={"source": storage.join(s3_server.uri, "more")})
    url, dice = flaky(s3_server.endpoint, 0.0, stall=0)
    dice.fail_fraction = 1.0
    env = faults.environment(AWS_ENDPOINT_URL=url, IDEM_S3_TIMEOUT_S="1", AWS_MAX_ATTEMPTS="2")
    log = tmp_path / "driver.log"
    driver = faults.start("-m", "pipelines.ingest", str(faults.run_file(other, tmp_path)), env=env, log=log)
    assert driver.wait(120) == 2, log.read_text()[-3000:]
    assert f"{s3_server.uri}/more" in log.read_text()
    faults.balance(settings, {"a.parquet": first})
