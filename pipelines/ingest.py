"""Read a catalogue with Ray Data, check and normalise every record, and publish the items as one new Lance version.

Workers read, normalise and write fragments; the driver alone commits them, once. So a reader sees the old version or
the new, and every record ends as exactly one item or one reject. A finished run of the same source is not repeated.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import lance
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import ray
import ray.data
import ray.data.block
import ray.exceptions
from lance.fragment import FragmentMetadata, write_fragments
from pydantic import Field
from tqdm import tqdm

from idem import cluster, config, images, job, manifest, schema, storage
from pipelines.items import DATASET, ID_KEY, REJECTS
from pipelines.normalize import Limits, normalize_records, split
from pipelines.sources import Columns, SourcePlan, Survey, plan_source, read_group, survey

log = logging.getLogger("ingest")
NEVER = timedelta(days=365 * 100)

MADE = pa.schema(
    [
        pa.field("source_file", pa.string()),
        pa.field("source_row", pa.int64()),
        pa.field("committed", pa.int64()),
        pa.field("reasons", pa.string()),  # JSON: reason -> number of rejects
        pa.field("items", pa.list_(pa.string())),  # fragments, as Lance's JSON
        pa.field("rejects", pa.list_(pa.string())),
    ]
)


class IngestConfig(config.Table):
    """source: a parquet file or folder; "" is the shop that pipelines.catalog drew last. Other fields are explained where used."""

    source: str = ""
    columns: Columns = Columns()
    max_side: int = Field(256, ge=16)
    max_pixels: int = Field(images.MAX_PIXELS, gt=0)
    unseen_fraction: float = Field(0.2, ge=0, le=1)
    max_reject_fraction: float = Field(0.5, ge=0, le=1)


class RecordSource(ray.data.Datasource):
    """The planned row groups as a Ray Data source: one read task each."""

    def __init__(self, plan: SourcePlan, surveyed: Survey, unseen_fraction: float) -> None:
        super().__init__()
        self._plan, self._surveyed, self._unseen_fraction = plan, surveyed, unseen_fraction

    def estimate_inmemory_data_size(self) -> int:
        return sum(group.bytes for group in self._plan.groups)

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ray.data.ReadTask]:
        del parallelism, data_context  # a row group is what can be read alone
        tasks = []
        for group in self._plan.groups:
            read = partial(
                read_group,
                group,
                columns=self._plan.columns,
                attributes=self._plan.attributes,
                duplicates=self._surveyed.duplicates.get((group.uri, group.number), ()),
                settled=self._surveyed.settled[group.uri, group.number],
                unseen_fraction=self._unseen_fraction,
            )
            known = ray.data.block.BlockMetadata(num_rows=group.rows, size_bytes=group.bytes, exec_stats=None, input_files=(group.uri,))
            tasks.append(ray.data.ReadTask(read, known, per_task_row_limit=per_task_row_limit))
        return tasks


def _fragments(table: pa.Table, uri: str) -> list[str]:
    if not table.num_rows:
        return []
    made = write_fragments(table, uri, schema=table.schema, mode="overwrite")
    return [json.dumps(fragment.to_json()) for fragment in made]


def write_outcomes(outcomes: pa.Table, folder: str) -> pa.Table:
    """OUTCOMES -> fragments on disk that no reader sees until the driver commits them; returns one row of MADE."""
    if not outcomes.num_rows:
        return MADE.empty_table()
    items, rejects = split(outcomes)
    first = (items if items.num_rows else rejects).select(["source_file", "source_row"]).slice(0, 1).to_pylist()[0]
    told = {
        **first,
        "committed": items.num_rows,
        "reasons": json.dumps(Counter(rejects.column("reason").to_pylist())),
        "items": _fragments(items, storage.join(folder, DATASET)),
        "rejects": _fragments(rejects, storage.join(folder, REJECTS)),
    }
    return pa.Table.from_pylist([told], schema=MADE)


@dataclass(frozen=True)
class Written:
    """What the workers wrote, in the order of the source whatever order they finished in."""

    items: list[str]
    rejects: list[str]
    committed: int
    by_reason: dict[str, int]

    @property
    def rejected(self) -> int:
        return sum(self.by_reason.values())


def gather(made: Iterable[dict[str, Any]]) -> Written:
    """Merge the rows of MADE."""
    rows = sorted(made, key=lambda row: (row["source_file"], row["source_row"]))
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(json.loads(row["reasons"]))
    return Written(
        items=[fragment for row in rows for fragment in row["items"]],
        rejects=[fragment for row in rows for fragment in row["rejects"]],
        committed=sum(row["committed"] for row in rows),
        by_reason=dict(sorted(reasons.items())),
    )


def _execute(plan: SourcePlan, surveyed: Survey, settings: IngestConfig, folder: str) -> Written:
    ray.data.DataContext.get_current().enable_progress_bars = False
    limits = Limits(max_side=settings.max_side, max_pixels=settings.max_pixels)
    made = (
        ray.data.read_datasource(RecordSource(plan, surveyed, settings.unseen_fraction), override_num_blocks=len(plan.groups))
        .map_batches(partial(normalize_records, limits=limits), batch_size=None, batch_format="pyarrow")
        .map_batches(partial(write_outcomes, folder=folder), batch_size=None, batch_format="pyarrow")
    )
    rows = []
    with tqdm(total=plan.rows, desc="ingest", unit=" records", file=sys.stderr) as bar:
        for row in made.iter_rows():
            rows.append(row)
            bar.update(row["committed"] + sum(json.loads(row["reasons"]).values()))
    return gather(rows)


def _check(written: Written, plan: SourcePlan, allowed: float) -> None:
    """The books must balance, and the source must be worth publishing."""
    assert written.committed + written.rejected == plan.rows, (written.committed, written.by_reason, plan.rows)
    if written.rejected > allowed * plan.rows or not written.committed:
        told = ", ".join(f"{count:,} {reason}" for reason, count in written.by_reason.items())
        raise ValueError(
            f"{written.rejected:,} of {plan.rows:,} records of {plan.uri} cannot be used ({told}); at most "
            f"{allowed:.0%} may be (ingest.max_reject_fraction) and one must remain. Nothing was published"
        )


def _has_versions(uri: str) -> bool:
    filesystem, path = storage.open_filesystem(storage.join(uri, "_versions"))
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    return any(info.extension == "manifest" for info in found)


def _clean(folder: str) -> None:
    """Remove what nobody committed: fragments of an ingest that was killed, or whose books did not please. Versions all stay."""
    for uri in (storage.join(folder, DATASET), storage.join(folder, REJECTS)):
        if not _has_versions(uri):
            storage.remove_tree(uri)
            continue
        # Unverified files may be those of a writer at work; there is none, the driver being the only one. No version is
        # that old, so none is removed: a release may have bound any of them.
        lance.dataset(uri).cleanup_old_versions(NEVER, delete_unverified=True)


def _commit(uri: str, table: pa.Schema, fragments: list[str], made_id: str) -> lance.LanceDataset:
    operation = lance.LanceOperation.Overwrite(table.with_metadata({ID_KEY: made_id}), [FragmentMetadata.from_json(f) for f in fragments])
    return lance.LanceDataset.commit(uri, operation)


def _publish(folder: str, written: Written, made_id: str) -> tuple[lance.LanceDataset, lance.LanceDataset]:
    """Commit rejects, then items, each in one step; the manifest, which comes after, names the version of both."""
    rejects = _commit(storage.join(folder, REJECTS), schema.REJECTS, written.rejects, made_id)
    dataset = _commit(storage.join(folder, DATASET), schema.ITEMS, written.items, made_id)
    assert dataset.count_rows() == written.committed
    dataset.create_scalar_index("item_id", "BTREE")  # taking items by id scans without it
    return dataset, rejects


def _figures(
    dataset: lance.LanceDataset, rejects: lance.LanceDataset, plan: SourcePlan, surveyed: Survey, written: Written
) -> dict[str, Any]:
    known = dataset.to_table(columns=["product_id", "family_id", "id_split", "mime"])
    unseen = pc.equal(known.column("id_split"), "dev_unseen")
    train = pc.equal(known.column("id_split"), "train")
    families = [set(known.filter(part).column("family_id").unique().to_pylist()) for part in (train, unseen)]
    return {
        "rows": plan.rows,
        "committed": written.committed,
        "rejected": written.rejected,
        "by_reason": written.by_reason,
        "products": pc.count_distinct(known.column("product_id")).as_py(),
        "products_train": pc.count_distinct(known.filter(train).column("product_id")).as_py(),
        "products_unseen": pc.count_distinct(known.filter(unseen).column("product_id")).as_py(),
        "families": pc.count_distinct(known.column("family_id")).as_py(),
        "families_in_both_splits": len(families[0] & families[1]),  # as given: a sibling in training makes an unseen product familiar
        "split_conflicts": surveyed.split_conflicts,
        "images": pc.sum(pc.not_equal(known.column("mime"), "")).as_py(),
        "version": dataset.version,
        "rejects_version": rejects.version,
        "not_read": list(plan.not_read),
    }


def finished(folder: str, made_id: str) -> manifest.Manifest | None:
    """The manifest in `folder` if it is that of `made_id` and its version can still be opened."""
    if not storage.exists(storage.join(folder, manifest.NAME)):
        return None
    made = manifest.read(folder, kind="items")
    if made.id != made_id:
        return None
    try:
        lance.dataset(storage.join(folder, DATASET), version=made.figures["version"])
    except ValueError:
        return None
    return made


def run(settings: IngestConfig) -> dict[str, Any]:
    """Ingest; returns the figures of the manifest. ValueError for a source that cannot be used; then nothing is published."""
    layout = storage.Layout(settings.root)
    source = settings.source or storage.join(manifest.current(layout.catalog, kind="catalog"), "records.parquet")
    plan = plan_source(source, settings.columns)
    for name in plan.not_read:
        log.info("%s is not read: it has neither pictures nor one row a product", name)
    inputs = {"source": plan.fingerprint}
    made_id = manifest.fingerprint("items", settings.settings(), inputs)
    if made := finished(layout.items, made_id):
        return {**made.figures, "skipped": True}
    surveyed = survey(plan)
    if surveyed.split_conflicts:
        log.warning("%d products are given more than one id_split: none of them is trained on", surveyed.split_conflicts)
    _clean(layout.items)
    storage.require_free(layout.items, plan.bytes + plan.bytes // 2)
    cluster.connect()
    try:
        written = _execute(plan, surveyed, settings, layout.items)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):  # one of ours, meant for the user; the lines below it are advice on Ray Data
            raise ValueError(str(error.cause).partition("\n")[0]) from error
        raise
    try:
        _check(written, plan, settings.max_reject_fraction)
    except ValueError:
        _clean(layout.items)
        raise
    items, rejects = _publish(layout.items, written, made_id)
    figures = _figures(items, rejects, plan, surveyed, written)
    manifest.write(layout.items, kind="items", config=settings.settings(), inputs=inputs, figures=figures)
    return figures


if __name__ == "__main__":
    sys.exit(job.main("pipelines.ingest", "ingest", IngestConfig, run))
