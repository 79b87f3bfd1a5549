"""Records in one form, whatever they were read from: what sources give and normalising takes."""

from collections.abc import Iterable, Mapping

import pyarrow as pa
from pydantic import BaseModel

from idem import folds, schema

TEXTS = (
    "item_id",
    "product_id",
    "title",
    "family_id",
    "coarse",
    "category",
    "group",
    "lang",
    "role",
    "style",
    "id_split",
    "split",
    "version",
)
SETTLED = ("family_id", "coarse", "id_split")  # must be one for all records of a product, or folds and splits leak
BATCH_ROWS = 128


class Columns(BaseModel, frozen=True, extra="forbid"):
    """Which column of the source holds what. Those that are named explicitly must exist."""

    item_id: str = "image_id"
    product_id: str = "product_id"
    image: str = "image"  # encoded bytes, or a path or URL
    title: str = "title"
    family_id: str = "family_id"  # else coarse, else the product itself
    coarse: str = "coarse"
    category: str = "category"  # else group
    group: str = "group"
    lang: str = "lang"
    role: str = "role"
    style: str = "style"
    id_split: str = "id_split"
    split: str = "split"
    mime: str = "mime"  # what the picture is said to be
    version: str = "version"  # a number or a time; of the records of one item the highest stays, else the last
    deleted: str = "deleted"  # true: the item goes

    def get(self, field: str) -> str:
        """The source's name of one of our fields."""
        return getattr(self, field)


RECORDS = pa.schema(
    [
        pa.field("source_file", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        *(pa.field(name, pa.string(), nullable=False) for name in TEXTS),  # "" for what is missing
        pa.field("mime", pa.string(), nullable=False),  # as declared: a MIME type or a file name's ending, lower case; "" where nothing is
        pa.field("deleted", pa.bool_(), nullable=False),
        pa.field("image", pa.large_binary()),  # as it came; null for none
        pa.field("image_ref", pa.string()),  # the path or URL that it came from
        pa.field("fault", pa.string(), nullable=False),  # reason code of a reject, where reading or fetching found one; else ""
        pa.field("fault_message", pa.string(), nullable=False),
        pa.field("original", pa.large_binary()),  # of a record that could not be read: its bytes
    ]
)


def records_schema(attributes: pa.DataType | None = None) -> pa.Schema:
    """RECORDS, with the columns kept for filters as one struct where there are any."""
    return RECORDS.append(pa.field(schema.ATTRIBUTES, attributes)) if attributes is not None else RECORDS


def settle(told: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """One answer from what the records of a product say of SETTLED, in their order: the first that is given, but training gives way."""
    given = {field: [value for value in values if value] for field, values in zip(SETTLED, zip(*told, strict=True), strict=True)}
    # A product that is trained on and then judged as unseen would flatter the figures; one that is left out costs little.
    given["id_split"].sort(key=lambda split: (split != "dev_unseen", split == "train"))
    return {field: values[0] if values else "" for field, values in given.items()}


def family_and_split(product_id: str, told: Mapping[str, str], unseen_fraction: float) -> tuple[str, str]:
    """family_id and id_split of a product from what was told of SETTLED ("" for nothing)."""
    family = told["family_id"] or told["coarse"] or product_id
    # Whole families are dealt: a sibling in training would make an "unseen" product familiar.
    unseen = folds.uniform(family, "unseen") < unseen_fraction
    return family, told["id_split"] or ("dev_unseen" if unseen else "train")
