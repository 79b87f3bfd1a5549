"""Releases carried to another root and back: what travels, in which order, and what a cut-off or damaged transfer leaves."""

from pathlib import Path

import lance
import pytest

from idem import manifest, storage
from index import registry, release, transfer
from index.searcher import Searcher
from pipelines.items import open_items
from tests.pipelines.conftest import S3Server, flaky, moto_endpoint, s3_server

__all__ = ["flaky", "moto_endpoint", "s3_server"]


@pytest.fixture
def released(indexed):
    """A root with a current release."""
    release.run(release.ReleaseConfig(root=indexed))
    return indexed


def run_file(root, name) -> str:
    path = Path(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'root = "{root}"\n')
    return str(path)


def same(root, other) -> None:
    mine, there = (release.Release.open(storage.Layout(str(each)).releases) for each in (root, other))
    assert (mine.name, mine.id, mine.items_version) == (there.name, there.id, there.items_version)
    assert Searcher.open(mine.index).item_ids == Searcher.open(there.index).item_ids
    ids = Searcher.open(mine.index).item_ids[:3]
    assert open_items(mine.items, mine.items_version).images(ids) == open_items(there.items, there.items_version).images(ids)


def test_to_a_bucket_and_to_another_machine(released, s3_server: S3Server, tmp_path_factory, capsys):
    bucket, other = f"{s3_server.uri}/shop", str(tmp_path_factory.mktemp("other") / "a machine")
    assert registry.main(["push", run_file(released, "run.toml"), bucket]) == 0
    assert registry.main(["pull", run_file(other, "run.toml"), bucket]) == 0
    same(released, other)
    assert "release-" in next(iter(open_items(storage.Layout(bucket).items).dataset.tags.list()))
    assert transfer.carry(released, bucket)["bytes"] == 0
    assert transfer.carry(bucket, other)["bytes"] == 0
    assert '"bytes": ' in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"index\.release pull brings it there"):
        release.Release.open(storage.Layout(bucket).releases)


def test_a_second_release_travels_as_far_as_it_differs_and_going_back_copies_nothing(released, tmp_path, items_again):
    from index import run

    other = str(tmp_path / "other")
    first = transfer.carry(released, other)
    items_again(41)
    run.run(run.IndexConfig(root=released, fields="image"))  # pyright: ignore[reportCallIssue]
    release.run(release.ReleaseConfig(root=released))
    second = transfer.carry(released, other)
    assert second["release"] != first["release"]
    same(released, other)
    embedder = Path(manifest.current(storage.Layout(released).embedder, kind="embedder"))
    total = sum(p.stat().st_size for p in Path(released).rglob("*") if p.is_file())
    assert second["bytes"] < total - sum(p.stat().st_size for p in embedder.iterdir())
    assert transfer.carry(released, other, first["release"])["bytes"] == 0
    assert release.Release.open(storage.Layout(other).releases).name == first["release"]


def test_a_damaged_file_is_named_and_the_old_release_stays(released, tmp_path, items_again):
    from index import run

    other = str(tmp_path / "other")
    first = transfer.carry(released, other)
    items_again(41)
    run.run(run.IndexConfig(root=released, fields="image"))  # pyright: ignore[reportCallIssue]
    release.run(release.ReleaseConfig(root=released))
    path = Path(manifest.current(storage.Layout(released).index, kind="index"), "shard-001.faiss")
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(ValueError, match=r"shard-001\.faiss is damaged: its checksum differs"):
        transfer.carry(released, other)
    assert registry.main(["push", run_file(released, "run.toml"), other]) == 2
    assert release.Release.open(storage.Layout(other).releases).name == first["release"]
    assert not list(Path(other).rglob("*.partial"))
    path.write_bytes(whole)
    transfer.carry(released, other)
    same(released, other)
    there = Path(release.Release.open(storage.Layout(other).releases).index, "shard-001.faiss")
    there.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert transfer.carry(released, other)["bytes"] == len(whole), "a damaged copy is made anew"
    same(released, other)


def test_cut_off_anywhere_it_goes_on_and_is_never_current_before_it_is_whole(released, tmp_path, monkeypatch):
    plain, source, target = transfer._copied, released, str(tmp_path / "other")
    pointer = Path(storage.Layout(target).releases, manifest.POINTER)
    sizes = []
    for stop in (0, 3, 8):
        done = []

        def cut(file, source, target, stop=stop, done=done):
            if len(done) >= stop:
                raise KeyboardInterrupt
            done.append(file)
            return plain(file, source, target)

        monkeypatch.setattr(transfer, "_copied", cut)
        with pytest.raises(KeyboardInterrupt):
            transfer.carry(source, target)
        assert not pointer.exists()
    monkeypatch.setattr(transfer, "_copied", plain)
    sizes.append(transfer.carry(source, target)["bytes"])
    same(source, target)
    assert sizes[0] < sum(p.stat().st_size for p in Path(target).rglob("*") if p.is_file())


def test_a_network_that_fails(released, s3_server: S3Server, flaky, tmp_path):
    _, dice = flaky(s3_server.endpoint, 0.05, stall=0, seed=2)
    bucket, other = f"{s3_server.uri}/shop", str(tmp_path / "other")
    transfer.carry(released, bucket)
    transfer.carry(bucket, other)
    assert dice.happened["error"] + dice.happened["reset"] + dice.happened["cut"] > 0
    same(released, other)


def test_a_later_version_of_the_items_changes_nothing(released, tmp_path, items_again):
    items_again(45)
    other = str(tmp_path / "other")
    transfer.carry(released, other)
    same(released, other)
    assert (
        release.Release.open(storage.Layout(other).releases).items_version
        < lance.dataset(storage.join(storage.Layout(other).items, "items.lance")).version
    )


def test_what_is_not_there(released, tmp_path):
    with pytest.raises(ValueError, match="no finished release"):
        transfer.carry(str(tmp_path / "nowhere"), str(tmp_path / "other"))
    with pytest.raises(ValueError, match="no finished release"):
        transfer.carry(released, str(tmp_path / "other"), "another")
    assert not (tmp_path / "other").exists()
