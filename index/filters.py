"""Which items a search may return, told by their attributes; pure.

    {"category": "shoes", "price": {"gte": 10, "lt": 20}, "seller": ["a", "b"]}

is the items of that category, of that price, of either seller. A column is named as it is, an attribute also without `attributes.`
before it. An item whose value is missing is not let through.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from idem import schema

Where = Mapping[str, Any]
COMPARED: dict[str, Callable[..., Any]] = {
    "eq": pc.equal,
    "ne": pc.not_equal,
    "lt": pc.less,
    "lte": pc.less_equal,
    "gt": pc.greater,
    "gte": pc.greater_equal,
}
OPERATORS = (*COMPARED, "in")


def mask(table: pa.Table, where: Where) -> np.ndarray:
    """(n,) bool: the rows that satisfy every condition. ValueError names the column, operator or value that cannot be used."""
    kept = np.ones(table.num_rows, bool)
    for name, asked in where.items():
        column = _column(table, name)
        for operator, value in _conditions(name, asked):
            kept &= _holds(name, column, operator, value)
    return kept


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    for known in (name, f"{schema.ATTRIBUTES}.{name}"):
        if known in table.column_names:
            return table[known]
    raise ValueError(f"a filter asks for {name!r}; the index knows {', '.join(sorted(table.column_names))}")


def _conditions(name: str, asked: Any) -> list[tuple[str, Any]]:
    if isinstance(asked, Mapping):
        if not asked or (unknown := [key for key in asked if key not in OPERATORS]):
            found = ", ".join(map(repr, unknown)) if asked else "nothing"
            raise ValueError(f"the filter of {name!r} compares by {found}; allowed are {', '.join(OPERATORS)}")
        return list(asked.items())
    return [("in" if isinstance(asked, list | tuple | set | frozenset) else "eq", asked)]


def _holds(name: str, column: pa.ChunkedArray, operator: str, value: Any) -> np.ndarray:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    try:
        if operator == "in":
            held = pc.is_in(column, value_set=_typed(list(value), kind), skip_nulls=True)
        else:
            (scalar,) = _typed([value], kind)
            if not scalar.is_valid:
                raise TypeError("None is equal to nothing")
            held = COMPARED[operator](column.cast(kind), scalar)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(f"the filter of {name!r} ({kind}) cannot use {operator} {value!r}: {error}") from error
    return np.asarray(pc.fill_null(held, False).to_numpy())


def _typed(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values as the column has them; a fraction asked of whole numbers stays one."""
    if pa.types.is_integer(kind) and any(isinstance(value, float) for value in values):
        kind = pa.float64()
    return pa.array(values, kind)
