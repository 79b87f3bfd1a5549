"""What an index will be, against FAISS's own; and the planner on a billion rows, whose hashes a counter gives."""

import json
import re
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import faiss
import numpy as np
import pytest

from benchmarks.tools import index_constants
from index import plan, shard, sizes

DIM = 128
FACTORY = sizes.suggest(10**9, DIM)
ROWS, BLOCK = 10**9, 1 << 19
KINDS = [
    "Flat",
    "SQ8",
    "HNSW16",
    "HNSW32_Flat",
    "HNSW16_SQ8",
    "HNSW32_SQfp16",
    "IVF16,Flat",
    "IVF16,SQ8",
    "IVF16,SQfp16",
    "IVF16,PQ16x4",
    "IVF16,PQ16x4fs",
    "IVF256,PQ32x4fs",
    "IVF256_HNSW16,PQ32x4fs,Refine(SQfp16)",
    "IVF16,PQ16x4fs,Refine(SQ8)",
    "IVF16,PQ16x4fs,RFlat",
    "IVF16,PQ16x4fs,Refine(Flat)",
    "IVF16,RaBitQ",
    "IVF16,RaBitQfs",
]


@pytest.mark.parametrize(("factory", "dim"), [*((kind, 32) for kind in KINDS), ("IVF256,PQ64x4fs,Refine(SQfp16)", DIM)])
def test_bytes_are_those_of_a_written_index(factory, dim):
    vectors = np.random.default_rng(0).standard_normal((20_000, dim)).astype(np.float32)
    index = shard.empty_index(lambda: vectors[:2000], dim=dim, total=len(vectors), factory=factory)
    index.add(vectors)
    size = len(faiss.serialize_index(index))
    told = sizes.outline(total=len(vectors), dim=dim, factory=factory, shards=1)
    assert told.shard_bytes == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize("dim", [63, 64, 128, 768])
@pytest.mark.parametrize("total", [10, 50_000, 50_001, 500_001, 10**6, 10**7, 10**8, 10**9, 10**10])
def test_what_is_suggested_can_be_built_and_is_told(total, dim):
    factory = sizes.suggest(total, dim)
    assert faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT).d == dim
    told = sizes.outline(total=total, dim=dim, factory=factory, shards=min(total, 250))
    assert told.bytes.each > 0
    assert (told.lists > 0) == (total > 500_000)
    assert not told.poor
    assert len(told.lines()) == 3 + (told.lists > 0)


@pytest.mark.parametrize(
    ("total", "factory", "why"),
    [
        (10**7, "Flat", "too many"),
        (10**7, "SQ8", "too many"),
        (10**7, "HNSW32", "too many"),
        (10_000, "IVF1024,PQ64x4fs", "40,960 vectors to be trained on"),
        (100_000, "IVF256,SQ8", "too few"),
        (10**8, "IVF1024,PQ64x4fs", "a list are too many"),
        (10**7, "IVF131072_HNSW32,SQ8", "a list are too few"),
    ],
)
def test_a_poor_choice_is_told_with_the_usual_one(total, factory, why):
    said = sizes.outline(total=total, dim=DIM, factory=factory, shards=2).lines()[-1]
    assert why in said
    assert said.endswith(sizes.suggest(total, DIM))


def test_lists_are_planned_to_be_trained_as_they_are():
    told = sizes.outline(total=10**9, dim=DIM, factory=FACTORY, shards=25)
    assert told.training_rows == len(shard.sampled(10**9, told.lists))


def test_the_tables_of_the_document_are_computed_from_its_constants():
    text = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    known = json.loads(re.search(r"```json\n(.*?)```", text, re.S)[1])["constants"]
    assert index_constants.tables(index_constants.Constants(**known)) in text


def test_constants_are_measured_in_small():
    known, own = index_constants.measured(6000, 20, 500)
    assert all(value > 0 for name, value in asdict(known).items() if name not in ("ask", "encode", "scan", "refine", "merge"))
    assert own["query_ms"] > 0


def test_a_factory_that_faiss_cannot_read_is_refused():
    with pytest.raises(ValueError, match="FAISS cannot build 'Nonsense'"):
        plan.outline(total=10, dim=8, factory="Nonsense", shards=1)


@pytest.mark.parametrize("total", [1, 7, 1000, sizes.EVEN])
def test_few_rows_are_cut_evenly(total):
    for shards in {1, min(3, total), min(7, total)}:
        parts = [len(part) for part in plan.shards([str(i) for i in range(total)], shards)]
        assert sizes.outline(total=total, dim=8, factory="Flat", shards=shards).rows == (min(parts), max(parts))


@pytest.mark.parametrize("total", [10**6, 10**8, 10**9, 10**10])
@pytest.mark.parametrize("memory", [8e9, 64e9])
@pytest.mark.parametrize("together", [1, 4])
def test_shards_that_fit_a_memory_are_as_few_as_may_be(total, memory, together):
    made = sizes.sized(total, DIM, memory, together=together, copies=2)
    told, room = made.outline, memory * 0.8 / together
    assert told.opening_bytes <= room
    fewer = sizes.outline(total=total, dim=DIM, factory=told.factory, shards=max(1, told.shards - 1))
    assert told.shards == 1 or fewer.opening_bytes > room
    assert made.machines * together >= told.shards * 2
    assert made.machines >= 2


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="copies=0"):
        sizes.sized(10, 8, 1e9, copies=0)
    with pytest.raises(ValueError, match="131,072 lists"):
        sizes.sized(10**9, DIM, 1e6)


def test_a_billion_rows_go_where_they_were_planned():
    """Each into one shard, none larger than planned; twice the shards halve each, one more moves as many as `moved` says."""
    told = sizes.sized(ROWS, DIM, 16e9).outline
    count, dealt, otherwise = told.shards, np.zeros(told.shards, np.int64), {told.shards * 2: 0, told.shards + 1: 0}
    tracemalloc.start()
    for start in range(0, ROWS, BLOCK):
        hashed = plan.mixed(np.arange(start, min(start + BLOCK, ROWS), dtype=np.uint64))
        mine = plan.shard_of(hashed, count)
        dealt += np.bincount(mine, minlength=count)  # raises where a shard has a number that is not there
        if start % (64 * BLOCK) == 0:
            assert (plan.shard_of(hashed, 2 * count) // 2 == mine).all()
            assert (plan.shard_of(hashed[::-1], count)[::-1] == mine).all()
            for other in otherwise:
                otherwise[other] += np.count_nonzero(plan.shard_of(hashed, other) != mine)
            seen = start // (64 * BLOCK) * BLOCK + len(hashed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e9
    assert count > 8
    assert dealt.sum() == ROWS
    assert told.rows[0] <= dealt.min() <= dealt.max() <= told.rows[1]
    assert 0.3 < dealt.std() / told.deviation < 2
    largest = sizes.outline(total=int(dealt.max()), dim=DIM, factory=told.factory, shards=1)
    assert largest.opening_bytes <= told.opening_bytes <= 16e9 * 0.8
    assert largest.shard_bytes <= told.shard_bytes
    for other, rows in otherwise.items():
        assert rows / seen == pytest.approx(plan.moved(count, other), abs=0.002)
