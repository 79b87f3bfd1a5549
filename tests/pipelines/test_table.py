"""Compare-and-swap on a Lance table: what conflicts, what does not, and that nothing is committed twice."""

import json
from pathlib import Path

import lance
import lance.optimize
import pyarrow as pa
import pytest
from lance.fragment import FragmentMetadata, write_fragments

from pipelines import table

SCHEMA = pa.schema([pa.field("item_id", pa.string(), nullable=False), pa.field("n", pa.int64())])


def staged(uri: str, *ids: str) -> tuple[str, ...]:
    made = write_fragments(pa.table({"item_id": list(ids), "n": range(len(ids))}, schema=SCHEMA), uri, mode="append", schema=SCHEMA)
    return tuple(json.dumps(fragment.to_json()) for fragment in made)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    where = str(tmp_path / "t.lance")
    table.create(where, SCHEMA)
    return where


def ids(uri: str, version: int | None = None) -> list[str]:
    return table.open_table(uri, version).to_table().column("item_id").to_pylist()


def emptied(uri: str) -> table.Change:
    opened = table.open_table(uri)
    rows = {fragment: range(fragment.physical_rows) for fragment in opened.get_fragments()}
    return table.Change(updated=tuple(table.without(uri, fragment, gone, opened.version) for fragment, gone in rows.items()))


def test_a_change_becomes_visible_in_one_commit(uri: str) -> None:
    before = table.open_table(uri)
    assert (ids(uri), table.runs_of(before), table.id_of(before)) == ([], (), None)
    first = table.swap(before, table.Change(added=staged(uri, "a", "b", "c")), "r1")
    assert first
    assert (ids(uri), table.runs_of(first)) == (["a", "b", "c"], ("r1",))
    left = first.get_fragments()[0].delete("item_id = 'b'")
    change = table.Change(added=staged(uri, "b"), updated=(json.dumps(left.to_json()),))
    second = table.swap(first, change, "r2")
    assert second
    assert (ids(uri), table.runs_of(second)) == (["a", "c", "b"], ("r1", "r2"))
    assert len({table.id_of(first), table.id_of(second), None}) == 3
    assert ids(uri, first.version) == ["a", "b", "c"]
    assert table.swap(second, emptied(uri), "r3") is not None
    assert ids(uri) == []
    assert table.open_table(uri).count_rows() == 0


def test_a_run_is_committed_once(uri: str) -> None:
    change = table.Change(added=staged(uri, "a"))
    table.swap(table.open_table(uri), change, "r1")
    version = table.open_table(uri).version
    assert table.swap(table.open_table(uri), change, "r1") is not None
    assert (ids(uri), table.open_table(uri).version) == (["a"], version)


def other_run(uri: str) -> None:
    assert table.swap(table.open_table(uri), table.Change(added=staged(uri, "other")), "other") is not None


MOVES = {
    "another run": other_run,
    "an append": lambda uri: lance.write_dataset(pa.table({"item_id": ["x"], "n": [1]}, schema=SCHEMA), uri, mode="append"),
    "a delete": lambda uri: lance.dataset(uri).delete("item_id = 'a'"),
    "an update": lambda uri: lance.dataset(uri).update({"n": "9"}, where="item_id = 'a'"),
    "a compaction": lambda uri: lance.dataset(uri).optimize.compact_files(num_threads=1),
    "a roll-back": lambda uri: lance.dataset(uri, version=2).restore(),
}


@pytest.mark.parametrize("name", MOVES)
def test_whoever_comes_second_is_told(uri: str, name: str) -> None:
    for run, item in (("r1", "a"), ("r2", "b")):
        assert table.swap(table.open_table(uri), table.Change(added=staged(uri, item)), run) is not None
    planned = table.open_table(uri)
    MOVES[name](uri)
    held = ids(uri)
    assert table.swap(planned, table.Change(added=staged(uri, "c")), "r3") is None
    assert ids(uri) == held


def test_an_index_is_no_conflict_and_covers_nothing_that_it_does_not_know(uri: str) -> None:
    assert table.swap(table.open_table(uri), table.Change(added=staged(uri, "a")), "r1") is not None
    planned = table.open_table(uri)
    lance.dataset(uri).create_scalar_index("item_id", "BTREE")
    assert table.swap(planned, table.Change(added=staged(uri, "b")), "r2") is not None
    assert table.swap(table.open_table(uri), emptied(uri), "r3") is not None
    # A new fragment must not take the number of one that the index still knows: its rows would not be found.
    assert table.swap(table.open_table(uri), table.Change(added=staged(uri, "c", "d")), "r4") is not None
    for item in "cd":
        assert table.open_table(uri).to_table(filter=f"item_id = '{item}'").num_rows == 1


def test_a_compaction_that_comes_second_is_told_too(uri: str) -> None:
    for run in ("r1", "r2", "r3"):
        assert table.swap(table.open_table(uri), table.Change(added=staged(uri, run)), run) is not None
    planned = table.open_table(uri)
    plan = lance.optimize.Compaction.plan(planned, {})
    done = [task.execute(planned) for task in plan.tasks]
    assert done
    gone = table.without(uri, planned.get_fragments()[0], [0], planned.version)
    gone = table.Change(updated=(gone,), added=staged(uri, "new"))
    assert table.swap(planned, gone, "r4") is not None
    with pytest.raises(OSError, match="conflict") as caught:
        lance.optimize.Compaction.commit(planned, done)
    assert table.may_pass(caught.value)
    assert sorted(ids(uri)) == ["new", "r2", "r3"]


def test_the_next_version_keeps_the_order_of_what_stays() -> None:
    fragments = [FragmentMetadata(n, [], 10) for n in (4, 7, 9)]
    updated = FragmentMetadata(7, [], 8)
    change = table.Change(added=(json.dumps(FragmentMetadata(0, [], 1).to_json()),) * 2, updated=(json.dumps(updated.to_json()),))
    assert [(f.id, f.physical_rows) for f in table.apply(fragments, change, 12)] == [(4, 10), (7, 8), (9, 10), (12, 1), (13, 1)]


def test_a_table_with_other_columns_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="holds other columns than this run gives: they differ in extra"):
        table.create(uri, SCHEMA.append(pa.field("extra", pa.int64())))


def test_orphans_are_what_no_version_names(uri: str) -> None:
    kept = staged(uri, "kept")
    table.swap(table.open_table(uri), table.Change(added=staged(uri, "a")), "r1")
    (left,) = table.files_of(staged(uri, "left"))
    held = table.files_of(kept)
    assert set(table.orphans(table.open_table(uri), (), float("inf"))) == {left, *held}
    assert table.orphans(table.open_table(uri), held, float("inf")) == [left]
    assert table.orphans(table.open_table(uri), (), 0.0) == []
