"""Keep the items quick and small: compact fragments, bring indices up to date, remove old versions; or tag one, or roll back.

Every step leaves a version that can be read, and may run beside an ingest: whoever commits second takes the other into account.
"""

import logging
import sys
from datetime import timedelta
from typing import Any

import lance_ray
from pydantic import Field

from idem import cluster, config, job, storage
from pipelines import publish, runs, table

log = logging.getLogger("upkeep")
UNVERIFIED_S = 6 * 86400.0  # Lance takes files that no version names for leftovers after seven days


class UpkeepConfig(config.Table):
    """compact: merge fragments below rows_per_fragment, and write those anew of which much is gone. index: cover new rows.

    keep_days: remove versions older than that, but none that is tagged (releases tag what they bind); -1 removes none.
    tag: name for the newest version, taken from an earlier one that has it. rollback_to: make that version the newest again,
    and do nothing else; 0 for none.
    """

    compact: bool = True
    rows_per_fragment: int = Field(100_000, ge=1)
    index: bool = True
    keep_days: float = Field(-1, ge=-1)
    tag: str = ""
    rollback_to: int = Field(0, ge=0)
    workers: int = Field(2, ge=1)


def _compact(uri: str, settings: UpkeepConfig) -> dict[str, int]:
    """Fragments before and after. Another writer may move rows first: then what it left is compacted."""
    before = len(table.open_table(uri).get_fragments())
    options: Any = {"target_rows_per_fragment": settings.rows_per_fragment, "num_threads": 1}

    def once() -> None:
        lance_ray.compact_files(uri, compaction_options=options, num_workers=settings.workers, storage_options=storage.lance_options(uri))

    table.insist(once)
    return {"fragments_before": before, "fragments": len(table.open_table(uri).get_fragments())}


def _clean(uri: str, days: float, longest_s: float) -> dict[str, int]:
    if longest_s > UNVERIFIED_S:
        raise ValueError(
            f"an ingest has been at work for {longest_s / 86400:.1f} days: its files would be taken for leftovers; wait for it"
        )
    stats = table.open_table(uri).cleanup_old_versions(timedelta(days=days), error_if_tagged_old_versions=False)
    return {"versions_removed": stats.old_versions, "bytes_removed": stats.bytes_removed}


def rollback(uri: str, version: int) -> dict[str, Any]:
    """Make `version` the newest again. ValueError where it is not there, or never held items."""
    newest = table.open_table(uri)
    known = [one["version"] for one in newest.versions()]
    if version not in known:
        raise ValueError(f"version {version} is not there to roll back to; there are {', '.join(map(str, known[-20:]))}")
    old = table.open_table(uri, version)
    if not table.id_of(old):
        raise ValueError(f"version {version} holds no items yet")
    old.restore()
    now = table.open_table(uri)
    return {"version": now.version, "rolled_back_to": version, "rows": now.count_rows(), "runs": list(table.runs_of(now))}


def run(settings: UpkeepConfig) -> dict[str, Any]:
    """The figures of what was done. ValueError where there are no items."""
    items = storage.Layout(settings.root).items
    uri = storage.join(items, table.ITEMS)
    if not table.exists(uri):
        raise ValueError(f"no items at {items}: nothing was ingested there yet")
    publish.finish_all(items)
    with runs.held(runs.folder_of(items, "upkeep")):  # so that no sweep takes what compaction writes for leftovers
        if settings.rollback_to:
            return rollback(uri, settings.rollback_to)
        figures: dict[str, Any] = {"swept": runs.sweep(items)}
        if settings.compact:
            cluster.connect()
            figures |= _compact(uri, settings)
            _compact(storage.join(items, table.REJECTS), settings)
        if settings.index:
            publish.index(uri)
        newest = table.open_table(uri)
        if settings.tag:
            (newest.tags.update if settings.tag in newest.tags.list() else newest.tags.create)(settings.tag, newest.version)
        if settings.keep_days >= 0:
            longest = runs.longest(items)
            figures |= _clean(uri, settings.keep_days, longest)
            _clean(storage.join(items, table.REJECTS), settings.keep_days, longest)
        return {**figures, "version": newest.version, "rows": newest.count_rows()}


if __name__ == "__main__":
    sys.exit(job.main("pipelines.upkeep", "upkeep", UpkeepConfig, run))
