"""What else is said of products: names in other languages, keywords, descriptions; from parquet files with a product_id."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

KEY = "product_id"


class TextSource(BaseModel):
    """A parquet file with product_id, one row a product or several, and the columns of texts or lists of texts to take."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: str
    columns: tuple[str, ...]


def read_texts(sources: Sequence[TextSource]) -> dict[str, list[str]]:
    """All texts of each product, in order. ValueError names the file that is missing, or the column."""
    found: dict[str, list[str]] = {}
    for source in sources:
        table = _table(source)
        for name in source.columns:
            for product, value in zip(table[KEY].to_pylist(), table[name].to_pylist(), strict=True):
                said = value if isinstance(value, list) else [value]
                found.setdefault(str(product), []).extend(text.strip() for text in said if text and text.strip())
    return found


def _table(source: TextSource) -> pa.Table:
    path, wanted = Path(source.file), [KEY, *source.columns]
    if not path.is_file():
        raise ValueError(
            f"there is no file of texts at {path} (train.texts); a parquet file with {KEY} and {', '.join(source.columns)} is needed"
        )
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"cannot read the texts {path} (train.texts): {error}") from error
    if missing := [name for name in wanted if name not in schema.names]:
        raise ValueError(f"the texts {path} have no column {', '.join(missing)}; they have {', '.join(schema.names)}")
    for name in source.columns:
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        if not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
            raise ValueError(f"column {name} of the texts {path} is of type {kind}; texts or lists of texts are needed")
    return pq.read_table(path, columns=wanted)
