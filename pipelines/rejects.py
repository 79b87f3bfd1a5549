"""The rejects that are still open: set aside by a run of the items, and since then neither read again nor replayed. No Ray.

The table of rejects only grows. Which of its rows count follows from the runs that the items name, so that a roll-back of the
items rolls their rejects back too.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lance
import pyarrow as pa

from idem import storage
from pipelines import runs as folders
from pipelines import table

REPLAYED = "replayed"  # the reason of a row that closes another: `record` names the run of that one
LIGHT = ("source_file", "source_row", "item_id", "reason", "message", "run")


@dataclass(frozen=True)
class Rejects:
    """The open rejects (rows of idem.schema.REJECTS) beside one version of the items."""

    dataset: lance.LanceDataset
    addresses: list[int]
    light: pa.Table  # LIGHT of each, in the same order

    def batches(self, rows: Sequence[int], size: int = 128) -> Iterator[pa.Table]:
        """All columns of the open rejects at these places, in their order, some at a time."""
        for start in range(0, len(rows), size):
            wanted = [self.addresses[row] for row in rows[start : start + size]]
            found = self.dataset.scanner(filter=f"_rowaddr IN ({table.sql_list(wanted)})", with_row_address=True).to_table()
            yield found.sort_by("_rowaddr").drop_columns(["_rowaddr"])


def _read_again(items: str, applied: Sequence[str]) -> dict[str, set[str]]:
    """For each run, the names of its source files that a later run of the same source read again."""
    files = {run: folders.files_of(items, run) for run in applied}
    later: dict[str, set[str]] = {}
    result: dict[str, set[str]] = {}
    for run in reversed(applied):
        if found := files[run]:
            seen = later.setdefault(found.source, set())
            result[run] = set(seen)
            seen |= set(found.files.values())
    return result


def _replayed(dataset: lance.LanceDataset, mine: str) -> set[tuple[str, str, int]]:
    """Run, source file and row of the rejects that a later run took up again."""
    found = dataset.to_table(columns=["source_file", "source_row", "record"], filter=f"reason = '{REPLAYED}' AND {mine}").to_pylist()
    return {(json.loads(row["record"])["run"], row["source_file"], row["source_row"]) for row in found}


def _is_open(row: dict[str, Any], replayed: set[tuple[str, str, int]], again: Mapping[str, set[str]]) -> bool:
    taken_up = (row["run"], row["source_file"], row["source_row"]) in replayed
    return not taken_up and row["source_file"] not in again.get(row["run"], ())


def open_rejects(items: str, reasons: Collection[str] = (), runs: Collection[str] | None = None) -> Rejects:
    """The open rejects of the newest items at `items` (Layout.items); of these reasons and these runs alone, where some are given.

    Holds what LIGHT names of each in memory. ValueError where nothing was published yet.
    """
    uri = storage.join(items, table.REJECTS)
    if not table.exists(uri) or not table.exists(storage.join(items, table.ITEMS)):
        raise ValueError(f"no rejects at {items}: nothing was ingested there yet")
    applied = table.runs_of(table.open_table(storage.join(items, table.ITEMS)))
    dataset = table.open_table(uri)
    asked = [run for run in applied if runs is None or run in runs]
    mine = f"run IN ({table.sql_list(asked)})" if asked else "false"
    wanted = f"{mine} AND reason <> '{REPLAYED}'"
    found = dataset.scanner(columns=list(LIGHT), filter=wanted, with_row_address=True, scan_in_order=True).to_table()
    light, replayed, again = found.select(list(LIGHT)), _replayed(dataset, mine), _read_again(items, applied)
    chosen = [
        place for place, row in enumerate(light.to_pylist()) if _is_open(row, replayed, again) and (not reasons or row["reason"] in reasons)
    ]
    addresses = found.column("_rowaddr").to_pylist()
    return Rejects(dataset=dataset, addresses=[addresses[place] for place in chosen], light=light.take(pa.array(chosen, pa.int64())))
