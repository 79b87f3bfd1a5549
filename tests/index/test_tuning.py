"""Search settings that are chosen for a recall, from the job's own run to the process that serves. Pure parts: test_checking.py."""

import logging
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest

from idem import manifest, storage
from index import kinds, run, shard, tuning, vectors
from index.checking import Asked, AsServed, Yardstick
from index.searcher import Searcher, Shard, exact
from index.tuning import Tried


def test_knobs_are_those_that_a_kind_has(unit_vectors):
    matrix = unit_vectors(400, 16)
    assert tuning.knobs(shard.make_index(matrix, factory="Flat")) == {}
    assert tuning.knobs(shard.make_index(matrix, factory="IVF6,Flat")) == {"nprobe": [1, 2, 4]}
    assert list(tuning.knobs(shard.make_index(matrix, factory="HNSW8"))["efSearch"])[:2] == [16, 32]
    both = tuning.knobs(shard.make_index(matrix, factory="IVF8,PQ8x4fs,Refine(SQfp16)"))
    assert both == {"k_factor_rf": [1, 2, 4, 8, 16, 32], "nprobe": [1, 2, 4, 8]}


@pytest.mark.parametrize("setting", [{"nprobe": 4, "k_factor_rf": 8}, {"nprobe": 2}, {"k_factor_rf": 2}])
def test_what_is_written_is_what_faiss_reads(unit_vectors, setting):
    index = shard.make_index(unit_vectors(400, 16), factory="IVF8,PQ8x4fs,Refine(SQfp16)")
    faiss.ParameterSpace().set_index_parameters(index, tuning.written(setting))
    outer, inner = list(kinds.layers(index))
    assert outer.k_factor == setting.get("k_factor_rf", 1)
    assert inner.nprobe == setting.get("nprobe", 1)


def test_the_first_value_that_is_enough_ends_a_row_and_dear_ones_are_no_choice():
    seconds = {(1, 8): 9.0, (2, 4): 5.0, (4, 2): 6.0}
    tried = tuning.searched(
        {"k_factor_rf": [1, 2, 4], "nprobe": [1, 2, 4, 8]},
        lambda s: Tried(s, s["nprobe"] * s["k_factor_rf"] / 8, seconds.get((s["k_factor_rf"], s["nprobe"]), 1.0)),
        1.0,
    )
    best = tuning.cheapest(tried, 1.0)
    assert best is not None
    assert best.setting == {"k_factor_rf": 2, "nprobe": 4}
    assert len(tried) == 4 + 3 + 2 < 3 * 4


def served(root: str) -> tuple[Searcher, dict]:
    folder = manifest.current(storage.Layout(root).index, kind="index")
    return Searcher.open(folder), manifest.read(folder, kind="index").figures


def gallery_recall(root: str, searcher: Searcher, k: int = 10) -> float:
    """What a process that serves finds of the exact answers, each vector itself among them; a second, slow count of the same."""
    item_ids, matrix = vectors.read(storage.join(manifest.current(storage.Layout(root).vectors, kind="vectors"), vectors.NAME))
    least = exact(matrix, matrix, k)[0][:, -1]
    at = {item_id: row for row, item_id in enumerate(item_ids)}
    found = [[float(matrix[at[hit.item_id]] @ matrix[row]) for hit in hits] for row, hits in enumerate(searcher.search(matrix, k))]
    return float(np.mean([np.mean([score >= least[row] - 1e-5 for score in scores]) for row, scores in enumerate(found)]))


@pytest.mark.parametrize(("factory", "shards"), [("IVF8,Flat", 1), ("IVF8,Flat", 3), ("IVF4,PQ8x4fs,Refine(SQfp16)", 3), ("HNSW4", 2)])
def test_what_was_tuned_serves_with_that_recall(root, without_ray, factory, shards):
    figures = run.run(run.IndexConfig(root=root, gallery="role != 'x'", factory=factory, shards=shards, target_recall=0.9, min_recall=0.5))
    searcher, told = served(root)
    assert told["parameters"] == figures["parameters"] != ""
    for each in searcher.shards:
        outer, *_, inner = [*kinds.layers(each.index)] * 2
        graph = getattr(inner, "hnsw", None)
        here = {"nprobe": getattr(inner, "nprobe", 0), "k_factor_rf": getattr(outer, "k_factor", 0), "efSearch": graph and graph.efSearch}
        assert all(here[name] == float(value) for name, value in (part.split("=") for part in told["parameters"].split(",")))
    assert gallery_recall(root, searcher) >= 0.85


@pytest.mark.parametrize("shards", [2, 5])
@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("factory", ["IVF16,PQ8x4fs,Refine(SQfp16)", "IVF16,SQ4,Refine(Flat)"])
def test_an_index_is_checked_as_it_is_served(tmp_path, unit_vectors, factory, factor, shards):
    """Twins: shards in their files, and the one index that a process makes of them."""
    vectors, queries = unit_vectors(3000, 16), unit_vectors(200, 16, 1)
    trained = shard.empty_index(lambda: vectors, dim=16, total=3000, factory=factory, parameters=f"nprobe=8,k_factor_rf={factor}")
    for number, rows in enumerate(np.array_split(np.arange(3000), shards)):
        index = faiss.clone_index(trained)
        index.add(vectors[rows])
        meta = pa.table({name: [f"{row:05d}" for row in rows] for name in [*shard.META_COLUMNS, *shard.FILTER_COLUMNS]})
        shard.write(str(tmp_path), number, index=index, meta=[meta])
    checked = AsServed.of([Shard.read(str(tmp_path), number, columns=shard.META_COLUMNS) for number in range(shards)])
    serves = Searcher.of([Shard.read(str(tmp_path), number, mapped=False) for number in range(shards)])
    assert (len(checked.shards), len(serves.shards)) == (shards, 1)
    truth = exact(vectors, queries, 10)[1]
    found = [searcher.find(queries, 10) for searcher in (checked, serves)]
    one, other = (np.mean([np.isin(mine, known).mean() for mine, known in zip(rows, truth, strict=True)]) for _, rows in found)
    print(f"recall@10 checked {one:.4f}, served {other:.4f}, largest difference of a score {np.abs(found[0][0] - found[1][0]).max():.2e}")  # noqa: T201
    assert abs(one - other) < 0.003
    joined: Any = faiss.downcast_index(serves.shards[0].index)
    mine, theirs = checked._candidates(queries, 80)[0], joined.base_index.search(queries, 80)[0]
    np.testing.assert_array_equal(np.sort(mine), np.sort(theirs), "candidates as good, one by one: only which of equals is cut may differ")


def test_kinds_that_are_served_apart_are_checked_apart(unit_vectors):
    meta = pa.table({name: [f"{row:03d}" for row in range(200)] for name in shard.META_COLUMNS})
    for factory in ("Flat", "IVF4,Flat", "HNSW8", "HNSW8,Refine(SQfp16)"):
        parts = [Shard(shard.make_index(unit_vectors(200, 16, seed), factory=factory), meta) for seed in (0, 1)]
        assert type(AsServed.of(parts)) is Searcher


def test_what_is_tried_is_told(root, without_ray, caplog):
    with caplog.at_level(logging.INFO):
        run.run(run.IndexConfig(root=root, gallery="role = 'catalog'", factory="IVF8,Flat", target_recall=0.9, min_recall=0))
    told = [record.getMessage() for record in caplog.records if record.name == "index.tuning"]
    assert told
    assert all("nprobe=" in line and "recall@10" in line and "ms a query" in line for line in told)
    assert any("as IVF8,Flat: 2 shards of 20" in record.getMessage() for record in caplog.records if record.name == "index.run")


def test_an_exact_index_has_nothing_to_tune(root, without_ray):
    figures = run.run(run.IndexConfig(root=root, factory="Flat", target_recall=1.0))
    assert (figures["parameters"], figures["recall@10"]) == ("", 1.0)


def test_a_target_out_of_reach_leaves_nothing_behind(root, without_ray):
    with pytest.raises(ValueError, match=r"target_recall = 0.999 is out of reach: the most is 0\.\d+, with nprobe="):
        run.run(run.IndexConfig(root=root, gallery="true", factory="IVF4,PQ1x4", target_recall=0.999, min_recall=0))
    assert not list(Path(storage.Layout(root).index).rglob("*.faiss"))


def test_both_halves_have_queries_of_every_kind_that_has_any(unit_vectors):
    asked = {"gallery": Asked(unit_vectors(1, 8), np.arange(1)), "image": Asked(unit_vectors(5, 8)), "text": Asked(unit_vectors(2, 8))}
    whole = Yardstick(asked=asked, best={kind: each.queries for kind, each in asked.items()}, dataset=None, order=np.arange(9))
    halves = [whole.half(number) for number in (0, 1)]
    assert [{kind: len(each.queries) for kind, each in half.asked.items()} for half in halves] == [
        {"gallery": 1, "image": 3, "text": 1},
        {"gallery": 1, "image": 2, "text": 1},
    ]
    assert not np.isin(halves[0].asked["image"].queries, halves[1].asked["image"].queries).any()
    assert all(half.asked["gallery"].own.tolist() == [0] for half in halves)
