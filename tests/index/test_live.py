"""Changes after a release, and swaps of releases, as a replica sees them."""

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idem import manifest, schema, storage
from index import registry, release
from index.changes import Change, Writer
from index.live import Live, net
from index.searcher import Searcher

PROJECT = Path(__file__).parents[2]
DIM = 16
OPERATIONS = 20_000


class ByTitle:
    """An encoder whose vectors are told by the title alone; `broken` titles cannot be encoded."""

    def encode(self, images, texts):
        if any(text == "broken" for text in texts):
            raise ValueError("a picture that does not decode")
        return np.stack([vector_of(text) for text in texts]) if texts else np.zeros((0, DIM), np.float32)


def vector_of(title: str) -> np.ndarray:
    vector = np.random.default_rng(zlib.crc32(title.encode())).standard_normal(DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def item(item_id: str, title: str, category: str = "c") -> dict:
    known = {"product_id": item_id, "family_id": item_id, "category": category, "title": title, "lang": "en", "image": None, "mime": ""}
    rest = {"role": "photo", "style": "", "id_split": "train", "split": "", "content_hash": title, "source_file": "log", "source_row": 0}
    return {"item_id": item_id, **known, "width": 0, "height": 0, **rest}


def items(*rows: dict) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=schema.ITEMS)


def point(root: str, name: str) -> None:
    registry.roll_back(storage.Layout(root).releases, argparse.Namespace(name=name))


@pytest.fixture
def live(indexed):
    release.run(release.ReleaseConfig(root=indexed))
    return Live(indexed, lambda _: ByTitle())


@pytest.fixture
def writer(live):
    with Writer(live.changes) as made:
        yield made


def best(live, title: str, k: int = 1, **where) -> list[str]:
    return [hit.item_id for hit in live.search(vector_of(title)[None], k, **where)[0]]


def test_what_is_put_is_found_and_what_is_replaced_or_deleted_is_not(live, writer):
    assert best(live, "red boat") != ["new"]
    writer.put(items(item("new", "red boat"), item("other", "blue boat", "boats")))
    live.refresh()
    assert best(live, "red boat") == ["new"]
    assert best(live, "red boat", where={"category": "boats"}) == ["other"]
    writer.put(items(item("new", "green boat")))
    live.refresh()
    assert best(live, "green boat") == ["new"]
    assert live.search(vector_of("red boat")[None], 1)[0][0].score < 0.99
    writer.delete(["new", "p003-0", "never there"])
    live.refresh()
    every = best(live, "green boat", k=1000)
    assert len(every) == 40  # 40 products in the release, one deleted, and `other`
    assert not {"new", "p003-0"} & set(every)
    assert "other" in every


def test_an_item_of_the_release_that_is_put_again_is_found_once_as_it_is_now(live, writer):
    writer.put(items(item("p003-0", "a new title")))
    live.refresh()
    (hit,) = live.search(vector_of("a new title")[None], 1)[0]
    assert (hit.item_id, hit.title) == ("p003-0", "a new title")
    assert len(best(live, "a new title", k=1000)) == 40
    assert live.state.images(["p003-0", "p004-0"])[0] is None
    assert live.state.images(["p004-0"])[0] == live.state.items.images(["p004-0"])[0]


def test_a_put_that_cannot_be_encoded_is_told_and_the_item_stays_as_it_was(live, writer):
    writer.put(items(item("p003-0", "broken"), item("a", "good one"), item("b", "broken"), item("c", "good two")))
    state = live.refresh()
    assert set(live.refused) == {"p003-0", "b"}
    assert best(live, "good one") == ["a"]
    assert best(live, "good two") == ["c"]
    assert "p003-0" in best(live, "good one", k=1000)
    assert state.seen == 4


def test_a_request_is_answered_from_the_state_that_it_has_taken(live, writer):
    before = live.state
    writer.put(items(item("new", "red boat")))
    live.refresh()
    assert before.search(vector_of("red boat")[None], 1)[0][0].item_id != "new"


def test_another_replica_and_a_restart_see_the_same(live, writer, indexed):
    writer.put(items(item("new", "red boat")))
    writer.delete(["p000-0"])
    live.refresh()
    again = Live(indexed, lambda _: ByTitle())
    assert best(again, "red boat", k=1000) == best(live, "red boat", k=1000)


def test_neither_a_reload_nor_a_roll_back_brings_a_deleted_item_back(live, writer, indexed, embedder_again):
    first = live.state.release.name
    writer.delete(["p000-0"])
    embedder_again(1)
    from index import run

    run.run(run.IndexConfig(root=indexed, fields="image"))
    second = release.run(release.ReleaseConfig(root=indexed))["release"]
    assert live.refresh().release.name == second != first
    assert "p000-0" not in best(live, "x", k=1000)
    point(indexed, first)
    assert live.refresh().release.name == first
    assert "p000-0" not in best(live, "x", k=1000)


def test_a_release_that_cannot_be_opened_leaves_the_one_that_is_served(live, indexed, caplog):
    first = live.state.release.name
    release.run(release.ReleaseConfig(root=indexed, name="again"))
    (Path(live.layout.releases) / "again" / manifest.NAME).write_text("{")
    assert live.refresh().release.name == first
    assert f"{first} is kept" in caplog.text
    assert len(best(live, "x", k=1000)) == 40


def test_a_change_is_visible_within_a_second(live, writer):
    with live.following():
        for i in range(3):
            writer.put(items(item("new", f"boat {i}")))
            start = time.monotonic()
            while live.search(vector_of(f"boat {i}")[None], 1)[0][0].score < 0.99:
                assert time.monotonic() - start < 1
                time.sleep(0.01)


@pytest.mark.parametrize("swaps", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_swaps_under_queries(live, indexed, embedder_again, swaps):
    """Every answer is from exactly one release: those of one release hold all of its scores and none of the other's."""
    from index import run

    layout, first = storage.Layout(indexed), live.state.release.name
    embedder_again(1)
    run.run(run.IndexConfig(root=indexed, fields="image"))
    second = release.run(release.ReleaseConfig(root=indexed))["release"]
    query = vector_of("x")[None]
    expected = {name: Searcher.open(storage.join(layout.releases, name)).search(query, 10) for name in (first, second)}
    assert expected[first] != expected[second]
    asked, wrong, stop = [0, 0], [], threading.Event()

    def ask(number: int) -> None:
        while not stop.is_set():
            try:
                state = live.state
                if state.search(query, 10) != expected[state.release.name] or live.search(query, 10) not in expected.values():
                    wrong.append("an answer of neither release")
            except Exception as error:
                wrong.append(repr(error))
            asked[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    seen = set()
    for swap in range(swaps):
        point(indexed, (first, second)[swap % 2])
        seen.add((swap % 2, live.refresh().release.name))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert seen == {(0, first), (1, second)}
    assert min(asked) > swaps


WRITE = """
import json, random, sys
sys.path.insert(0, {tests!r})
from index.changes import Writer
from test_live import item, items
folder, start, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Writer(folder) as writer:
    print(json.dumps(["last", writer.last]), flush=True)
    number = start
    while number < end:
        draw = random.Random(number)
        size = min(draw.randint(1, 40), end - number)
        ids = [f"n{{draw.randrange(1500)}}" for _ in range(size)] + (["p%03d-0" % draw.randrange(40)] if draw.random() < 0.02 else [])
        ids = list(dict.fromkeys(ids))[:size]
        if draw.random() < 0.35:
            writer.delete(ids)
            print(json.dumps(["delete", ids, number]), flush=True)
        else:
            writer.put(items(*[item(each, f"{{each}} at {{number}}") for each in ids]))
            print(json.dumps(["put", ids, number]), flush=True)
        number += len(ids)
"""


def acknowledged(folder: str, start: int, end: int, kill_at: int | None):
    """What a writer process has acknowledged, as it says so; it is killed at `kill_at`."""
    code = WRITE.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, folder, str(start), str(end)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if not line.endswith("\n"):
                break
            said = json.loads(line)
            yield said
            if kill_at is not None and said[0] != "last" and said[2] >= kill_at:
                process.send_signal(signal.SIGKILL)
        assert process.wait() == (0 if kill_at is None else -signal.SIGKILL)


def test_twenty_thousand_changes_with_a_kill_in_the_middle(live):
    """Interleaved with queries. What was acknowledged is there at the end; of what was not, at most the change that was being written."""
    truth: dict[str, str | None] = {f"p{p:03d}-0": "" for p in range(40)}
    stop, wrong, asked = threading.Event(), [], [0]

    def ask() -> None:
        while not stop.is_set():
            try:
                found = best(live, "n7 at 7", k=5)
                if len(set(found)) != len(found) or len(found) != 5:
                    wrong.append(found)
            except Exception as error:
                wrong.append(repr(error))
            asked[0] += 1
            time.sleep(0.002)

    def hold(said) -> None:
        operation, ids, number = said
        for each in ids:
            truth[each] = f"{each} at {number}" if operation == "put" else None

    with live.following(0.1):
        thread = threading.Thread(target=ask)
        thread.start()
        count, last = 0, 0
        for said in acknowledged(live.changes, 0, OPERATIONS, OPERATIONS // 2):
            if said[0] != "last":
                hold(said)
                count, last = count + len(said[1]), said[2] + len(said[1])
        with Writer(live.changes) as writer:
            unsaid = writer.last - count  # written, but killed before it could say so
        assert 0 <= unsaid <= 41  # one change
        for said in acknowledged(live.changes, last, OPERATIONS, None):
            if said[0] != "last":
                hold(said)
        live.refresh()
        stop.set()
        thread.join()
    assert not wrong
    assert asked[0] > 100
    expected = {each: title for each, title in truth.items() if title is not None}
    hits = live.search(vector_of("x")[None], 10_000)[0]
    assert {hit.item_id for hit in hits} == set(expected)
    assert len(hits) == len(expected)
    put = {each: title for each, title in expected.items() if title}
    assert {hit.item_id: hit.title for hit in hits if hit.item_id in put} == put
    for each in list(put)[-20:]:
        assert best(live, put[each])[0] == each


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.sampled_from("abcde"), min_size=1, max_size=3, unique=True)), max_size=12))
def test_the_net_of_changes_agrees_with_a_dict(operations):
    changes, plain, first = [], {}, 1
    for number, (put, ids) in enumerate(operations):
        rows = items(*[item(each, str(number)) for each in ids]) if put else pa.table({"item_id": ids})
        changes.append(Change(first=first, operation="put" if put else "delete", rows=rows))
        first += len(ids)
        for each in ids:
            plain.pop(each, None)
            plain[each] = str(number) if put else None
    table, deleted = net(changes)
    kept = dict(zip(table["item_id"].to_pylist(), table["title"].to_pylist(), strict=True)) if table is not None else {}
    assert kept == {each: title for each, title in plain.items() if title is not None}
    assert sorted(deleted) == sorted(each for each, title in plain.items() if title is None)
