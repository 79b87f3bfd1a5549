import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from index import shard
from index.merge import merge
from index.searcher import Searcher, Shard, exact

PROJECT = Path(__file__).parents[2]


def ids(answers):
    return [[hit.item_id for hit in hits] for hits in answers]


def test_exact_agrees_with_one_sort_of_everything(unit_vectors):
    vectors, queries = unit_vectors(300, 24), unit_vectors(40, 24, 1)
    scores, rows = exact(vectors, queries, 7)
    plain = queries @ vectors.T
    np.testing.assert_array_equal(rows, np.argsort(-plain, axis=1)[:, :7])
    np.testing.assert_allclose(scores, np.sort(plain, axis=1)[:, ::-1][:, :7], atol=1e-6)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_sharded_flat_search_is_exact_search(unit_vectors, make_index, shards):
    vectors, queries = unit_vectors(500, 32), unit_vectors(50, 32, 1)
    folder, item_ids = make_index(vectors, shards)
    answers = Searcher.open(folder).search(queries, 10)
    scores, rows = exact(vectors, queries, 10)
    assert ids(answers) == [[item_ids[i] for i in row] for row in rows]
    np.testing.assert_allclose([[hit.score for hit in hits] for hits in answers], scores, atol=1e-6)


def test_a_hit_carries_what_is_known_of_its_item(unit_vectors, make_index):
    vectors = unit_vectors(20, 8)
    folder, _ = make_index(vectors, 3)
    ((hit,),) = Searcher.open(folder).search(vectors[7:8], 1)
    assert (hit.item_id, hit.product_id, hit.family_id, hit.category, hit.title) == ("item-00007", "p2", "f2", "c2", "t2")
    assert hit.score == pytest.approx(1, abs=1e-6)


def test_duplicates_across_shards_come_in_the_order_of_their_ids(unit_vectors, make_index):
    vectors = np.repeat(unit_vectors(1, 8), 12, axis=0)
    folder, item_ids = make_index(vectors, 3)
    assert ids(Searcher.open(folder).search(vectors[:1], 5)) == [item_ids[:5]]


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
@pytest.mark.parametrize("k", [1, 7, 60, 500])
def test_a_batch_over_all_shards_agrees_with_the_merge_of_each_shard_alone(unit_vectors, make_index, factory, k):
    vectors = unit_vectors(400, 8)
    vectors[100:160] = vectors[100]  # more equals than FAISS gives spare ones
    vectors[300:305] = vectors[7]
    searcher = Searcher.open(make_index(vectors, 3, factory)[0])
    queries = np.concatenate([vectors[[7, 300, 3]], unit_vectors(20, 8, 1)])
    one_by_one = zip(*(shard.search(queries, k) for shard in searcher.shards), strict=True)
    assert searcher.search(queries, k) == [merge(per_shard, k) for per_shard in one_by_one]
    scores, positions = searcher.find(queries, k)
    item_ids = np.array([*searcher.item_ids, ""])
    assert [[i for i in row if i] for row in item_ids[positions].tolist()] == ids(searcher.search(queries, k))
    assert (scores[:, 1:] <= scores[:, :-1]).all()


def test_k_larger_than_the_index_gives_all_of_it(unit_vectors, make_index):
    folder, item_ids = make_index(unit_vectors(9, 8), 2)
    searcher = Searcher.open(folder)
    (found,) = ids(searcher.search(unit_vectors(1, 8, 1), 100))
    assert sorted(found) == sorted(searcher.item_ids) == item_ids


def test_an_index_that_does_not_look_everywhere_gives_fewer_and_no_empty_rows(unit_vectors, make_index):
    folder, item_ids = make_index(unit_vectors(400, 8), 2, "IVF8,Flat")
    for found in ids(Searcher.open(folder).search(unit_vectors(5, 8, 1), 400)):
        assert 0 < len(found) < 400
        assert len(set(found)) == len(found)
        assert set(found) <= set(item_ids)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.zeros((2, 5)), 3, r"must be \(n, 8\).*found \(2, 5\)"),
        (np.zeros(8), 3, r"found \(8,\)"),
        (np.array([[0.0] * 8, [np.nan] * 8]), 3, "in 1 of 2, the first is number 1"),
        (np.full((1, 8), np.inf), 3, "infinity"),
        (np.zeros((1, 8)), 0, "at least 1; found 0"),
    ],
)
def test_wrong_queries_are_refused(unit_vectors, make_index, queries, k, message):
    searcher = Searcher.open(make_index(unit_vectors(9, 8), 2)[0])
    with pytest.raises(ValueError, match=message):
        searcher.search(queries, k)


def test_no_query_gives_no_answer(unit_vectors, make_index):
    assert Searcher.open(make_index(unit_vectors(9, 8), 2)[0]).search(np.zeros((0, 8)), 3) == []


def test_a_missing_shard_a_flipped_byte_and_an_unfinished_index_are_named(unit_vectors, make_index):
    folder = Path(make_index(unit_vectors(30, 8), 2)[0])
    with pytest.raises(ValueError, match="no shard 2; it has 2"):
        Shard.open(str(folder), 2)
    file = folder / "shard-001.faiss"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-001\.faiss does not match"):
        Searcher.open(str(folder))
    assert Shard.open(str(folder), 0).dim == 8
    file.unlink()
    with pytest.raises(ValueError, match=r"shard-001\.faiss is missing"):
        Searcher.open(str(folder))
    copy = shutil.copytree(folder, folder.parent / "unfinished")
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no finished"):
        Searcher.open(str(copy))


def test_a_factory_that_faiss_refuses_is_named(unit_vectors):
    with pytest.raises(ValueError, match="'IVF64,Flat' for 10 vectors of 8 dimensions"):
        shard.make_index(unit_vectors(10, 8), factory="IVF64,Flat")
    with pytest.raises(ValueError, match="'Nonsense'"):
        shard.make_index(unit_vectors(10, 8), factory="Nonsense")


def test_search_parameters_are_kept_in_the_file(unit_vectors, tmp_path):
    import pyarrow as pa

    vectors = unit_vectors(400, 8)
    meta = pa.table({name: [f"{i:03d}" for i in range(400)] for name in shard.META_COLUMNS})
    shard.write(str(tmp_path), 0, index=shard.make_index(vectors, factory="IVF8,Flat", parameters="nprobe=8"), meta=[meta])
    found = Shard.read(str(tmp_path), 0).search(vectors[:20], 5)
    assert ids(found) == [[f"{i:03d}" for i in row] for row in exact(vectors, vectors[:20], 5)[1]]


def test_searching_needs_neither_torch_nor_ray():
    code = "import sys, index.searcher, index.release; print([m for m in ('torch', 'ray') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True).stdout == "[]\n"
