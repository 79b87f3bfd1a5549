"""A run file: one complete TOML, one table a stage, `root` above them. Unknown keys and tables are errors."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

TABLES = ("catalog", "ingest", "replay", "upkeep", "train", "index", "candidates", "rerank", "release", "serve", "evaluate")


class Table(BaseModel):
    """One table of a run file, plus the root of the run. Subclasses add typed fields with defaults where one is sensible."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    root: str

    def settings(self) -> dict[str, Any]:
        """What goes into a manifest: everything but the place on disk, so that a run may be moved."""
        return self.model_dump(exclude={"root"})


T = TypeVar("T", bound=Table)


def _override(tables: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"--set takes table.key=value or root=value, found {assignment!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set ingest.source=photos.parquet
    *path, last = key.split(".")
    table = tables
    for name in path:
        table = table.setdefault(name, {})
    table[last] = value


def load(path: str, table: str, model: type[T], overrides: Sequence[str] = ()) -> T:
    """Read one table of the run file at `path` into `model`, after applying `table.key=value` overrides.

    ValueError says which key or table is unknown, or which value is wrong, and what is allowed.
    """
    try:
        tables = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"cannot read the run file {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"the run file {path} is not valid TOML: {error}") from error
    for assignment in overrides:
        _override(tables, assignment)
    if unknown := sorted(set(tables) - {"root", *TABLES}):
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; allowed are root and the tables {', '.join(TABLES)}")
    if "root" not in tables:
        raise ValueError(f"{path}: root is missing (the folder or URI under which the run keeps its artifacts)")
    try:
        return model(root=tables["root"], **tables.get(table, {}))
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r})" for e in error.errors())
        allowed = ", ".join(name for name in model.model_fields if name != "root")
        raise ValueError(f"{path}, table [{table}]: {said}. Allowed keys: {allowed}") from error
