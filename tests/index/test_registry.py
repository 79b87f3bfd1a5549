"""Releases told, pointed at and cleared away: the plan on made-up releases, the commands on real ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idem import manifest, storage
from index import registry, release, run
from index.registry import Artifact, Entry, garbage
from index.release import Release, ReleaseConfig
from pipelines.items import open_items

Command = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def command(indexed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a verb on the run; its exit code and its JSON line."""
    toml = tmp_path / "run.toml"
    toml.write_text(f'root = "{indexed}"\n[release]\n')

    def typed(verb: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        code = registry.main([verb, str(toml), *arguments])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return typed


@pytest.fixture
def three(indexed: str) -> str:
    """Three releases of three indexes of one embedder; the times they were made at are a day apart."""
    for day, shards in enumerate((1, 2, 3), 1):
        run.run(run.IndexConfig(root=indexed, fields="image", shards=shards))
        release.run(ReleaseConfig(root=indexed, name=f"r{shards}"))
        path = Path(indexed, "releases", f"r{shards}", manifest.NAME)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"created": f"2026-01-0{day}T00:00:00+00:00"}))
    return indexed


def test_the_list_has_every_release_and_marks_the_current_one(three, command, capsys):
    assert [(e.name, e.current) for e in registry.entries(f"{three}/releases")] == [("r3", True), ("r2", False), ("r1", False)]
    assert command("list")[1]["releases"][0] == {"name": "r3", "current": True}
    text = registry.told(registry.entries(f"{three}/releases"))
    assert text.splitlines()[1].startswith("*  r3")
    assert len(text.splitlines()) == 4


def test_a_run_without_releases_is_told_so(command):
    code, said = command("list")
    assert (code, said["releases"]) == (0, [])
    for verb in ("show", "rollback"):
        code, said = command(verb)
        assert (code, said["error"]) == (2, "no release is current; there are: none")


def test_a_roll_back_goes_to_the_one_before_or_to_the_named_one_and_back(three, command):
    def rolled(*name: str) -> tuple[str, str]:
        code, said = command("rollback", *name)
        assert code == 0
        assert Release.open(f"{three}/releases").name == said["release"]
        return said["before"], said["release"]

    assert [rolled(), rolled(), rolled("r3")] == [("r3", "r2"), ("r2", "r1"), ("r1", "r3")]
    assert command("rollback", "r9")[1]["error"] == "there is no release 'r9'; there are: r3, r2, r1"
    command("rollback", "r1")
    code, said = command("rollback")
    assert (code, said["error"]) == (2, "there is no release before r1 to go back to; there are: r3, r2, r1")


def test_what_cannot_be_opened_does_not_become_current(three, command):
    Path(Release.open(f"{three}/releases/r1").index, "shard-000.faiss").unlink()
    code, said = command("rollback", "r1")
    assert code == 2
    assert "shard-000.faiss is missing" in said["error"]
    assert Release.open(f"{three}/releases").name == "r3"
    assert "shard-000.faiss is missing" in command("show", "r1")[1]["error"]
    assert command("show")[1]["release"] == "r3"


def test_a_run_file_alone_is_published(indexed, command, tmp_path):
    assert registry.main([str(tmp_path / "run.toml"), "--set", 'release.name="first"']) == 0
    assert Release.open(f"{indexed}/releases").name == "first"
    assert command("publish", "--set", 'release.name="first"')[1]["skipped"]


def folders(root: str, kind: str) -> int:
    return len(list(Path(root, kind).glob(f"*/{manifest.NAME}")))


def test_old_releases_go_with_what_they_alone_bind(three, command):
    run.run(run.IndexConfig(root=three, fields="image", shards=4))  # not released yet: it stays
    (building := Path(three, "index", "0123456789abcdef")).mkdir()
    before = sum(1 for _ in Path(three).rglob("*"))
    said = command("gc", "--keep", "1", "--dry-run")[1]
    assert sorted(name.split("/")[0] for name in said["would_remove"]) == ["index", "index", "releases", "releases"]
    assert said["bytes"] > 0
    assert sum(1 for _ in Path(three).rglob("*")) == before
    assert set(command("gc", "--keep", "1")[1]["removed"]) == set(said["would_remove"])
    assert [entry.name for entry in registry.entries(f"{three}/releases")] == ["r3"]
    assert (folders(three, "index"), folders(three, "embedder"), folders(three, "vectors")) == (2, 1, 1)
    assert Release.open(f"{three}/releases").name == "r3"
    assert building.exists(), "it is being made"
    assert list(open_items(storage.Layout(three).items).dataset.tags.list()) == ["release-r3"]
    assert command("gc", "--keep", "1")[1]["removed"] == []


def test_the_current_release_stays_however_old(three, command):
    command("rollback", "r1")
    command("gc", "--keep", "1")
    assert [entry.name for entry in registry.entries(f"{three}/releases")] == ["r3", "r1"]
    assert Release.open(f"{three}/releases").name == "r1"


def test_nothing_goes_while_a_release_cannot_be_read(three, command):
    Path(three, "releases", "r1", manifest.NAME).write_text("{")
    code, said = command("gc", "--keep", "1")
    assert (code, said["error"][:44]) == (2, "what the releases r1 bind cannot be read, so")
    assert folders(three, "index") == 3
    assert "is damaged" in registry.told(registry.entries(f"{three}/releases"))
    assert command("gc", "--keep", "0")[1]["error"] == "keep is how many releases stay, at least 1; found 0"


@given(st.data())
def test_what_stays_needs_nothing_that_goes(data):
    ids = st.integers(0, 4).map(str)
    vectors = [Artifact(kind="vectors", id=i, current=i == "0", inputs={"embedder": data.draw(ids)}) for i in "01234"]
    indexes = [Artifact(kind="index", id=i, current=i == "1", inputs={"vectors": data.draw(ids)}) for i in "01234"]
    embedders = [Artifact(kind="embedder", id=i, current=i == "2", inputs={}) for i in "01234"]
    made = [*vectors, *indexes, *embedders]
    known = [
        Entry(name=f"r{9 - n}", created=f"{9 - n}", current=n == 2, bound={"index": data.draw(ids), "embedder": data.draw(ids)})
        for n in range(data.draw(st.integers(0, 6)))
    ]
    releases, unbound = garbage(known, made, data.draw(st.integers(1, 4)))
    gone = {(a.kind, a.id) for a in unbound}
    stay = [entry for entry in known if entry not in releases]
    assert all(entry in stay for entry in known if entry.current)
    assert not any(pair in gone for entry in stay for pair in entry.bound.items())
    assert not any(pair in gone for a in made if (a.kind, a.id) not in gone for pair in a.inputs.items())
    assert not any(a.current for a in unbound)
