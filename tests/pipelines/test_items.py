import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idem import schema, storage
from pipelines.items import IDS_A_QUERY, Items, open_items
from pipelines.table import ID_KEY, ITEMS

N = 2 * IDS_A_QUERY + 10


def put(folder: str, n: int, made_id: str, title: str) -> int:
    """Write `n` items as ingest would; the version."""
    columns = {f.name: [""] * n if f.type == pa.string() else [0] * n for f in schema.ITEMS}
    ids = [f"it's {k}" for k in range(n)]
    columns |= {
        "item_id": ids,
        "image": [None if k % 3 == 0 else b"%d" % k for k in range(n)],
        "source_row": range(n),
        "title": [title] * n,
    }
    table = pa.table(columns, schema=schema.ITEMS.with_metadata({ID_KEY: made_id}))
    dataset = lance.write_dataset(table, storage.join(folder, ITEMS), mode="overwrite", max_rows_per_file=1000)
    dataset.create_scalar_index("item_id", "BTREE")
    return dataset.version


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two published versions, each with its index."""
    uri = str(tmp_path_factory.mktemp("items"))
    for n, title in ((5, "old"), (N, "new")):
        put(uri, n, title, title)
    return uri


@pytest.fixture
def items(folder: str) -> Items:
    return open_items(folder)


def test_open_gives_the_newest(items: Items) -> None:
    assert (items.id, items.version, items.count()) == ("new", 4, N)


def test_an_earlier_version_keeps_its_own_id(folder: str) -> None:
    old = open_items(folder, version=2)
    assert (old.id, old.version, old.count(), old.table(["title"])["title"][0].as_py()) == ("old", 2, 5, "old")


def test_a_table_that_nothing_was_published_in_yet(tmp_path: object) -> None:
    lance.write_dataset(schema.ITEMS.empty_table(), storage.join(str(tmp_path), ITEMS))
    with pytest.raises(ValueError, match="no finished items at"):
        open_items(str(tmp_path))


def test_what_is_not_there(folder: str, tmp_path: object) -> None:
    with pytest.raises(ValueError, match="no finished items at"):
        open_items(str(tmp_path))
    with pytest.raises(ValueError, match=r"version 99 of the items at .* is not there; the latest is 4"):
        open_items(folder, version=99)


def test_scan_filter_and_count(items: Items) -> None:
    assert items.table(["source_row"])["source_row"].to_pylist() == list(range(N))
    assert items.table(["item_id", "source_row"], "source_row >= 4005").to_pydict() == {
        "item_id": [f"it's {k}" for k in range(4005, N)],
        "source_row": list(range(4005, N)),
    }
    assert items.count("image IS NULL") == len(range(0, N, 3))


@pytest.mark.parametrize("size", [0, 1, 7, IDS_A_QUERY, N])
def test_take_keeps_the_order_asked(items: Items, size: int) -> None:
    rows = [(k * 37) % N for k in range(size)] + [0] * min(size, 2)  # with repeats
    taken = items.take([f"it's {k}" for k in rows], ["source_row", "item_id"])
    assert taken.column_names == ["source_row", "item_id"]
    assert taken["source_row"].to_pylist() == rows
    assert items.take_rows(rows, ["source_row", "item_id"]).to_pydict() == taken.to_pydict()


def test_images_are_bytes_or_none(items: Items) -> None:
    assert items.images(["it's 4", "it's 3", "it's 4"]) == [b"4", None, b"4"]
    assert items.images([]) == []


def test_errors_name_what_is_wrong(items: Items) -> None:
    with pytest.raises(ValueError, match="no item 'x0', 'x1', 'x2', 'x3', 'x4' and 2 more among the 4,010 of version 4"):
        items.take(["it's 1", *(f"x{k}" for k in range(7))], ["title"])
    with pytest.raises(ValueError, match="no row 4010, -1: the items have 4,010 rows"):
        items.take_rows([0, N, -1], ["title"])
    with pytest.raises(ValueError, match="no column 'colour'; they have item_id, product_id"):
        items.table(["colour"])
    with pytest.raises(ValueError, match="cannot read the items where colour = 1"):
        items.count("colour = 1")
    with pytest.raises(ValueError, match="cannot read the items where colour = 1"):
        list(items.batches(["title"], "colour = 1"))
    with pytest.raises(ValueError, match=r"shard is \(n, of\) with 0 <= n < of, found \(2, 2\)"):
        list(items.batches(["title"], shard=(2, 2)))


def test_batches_are_the_scan_and_fetch_pictures_when_asked(items: Items) -> None:
    batches = list(items.batches(["source_row", "title"], batch_size=300))
    assert max(len(b.table) for b in batches) <= 300
    assert pa.concat_tables(b.table for b in batches) == items.table(["source_row", "title"])
    rows = batches[3].table["source_row"].to_pylist()
    assert batches[3].images() == [None if k % 3 == 0 else b"%d" % k for k in rows]
    columns = batches[3].numpy()
    assert columns["source_row"].dtype == np.int64
    assert columns["title"].tolist() == ["new"] * len(rows)


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> Items:
    """Items in fragments of 1000 of which some rows are gone."""
    uri = str(tmp_path_factory.mktemp("gaps"))
    put(uri, N, "gaps", "t")
    lance.dataset(storage.join(uri, ITEMS)).delete("source_row % 7 = 0 OR (source_row >= 1000 AND source_row < 2000)")
    return open_items(uri)


@settings(deadline=None, max_examples=30)
@given(of=st.integers(1, 9), few=st.booleans())
def test_shards_are_all_rows_once(gaps: Items, of: int, few: bool) -> None:
    wanted = "source_row % 2 = 0" if few else None
    parts = [[r for b in gaps.batches(["source_row"], wanted, shard=(n, of)) for r in b.table["source_row"].to_pylist()] for n in range(of)]
    assert [row for part in parts for row in part] == gaps.table(["source_row"], wanted)["source_row"].to_pylist()
    with_pictures = next(gaps.batches(["source_row"], wanted, shard=(of - 1, of)))
    assert with_pictures.images() == [None if k % 3 == 0 else b"%d" % k for k in with_pictures.table["source_row"].to_pylist()]


@pytest.mark.parametrize("passed", ["source_row % 3 = 1", "source_row < 0", "true", "title = 't' AND source_row > 1900"])
def test_positions_are_those_of_the_scan(gaps: Items, passed: str) -> None:
    at = gaps.positions(passed)
    assert gaps.take_rows(at, ["item_id"]) == gaps.table(["item_id"], passed)
    assert (np.diff(at) > 0).all()
    with pytest.raises(ValueError, match="cannot read the items where colour = 1"):
        gaps.positions("colour = 1")


def test_a_tag_keeps_a_version(gaps: Items) -> None:
    gaps.keep("release-1")
    gaps.keep("release-1")
    assert gaps.dataset.tags.list()["release-1"]["version"] == gaps.version
    with pytest.raises(ValueError, match=r"the tag release-1 names version \d of the items, not 1"):
        Items(id="x", version=1, dataset=gaps.dataset).keep("release-1")
