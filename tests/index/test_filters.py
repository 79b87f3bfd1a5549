import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index import filters

SHOP = pa.table(
    {
        "category": pa.array(["shoes", "hats", None, "shoes", "bags"]).dictionary_encode(),
        "price": pa.array([10, 20, 30, None, 50], pa.int64()),
        "attributes.seller": ["a", "b", "a", "c", None],
        "attributes.new": [True, False, None, True, True],
        "attributes.weight": [0.5, 1.5, 2.5, 3.5, float("nan")],
    }
)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"category": "shoes"}, [0, 3]),
        ({"category": ["hats", "bags"]}, [1, 4]),
        ({"category": {"ne": "shoes"}}, [1, 4]),
        ({"price": {"gte": 10, "lt": 30}}, [0, 1]),
        ({"price": {"gt": 10.5}}, [1, 2, 4]),
        ({"price": [10, 50]}, [0, 4]),
        ({"seller": "a", "price": {"lte": 10}}, [0]),
        ({"attributes.seller": {"in": ["a", "c"]}}, [0, 2, 3]),
        ({"new": True}, [0, 3, 4]),
        ({"weight": {"gt": 1}}, [1, 2, 3]),
        ({"category": []}, []),
    ],
)
def test_what_a_filter_lets_through(where, rows):
    assert np.flatnonzero(filters.mask(SHOP, where)).tolist() == rows


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"colour": "red"}, "asks for 'colour'; the index knows attributes.new, .*price"),
        ({"price": {"over": 3}}, "compares by 'over'; allowed are eq, ne, lt"),
        ({"price": {}}, "compares by nothing"),
        ({"price": "cheap"}, r"of 'price' \(int64\) cannot use eq 'cheap'"),
        ({"category": 3}, "of 'category'"),
        ({"category": None}, "None is equal to nothing"),
        ({"price": {"in": 3}}, "cannot use in 3"),
        ({"price": 2**70}, "cannot use eq"),
    ],
)
def test_a_filter_that_cannot_be_used_is_refused(where, message):
    with pytest.raises(ValueError, match=message):
        filters.mask(SHOP, where)


PLAIN = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "lte": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "gte": lambda a, b: a >= b,
    "in": lambda a, b: a in b,
}


@given(
    st.lists(st.tuples(st.none() | st.integers(-3, 3), st.none() | st.sampled_from("xyz")), min_size=1, max_size=20),
    st.sampled_from(filters.OPERATORS),
    st.integers(-4, 4),
    st.lists(st.sampled_from("xyz"), max_size=2),
)
def test_filters_agree_with_a_loop(rows, operator, number, letters):
    table = pa.table({"n": pa.array([n for n, _ in rows], pa.int32()), "c": pa.array([c for _, c in rows], pa.string())})
    value = [number, 0] if operator == "in" else number
    plain = [n is not None and PLAIN[operator](n, value) and c is not None and c in letters for n, c in rows]
    assert filters.mask(table, {"n": {operator: value}, "c": letters}).tolist() == plain
