"""The whole ingest beside a twin of twenty lines that holds everything in one dict; without Ray, the same functions in turn."""

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from idem import storage
from pipelines import ingest, publish
from pipelines.items import open_items
from pipelines.rejects import open_rejects

COLUMNS = pa.schema(
    {
        "image_id": pa.string(),
        "product_id": pa.string(),
        "title": pa.string(),
        "version": pa.int64(),
        "deleted": pa.bool_(),
        "family_id": pa.string(),
        "id_split": pa.string(),
    }
)
RECORD = st.fixed_dictionaries(
    {
        "image_id": st.sampled_from("abcdef"),
        "product_id": st.sampled_from(["p", "q", ""]),
        "title": st.sampled_from(["one", "two", "three"]),
        "version": st.sampled_from([None, None, 1, 2, 3]),
        "deleted": st.sampled_from([False, False, False, True]),
        "family_id": st.sampled_from([None, "f", "g"]),
        "id_split": st.sampled_from([None, "train", "dev_unseen"]),
    }
)
FILES = st.lists(st.lists(RECORD, min_size=1, max_size=8), min_size=1, max_size=4)


def in_turn(function: Callable[[str], str], work: Sequence[str]) -> Iterator[tuple[int, str]]:
    yield from ((place, function(piece)) for place, piece in enumerate(work))


def refusal(config: ingest.IngestConfig) -> str | None:
    """What a run is refused for; None where it went through."""
    try:
        ingest.run(config)
    except ValueError as error:
        return str(error)
    return None


def twin(state: dict[str, dict], records: list[dict]) -> None:
    """What one run makes of the items: of each id the newest record, by version, then by order; a tombstone takes it away."""
    groups: dict[str, list[dict]] = {}
    for order, record in enumerate(records):
        if record["product_id"] or record["deleted"]:
            groups.setdefault(record["image_id"], []).append({**record, "order": order})
    for item_id, found in groups.items():
        newest = max(found, key=lambda r: (r["version"] is not None, r["version"] or 0, r["order"]))
        there = state.get(item_id)
        if there and None not in (there["version"], newest["version"]) and newest["version"] < there["version"]:
            continue
        if newest["deleted"]:
            state.pop(item_id, None)
        else:
            state[item_id] = newest


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=FILES, one_by_one=st.booleans(), unit_rows=st.sampled_from([1, 3, 100]))
def test_any_catalogue_in_any_number_of_runs(
    files: list[list[dict]], one_by_one: bool, unit_rows: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ingest, publish):
        monkeypatch.setattr(module, "each", in_turn)
    monkeypatch.setattr(ingest.cluster, "connect", lambda: None)
    monkeypatch.setattr(ingest, "bucket_count", lambda rows: 3)
    folder = tmp_path_factory.mktemp("twin")
    source = folder / "source"
    source.mkdir()
    config = ingest.IngestConfig(root=str(folder), source=str(source), unit_rows=unit_rows, max_reject_fraction=1.0, unseen_fraction=0.5)
    state: dict[str, dict] = {}
    published = False
    due: list[dict] = []  # also of runs that were refused, because nothing of theirs was of use
    for number, records in enumerate(files):
        pq.write_table(pa.Table.from_pylist(records, schema=COLUMNS), source / f"{number}.parquet", row_group_size=2)
        due += records
        if not one_by_one and number < len(files) - 1:
            continue
        if (refused := refusal(config)) is not None:
            assert "of a first load one must remain" in refused
            assert not published
            attempt: dict[str, dict] = {}
            twin(attempt, due)
            assert not attempt
            continue
        published = True
        twin(state, due)
        due = []
    if not published:
        return
    uri = storage.Layout(config.root).items
    items = open_items(uri).table(["item_id", "title", "version", "product_id", "family_id", "id_split"]).to_pylist()
    assert {r["item_id"]: (r["title"], r["version"], r["product_id"]) for r in items} == {
        item_id: (r["title"], r["version"], r["product_id"]) for item_id, r in state.items()
    }
    assert len(items) == len(state)
    for product in "pq":
        assert len({(r["family_id"], r["id_split"]) for r in items if r["product_id"] == product}) <= 1
    assert due or ingest.run(config)["skipped"]
    assert all(row["reason"] in ("missing_id", "superseded", "duplicate_id") for row in open_rejects(uri).light.to_pylist())
