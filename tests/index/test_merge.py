from hypothesis import given
from hypothesis import strategies as st

from idem.types import Hit
from index.merge import best_first, merge


def hit(item_id: str, score: float) -> Hit:
    return Hit(item_id=item_id, product_id="", family_id="", category="", title="", score=score)


def concatenate_and_sort(per_shard, k):
    return sorted((h for hits in per_shard for h in hits), key=best_first)[:k]


hits = st.builds(hit, st.text("abc", max_size=3), st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]))
shards = st.lists(st.lists(hits, max_size=6).map(lambda found: sorted(found, key=best_first)), max_size=5)


@given(shards, st.integers(1, 12))
def test_merge_agrees_with_concatenate_and_sort(per_shard, k):
    assert merge(per_shard, k) == concatenate_and_sort(per_shard, k)


def test_ties_go_to_the_smaller_item_id_whatever_the_order_of_shards():
    a, b = [hit("b", 0.5)], [hit("a", 0.5), hit("c", 0.5)]
    assert merge([a, b], 2) == merge([b, a], 2) == [hit("a", 0.5), hit("b", 0.5)]
