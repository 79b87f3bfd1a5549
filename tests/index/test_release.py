import shutil
from pathlib import Path

import pytest

from idem import manifest, storage
from index import release, run
from index.release import Release, ReleaseConfig
from index.searcher import Searcher


def bind(root: str, name: str = "") -> dict:
    return release.run(ReleaseConfig(root=root, name=name))


def folder_of(root: str, kind: str) -> Path:
    return Path(manifest.current(getattr(storage.Layout(root), kind), kind=kind))


def write_reranker(root: str, embedder: str) -> None:
    made = manifest.Plan(parent=storage.Layout(root).reranker, kind="reranker", config={}, inputs={"embedder": embedder})
    storage.write_bytes(storage.join(made.folder, "config.json"), b"{}")
    made.write(figures={}, files=["config.json"])


def test_a_release_binds_what_is_current_and_opens_by_folder_and_by_pointer(indexed):
    figures = bind(indexed)
    there = Release.open(storage.join(storage.Layout(indexed).releases, figures["release"]))
    assert there == Release.open(storage.Layout(indexed).releases)
    assert there.name == there.id[:12] == figures["release"]
    assert (Path(there.embedder), Path(there.index)) == (folder_of(indexed, "embedder"), folder_of(indexed, "index"))
    assert there.reranker is None
    assert there.items_version == 1
    assert len(Searcher.open(there.index).item_ids) == len(Searcher.open(storage.Layout(indexed).releases).item_ids) == 40


def test_a_second_time_is_skipped_and_a_name_is_never_bound_anew(indexed):
    bind(indexed, "first")
    assert bind(indexed, "first")["skipped"]
    run.run(run.IndexConfig(root=indexed, fields="image", shards=3))
    with pytest.raises(ValueError, match="first binds something else"):
        bind(indexed, "first")
    bind(indexed, "second")
    releases = storage.Layout(indexed).releases
    assert Release.open(releases).name == "second"
    assert Release.open(storage.join(releases, "first")).index != Release.open(releases).index


def test_a_run_may_be_moved(indexed, tmp_path):
    name = bind(indexed)["release"]
    elsewhere = tmp_path / "elsewhere" / "run"
    shutil.copytree(indexed, elsewhere, ignore=shutil.ignore_patterns("elsewhere"))
    for artifact in ("items", "embedder", "index"):
        shutil.rmtree(Path(indexed, artifact))
    there = Release.open(str(elsewhere / "releases" / name))
    assert there.index.startswith(str(elsewhere))
    with pytest.raises(ValueError, match=r"version 1 of the items is not at .*no finished embedder.*no finished index"):
        Release.open(storage.join(storage.Layout(indexed).releases, name))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: flip(folder_of(root, "index") / "shard-000.faiss"), r"shard-000\.faiss does not match its checksum"),
        (lambda root: (folder_of(root, "index") / "shard-001.parquet").unlink(), r"shard-001\.parquet is missing"),
        (lambda root: flip(folder_of(root, "embedder") / "model.safetensors"), r"model\.safetensors does not match"),
        (lambda root: (folder_of(root, "embedder") / "manifest.json").unlink(), "no finished embedder"),
        (lambda root: (folder_of(root, "index") / "manifest.json").open("a").write("\n"), r"manifest\.json does not match the checksum"),
        (lambda root: shutil.rmtree(Path(root, "items", "items.lance")), "version 1 of the items is not at"),
    ],
)
def test_what_is_damaged_is_refused_by_name(indexed, harm, message):
    bind(indexed)
    harm(indexed)
    with pytest.raises(ValueError, match=message):
        Release.open(storage.Layout(indexed).releases)


def test_later_items_do_not_touch_a_release_and_other_items_under_its_version_are_refused(indexed, items_again):
    bind(indexed)
    items_again(41)
    assert Release.open(storage.Layout(indexed).releases).items_version == 1
    shutil.rmtree(Path(indexed, "items"))
    items_again(41)
    with pytest.raises(ValueError, match=r"version 1 of the items at .* has id"):
        Release.open(storage.Layout(indexed).releases)


def test_a_reranker_is_bound_where_there_is_one_of_the_same_embedder(indexed, embedder_again):
    embedder = folder_of(indexed, "embedder").name
    write_reranker(indexed, embedder)
    bind(indexed)
    assert Release.open(storage.Layout(indexed).releases).reranker == str(folder_of(indexed, "reranker"))
    write_reranker(indexed, "another")
    with pytest.raises(ValueError, match=f"reranker .* was made with embedder another, the current one is {embedder}"):
        bind(indexed, "new")
    embedder_again(1)
    with pytest.raises(ValueError, match=f"the index .* was made with embedder {embedder}"):
        bind(indexed, "new")


@pytest.mark.parametrize("name", ["a/b", ".hidden"])
def test_a_name_that_is_no_folder_name_is_refused(indexed, name):
    with pytest.raises(ValueError, match="one folder name"):
        bind(indexed, name)


def test_a_run_without_an_index_is_told_so(root):
    with pytest.raises(ValueError, match="no finished index"):
        bind(root)
