import itertools

import faiss
import numpy as np
import pyarrow as pa
import pytest

from index import plan, shard


def table(rows: list[tuple[str, str, str, str, str]]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(plan.GALLERY_COLUMNS, row, strict=True)) for row in rows])


def ids(rows: pa.Table, gallery: plan.Gallery) -> list[str]:
    return rows.take(pa.array(gallery.rows))["item_id"].to_pylist()


CATALOG = table([("b", "p", "photo", "", "train"), ("a", "p", "catalog", "", "train"), ("c", "q", "photo", "", "train")])
SPLIT = table(
    [(f"u{i}", "unseen", "photo", "train", "dev_unseen") for i in range(7)]
    + [("u9", "unseen", "photo", "test", "dev_unseen"), ("t1", "seen", "photo", "train", "train"), ("t2", "seen", "photo", "val", "train")]
)
PLAIN = table([("d", "q", "render", "", "train"), ("b", "p", "render", "", "train"), ("a", "p", "render", "", "train")])


@pytest.mark.parametrize(
    ("rows", "per_product", "expected", "rule"),
    [
        (CATALOG, 0, ["a"], "catalog"),
        (SPLIT, 0, ["u0", "u1", "u2", "u3", "u4", "t1"], "split train"),
        (SPLIT, 2, ["u0", "u1", "t1"], "split train"),
        (PLAIN, 0, ["d", "a"], "first 1 "),
        (PLAIN, 2, ["d", "b", "a"], "first 2 "),
    ],
)
def test_the_first_rule_that_applies_is_taken_and_named(rows, per_product, expected, rule):
    gallery = plan.choose_gallery(rows, filter_was_given=False, per_product=per_product)
    assert ids(rows, gallery) == expected
    assert rule in gallery.rule


def test_split_train_needs_an_unseen_product_with_both_sides():
    only_train_side = SPLIT.filter(pa.compute.not_equal(SPLIT["split"], "test"))
    assert "first 1" in plan.choose_gallery(only_train_side, filter_was_given=False, per_product=0).rule


def test_a_filter_takes_all_rows_unless_limited():
    assert ids(CATALOG, plan.choose_gallery(CATALOG, filter_was_given=True, per_product=0)) == ["b", "a", "c"]
    assert ids(CATALOG, plan.choose_gallery(CATALOG, filter_was_given=True, per_product=1)) == ["a", "c"]


def test_an_empty_gallery_and_a_negative_limit_are_refused():
    with pytest.raises(ValueError, match="filter `gallery` keeps none"):
        plan.choose_gallery(CATALOG.slice(0, 0), filter_was_given=True, per_product=0)
    with pytest.raises(ValueError, match="found -1"):
        plan.choose_gallery(CATALOG, filter_was_given=True, per_product=-1)


def test_limit_agrees_with_the_obvious_loop():
    rng = np.random.default_rng(0)
    rows = table([(f"i{i:03d}", f"p{rng.integers(9)}", "photo", "", "train") for i in rng.permutation(200)])
    for limit in (1, 3, 7, 500):
        seen: dict[str, int] = {}
        kept = set()
        for item_id, product in sorted(zip(rows["item_id"].to_pylist(), rows["product_id"].to_pylist(), strict=True)):
            seen[product] = seen.get(product, 0) + 1
            if seen[product] <= limit:
                kept.add(item_id)
        gallery = plan.choose_gallery(rows, filter_was_given=True, per_product=limit)
        assert set(ids(rows, gallery)) == kept
        assert (np.diff(gallery.rows) > 0).all()


@pytest.mark.parametrize(("items", "count"), [p for p in itertools.product((1, 2, 5, 17, 100), (1, 2, 3, 7, 17)) if p[1] <= p[0]])
def test_every_item_is_in_exactly_one_shard_of_balanced_size(items, count):
    item_ids = [f"i{i}" for i in range(items)]
    parts = plan.shards(item_ids, count)
    assert sorted(np.concatenate(parts).tolist()) == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    shuffled = np.random.default_rng(count).permutation(item_ids).tolist()
    again = [{shuffled[i] for i in part} for part in plan.shards(shuffled, count)]
    assert again == [{item_ids[i] for i in part} for part in parts], "the shard of an item depends on the order of input"


@pytest.mark.parametrize(
    ("item_ids", "count", "message"), [(["a"], 2, "allowed are 1 to 1"), (["a"], 0, "1 to 1"), (["a", "a"], 1, "repeated")]
)
def test_impossible_shards_are_refused(item_ids, count, message):
    with pytest.raises(ValueError, match=message):
        plan.shards(item_ids, count)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "factory", ["Flat", "SQ8", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ16x4fs", "IVF16,PQ16x4fs,Refine(SQfp16)", "HNSW16_SQ8", "IVF16,RaBitQ"]
)
def test_bytes_a_vector_are_those_of_a_written_index(dim, factory):
    vectors = np.random.default_rng(0).standard_normal((20_000, dim)).astype(np.float32)
    size = len(faiss.serialize_index(shard.make_index(vectors, factory=factory))) / len(vectors)
    assert plan.bytes_each(dim, factory) == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize("total", [10, 50_000, 50_001, 500_001, 10**7, 10**8, 10**9, 10**10])
def test_what_is_suggested_can_be_built_and_is_told(total):
    factory = plan.suggest(total, 128)
    told = plan.outline(total=total, dim=128, factory=factory, shards=4)
    assert told.bytes_each > 0
    assert (told.lists > 0) == (total > 500_000)
    assert not any("usual" in line for line in told.lines())
    assert "usual" in plan.outline(total=total, dim=128, factory="SQ4", shards=4).lines()[-1]


def test_a_factory_that_faiss_cannot_read_is_refused():
    with pytest.raises(ValueError, match="FAISS cannot build 'Nonsense'"):
        plan.outline(total=10, dim=8, factory="Nonsense", shards=1)
