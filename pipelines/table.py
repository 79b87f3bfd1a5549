"""The Lance tables of the items and the rejects: made once, then changed by compare-and-swap.

Every version is complete. What a run adds, replaces and removes becomes visible in one commit, which also notes the run in
the schema's metadata: so a run that is started again sees that it is done, and a roll-back forgets the runs it takes back.
Why not `merge_insert` or an Append: docs/decisions/0004-one-commit-a-run.md.
"""

import hashlib
import json
import random
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import lance
import pyarrow as pa
import pyarrow.fs
from lance.commit import CommitConflictError
from lance.fragment import FragmentMetadata
from lance.schema import LanceSchema

from idem import storage
from idem.schema import ATTRIBUTES

T = TypeVar("T")

ITEMS = "items.lance"
REJECTS = "rejects.lance"
IDS_A_QUERY = 2000
ID_KEY = "idem.id"  # what the rows are: changes with every run, delete and roll-back, not with compaction
RUNS_KEY = "idem.runs"  # JSON: the runs that made them, oldest first, each with the note that it was committed by


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one run does to a table, planned against one version of it: fragments that are new, and those with rows taken out.

    Fragments are Lance's JSON.
    """

    added: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()


def sql_list(values: Iterable[object]) -> str:
    """Values for `column IN (...)` of a filter."""
    return ", ".join("'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value) for value in values)


def open_table(uri: str, version: int | None = None) -> lance.LanceDataset:
    """ValueError or OSError (as Lance has it) where there is no such table or version."""
    return lance.dataset(uri, version=version, storage_options=storage.lance_options(uri))


def exists(uri: str) -> bool:
    """Whether a version was ever committed at `uri`."""
    filesystem, path = storage.open_filesystem(storage.join(uri, "_versions"))
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    return any(info.extension == "manifest" for info in found)


def may_pass(error: Exception) -> bool:
    """Whether a commit that Lance refused may go through when tried again: another one was faster, or no answer came.

    Some of Lance's operations say so in words only. A commit without an answer may have been made: look before trying again.
    """
    return isinstance(error, CommitConflictError) or "commit conflict" in str(error) or storage.no_answer(error)


def insist(step: Callable[[], T], attempts: int = 6) -> T:
    """Do what may be repeated until it goes through; the last error where it does not."""
    for attempt in range(attempts):
        try:
            return step()
        except OSError as error:
            if not may_pass(error) or attempt == attempts - 1:
                raise
            time.sleep(random.uniform(0.5, 1) * 0.1 * 2**attempt)
    raise AssertionError


def create(uri: str, schema: pa.Schema) -> lance.LanceDataset:
    """The table at `uri`, made without rows where there is none. ValueError where it holds other columns."""

    def make() -> None:
        if not exists(uri):
            try:
                lance.write_dataset(schema.empty_table(), uri, mode="create", storage_options=storage.lance_options(uri))
            except OSError:
                if not exists(uri):  # else another writer was first, which is as good
                    raise

    insist(make)
    found = open_table(uri)
    if not found.schema.remove_metadata().equals(schema):
        differ = sorted({f.name for f in set(found.schema) ^ set(schema)})
        raise ValueError(
            f"the table {uri} holds other columns than this run gives: they differ in {', '.join(differ)}. It keeps the attributes of its "
            f"first run (ingest.attributes), and tables of an earlier version of Idem must be made anew (another root; make demo FRESH=1)"
        )
    return found


def kept_type(uri: str) -> pa.DataType | None:
    """The struct that the table at `uri` keeps columns for filters in; None where it keeps none, or is not there."""
    known = open_table(uri).schema if exists(uri) else pa.schema([])
    return known.field(ATTRIBUTES).type if ATTRIBUTES in known.names else None


def runs_of(table: lance.LanceDataset) -> tuple[str, ...]:
    """The runs whose records the rows of this version are, oldest first."""
    return tuple(notes_of(table))


def notes_of(table: lance.LanceDataset) -> dict[str, str]:
    """Run -> the note that its commit names, which says what else that run has to do."""
    return json.loads((table.schema.metadata or {}).get(RUNS_KEY.encode(), b"{}"))


def id_of(table: lance.LanceDataset) -> str | None:
    """None for a table that nothing was published in yet."""
    found = (table.schema.metadata or {}).get(ID_KEY.encode())
    return found.decode() if found else None


def apply(fragments: Sequence[FragmentMetadata], change: Change, fresh: int) -> list[FragmentMetadata]:
    """The fragments of the next version: those that stay in their place, new ones behind them with ids from `fresh` on."""
    updated = {f.id: f for f in map(FragmentMetadata.from_json, change.updated)}
    kept = [updated.get(f.id, f) for f in fragments]
    added = [FragmentMetadata.from_json(text) for text in change.added]
    for number, fragment in enumerate(added):
        fragment.id = fresh + number
    return kept + added


def without(uri: str, fragment: lance.LanceFragment, rows: Sequence[int], version: int) -> str:
    """The fragment (Lance's JSON) without those rows, by a deletion file that nobody sees before a commit.

    Lance's own delete names no fragment where no row is left, and Merge wants all of them back: then the file, in Lance's
    format of deletion files, is ours. The commit drops such a fragment.
    """
    addresses = ", ".join(str(fragment.fragment_id << 32 | row) for row in sorted(rows))
    if left := fragment.delete(f"_rowaddr IN ({addresses})"):
        return json.dumps(left.to_json())
    number, count = secrets.randbits(62), fragment.physical_rows
    everything = pa.table(
        {"row_id": pa.array(range(count), pa.uint32())}, schema=pa.schema([pa.field("row_id", pa.uint32(), nullable=False)])
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, everything.schema) as writer:
        writer.write_table(everything)
    name = f"{fragment.fragment_id}-{version}-{number}.arrow"
    storage.write_bytes(storage.join(uri, "_deletions", name), sink.getvalue().to_pybytes())
    told = {"read_version": version, "id": number, "file_type": "array", "num_deleted_rows": count, "base_id": None}
    return json.dumps({**fragment.metadata.to_json(), "deletion_file": told})


def _fresh_id(table: lance.LanceDataset) -> int:
    """An id that no fragment has, nor any that is gone but that an index still says it covers."""
    covered = [i for index in table.describe_indices() for segment in index.segments for i in segment.fragment_ids]
    return max([*(f.fragment_id for f in table.get_fragments()), *covered], default=-1) + 1


def swap(table: lance.LanceDataset, change: Change, run: str, note: str = "") -> lance.LanceDataset | None:
    """Commit `change` on top of just this version of `table`; None where another commit that touched rows was faster, or no
    answer came: then the newest version tells whether the run is in it.

    The operation is Merge, which alone conflicts with every commit that adds, removes or moves rows, so that what was
    planned from this version's ids is still true when it becomes visible.
    """
    if run in runs_of(table):
        return table
    runs = {**notes_of(table), run: note}
    told = {ID_KEY: hashlib.sha256(f"{id_of(table)}/{run}".encode()).hexdigest()[:16], RUNS_KEY: json.dumps(runs)}
    schema = LanceSchema.from_pyarrow(table.lance_schema.to_pyarrow().with_metadata(told))
    fragments = apply([fragment.metadata for fragment in table.get_fragments()], change, _fresh_id(table))
    operation = lance.LanceOperation.Merge(fragments, schema)
    transaction = lance.Transaction(table.version, operation, transaction_properties={"idem.run": run})
    try:
        return lance.LanceDataset.commit(table, transaction, max_retries=0, storage_options=storage.lance_options(table.uri))
    except OSError as error:
        if not may_pass(error):
            raise
        return None


def orphans(table: lance.LanceDataset, keep: Iterable[str], written_before: float) -> list[str]:
    """Paths (below the table) of data and deletion files that no version names, that are not in `keep`, and that are older.

    What is younger may belong to a writer at work. Times are seconds since 1970, by the clock of the store.
    """
    tracked = {path for batch in table.tracked_files() for path in batch.column("path").to_pylist()} | set(keep)
    found = []
    for batch in table.all_files():
        for path, modified in zip(batch.column("path").to_pylist(), batch.column("last_modified").to_pylist(), strict=True):
            if path.startswith(("data/", "_deletions/")) and path not in tracked and modified.timestamp() < written_before:
                found.append(path)
    return found


def files_of(fragments: Iterable[str]) -> set[str]:
    """Paths below the table of the data files of fragments (Lance's JSON)."""
    return {f"data/{file.path}" for text in fragments for file in FragmentMetadata.from_json(text).files}
