import lance
import numpy as np
import pyarrow as pa
import pytest

from idem import schema
from index import shard, tuning
from index.checking import Asked, Yardstick, exact_of, in_one_shard
from index.searcher import Searcher, Shard, exact
from index.tuning import Tried


@pytest.mark.parametrize(("n", "size"), [(300, 7), (300, 300), (300, 1000), (5, 2)])
def test_exact_search_of_parts_is_exact_search(unit_vectors, n, size):
    vectors, queries = unit_vectors(n, 24), unit_vectors(40, 24, 1)
    parts = [vectors[start : start + size] for start in range(0, n, size)]
    scores, rows = exact_of(parts, queries, 7)
    plain = exact(vectors, queries, 7)
    k = min(7, n)
    np.testing.assert_allclose(scores[:, :k], plain[0], atol=1e-6)
    np.testing.assert_array_equal(rows[:, :k], plain[1])
    assert (rows[:, k:] == -1).all()


def test_what_is_not_in_exactly_one_shard_is_named():
    ids = pa.chunked_array([["a", "b"], ["c"]])
    in_one_shard(pa.chunked_array([["c", "a"], ["b"]]), ids)
    with pytest.raises(ValueError, match=r"2 items .*: a in 2, c in 0"):
        in_one_shard(pa.chunked_array([["a", "b", "a"]]), ids)
    with pytest.raises(ValueError, match="d, which is no item"):
        in_one_shard(pa.chunked_array([["a", "b", "c", "d"]]), ids)


def stored(path, vectors: np.ndarray) -> lance.LanceDataset:
    array = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    ids = [f"{i:05d}" for i in range(len(vectors))]
    columns = {"item_id": ids, "vector": array, "embedder": ["e"] * len(ids), "content_hash": ids}
    return lance.write_dataset(pa.table(columns, schema=schema.vectors(vectors.shape[1])), str(path))


def yardstick(tmp_path, vectors, queries, factory):
    dataset = stored(tmp_path / "v.lance", vectors)
    order = np.random.default_rng(0).permutation(len(vectors))
    meta = pa.table({name: [f"{i:05d}" for i in order] for name in shard.META_COLUMNS})
    searcher = Searcher([Shard(shard.make_index(vectors[order], factory=factory), meta)])
    own = np.arange(0, len(vectors), 10)
    return searcher, Yardstick.of({"gallery": Asked(vectors[own], own), "image": Asked(queries)}, dataset, order)


def test_recall_agrees_with_a_count_of_what_is_in_both_answers(tmp_path, unit_vectors):
    vectors, queries = unit_vectors(500, 16), unit_vectors(100, 16, 1)
    for number, factory in enumerate(("Flat", "IVF16,Flat")):
        searcher, against = yardstick(tmp_path / str(number), vectors, queries, factory)
        found = [[int(hit.item_id) for hit in hits] for hits in searcher.search(queries, 10)]
        truth = exact(vectors, queries, 10)[1].tolist()
        plain = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)])
        own = vectors[::10]
        found = [[int(hit.item_id) for hit in hits if int(hit.item_id) != 10 * i][:10] for i, hits in enumerate(searcher.search(own, 11))]
        truth = [[i for i in row if i != 10 * n][:10] for n, row in enumerate(exact(vectors, own, 11)[1].tolist())]
        gallery = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)])
        assert against.recalls(searcher) == pytest.approx({"gallery": gallery, "image": plain})
        assert (plain == 1) == (factory == "Flat")


def test_equally_good_answers_count(tmp_path, unit_vectors):
    vectors = np.repeat(unit_vectors(30, 16), 20, axis=0)
    searcher, against = yardstick(tmp_path, vectors, vectors[:20], "Flat")
    assert against.recalls(searcher) == {"gallery": 1.0, "image": 1.0}


def test_the_cheapest_setting_that_reaches_a_recall_is_chosen():
    tried = [
        Tried({"nprobe": 1}, 0.5, 1.0),
        Tried({"nprobe": 4}, 0.96, 3.0),
        Tried({"nprobe": 2}, 0.95, 4.0),
        Tried({"nprobe": 8}, 0.99, 9.0),
    ]
    assert tuning.cheapest(tried, 0.95) is tried[1]
    assert tuning.cheapest(tried, 0.999) is None


def test_settings_beyond_the_first_that_is_enough_are_not_tried():
    space = {"k_factor_rf": [1, 2, 4], "nprobe": [1, 2, 4, 8]}
    tried = tuning.searched(space, lambda s: Tried(s, s["nprobe"] * s["k_factor_rf"] / 10, 1.0), 0.8)
    assert [dict(each.setting) for each in tried] == [
        *({"k_factor_rf": 1, "nprobe": n} for n in (1, 2, 4, 8)),
        *({"k_factor_rf": 2, "nprobe": n} for n in (1, 2, 4)),
        *({"k_factor_rf": 4, "nprobe": n} for n in (1, 2)),
    ]


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,PQ8x4fs,Refine(SQfp16)", "HNSW8"])
def test_tuning_reaches_its_recall_on_queries_that_it_has_not_seen(tmp_path, unit_vectors, factory):
    searcher, against = yardstick(tmp_path, unit_vectors(2000, 16), unit_vectors(400, 16, 1), factory)
    chosen = tuning.tune(searcher, against.half(0), 0.9)
    assert chosen
    assert min(against.half(1).recalls(searcher).values()) > 0.87


def test_a_recall_out_of_reach_says_what_is_reached(tmp_path, unit_vectors):
    searcher, against = yardstick(tmp_path, unit_vectors(500, 16), unit_vectors(50, 16, 1), "IVF4,PQ1x4")
    with pytest.raises(ValueError, match=r"target_recall = 0.99 is out of reach: the most is 0\.\d+, with nprobe="):
        tuning.tune(searcher, against, 0.99)
