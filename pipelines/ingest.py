"""Read a catalogue with Ray Data, check and normalise every record, and publish the items as one new Lance version.

Workers read, normalise and write fragments that no reader sees; the driver alone commits, once. So every record ends as one
item or one reject, a reader sees the old version or the new, and a run that was killed goes on where it was. Source files
that the items hold already are not read again: a finished run does nothing.
"""

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
from pydantic import Field
from tqdm import tqdm

from idem import cluster, config, images, job, manifest, schema, storage
from idem.memory import MemoryWatch
from pipelines import publish, report, runs, stage, table
from pipelines.keys import BANDS, bucket_count
from pipelines.normalize import Limits
from pipelines.reading.sources import SourcePlan, Unit, plan_source
from pipelines.records import Columns
from pipelines.workers import each

log = logging.getLogger("ingest")
MEMORY_EVERY_S = 10.0  # each look walks every mapping of every process
RECORD_BYTES = 20_000  # of a record, where only reading tells how many there are
HARMLESS = ("superseded",)  # reasons that say nothing against a source


class IngestConfig(config.Table):
    """source: file, folder or Lance dataset, local or s3://; "" is the shop that pipelines.catalog drew last. format: "" for
    what the files' names say. image_folder: what relative picture paths start from; "" is the folder of the source. attributes:
    columns kept for filters. near_distance: bits in which the perceptual hashes of near-duplicates differ at most; -1 does
    not look for them. unit_rows: records that are read, written and, after a crash, read again together.
    """

    source: str = ""
    format: str = ""
    image_folder: str = ""
    columns: Columns = Columns()
    attributes: tuple[str, ...] = ()
    max_side: int = Field(256, ge=16)
    max_pixels: int = Field(images.MAX_PIXELS, gt=0)
    max_bytes: int = Field(images.MAX_BYTES, gt=0)
    unseen_fraction: float = Field(0.2, ge=0, le=1)
    near_distance: int = Field(3, ge=-1, lt=BANDS)
    max_reject_fraction: float = Field(0.5, ge=0, le=1)
    unit_rows: int = Field(4096, ge=1)

    def identity(self) -> str:
        """A fingerprint of what decides how records turn out; not of what only decides whether, or how fast."""
        told = self.model_dump(exclude={"root", "max_reject_fraction", "unit_rows"})
        return manifest.fingerprint("ingest", told, {})

    def limits(self) -> Limits:
        told = ("max_side", "max_pixels", "max_bytes", "unseen_fraction")
        return Limits(**{name: getattr(self, name) for name in told})


def _staging(settings: IngestConfig, plan: SourcePlan, run: str) -> stage.Staging:
    items = storage.Layout(settings.root).items
    return stage.Staging(
        run=run,
        folder=runs.folder_of(items, run),
        items=storage.join(items, table.ITEMS),
        rejects=storage.join(items, table.REJECTS),
        reading=plan.reading,
        limits=settings.limits(),
        buckets=bucket_count(max(plan.rows, plan.bytes // RECORD_BYTES)),
        near=settings.near_distance >= 0,
    )


@dataclass(frozen=True)
class Budget:
    """How many records may be set aside: over it, nothing is published."""

    allowed: float
    source: str
    rows: int  # as far as they are known before
    first: bool  # nothing was published yet: then something must be

    def spent(self, reasons: Mapping[str, int], rows: int) -> int:
        """How many records were set aside against the source, if that is more than is allowed of `rows`; else 0."""
        count = sum(count for reason, count in reasons.items() if reason not in HARMLESS)
        return count if count > self.allowed * rows else 0

    def check(self, figures: Mapping[str, Any]) -> None:
        """ValueError where the figures of a run are over it, or nothing is left."""
        reasons, rows = figures["by_reason"], max(figures["rows"], self.rows)
        over = self.spent(reasons, rows)
        if not over and (not self.first or figures["committed"]):
            return
        told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        raise ValueError(
            f"{over or sum(reasons.values()):,} of {rows:,} records of {self.source} cannot be used ({told}); at most "
            f"{self.allowed:.0%} may be (ingest.max_reject_fraction), and of a first load one must remain. Nothing was published"
        )


def _stage_all(plan: SourcePlan, staging: stage.Staging, budget: Budget) -> list[stage.Staged]:
    """Stage every unit on the cluster; where the budget is spent before the end, only some."""

    def one(piece: str) -> str:
        return stage.stage(Unit(**json.loads(piece)), staging).model_dump_json()

    made: dict[int, stage.Staged] = {}
    reasons: Counter[str] = Counter()
    known = all(unit.rows for unit in plan.units)  # else only the end tells how many there are
    with tqdm(total=plan.rows or None, desc="ingest", unit=" records", file=sys.stderr, mininterval=1) as bar:
        for place, answer in each(one, [json.dumps(asdict(unit)) for unit in plan.units]):
            staged = made[place] = stage.Staged.model_validate_json(answer)
            reasons.update(staged.rejected)
            bar.update(staged.rows)
            bar.set_postfix(rejected=sum(reasons.values()), refresh=False)
            if known and budget.spent(reasons, plan.rows):
                break
    return [made[place] for place in sorted(made)]


def _checks(budget: Budget, staging: stage.Staging, times: list[dict[str, Any]]) -> publish.Check:
    """The last look before the commit. A run that is refused leaves a report, so that one sees why."""

    def check(figures: Mapping[str, Any], rejects: Sequence[str]) -> None:
        try:
            budget.check(figures)
        except ValueError as error:
            where = publish.save_report(staging.folder, {**figures, "error": str(error)}, times, staging.rejects, rejects)
            raise ValueError(f"{error}. Examples: {where}. What was read is kept, for a run that allows more") from error

    return check


def _refuse(check: publish.Check, figures: Mapping[str, Any], units: Sequence[stage.Staged]) -> None:
    """A run that was stopped half-way because its budget was spent."""
    reasons: Counter[str] = Counter()
    for unit in units:
        reasons.update(unit.rejected)
    so_far = {"committed": sum(unit.items for unit in units), "unchanged": 0, "deleted": 0}
    told = {**figures, **so_far, "by_reason": dict(reasons), "rejected": sum(reasons.values())}
    check(told, [text for unit in units for text in unit.reject_fragments])
    raise AssertionError(told)


def _staged_figures(plan: SourcePlan, units: Sequence[stage.Staged], run: str) -> dict[str, Any]:
    return {
        "source": plan.uri,
        "run": run,
        "rows": sum(unit.rows for unit in units),
        "images": sum(unit.images for unit in units),
        "files_read": len({unit.uri for unit in plan.units}),
        "files_skipped": len(plan.files) - len({unit.uri for unit in plan.units}),
        "not_read": list(plan.not_read),
        "bytes_read": sum(unit.bytes_read for unit in units),
        "bytes_written": sum(unit.bytes_written for unit in units),
        "worker_peak_mb": max((unit.peak_mb for unit in units), default=0.0),
    }


def _rates(figures: Mapping[str, Any], seconds: float, watch: MemoryWatch) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 2),
        "rows_per_s": round(figures["rows"] / seconds, 1),
        "mb_per_s": round(figures["bytes_read"] / seconds / 1e6, 2),
        "peak_mb": round(watch.peak_mb, 1),
    }


def ingest(settings: IngestConfig, plan: SourcePlan, run: str, files: runs.Files, closing: pa.Table | None = None) -> dict[str, Any]:
    """Stage the plan's units, publish them as `run`, and finish.

    files: what it takes in; closing: rows of REJECTS that say which of these it takes up.
    """
    start = time.perf_counter()
    items = storage.Layout(settings.root).items
    staging = _staging(settings, plan, run)
    with runs.held(staging.folder) as hold, MemoryWatch(MEMORY_EVERY_S) as watch:
        if removed := runs.sweep(items):
            log.info("%d files that an earlier run left behind were removed", removed)
        storage.require_free(staging.items, plan.bytes + plan.bytes // 2)
        first = table.id_of(table.create(staging.items, schema.items(plan.reading.kept))) is None
        table.create(staging.rejects, schema.REJECTS)
        runs.note_files(staging.folder, files)
        cluster.connect()
        budget = Budget(settings.max_reject_fraction, plan.uri, plan.rows, first)
        units = _stage_all(plan, staging, budget)
        figures = _staged_figures(plan, units, run)
        check = _checks(budget, staging, publish.sources(units))
        if len(units) < len(plan.units):
            _refuse(check, figures, units)
        closed, _ = stage.write([closing] if closing else [], schema.REJECTS, staging.rejects)
        told = {"near_distance": settings.near_distance, "figures": figures, "check": check, "hold": hold, "closing": closed}
        log.info("%d records read; looking for records of one item, product or picture", figures["rows"])
        publish.commit(publish.Job(staging=staging, units=units, **told))
        return publish.finish(items, run, lambda known: _rates(known, time.perf_counter() - start, watch))


def _show(figures: Mapping[str, Any], items: str) -> None:
    folder = runs.folder_of(items, figures["run"])
    noted = publish.note_of(items, figures["run"])
    print(report.table(figures, [report.SourceTime(**told) for told in noted.sources] if noted else []), file=sys.stderr)  # noqa: T201
    print(f"report   {storage.join(folder, 'report.html')}", file=sys.stderr)  # noqa: T201


def source_of(settings: IngestConfig) -> str:
    """The URI of the source; without one in the settings, the shop that pipelines.catalog drew last."""
    return settings.source or storage.join(manifest.current(storage.Layout(settings.root).catalog, kind="catalog"), "records.parquet")


def _as_kept(plan: SourcePlan, items: str) -> SourcePlan:
    """With the types that the table keeps its attributes in, where it keeps these: a later file may be guessed otherwise."""
    there = table.kept_type(storage.join(items, table.ITEMS))
    if not there or not plan.reading.kept or {f.name for f in there} != {f.name for f in plan.reading.kept}:
        return plan
    return replace(plan, reading=replace(plan.reading, kept=there))


def run(settings: IngestConfig) -> dict[str, Any]:
    """Ingest what the items do not hold yet; gives the figures. ValueError for a source that cannot be used; then nothing is published."""
    layout, source = storage.Layout(settings.root), source_of(settings)
    applied = publish.finish_all(layout.items)
    done = runs.taken_in(layout.items, applied, settings.identity())
    told = {"format": settings.format, "keep": settings.attributes, "images": settings.image_folder, "unit_rows": settings.unit_rows}
    plan = _as_kept(plan_source(source, settings.columns, done=done, **told), layout.items)
    for name in plan.not_read:
        log.info("%s is not read: it has neither pictures nor one row a product", name)
    taken = {file.fingerprint: file.name for file in plan.files if file.fingerprint not in done}
    if not taken:
        log.info("nothing new in %s: its %d files are in the items already", source, len(plan.files))
        return {**runs.last_figures(layout.items, applied, settings.identity()), "skipped": True}
    number = manifest.fingerprint("ingest", {"settings": settings.identity()}, {name: finger for finger, name in taken.items()})
    about = {"images": plan.reading.images, "config": settings.settings()}
    files = runs.Files(settings=settings.identity(), source=source, files=taken, **about)
    figures = ingest(settings, plan, runs.name_of(layout.items, number, applied), files)
    _show(figures, layout.items)
    return figures


if __name__ == "__main__":
    sys.exit(job.main("pipelines.ingest", "ingest", IngestConfig, run))
