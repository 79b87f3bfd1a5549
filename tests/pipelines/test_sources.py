import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idem import folds
from pipelines.normalize import RECORDS
from pipelines.sources import BATCH_ROWS, Columns, SourcePlan, Survey, plan_source, read_group, survey

COLUMNS = Columns()


def write(path: Path, columns: dict[str, object], **options: object) -> str:
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def photos(path: Path, n: int = 4, start: int = 0, **columns: object) -> str:
    ids = [f"i{start + k}" for k in range(n)]
    return write(path, {"image_id": ids, "product_id": [f"p{k % 2}" for k in range(n)], "image": [b"x"] * n} | columns, row_group_size=3)


def records(plan: SourcePlan, **options: object) -> list[dict]:
    """All that is read, with what the survey settled, as ingest reads it."""
    settled = survey(plan).settled
    told = {"columns": plan.columns, "attributes": plan.attributes, **options}
    tables = [t for g in plan.groups for t in read_group(g, settled=settled[g.uri, g.number], **told)]
    assert all(t.schema == RECORDS for t in tables)
    return pa.concat_tables(tables).to_pylist()


def test_one_file(tmp_path: Path) -> None:
    plan = plan_source(photos(tmp_path / "a.parquet"), COLUMNS)
    assert [(g.number, g.first_row, g.rows) for g in plan.groups] == [(0, 0, 3), (1, 3, 1)]
    assert (plan.rows, plan.attributes, plan.not_read) == (4, (), ())
    assert [(r["source_file"], r["source_row"], r["item_id"]) for r in records(plan)] == [("a.parquet", k, f"i{k}") for k in range(4)]


def test_a_folder_has_records_attributes_and_files_left_alone(tmp_path: Path) -> None:
    photos(tmp_path / "b.parquet", start=4)
    photos(tmp_path / "a.parquet")
    write(
        tmp_path / "products.parquet",
        {"product_id": ["p0", "p1"], "coarse": ["cups", None], "group": ["kitchen", ""], "title": ["A cup", "B"]},
    )
    write(tmp_path / "texts.parquet", {"product_id": ["p0", "p0"], "lang": ["en", "fr"]})
    (tmp_path / "README.md").write_text("about")
    plan = plan_source(str(tmp_path), COLUMNS)
    assert [g.name for g in plan.groups] == ["a.parquet"] * 2 + ["b.parquet"] * 2
    assert [Path(a).name for a in plan.attributes] == ["products.parquet"]
    assert plan.not_read == ("texts.parquet",)
    told = {r["product_id"]: (r["family_id"], r["category"], r["title"]) for r in records(plan)}
    assert told == {"p0": ("cups", "kitchen", "A cup"), "p1": ("p1", "", "B")}


def test_what_a_record_says_goes_before_what_its_product_says(tmp_path: Path) -> None:
    photos(tmp_path / "a.parquet", title=["own", None, "", " "], coarse=["c"] * 4)
    write(tmp_path / "products.parquet", {"product_id": ["p0", "p1"], "title": ["of p0", "of p1"], "family_id": ["f0", None]})
    assert [(r["title"], r["family_id"]) for r in records(plan_source(str(tmp_path), COLUMNS))] == [
        ("own", "f0"),
        ("of p1", "c"),
        ("of p0", "f0"),
        ("of p1", "c"),
    ]


def test_families_are_dealt_whole_where_the_split_is_missing(tmp_path: Path) -> None:
    n = 400
    columns = {"product_id": [f"q{k}" for k in range(n)], "family_id": [f"f{k // 4}" for k in range(n)]}
    path = photos(tmp_path / "a.parquet", n, **columns, id_split=["dev_unseen"] + [None] * (n - 1))
    made = records(plan_source(path, COLUMNS), unseen_fraction=0.3)
    assert made[0]["id_split"] == "dev_unseen"
    for r in made[1:]:
        assert r["id_split"] == ("dev_unseen" if folds.uniform(r["family_id"], "unseen") < 0.3 else "train")
    assert 0.2 < sum(r["id_split"] == "dev_unseen" for r in made) / n < 0.4


def first(values: list[str | None]) -> str:
    return next((value for value in values if value), "")


TOLD = st.fixed_dictionaries(
    {
        "product_id": st.sampled_from(["p0", "p1", "p2", "", None]),
        "family_id": st.sampled_from([None, "", "f", "g"]),
        "coarse": st.sampled_from([None, "c", "d"]),
        "id_split": st.sampled_from([None, "", "train", "dev_unseen", "other"]),
    }
)
PRODUCT = st.fixed_dictionaries({"family_id": st.sampled_from([None, "h"]), "id_split": st.sampled_from([None, "train", "dev_unseen"])})


@settings(deadline=None)
@given(rows=st.lists(TOLD, min_size=1, max_size=12), of_p0=st.none() | PRODUCT)
def test_a_product_has_one_family_and_one_split(tmp_path_factory: pytest.TempPathFactory, rows: list[dict], of_p0: dict | None) -> None:
    folder = tmp_path_factory.mktemp("source")
    photos(folder / "a.parquet", len(rows), **{name: pa.array([r[name] for r in rows], pa.string()) for name in rows[0]})
    if of_p0:
        products = {"product_id": ["p0"]} | {name: pa.array([value], pa.string()) for name, value in of_p0.items()}
        write(folder / "products.parquet", products)
    plan = plan_source(str(folder), COLUMNS)
    made, conflicts = records(plan, unseen_fraction=0.5), 0
    for product_id in {r["product_id"] for r in rows} - {None, ""}:
        known = (of_p0 if product_id == "p0" else None) or {}
        told = [{name: r[name] or known.get(name) for name in r} for r in rows if r["product_id"] == product_id]
        families, splits = zip(*((r["family_id"], r["id_split"]) for r in made if r["product_id"] == product_id), strict=True)
        family = first([r["family_id"] for r in told]) or first([r["coarse"] for r in told]) or product_id
        assert set(families) == {family}
        answers = {r["id_split"] for r in told} - {None, ""}
        assert len(set(splits)) == 1
        if not answers:
            assert splits[0] == ("dev_unseen" if folds.uniform(family, "unseen") < 0.5 else "train")
        elif "dev_unseen" in answers:
            assert splits[0] == "dev_unseen"
        else:
            assert splits[0] == ("other" if "other" in answers else "train")
        conflicts += len(answers) > 1
    assert survey(plan).split_conflicts == conflicts


def test_only_products_whose_records_differ_are_handed_on(tmp_path: Path) -> None:
    path = photos(tmp_path / "a.parquet", 6, family_id=["f", "g", "f", None, "f", "g"], id_split=["train"] * 4 + ["dev_unseen", "train"])
    plan = plan_source(path, COLUMNS)
    settled = {
        "p0": {"family_id": "f", "coarse": "", "id_split": "dev_unseen"},
        "p1": {"family_id": "g", "coarse": "", "id_split": "train"},
    }
    found = survey(plan)
    assert (list(found.settled.values()), found.split_conflicts) == ([settled, settled], 1)
    same = plan_source(photos(tmp_path / "b.parquet", 6, family_id=["f", "g"] * 3), COLUMNS)
    assert list(survey(same).settled.values()) == [{}, {}]


def test_columns_may_have_other_names_and_types(tmp_path: Path) -> None:
    pictures = pa.array([{"bytes": b"x", "path": "x.jpg"}, None], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    names = pa.array([b"caf\xc3\xa9", b"\xff cup"], pa.binary())
    path = write(
        tmp_path / "a.parquet", {"sku": [1, 2], "asin": pa.array(["p", "p"]).dictionary_encode(), "photo": pictures, "name": names}
    )
    plan = plan_source(path, Columns(item_id="sku", product_id="asin", image="photo", title="name"))
    assert [(r["item_id"], r["product_id"], r["image"], r["title"]) for r in records(plan)] == [
        ("1", "p", b"x", "café"),
        ("2", "p", None, "\ufffd cup"),
    ]


def test_batches_are_small(tmp_path: Path) -> None:
    n = 2 * BATCH_ROWS + 1
    path = write(tmp_path / "a.parquet", {"image_id": list(range(n)), "product_id": ["p"] * n, "image": [b"x"] * n})
    (group,) = plan_source(path, COLUMNS).groups
    tables = list(read_group(group, columns=COLUMNS))
    assert [t.num_rows for t in tables] == [BATCH_ROWS, BATCH_ROWS, 1]
    assert pa.concat_tables(tables)["source_row"].to_pylist() == list(range(n))


def test_the_first_of_an_id_stays(tmp_path: Path) -> None:
    ids = pa.array(["a", "b", " a", None, "", "", "b"])
    for name in ("1.parquet", "2.parquet"):
        write(tmp_path / name, {"image_id": ids, "product_id": ["p"] * 7, "image": [b"x"] * 7}, row_group_size=4)
    plan = plan_source(str(tmp_path), COLUMNS)
    found = {(Path(uri).name, number): rows for (uri, number), rows in survey(plan).duplicates.items()}
    assert found == {("1.parquet", 0): (2,), ("1.parquet", 1): (6,), ("2.parquet", 0): (0, 1, 2), ("2.parquet", 1): (6,)}
    (table,) = read_group(plan.groups[1], columns=COLUMNS, duplicates=(6,))
    assert table["duplicate"].to_pylist() == [False, False, True]


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    photos(path)
    first = plan_source(str(path), COLUMNS).fingerprint
    assert plan_source(str(tmp_path), COLUMNS).fingerprint == first
    os.utime(path, ns=(1, 1))
    touched = plan_source(str(path), COLUMNS).fingerprint
    photos(tmp_path / "b.parquet")
    assert len({first, touched, plan_source(str(tmp_path), COLUMNS).fingerprint}) == 3


def test_a_uri_is_as_good_as_a_path(tmp_path: Path) -> None:
    photos(tmp_path / "a.parquet")
    plan = plan_source(tmp_path.as_uri(), COLUMNS)
    assert len(records(plan)) == 4


ALL = {"image_id": ["i"], "product_id": ["p"], "image": [b"x"]}


@pytest.mark.parametrize("missing", ALL)
def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path, missing: str) -> None:
    path = write(tmp_path / "a.parquet", {k: v for k, v in ALL.items() if k != missing} | {"color": ["red"]})
    exist = ", ".join([k for k in ALL if k != missing] + ["color"])
    with pytest.raises(ValueError, match=f"a.parquet has no column '{missing}'.*its columns are {exist}"):
        plan_source(path, COLUMNS)


def test_a_column_asked_for_by_name_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'headline' \(for title\); its columns are image, image_id, product_id"):
        plan_source(write(tmp_path / "a.parquet", ALL), Columns(title="headline"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image": ["x.jpg"]}, "'image' .for image. is of type string; encoded pictures as binary is needed"),
        ({"title": [["a", "b"]]}, "'title' .for title. is of type list<.*a plain text or number is needed"),
    ],
)
def test_a_column_of_the_wrong_type(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_source(write(tmp_path / "a.parquet", ALL | changes), COLUMNS)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nope.parquet does not exist"):
        plan_source(str(tmp_path / "nope.parquet"), COLUMNS)
    with pytest.raises(ValueError, match=r"holds no .parquet file; found nothing"):
        plan_source(str(tmp_path), COLUMNS)
    (tmp_path / "a.parquet").write_bytes(b"id,title\n1,cup\n")
    with pytest.raises(ValueError, match=r"a.parquet cannot be read as parquet"):
        plan_source(str(tmp_path), COLUMNS)
    path = write(
        tmp_path / "a.parquet",
        {"image_id": pa.array([], pa.string()), "product_id": pa.array([], pa.string()), "image": pa.array([], pa.binary())},
    )
    with pytest.raises(ValueError, match=r"the catalogue .*a.parquet is empty"):
        plan_source(path, COLUMNS)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", {"word": ["x"]})
    with pytest.raises(ValueError, match=r"no file in .* has a column 'image'.*a.parquet: word; b.parquet: word"):
        plan_source(str(tmp_path), COLUMNS)


def test_damaged_data_behind_a_sound_footer(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, {k: v * 500 for k, v in ALL.items()} | {"image": [os.urandom(50) for _ in range(500)]}, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[200 : len(data) // 2] = b"\xff" * (len(data) // 2 - 200)
    path.write_bytes(data)
    plan = plan_source(str(path), COLUMNS)
    with pytest.raises(ValueError, match=r"a.parquet cannot be read as parquet"):
        list(read_group(plan.groups[0], columns=COLUMNS))


@pytest.mark.data
def test_the_public_sets(shared_data: Path) -> None:
    grocery = plan_source(str(shared_data / "grocery"), COLUMNS)
    assert (grocery.rows, len(grocery.attributes), grocery.not_read) == (3490, 1, ())
    first = next(read_group(grocery.groups[0], columns=COLUMNS, attributes=grocery.attributes)).to_pylist()[0]
    assert (first["family_id"], first["category"], first["id_split"]) == ("Apple", "Fruit", "train")
    emoji = plan_source(str(shared_data / "emoji"), COLUMNS)
    assert (emoji.rows, emoji.not_read) == (17533, ("qrels.parquet", "queries.parquet", "texts.parquet"))
    assert survey(emoji) == Survey(duplicates={}, settled={(g.uri, g.number): {} for g in emoji.groups}, split_conflicts=0)
