"""The plan of a source: its files, the units of work in them, and what a worker needs to read a unit."""

from dataclasses import dataclass

import pyarrow as pa

from pipelines.records import Columns

PICTURES = ("jpg", "jpeg", "png", "webp", "gif")
ENDINGS = {
    "parquet": ("parquet",),
    "jsonl": ("jsonl", "ndjson", "jsonl.gz", "ndjson.gz"),
    "csv": ("csv", "tsv", "csv.gz", "tsv.gz"),
    "webdataset": ("tar", "tar.gz", "tgz"),
    "arrow": ("arrow",),
}
FORMATS = (*ENDINGS, "lance")  # a Lance dataset is a folder of its own, told by its _versions
TABLES = ("parquet", "jsonl", "csv")  # of these, files may describe products
ALLOWED = "; ".join(f"{name}: {' '.join(f'.{ending}' for ending in endings)}" for name, endings in ENDINGS.items())
ALLOWED += "; lance: a folder with _versions"


def format_of(name: str) -> str:
    """The format that the ending of a file's name stands for; "" for none."""
    lower = name.lower()
    return next((kind for kind, endings in ENDINGS.items() if lower.endswith(tuple(f".{ending}" for ending in endings))), "")


def is_gzip(name: str) -> bool:
    return name.lower().endswith((".gz", ".tgz"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file of records. `rows` is 0 where only reading it all would tell; `fingerprint` (16 hexadecimal digits) changes with
    its name, size and time of change, and with those of the files that describe the products of its source."""

    uri: str
    name: str
    format: str
    bytes: int
    rows: int
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The unit of work: some rows of one file, from `first_row` on. `rows` is 0 where only reading tells.

    number: of the unit within its file; offset: of its first byte (jsonl, csv) or of its first row in the fragment (lance);
    groups: row groups (parquet) or the fragment (lance); version: of the dataset (lance); header: names of the columns (csv).
    """

    uri: str
    name: str
    format: str
    number: int
    first_row: int
    rows: int
    bytes: int
    offset: int = 0
    groups: tuple[int, ...] = ()
    version: int = 0
    header: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a worker needs besides the unit.

    attributes: URIs of the files that describe products; kept: struct of the columns kept for filters, None for none; images:
    where relative paths of pictures start.
    """

    columns: Columns
    attributes: tuple[str, ...]
    kept: pa.DataType | None
    images: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """files: all files of records that there are; units: of those to be read only, in order; not_read: names of files left alone."""

    uri: str
    reading: Reading
    files: tuple[SourceFile, ...]
    units: tuple[Unit, ...]
    not_read: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Of what is to be read, as far as it is known before."""
        return sum(unit.rows for unit in self.units)

    @property
    def bytes(self) -> int:
        """On disk, of the files to be read."""
        read = {unit.uri for unit in self.units}
        return sum(file.bytes for file in self.files if file.uri in read)
