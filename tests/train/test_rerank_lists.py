"""Candidates to lists: who is asked how, and what is known of each document."""

import numpy as np
import pyarrow as pa
import pytest

from idem import schema
from train.rerank_data import KINDS, Known, Pool, askable, draw, lists, served, title_codes
from train.rerank_loop import RerankConfig

CONFIG = RerankConfig(root="")


def known(titles: list[str], products: list[int]) -> Known:
    """Vectors that differ by what they are of: queries with all they have and with their title alone, and the index's own."""
    both, text, indexed = np.random.default_rng(0).normal(size=(3, len(titles), 4)).astype(np.float32)
    codes = np.array(products)
    return Known(products=codes, families=codes, titles=title_codes(titles, 48), both=both, text=text, indexed=indexed)


def test_cosines_of_text_are_with_the_vectors_of_the_index() -> None:
    rows = {"a": 0, "b": 1, "c": 2}
    columns = {"query_id": ["a"], "fold": ["rerank"], "item_ids": [["b", "c"]], "scores": [[0.9, 0.8]], "levels": [[0, 3]], "text": [None]}
    told = known(["red cup", "cup", "tea"], [0, 0, 1])
    made = lists(pa.table(columns, schema=schema.CANDIDATES), rows, told)
    for kind, asked in (("both", told.both), ("text", told.text)):
        np.testing.assert_allclose(made.cosines[KINDS.index(kind), 0], told.indexed[[1, 2]] @ asked[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("titles", "may_tell"),
    [
        (["red cup", "cup", "tea"], True),  # its own words
        (["cup", "cup", "tea"], False),  # one title a product
        ([" CUP", "cup ", "tea"], False),
        (["", "cup", "tea"], False),  # nothing to tell
        (["tea", "cup", "tea"], True),  # another product's title is no answer
    ],
)
def test_a_title_that_a_right_document_has_is_not_asked_with(titles: list[str], may_tell: bool) -> None:
    columns = {"query_id": ["a"], "fold": ["rerank"], "item_ids": [["b", "c"]], "scores": [[0.9, 0.8]], "levels": [[0, 3]], "text": [None]}
    made = lists(pa.table(columns, schema=schema.CANDIDATES), {"a": 0, "b": 1, "c": 2}, known(titles, [0, 0, 1]))
    assert made.told.tolist() == [may_tell]


def test_a_product_that_no_list_holds_is_not_asked_for_by_title() -> None:
    columns = {"query_id": ["a"], "fold": ["rerank"], "item_ids": [["b", "c"]], "scores": [[0.9, 0.8]], "levels": [[3, 3]], "text": [None]}
    made = lists(pa.table(columns, schema=schema.CANDIDATES), {"a": 0, "b": 1, "c": 2}, known(["cup", "tea", "pot"], [0, 1, 2]))
    assert not made.told.any()


def test_lists_are_read_from_candidates() -> None:
    columns = {
        "query_id": ["a", "b"],
        "fold": ["rerank", "rerank"],
        "item_ids": [["c", "a", "b"], ["c"]],
        "scores": [[0.9, 0.8, 0.7], [0.2]],
        "levels": [[3, 0, 0], [1]],
        "text": [None, None],
    }
    made = lists(pa.table(columns, schema=schema.CANDIDATES), {"a": 0, "b": 1, "c": 2}, known(["red cup", "cup", "tea"], [0, 0, 1]))
    assert made.documents.tolist() == [[2, 1, -1], [2, -1, -1]], "a query is no answer to itself"
    assert made.levels.tolist() == [[3, 0, -1], [1, -1, -1]]
    assert made.cosines[0].round(4).tolist() == [[0.9, 0.7, 0.0], [0.2, 0.0, 0.0]] or np.allclose(made.cosines[0][:, 0], [0.9, 0.2])
    assert served(made, 0, "image", 20).tolist() == [0, 1]


def test_a_text_that_is_no_item_is_asked_as_one_and_has_the_family_of_its_best_document() -> None:
    columns = {
        "query_id": ["a", "q"],
        "fold": ["rerank"] * 2,
        "item_ids": [["b", "c"], ["c", "b"]],
        "scores": [[0.9, 0.8], [0.7, 0.6]],
        "levels": [[0, 3], [3, 1]],
        "text": [None, "something hot"],
    }
    told = known(["cup", "cup", "tea", "something hot"], [0, 0, 1, -1])
    made = lists(pa.table(columns, schema=schema.CANDIDATES), {"a": 0, "b": 1, "c": 2, "q": 3}, told)
    assert made.told.tolist() == [False, True]
    assert made.families.tolist() == [0, 0]
    np.testing.assert_allclose(made.cosines[KINDS.index("text"), 1], told.indexed[[2, 1]] @ told.text[3], rtol=1e-5)
    assert made.levels.tolist() == [[0, 3], [3, 1]]
    pictured = np.array([True, True, True, False])
    pool = Pool(places=np.ones((4, 2, 8), np.float16), pictured=pictured, texts=np.full((4, 5), 7, np.int16))
    assert [askable(pool, made, kind).tolist() for kind in KINDS] == [[0], [], [1]]
    batch = draw(pool, made, slots=range(40), seed=0, step=0, chunk=2, settings=CONFIG.model_copy(update={"dropout": 0.0}))
    texts = batch.q_text.any(1)
    assert texts.any()
    assert (texts != batch.q_mask.any(1)).all(), "a picture or a text asks, never both here"


def test_texts_for_which_nothing_was_found_have_a_family_each() -> None:
    columns = {
        "query_id": ["q", "r", "s"],
        "fold": ["rerank"] * 3,
        "item_ids": [["a", "b"]] * 3,
        "scores": [[0.9, 0.8]] * 3,
        "levels": [[3, 3], [3, 3], [3, 2]],
        "text": ["hot", "cold", "tea"],
    }
    told = known(["cup", "tea", "hot", "cold", "tea"], [0, 1, -1, -1, -1])
    made = lists(pa.table(columns, schema=schema.CANDIDATES), {"a": 0, "b": 1, "q": 2, "r": 3, "s": 4}, told)
    assert made.families[2] == 1
    assert len({0, 1, *made.families.tolist()}) == 4
