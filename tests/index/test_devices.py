"""Search on a torch device against FAISS on the CPU. The device here is the CPU, which runs what a GPU runs."""

from dataclasses import replace

import faiss
import numpy as np
import pyarrow as pa
import pytest

from index import devices, kinds, shard
from index.searcher import Searcher, Shard

KINDS = {
    "Flat": "",
    "SQfp16": "",
    "SQ8": "",
    "HNSW16": "efSearch=1500",
    "IVF8,SQ8": "nprobe=8",
    "IVF8,PQ4x4fs,Refine(SQfp16)": "nprobe=8,k_factor_rf=400",
    "OPQ8_16,IVF8,PQ8x4,RFlat": "nprobe=8,k_factor_rf=400",
}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(devices, "TILE", 301)
    monkeypatch.setattr(devices, "QUERIES", 7)


def pair(vectors, factory, parameters=""):
    """The same shard, searched by FAISS and by torch."""
    count = len(vectors)
    ids = [f"{i:05d}" for i in np.random.default_rng(5).permutation(count)]
    meta = {name: ids for name in shard.META_COLUMNS} | {"size": list(range(count))}
    plain = Shard(shard.make_index(vectors, factory=factory, parameters=parameters), pa.table(meta))
    return plain, replace(plain, exact=devices.Exact.of(faiss.clone_index(plain.index), "cpu"))


@pytest.mark.parametrize("factory", KINDS)
@pytest.mark.usefixtures("small_tiles")
def test_torch_finds_what_an_index_of_that_kind_finds_when_it_looks_everywhere(unit_vectors, factory):
    vectors, queries = unit_vectors(1500, 16), unit_vectors(40, 16, 1)
    plain, exact = (Searcher([each]) for each in pair(vectors, factory, KINDS[factory]))
    for where in (None, {"size": {"lt": 700}}, {"size": {"lt": 30}}):
        expected, found = plain.find(queries, 10, where=where), exact.find(queries, 10, where=where)
        np.testing.assert_allclose(found[0], expected[0], atol=1e-3)
        assert (found[1] == expected[1]).mean() > 0.995
        assert (found[1] >= 0).all()


@pytest.mark.usefixtures("small_tiles")
def test_fewer_than_asked_for_none_and_ties(unit_vectors):
    vectors = np.repeat(unit_vectors(5, 8), 4, axis=0)
    for each in pair(vectors, "Flat"):
        searcher = Searcher([each])
        (hits,) = searcher.search(vectors[:1], 30)
        assert len(hits) == 20
        assert [h.item_id for h in hits[:4]] == sorted(h.item_id for h in hits[:4])
        assert [h.item_id for h in searcher.search(vectors[:1], 9, where={"size": {"lt": 3}})[0]] == sorted(each.item_ids[:3])
        assert searcher.search(vectors[:1], 3, where={"size": {"lt": -1}}) == [[]]
        assert searcher.find(vectors[:0], 3)[0].shape == (0, 3)


def test_hidden_items_stay_hidden(unit_vectors):
    vectors = unit_vectors(50, 8)
    _, exact = pair(vectors, "Flat")
    hidden = np.zeros(50, bool)
    hidden[7] = True
    assert Searcher([exact], hidden).find(vectors[7:8], 1)[1][0, 0] != 7


def test_an_index_that_keeps_no_vectors_is_refused(unit_vectors):
    with pytest.raises(ValueError, match=r"IndexIVFRaBitQ does not give its vectors back.*Refine\(SQfp16\)"):
        devices.Exact.of(shard.make_index(unit_vectors(500, 16), factory="IVF8,RaBitQ"), "cpu")
    assert len(devices.Exact.of(shard.make_index(unit_vectors(500, 16), factory="IVF8,RaBitQ,Refine(SQ8)"), "cpu").vectors) == 500


def test_cpu_is_faiss_and_needs_no_torch(unit_vectors, make_index):
    folder, _ = make_index(unit_vectors(40, 8), 2)
    assert Searcher.open(folder, device="cpu").shards[0].exact is None


class OnGpu:
    """As an index of faiss-gpu behaves: it takes no search parameters."""

    def __init__(self, index):
        self.index, self.ntotal, self.d = faiss.clone_index(index), index.ntotal, index.d

    def search(self, vectors, k, params=None):
        if params is not None:
            raise RuntimeError("params not implemented")
        return self.index.search(vectors, k)


def test_faiss_gpu_is_taken_where_it_is_and_has_the_kind(unit_vectors, monkeypatch):
    vectors, queries = unit_vectors(900, 16), unit_vectors(20, 16, 1)
    plain, exact = pair(vectors, "Flat")
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda _resources, number, index: OnGpu(index), raising=False)
    monkeypatch.setattr(kinds, "parameters", lambda *_: None)
    monkeypatch.setattr(devices.Exact, "of", lambda _index, _device: exact.exact)
    moved = plain.on("cuda:1")
    assert isinstance(moved.index, OnGpu)
    np.testing.assert_array_equal(Searcher([moved]).find(queries, 5)[1], Searcher([plain]).find(queries, 5)[1])

    def has_it_not(*_):
        raise RuntimeError("This index type is not implemented on GPU")

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", has_it_not)
    assert plain.on("cuda").exact is exact.exact


def test_lists_are_found_on_gpus_where_there_are_any(unit_vectors, monkeypatch):
    vectors, moved = unit_vectors(800, 16), []

    def to_gpus(index):
        moved.append(index)
        return faiss.clone_index(index)

    alone = shard.make_index(vectors, factory="IVF8,SQ8")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_gpus, raising=False)
    index = shard.make_index(vectors, factory="IVF8,SQ8")
    assert len(moved) == 1
    assert moved[0].metric_type == faiss.METRIC_INNER_PRODUCT
    assert faiss.downcast_index(index).clustering_index is None
    np.testing.assert_allclose(
        faiss.downcast_index(index.quantizer).reconstruct_n(0, 8), faiss.downcast_index(alone.quantizer).reconstruct_n(0, 8), atol=1e-5
    )
    shard.make_index(vectors, factory="Flat")
    assert len(moved) == 1
