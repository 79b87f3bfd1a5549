"""What a judge says of candidates, and what is left where judges agree."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idem import schema
from train import rerank_label

FOUND: dict[str, Any] = {"query_id": "q", "fold": "rerank", "item_ids": ["a", "b", "c"], "scores": [0.9, 0.8, 0.7], "levels": [0, 1, 3]}


def candidates(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=schema.CANDIDATES)


def judgements(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=schema.JUDGEMENTS)


@pytest.mark.parametrize(
    ("relevance", "level", "said"), [(0.95, 0, 0), (0.95, 3, 0), (0.05, 0, 1), (0.05, 2, 2), (0.5, 0, None), (0.9, 1, 0), (0.09, 0, 1)]
)
def test_a_judge_tells_the_very_same_from_all_else_where_it_is_sure(relevance: float, level: int, said: int | None) -> None:
    assert rerank_label.verdict(relevance, level, 0.9) == said


def test_a_pair_of_which_judges_disagree_is_not_learnt_from() -> None:
    told = judgements(*rerank_label.rows(FOUND, [0.02, 0.5, 0.01], "judge", 0.9))
    assert rerank_label.counted(told) == {"pairs": 3, "sure": 2, "disagreed": 1}
    (row,) = rerank_label.agreed(candidates(FOUND), told).to_pylist()
    assert (row["item_ids"], row["levels"]) == (["b", "c"], [1, 3])
    assert [round(score, 1) for score in row["scores"]] == [0.8, 0.7]


def test_what_people_say_replaces_what_the_metadata_say() -> None:
    told = judgements({"query_id": "q", "item_id": "c", "level": 0, "judge": "people", "confidence": 1.0})
    (row,) = rerank_label.agreed(candidates(FOUND), told).to_pylist()
    assert row["levels"] == [0, 1, 0]


def test_a_list_without_documents_goes() -> None:
    told = judgements(*rerank_label.rows({**FOUND, "item_ids": ["a"], "levels": [0]}, [0.0], "judge", 0.9))
    assert rerank_label.agreed(candidates({**FOUND, "item_ids": ["a"], "scores": [0.9], "levels": [0]}), told).num_rows == 0


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_no_level_is_made_up(relevance: list[float]) -> None:
    told = judgements(*rerank_label.rows(FOUND, relevance, "judge", 0.8))
    for row in rerank_label.agreed(candidates(FOUND), told).to_pylist():
        assert set(zip(row["item_ids"], row["levels"], strict=True)) <= set(zip(FOUND["item_ids"], FOUND["levels"], strict=True))
