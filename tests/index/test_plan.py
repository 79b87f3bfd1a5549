import itertools

import numpy as np
import pyarrow as pa
import pytest

from index import plan


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


@pytest.mark.parametrize("ids", [[], ["a"], ["a", "a"], ["b", "a", "b", "", "c"], [f"i{n % 700}" for n in range(2000)]])
def test_distinct_ids_are_counted_as_a_set_has_them(ids):
    assert plan.distinct(pa.chunked_array([pa.array(ids[:3], pa.string()), pa.array(ids[3:], pa.string())])) == len(set(ids))


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


def test_shards_of_many_are_equal_ranges_of_hashes(monkeypatch):
    monkeypatch.setattr(plan, "EVEN", 100)
    ids = [f"item-{i}" for i in range(20_000)]
    parts = plan.shards(ids, 7)
    assert sorted(np.concatenate(parts).tolist()) == list(range(20_000))
    backwards = plan.shards(ids[::-1], 7)
    assert [set(part.tolist()) for part in parts] == [{19_999 - i for i in part.tolist()} for part in backwards]
    mean = 20_000 / 7
    assert all(abs(len(part) - mean) < 5 * mean**0.5 for part in parts)


def test_hashes_do_not_depend_on_blocks_and_differ(monkeypatch):
    ids = pa.array([*(f"{i}" for i in range(5000)), "", "ä", "a" * 300, "b" * 300])
    whole = plan.hashes(ids)
    monkeypatch.setattr(plan, "BLOCK", 777)
    assert (plan.hashes(ids) == whole).all()
    assert len(np.unique(whole)) == len(ids)
    assert (plan.hashes(ids.slice(100, 50)) == whole[100:150]).all()


def test_ids_in_chunks_are_hashed_and_dealt_as_in_one():
    ids = [f"i{i}" * (1 + i % 3) for i in range(5000)]
    chunks = pa.chunked_array([ids[:1], [], ids[1:4000], ids[4000:]])
    assert (plan.hashes(chunks) == plan.hashes(pa.array(ids))).all()
    assert [part.tolist() for part in plan.shards(chunks, 3)] == [part.tolist() for part in plan.shards(ids, 3)]


def test_repeats_are_told_by_id_where_hashes_are_alike():
    ids = pa.chunked_array([["a", "b", "a"], ["c", "a"]])
    assert plan.repeats(ids, plan.hashes(ids)) == 2
    assert plan.repeats(ids, np.zeros(5, np.uint64)) == 2
    assert plan.repeats(pa.chunked_array([["a", "b"]]), np.zeros(2, np.uint64)) == 0


@pytest.mark.parametrize(("before", "after", "share"), [(4, 4, 0), (1, 2, 0.5), (4, 5, 0.5), (5, 4, 0.5), (10, 20, 0.95), (3, 7, 6 / 7)])
def test_a_number_of_shards_moves_the_rows_that_it_says(before, after, share):
    hashed = plan.mixed(np.arange(400_000, dtype=np.uint64))
    assert plan.moved(before, after) == pytest.approx(share)
    assert (plan.shard_of(hashed, before) != plan.shard_of(hashed, after)).mean() == pytest.approx(plan.moved(before, after), abs=0.005)


@pytest.mark.parametrize(
    ("count", "machines", "copies"), [p for p in itertools.product((1, 4, 33, 100), (1, 4, 9, 33), (1, 2, 3)) if p[2] <= p[1]]
)
def test_a_machine_more_takes_its_share_and_a_lost_one_leaves_it(count, machines, copies):
    before = plan.placed(count, machines, copies)
    after = plan.placed(count, machines + 1, copies, earlier=before)
    again = plan.placed(count, machines + 1, copies, earlier=np.where(after == 0, -1, after))
    for made in (before, after, again):
        assert all(len(set(row)) == copies for row in made.tolist())
        load = np.bincount(made.ravel(), minlength=machines)
        assert load.max() <= -(-count * copies // machines) + 2
    assert (before != after).sum() <= -(-count * copies // (machines + 1))
    assert (after[before != after] == machines).all() or copies > 1, "what moves goes to the new machine"
    assert np.array_equal(after, plan.placed(count, machines + 1, copies, earlier=before))


def test_more_copies_than_machines_are_refused():
    with pytest.raises(ValueError, match="3 copies of a shard need as many machines"):
        plan.placed(4, 2, 3)
