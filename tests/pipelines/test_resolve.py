"""The decisions of pipelines.resolve beside slow twins that look at everything at once."""

from collections import Counter
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import contested, keys, resolve
from pipelines.records import SETTLED, family_and_split
from pipelines.resolve import UNCHANGED, Verdict


def key(item_id: str, unit: int, row: int, version: int | None = None, record_hash: str | None = "h", gone: bool = False) -> dict:
    told = {"item_id": item_id, "unit": unit, "row": -1 if gone else row, "source_row": row, "file": "a.csv"}
    return {**told, "version": version, "record_hash": None if gone else record_hash}


def there(item_id: str, version: int | None = None, record_hash: str = "old") -> dict:
    return {"item_id": item_id, "version": version, "record_hash": record_hash, "address": 7, "unit": -1, "source_row": 7}


def test_the_last_record_of_an_id_stays() -> None:
    found = resolve.winners([key("a", 0, 0), key("b", 0, 1), key("a", 1, 0, record_hash="other"), key("a", 0, 5)], {})
    assert found.verdicts == [
        Verdict(unit=0, row=0, reason="superseded", message="another record with the item_id 'a' comes in row 0 of a.csv"),
        Verdict(unit=0, row=5, reason="superseded", message="another record with the item_id 'a' comes in row 0 of a.csv"),
    ]
    assert found.counts == {"inserted": 2, "updated": 0, "unchanged": 0, "removed": 0, "conflicting_ids": 1}


def test_an_exact_repeat_is_called_one() -> None:
    (verdict,) = resolve.winners([key("a", 0, 0), key("a", 0, 1)], {}).verdicts
    assert (verdict.row, verdict.reason) == (0, "duplicate_id")


def test_a_higher_version_goes_before_a_later_row() -> None:
    (verdict,) = resolve.winners([key("a", 0, 0, version=9), key("a", 0, 1, version=3)], {}).verdicts
    assert verdict.row == 1
    (verdict,) = resolve.winners([key("a", 0, 0, version=9), key("a", 0, 1)], {}).verdicts
    assert verdict.row == 1  # one without a version is older than any with one


@pytest.mark.parametrize(
    ("new", "old", "happens"),
    [
        (key("a", 0, 0), there("a"), "updated"),
        (key("a", 0, 0), there("a", record_hash="h"), "unchanged"),
        (key("a", 0, 0, version=2), there("a", version=1), "updated"),
        (key("a", 0, 0, version=1), there("a", version=2), None),
        (key("a", 0, 0, version=1), there("a"), "updated"),
        (key("a", 0, 0), there("a", version=2), "updated"),
        (key("a", 0, 0, gone=True), there("a"), "removed"),
        (key("a", 0, 0, version=1, gone=True), there("a", version=2), None),
    ],
)
def test_against_what_the_table_holds(new: dict, old: dict, happens: str | None) -> None:
    found = resolve.winners([new], {"a": old})
    assert [name for name, count in found.counts.items() if count] == ([happens] if happens else [])
    replaced = [v for v in found.verdicts if v.address >= 0]
    assert len(replaced) == (happens in ("updated", "removed"))
    aside = [v.reason for v in found.verdicts if v.unit >= 0]
    assert aside == ([UNCHANGED] if happens == "unchanged" else ["superseded"] if happens is None and new["row"] >= 0 else [])


def test_a_tombstone_takes_away_what_came_before_it_and_not_what_comes_after() -> None:
    found = resolve.winners([key("a", 0, 0), key("a", 0, 1, gone=True), key("b", 0, 2, gone=True), key("b", 0, 3)], {})
    assert [(v.row, v.reason) for v in found.verdicts] == [(0, "superseded")]
    assert "taken away by row 1" in str(found.verdicts[0].message)


KEYS = st.lists(
    st.builds(
        key,
        item_id=st.sampled_from("abc"),
        unit=st.integers(0, 2),
        row=st.integers(0, 1000),
        version=st.none() | st.integers(0, 3),
        record_hash=st.sampled_from("xy"),
        gone=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda k: (k["unit"], k["source_row"]),
)


@settings(deadline=None)
@given(ids=KEYS, old=st.dictionaries(st.sampled_from("abc"), st.tuples(st.none() | st.integers(0, 3), st.sampled_from("xy"))))
def test_one_record_an_id_and_every_other_is_told_why(ids: list[dict], old: dict) -> None:
    held = {item_id: there(item_id, version, digest) for item_id, (version, digest) in old.items()}
    found = resolve.winners(ids, held)
    aside = {(v.unit, v.row) for v in found.verdicts if v.unit >= 0}
    replaced = Counter(v.address for v in found.verdicts if v.address >= 0)
    for item_id in "abc":
        mine = sorted(
            (k for k in ids if k["item_id"] == item_id),
            key=lambda k: (k["version"] is not None, k["version"] or 0, k["unit"], k["source_row"]),
        )
        staying = [k for k in mine if k["row"] >= 0 and (k["unit"], k["row"]) not in aside]
        # the slow twin: go through all states in order
        state = ("old", held[item_id]) if item_id in held else None
        if mine:
            last = mine[-1]
            outdated = state and None not in (last["version"], state[1]["version"]) and last["version"] < state[1]["version"]
            same = state and last["row"] >= 0 and (last["record_hash"], last["version"]) == (state[1]["record_hash"], state[1]["version"])
            if not outdated and not same:
                state = None if last["row"] < 0 else ("new", last)
        assert staying == ([state[1]] if state and state[0] == "new" else [])
    assert sum(replaced.values()) == found.counts["updated"] + found.counts["removed"]
    assert len(aside) + found.counts["inserted"] + found.counts["updated"] == sum(k["row"] >= 0 for k in ids)


def said(product_id: str, row: int, family_id: str = "", coarse: str = "", id_split: str = "") -> dict:
    return {"product_id": product_id, "unit": 0, "source_row": row, "family_id": family_id, "coarse": coarse, "id_split": id_split}


def test_products_whose_records_agree_need_no_verdict() -> None:
    found, places = resolve.settled([said("p", 0, "f", "c", "train"), said("q", 1)], {}, 0.0)
    assert found.verdicts == []
    assert places == [("f", "train"), ("q", "train")]


def test_one_family_and_one_split_a_product() -> None:
    found, _ = resolve.settled([said("p", 0, "f"), said("p", 3, "", "", "dev_unseen"), said("p", 5, "g", "", "train")], {}, 0.0)
    assert set(found.verdicts) == {Verdict(unit=0, product_id="p", family_id="f", id_split="dev_unseen")}
    assert found.counts == {"products": 1, "products_train": 0, "products_unseen": 1, "split_conflicts": 1}


def test_rows_that_are_there_follow_what_is_new_but_unseen_stays() -> None:
    row = {"product_id": "p", "family_id": "p", "id_split": "train", "address": 5}
    found, _ = resolve.settled([said("p", 0, "f")], {"p": [row]}, 0.0)
    assert found.verdicts == [Verdict(address=5, family_id="f", id_split="train")]
    unseen = {**row, "family_id": "f", "id_split": "dev_unseen"}
    found, _ = resolve.settled([said("p", 0, "f", "", "train")], {"p": [unseen]}, 0.0)
    assert found.verdicts == [Verdict(unit=0, product_id="p", family_id="f", id_split="dev_unseen")]


SAID = st.lists(
    st.builds(
        said,
        product_id=st.sampled_from("pq"),
        row=st.integers(0, 100),
        family_id=st.sampled_from(["", "f", "g"]),
        coarse=st.sampled_from(["", "c"]),
        id_split=st.sampled_from(["", "train", "dev_unseen", "other"]),
    ),
    max_size=8,
    unique_by=lambda k: k["source_row"],
)


@settings(deadline=None)
@given(told=SAID)
def test_every_record_of_a_product_ends_in_one_place(told: list[dict]) -> None:
    found, _ = resolve.settled([dict(k) for k in told], {}, 0.5)
    changed = {v.product_id: (v.family_id, v.id_split) for v in found.verdicts}
    for product_id in {k["product_id"] for k in told}:
        mine = sorted((k for k in told if k["product_id"] == product_id), key=lambda k: k["source_row"])
        given_values = {f: [k[f] for k in mine if k[f]] for f in SETTLED}
        ends = {changed.get(product_id) or family_and_split(product_id, k, 0.5) for k in mine}
        ((family, split),) = ends
        assert family == next(iter([*given_values["family_id"], *given_values["coarse"], product_id]))
        if "dev_unseen" in given_values["id_split"]:
            assert split == "dev_unseen"
        elif "other" in given_values["id_split"]:
            assert split == "other"


def seen(item_id: str, row: int, content: str, phash: int | None) -> list[dict]:
    told = {"item_id": item_id, "unit": 0, "row": row, "source_row": row, "content_hash": content, "phash": phash, "file": "a"}
    return [{**told, "band": band} for band in range(keys.BANDS + 1 if phash is not None else 1)]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz"), st.sets(st.integers(0, 63), max_size=4)), max_size=10),
    distance=st.integers(0, 3),
)
def test_pictures_seen_before_are_the_ones_that_comparing_all_finds(rows: list[tuple], distance: int) -> None:
    pictures = [
        (item, row, f"{ord(c):064x}", int(np.array(sum(1 << b for b in bits), np.uint64).view(np.int64)))
        for row, (item, c, bits) in enumerate(rows)
    ]
    found = resolve.alike([k for p in pictures for k in seen(p[0], p[1], p[2], p[3])], [], distance)
    exact = {v.row: v.duplicate_of for v in found.verdicts if v.duplicate_of}
    near: dict[int, tuple[int, str]] = {}
    for v in found.verdicts:
        if v.near_duplicate_of:
            near[v.row] = min(near.get(v.row, (v.rank, v.near_duplicate_of)), (v.rank, v.near_duplicate_of))
    firsts: dict[str, str] = {}
    for item, row, content, _ in pictures:
        first = firsts.setdefault(content, item)
        assert exact.get(row) == (first if first != item else None)
    close = {(i, j) for (i, a), (j, b) in combinations(enumerate(pictures), 2) if ((a[3] ^ b[3]) & (2**64 - 1)).bit_count() <= distance}
    for j, (item, row, content, _) in enumerate(pictures):
        earlier = [i for i in range(j) if (i, j) in close]
        other = [i for i in earlier if pictures[i][0] != item and pictures[i][2] != content]
        if not earlier:
            assert row not in near
        elif row in near:
            assert near[row][1] in {pictures[i][0] for i in earlier}
        else:  # the earliest of a band is all that is compared
            assert not other or any(pictures[i][0] == item or pictures[i][2] == content for i in earlier)


def test_many_pictures_that_share_a_band_are_compared_in_bounded_work() -> None:
    rng = np.random.default_rng(0)
    hashes = (rng.integers(0, 2**47, 2 * resolve.COMPARED) << 16).tolist()
    pictures = [k for row, phash in enumerate(hashes) for k in seen(f"i{row}", row, f"{row:064x}", phash) if k["band"] == 1]
    assert resolve.alike(pictures, [], 3).verdicts == []


def test_what_the_table_holds_was_there_first() -> None:
    old = {"item_id": "old", "content_hash": "0" * 64, "phash": 5, "unit": -1, "source_row": 9, "address": 9}
    same = seen("a", 0, "0" * 64, 5)
    alike = seen("b", 1, "1" * 64, 5)
    found = resolve.alike([*same, *alike], [old], 3).verdicts
    assert {(v.row, v.duplicate_of) for v in found if v.duplicate_of} == {(0, "old")}
    assert {(v.row, v.near_duplicate_of, v.rank) for v in found if v.near_duplicate_of} == {(1, "old", -1)}


def as_keys(rows: list[dict], schema: pa.Schema) -> pa.Table:
    columns = [*schema, pa.field("unit", pa.int64()), pa.field("file", pa.string())]
    return pa.Table.from_pylist(rows, schema=pa.schema(columns))


@settings(deadline=None)
@given(ids=KEYS, old=st.dictionaries(st.sampled_from("abc"), st.tuples(st.none() | st.integers(0, 3), st.sampled_from("xy"))))
def test_what_is_left_out_as_uncontested_has_no_verdict(ids: list[dict], old: dict) -> None:
    held = {item_id: there(item_id, version, digest) for item_id, (version, digest) in old.items()}
    disputed, alone = contested.ids(as_keys(ids, keys.IDS), held.keys())
    few, everything = resolve.winners(disputed.to_pylist(), held), resolve.winners(ids, held)
    assert few.verdicts == everything.verdicts
    assert {**few.counts, "inserted": few.counts["inserted"] + alone} == everything.counts


LOOKS = st.integers(-(2**63), 2**63 - 1) | st.sets(st.integers(0, 63), max_size=5).map(
    lambda bits: int(np.array(sum(1 << b for b in bits), np.uint64).view(np.int64))
)


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz"), st.none() | LOOKS), max_size=14),
    old=st.lists(st.tuples(st.sampled_from("uvw"), LOOKS), max_size=2),
    distance=st.integers(0, 3),
    widest=st.sampled_from([2, contested.WIDEST]),
)
def test_pictures_left_out_as_uncontested_have_no_verdict(rows: list, old: list, distance: int, widest: int) -> None:
    pictures = [k for row, (item, c, phash) in enumerate(rows) for k in seen(item, row, f"{ord(c):064x}", phash)]
    before = [
        {"item_id": f"old{n}", "content_hash": f"{ord(c):064x}", "phash": phash, "unit": -1, "source_row": n, "address": n}
        for n, (c, phash) in enumerate(old)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contested, "WIDEST", widest)
        contents, hashes = {b["content_hash"] for b in before}, {b["phash"] for b in before}
        disputed = contested.pictures(as_keys(pictures, keys.PICTURES), contents, hashes, distance).to_pylist()
    few, everything = (set(resolve.alike(found, before, distance).verdicts) for found in (disputed, pictures))
    assert few == everything
