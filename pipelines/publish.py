"""From staged units to one new version of the items: decide, revise, commit, finish. Wiring, through pipelines.workers.

1. Verdicts and revised fragments, planned against one version of the items; nobody sees them.
2. A note of all that will be left to do (runs.note_commit); the commit names it.
3. The items are swapped, and the run is done, whoever finishes it. If another writer was faster, again from 1.
4. `finish`: rejects, indices, report, manifest; each may be repeated, so a run that was killed here is finished by the next.
"""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lance

from idem import manifest, schema, storage
from pipelines import examples, report, report_page, runs, table
from pipelines.revise import Places, Revised, revise_fragment, revise_unit
from pipelines.stage import Staged, Staging
from pipelines.verdicts import FAMILIES, Outcome, Work, resolve_bucket
from pipelines.workers import each

log = logging.getLogger("ingest")
ATTEMPTS = 20  # other writers may be faster so often
RECENT = 100  # runs that are looked at for being unfinished
INDEXED = ("item_id", "product_id", "content_hash", "phash")  # what a later run looks up


Check = Callable[[Mapping[str, Any], Sequence[str]], None]  # of the figures, and the fragments of the rejects


@dataclass(frozen=True, kw_only=True)
class Job:
    """A staged run. units: in the order of the plan; check: raises where the figures forbid to publish; hold: its lease;
    closing: fragments of rows for the rejects that say which of them are taken up by this run.
    """

    staging: Staging
    units: Sequence[Staged]
    near_distance: int
    figures: Mapping[str, Any]
    check: Check
    hold: runs.Hold
    closing: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Decided:
    units: dict[int, Revised]
    fragments: list[Revised]
    counts: Counter[str]


def _call(function: Callable[..., Any], **shared: Any) -> Callable[[str], str]:
    """`function`, which takes and gives values that JSON can hold, as pipelines.workers.each wants it."""

    def called(piece: str) -> str:
        return json.dumps(asdict(function(*json.loads(piece), **shared)))

    return called


def _unit(staged: dict[str, Any], places: Places, *, staging: Staging) -> Revised:
    return revise_unit(Staged(**staged), places, staging)


def _resolve(job: Job, version: int) -> tuple[dict[str, Places], Counter[str]]:
    """Where the verdicts on each target are, and what was counted."""
    staging = job.staging
    rows = sum(unit.rows for unit in job.units)
    work = Work(
        folder=staging.folder,
        items=staging.items,
        version=version,
        units=tuple((unit.key, unit.name) for unit in job.units),
        unseen_fraction=staging.limits.unseen_fraction,
        near_distance=job.near_distance,
        family_share=min(1.0, FAMILIES / max(rows, 1)),
    )
    places: dict[str, Places] = defaultdict(list)
    counts: Counter[str] = Counter()
    families: dict[int, set[str]] = defaultdict(set)
    buckets = [json.dumps([bucket]) for bucket in range(staging.buckets)]
    for _, answer in sorted(each(_call(resolve_bucket, work=work), buckets)):
        outcome = Outcome(**json.loads(answer))
        for target, number in outcome.targets.items():
            places[target] = [*places[target], (outcome.uri, number)]
        counts.update(outcome.counts)
        for family, split in outcome.families:
            families[family].add(split)
    counts["families"] = round(len(families) / work.family_share)
    counts["families_in_both_splits"] = round(sum({"train", "dev_unseen"} <= s for s in families.values()) / work.family_share)
    return places, counts


def _decide(job: Job, version: int) -> Decided:
    places, counts = _resolve(job, version)
    of_units = {int(target.removeprefix("unit/")): found for target, found in places.items() if target.startswith("unit/")}
    of_fragments = {int(target.removeprefix("fragment/")): found for target, found in places.items() if target.startswith("fragment/")}
    numbers = sorted(of_units)
    pieces = [json.dumps([job.units[number].model_dump(), of_units[number]]) for number in numbers]
    units = {numbers[place]: Revised(**json.loads(a)) for place, a in each(_call(_unit, staging=job.staging), pieces)}
    pieces = [json.dumps([number, found]) for number, found in sorted(of_fragments.items())]
    shared = {"items": job.staging.items, "version": version}
    fragments = [Revised(**json.loads(answer)) for _, answer in sorted(each(_call(revise_fragment, **shared), pieces))]
    for revised in units.values():
        counts.update(revised.counts)
    if units or fragments:
        log.info("%d of %d units were written again, and rows of %d fragments replaced", len(units), len(job.units), len(fragments))
    return Decided(units=units, fragments=fragments, counts=counts)


def _rows(fragments: Sequence[str]) -> int:
    return sum(json.loads(text)["physical_rows"] for text in fragments)


def _figures(job: Job, decided: Decided) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    for number, unit in enumerate(job.units):
        reasons.update(unit.rejected)
        reasons.update(decided.units[number].rejected if number in decided.units else {})
    committed = sum(_rows(_fragments_of(job, decided, number)) for number in range(len(job.units)))
    figures = {
        **job.figures,
        "committed": committed,
        "duplicates": 0,
        "near_duplicates": 0,
        **decided.counts,
        "deleted": sum(unit.deleted for unit in job.units),
        "rejected": sum(reasons.values()),
        "by_reason": dict(sorted(reasons.items())),
    }
    found = committed + figures["unchanged"] + figures["rejected"] + figures["deleted"]
    assert found == figures["rows"], figures  # the books must balance
    return figures


def _fragments_of(job: Job, decided: Decided, number: int) -> Sequence[str]:
    return decided.units[number].added if number in decided.units else job.units[number].item_fragments


def _decide_at(job: Job, version: int) -> Decided | None:
    """None where a clean-up removed the version meanwhile: then there is a newer one to decide by."""
    try:
        return _decide(job, version)
    except (ValueError, OSError):
        if version in {known["version"] for known in table.open_table(job.staging.items).versions()}:
            raise
        return None


def commit(job: Job) -> None:
    """Make the run part of the items, once. What `job.check` raises stops it with nothing published."""
    staging = job.staging
    for _ in range(ATTEMPTS):
        items = table.open_table(staging.items)
        if staging.run in table.runs_of(items):
            return  # a twin of ours was faster
        decided = _decide_at(job, items.version)
        if decided is None:
            continue
        figures = _figures(job, decided)
        rejects = [text for unit in job.units for text in unit.reject_fragments]
        rejects += [text for _, revised in sorted(decided.units.items()) for text in revised.rejects]
        job.check(figures, rejects)
        added = [text for number in range(len(job.units)) for text in _fragments_of(job, decided, number)]
        added += [text for revised in decided.fragments for text in revised.added]
        change = table.Change(
            added=tuple(added),
            updated=tuple(text for revised in decided.fragments for text in revised.updated),
        )
        replaced = sorted(path for number in decided.units for path in table.files_of(job.units[number].item_fragments))
        told = {"figures": figures, "sources": sources(job.units), "rejects": [*rejects, *job.closing], "replaced": replaced}
        note = runs.note_commit(staging.folder, runs.Commit(**told))
        job.hold.check()
        if table.swap(items, change, staging.run, note) is not None:  # a dataset without rows counts as false
            return
        log.info("the commit did not go through (another writer was faster, or no answer came): decided and tried again")
    raise ValueError(f"{staging.items}: other writers were faster {ATTEMPTS} times; run this again when fewer are at work")


def sources(units: Sequence[Staged]) -> list[dict[str, Any]]:
    """Rows, bytes and worker seconds of each source file."""
    found: dict[str, dict[str, Any]] = {}
    for unit in units:
        told = found.setdefault(unit.name, {"name": unit.name, "rows": 0, "bytes": 0, "seconds": 0.0})
        told["rows"] += unit.rows
        told["bytes"] += unit.bytes_read
        told["seconds"] = round(told["seconds"] + unit.seconds, 3)
    return list(found.values())


def index(uri: str) -> lance.LanceDataset:
    """Bring the indices of the items up to their newest version; a later run's look-ups scan what they do not cover."""

    def once() -> None:
        items = table.open_table(uri)
        missing = set(INDEXED) - {name for index in items.describe_indices() for name in index.field_names}
        for column in sorted(missing):
            items.create_scalar_index(column, "BTREE", replace=True)
        if len(missing) < len(INDEXED):
            items.optimize.optimize_indices()

    table.insist(once)
    return table.open_table(uri)


def _add_rejects(uri: str, fragments: Sequence[str], run: str) -> None:
    for _ in range(ATTEMPTS):  # another writer may be faster; adding rows never goes stale
        if table.swap(table.create(uri, schema.REJECTS), table.Change(added=tuple(fragments)), run) is not None:
            return
    raise ValueError(f"{uri}: other writers were faster {ATTEMPTS} times; run this again when fewer are at work")


def note_of(items_folder: str, run: str) -> runs.Commit | None:
    """What a run that the items name as theirs had to do at its commit; None where that is not known any more."""
    notes = table.notes_of(table.open_table(storage.join(items_folder, table.ITEMS)))
    return runs.commit_of(runs.folder_of(items_folder, run), notes.get(run, ""))


def finish(items_folder: str, run: str, rates: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _: {}) -> dict[str, Any]:
    """Do what is left of a run that the items name as theirs; its figures, with what `rates` makes of them.

    Safe to repeat, and to be killed in.
    """
    folder = runs.folder_of(items_folder, run)
    noted = note_of(items_folder, run)
    if noted is None:
        raise ValueError(f"{folder} has lost its notes: the run {run} is in the items, but its rejects and report are not known")
    rejects_uri, items_uri = storage.join(items_folder, table.REJECTS), storage.join(items_folder, table.ITEMS)
    _add_rejects(rejects_uri, noted.rejects, run)
    for path in noted.replaced:
        storage.remove(storage.join(items_uri, path))
    items = index(items_uri)
    figures = {**noted.figures, **rates(noted.figures), "version": items.version, "items": items.count_rows()}
    save_report(folder, figures, noted.sources, rejects_uri, noted.rejects)
    files = runs.files_of(items_folder, run)
    assert files, folder
    manifest.write(folder, kind="ingest", config=files.config, inputs={"run": run}, figures=figures)
    if table.runs_of(items)[-1] == run:  # else one that came after this has said more
        manifest.write(items_folder, kind="items", config=files.config, inputs={"run": run}, figures=figures)
    runs.clear(folder)
    return figures


def finish_all(items: str) -> tuple[str, ...]:
    """Finish the runs that were killed after their commit; all runs that the items name as theirs."""
    uri = storage.join(items, table.ITEMS)
    applied = table.runs_of(table.open_table(uri)) if table.exists(uri) else ()
    for run in applied[-RECENT:]:
        folder = runs.folder_of(items, run)
        if not runs.finished(folder) and note_of(items, run) and not runs.at_work(folder):
            log.info("finishing the run %s, which was stopped after its commit", run)
            with runs.held(folder):
                finish(items, run)
    return applied


def save_report(folder: str, figures: Mapping[str, Any], times: Sequence[Mapping[str, Any]], rejects: str, fragments: Sequence[str]) -> str:
    """Write report.html; returns where."""
    shown = examples.read(rejects, fragments, figures.get("by_reason", {}))
    page = report_page.page(figures, [report.SourceTime(**source) for source in times], shown)
    uri = storage.join(folder, "report.html")
    storage.write_bytes(uri, page.encode())
    return uri
