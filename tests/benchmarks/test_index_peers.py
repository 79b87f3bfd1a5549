import importlib
from pathlib import Path

import lance
import numpy as np
import pytest

from benchmarks.tools import index_data, index_peers
from benchmarks.tools.curves import recall_of
from idem import manifest, storage
from index import vectors as encoded
from pipelines.items import open_items

DATA = index_data.synthetic(3000, 50)
FACTORY = "IVF16,PQ64x4fs,Refine(SQfp16)"


def test_ours_finds_what_bare_faiss_finds_and_both_are_asked_the_same(tmp_path: Path):
    ours = index_peers.ours(index_peers.build_sharded(tmp_path, DATA.vectors, FACTORY, 4), "ours", FACTORY)
    bare = index_peers.bare(DATA.vectors, "bare", FACTORY)
    assert ours.settings == bare.settings
    found = [each.numbered(each.search(DATA.queries, 10, {"nprobe": 16, "k_factor_rf": 20})) for each in (ours, bare)]
    assert (same := recall_of(*found)) > 0.98, f"{same:.1%} of what is found is the same"
    assert 1 < ours.bytes_each / bare.bytes_each < 1.5, "each shard has the centroids again"


def test_curves_have_a_point_a_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index_peers, "REPEATS", 1)
    points = index_peers.curves([bare := index_peers.bare(DATA.vectors, "bare", FACTORY)], DATA)["bare"]
    assert [point.setting for point in points] == [f"nprobe={s['nprobe']},k_factor_rf={s['k_factor_rf']}" for s in bare.settings]
    assert points[0].recall < 0.95 < points[-1].recall, "the sweep has both sides of the recall at which they are compared"
    assert all(point.rate > 0 for point in points)


@pytest.mark.parametrize("name", index_peers.PEERS)
def test_a_peer_finds_the_nearest_at_its_best_setting(name: str, tmp_path: Path):
    try:
        importlib.import_module(name.split()[0])
    except ImportError:
        pytest.skip(f"{name.split()[0]} is not installed; requirements-bench.txt has it")
    for peer in index_peers.peers(DATA.vectors, tmp_path, [name]):
        found = peer.search(DATA.queries, 10, peer.settings[-1])
        least = 0.98 if "refined" in peer.name else 0.7 if "PQ" in peer.name else 0.94
        assert recall_of(found, DATA.exact) > least, peer.name
        assert 64 < peer.bytes_each < 1500, peer.name


def test_hits_of_a_batch_go_to_their_queries():
    found = index_peers.in_rows(np.array([2, 0, 2, 0]), np.array([5, 6, 7, 8]), (3, 3))
    assert found.tolist() == [[6, 8, -1], [-1, -1, -1], [5, 7, -1]]


def test_queries_are_taken_out_of_the_embeddings_that_they_ask(tmp_path: Path):
    path = tmp_path / "e.npy"
    np.save(path, np.random.default_rng(0).standard_normal((100, 8)))
    data = index_data.named("emoji", tmp_path, rows=0, queries=10, embeddings=str(path))
    assert (len(data.vectors), len(data.queries), data.exact.shape) == (90, 10, (10, 10))
    assert np.allclose(np.linalg.norm(data.vectors, axis=1), 1)
    assert data.made == "as given in e.npy"
    with pytest.raises(ValueError, match=r"above 100"):
        index_data.of_embeddings(np.zeros((100, 8)), 100, "")


def test_a_root_has_items_and_vectors_in_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index_data, "BLOCK", 64)
    index_data.fill(str(tmp_path), 200)
    layout = storage.Layout(str(tmp_path))
    stored = lance.dataset(storage.join(manifest.current(layout.vectors, kind="vectors"), encoded.NAME)).to_table()
    assert open_items(layout.items).table(["item_id"])["item_id"].to_pylist() == stored["item_id"].to_pylist()
    assert np.allclose(np.linalg.norm(np.stack(stored["vector"].to_numpy()), axis=1), 1, atol=1e-5)


def test_blocks_do_not_hang_on_how_many_there_are():
    few, many = (np.concatenate(list(index_data.clustered(n))) for n in (index_data.BLOCK, index_data.BLOCK + 5))
    assert np.array_equal(few, many[: index_data.BLOCK])
