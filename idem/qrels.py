"""Parquet tables of text queries and of their judgements, with the columns of the public sets."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds


def dataset(path: str, needed: Sequence[str] = ()) -> ds.Dataset:
    """A parquet file or a folder of them. ValueError where there is none, it cannot be read, or lacks a column that is needed."""
    if not Path(path).exists():
        raise ValueError(f"{path}: there is no such file or folder; a parquet file or a folder of them is needed")
    try:
        found = ds.dataset(path, format="parquet")
        found.count_rows()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
    if missing := [name for name in needed if name not in found.schema.names]:
        raise ValueError(f"{path} lacks {' and '.join(missing)}; its columns are {', '.join(found.schema.names)}")
    return found


def read_qrels(path: str) -> dict[str, dict[str, int]]:
    """query_id -> product_id -> level (3 - grade); ValueError names missing columns and grades outside of 0..3."""
    levels: dict[str, dict[str, int]] = {}
    columns = ["query_id", "product_id", "grade"]
    for row in dataset(path, columns).to_table(columns=columns).to_pylist():
        if row["grade"] not in (0, 1, 2, 3):
            raise ValueError(f"{path}: grade {row['grade']!r} of query {row['query_id']} is not one of 0, 1, 2, 3 (3 is best)")
        levels.setdefault(str(row["query_id"]), {})[str(row["product_id"])] = 3 - int(row["grade"])
    if not levels:
        raise ValueError(f"{path} holds no rows")
    return levels


def read_texts(path: str) -> dict[str, str]:
    """query_id -> what is asked; queries without a letter are left out. ValueError for a query_id that stands twice."""
    columns = ["query_id", "query"]
    rows = dataset(path, columns).to_table(columns=columns).to_pylist()
    if len(rows) != len({row["query_id"] for row in rows}):
        raise ValueError(f"{path}: a query_id stands twice in it; each names one query")
    return {str(row["query_id"]): row["query"].strip() for row in rows if row["query"] and row["query"].strip()}
