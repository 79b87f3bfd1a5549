"""Put rejects through again: repaired ones, or all that a changed limit allows now. Those that pass become items, the others stay.

`[ingest]` of the run file says how, as for the ingest itself, and of which source; `[replay]` says which of its rejects.
"""

import argparse
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from idem import config, job, manifest, schema, storage
from pipelines import ingest, publish, rejects, replayed, runs, table
from pipelines.reading.sources import Reading, SourcePlan
from pipelines.records import TEXTS

log = logging.getLogger("replay")
FIELDS = (*TEXTS, "mime", "deleted", "image", "image_ref", schema.ATTRIBUTES)
DECIDED = ("duplicate_id", "superseded")  # they lost to another record, and would win now as the last to come
UNIT_ROWS = 512
READERS = {"parquet": pq.read_table, "jsonl": pyarrow.json.read_json, "csv": pyarrow.csv.read_csv}


class ReplayConfig(config.Table):
    """reasons: of the rejects to put through again, whatever became of them before; empty takes those that may turn out
    otherwise now: repaired, or set aside under other settings. repaired: a parquet, jsonl or csv file with source_file,
    source_row and the fields that are to be changed.
    """

    reasons: tuple[str, ...] = ()
    repaired: str = ""


def _read_repairs(uri: str) -> replayed.Repairs:
    if not uri:
        return {}
    ending = uri.rsplit(".", 1)[-1].lower()
    if ending not in READERS:
        raise ValueError(f"repairs are read from {', '.join(READERS)}; found {uri}")
    rows = READERS[ending](pa.BufferReader(storage.read_bytes(uri))).to_pylist()
    return replayed.load_repairs(rows, FIELDS)


def choose(
    light: Sequence[Mapping[str, Any]],
    repairs: replayed.Repairs,
    reasons: Sequence[str],
    settings_of: Mapping[str, str],
    now: str,
    newer: Collection[int] = (),
) -> list[int]:
    """Places of the open rejects to put through again. settings_of: by run, what it was read with; `now`: what is asked for.

    newer: places of those whose item a later run brought: yesterday's record must not go over today's, unless it was mended.
    """
    chosen = []
    for place, row in enumerate(light):
        mended = (row["source_file"], row["source_row"]) in repairs
        otherwise = row["reason"] not in (*DECIDED, *replayed.RAW) and settings_of.get(row["run"]) != now and place not in newer
        if mended or row["reason"] in reasons or (not reasons and otherwise):
            chosen.append(place)
    return chosen


def _newer(light: Sequence[Mapping[str, Any]], uri: str) -> set[int]:
    """Places of the rejects whose item the table holds from a later run than theirs."""
    items = table.open_table(uri)
    order = {run: place for place, run in enumerate(table.runs_of(items))}
    found: set[int] = set()
    for start in range(0, len(light), table.IDS_A_QUERY):
        some = {place: light[place] for place in range(start, min(start + table.IDS_A_QUERY, len(light))) if light[place]["item_id"]}
        if some:
            ids = table.sql_list(row["item_id"] for row in some.values())
            held = items.to_table(columns=["item_id", "run"], filter=f"item_id IN ({ids})").to_pylist()
            run_of = {row["item_id"]: order.get(row["run"], -1) for row in held}
            found |= {place for place, row in some.items() if run_of.get(row["item_id"], -1) > order.get(row["run"], -1)}
    return found


def _closing(light: Sequence[Mapping[str, Any]], run: str) -> pa.Table:
    """Rows for the table of rejects which say that these were taken up by `run`."""
    rows = [
        {
            **{name: row[name] for name in ("source_file", "source_row", "item_id")},
            "reason": rejects.REPLAYED,
            "message": f"put through again by the run {run}",
            "original": None,
            "record": f'{{"run": "{row["run"]}"}}',
            "run": run,
        }
        for row in light
    ]
    return pa.Table.from_pylist(rows, schema=schema.REJECTS)


def _unknown(light: Sequence[Mapping[str, Any]], repairs: replayed.Repairs) -> None:
    if unknown := sorted(set(repairs) - {(row["source_file"], row["source_row"]) for row in light}):
        told = ", ".join(f"{file} row {row}" for file, row in unknown[:5])
        raise ValueError(f"{len(unknown)} repairs are for records that are not among the {len(light):,} open rejects: {told}")


def run(settings: ReplayConfig, how: ingest.IngestConfig) -> dict[str, Any]:
    """Replay; returns the figures of the run. ValueError for repairs that fit no open reject."""
    items = storage.Layout(settings.root).items
    applied = publish.finish_all(items)
    source = ingest.source_of(how)
    files = {run: found for run in applied if (found := runs.files_of(items, run)) and found.source == source}
    opened = rejects.open_rejects(items, runs=files)
    light = opened.light.to_pylist()
    repairs = _read_repairs(settings.repaired)
    _unknown(light, repairs)
    settings_of = {run: found.settings for run, found in files.items()}
    newer = _newer(light, storage.join(items, table.ITEMS))
    chosen = choose(light, repairs, settings.reasons, settings_of, how.identity(), newer)
    if not chosen:
        log.info(
            "none of the %d open rejects of %s would turn out otherwise: change a limit, repair some, or name reasons", len(light), source
        )
        return {"replayed": 0, "open": len(light), "skipped": True}
    keys = [[light[place][name] for name in ("run", "source_file", "source_row")] for place in chosen]
    wanted = manifest.fingerprint("replay", {"settings": how.identity()}, {"rejects": repr(keys), "repairs": repr(sorted(repairs.items()))})
    number = runs.name_of(items, wanted, applied)
    kept = table.kept_type(storage.join(items, table.ITEMS))
    images = how.image_folder or files[light[chosen[0]]["run"]].images
    units = replayed.write_units(runs.folder_of(items, number), opened.batches(chosen, UNIT_ROWS), repairs, kept)
    reading = Reading(columns=how.columns, attributes=(), kept=kept, images=images)
    plan = SourcePlan(uri=f"rejects of {items}", reading=reading, files=(), units=tuple(units), not_read=())
    taken = runs.Files(settings=how.identity(), source=source, files={}, images=images, config=how.settings())
    free = how.model_copy(update={"max_reject_fraction": 1.0})  # they were counted once
    figures = ingest.ingest(free, plan, number, taken, closing=_closing([light[place] for place in chosen], number))
    left = len(rejects.open_rejects(items, runs=[*files, number]).addresses)
    return {**figures, "replayed": len(chosen), "open": left}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.replay", description=__doc__)
    parser.add_argument("run", help="run file (TOML)")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="change one setting of the run file")
    told = parser.parse_args(argv)

    def both() -> dict[str, Any]:
        how = config.load(told.run, "ingest", ingest.IngestConfig, told.set)
        return run(config.load(told.run, "replay", ReplayConfig, told.set), how)

    return job.guarded("pipelines.replay", both)


if __name__ == "__main__":
    sys.exit(main())
