import lance
import pyarrow as pa
import pytest

from idem import manifest, schema, storage
from pipelines.items import DATASET, ID_KEY, IDS_A_QUERY, Items, open_items

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
    dataset = lance.write_dataset(table, storage.join(folder, DATASET), mode="overwrite", max_rows_per_file=1000)
    dataset.create_scalar_index("item_id", "BTREE")
    return dataset.version


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two published versions, then one that was committed without its manifest."""
    uri = str(tmp_path_factory.mktemp("items"))
    for n, title in ((5, "old"), (N, "new")):
        inputs = {"source": title}
        version = put(uri, n, manifest.fingerprint("items", {}, inputs), title)
        manifest.write(uri, kind="items", config={}, inputs=inputs, figures={"version": version})
    put(uri, 3, "unfinished", "half")
    return uri


@pytest.fixture
def items(folder: str) -> Items:
    return open_items(folder)


def test_open_gives_what_the_manifest_names(folder: str, items: Items) -> None:
    made = manifest.read(folder, kind="items")
    assert (items.id, items.version, items.count()) == (made.id, made.figures["version"], N)


def test_an_earlier_version_keeps_its_own_id(folder: str, items: Items) -> None:
    old = open_items(folder, version=2)
    assert (old.version, old.count(), old.table(["title"])["title"][0].as_py()) == (2, 5, "old")
    assert old.id == manifest.fingerprint("items", {}, {"source": "old"}) != items.id


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
