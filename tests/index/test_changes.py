"""The change log: what was acknowledged is there, whatever happens to the one that writes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idem import schema
from index import changes
from index.changes import HEADER, Tail, Writer, forget

ROOT = Path(__file__).resolve().parents[2]
TEXT = {
    "product_id": "p",
    "family_id": "f",
    "category": "c",
    "lang": "en",
    "mime": "",
    "role": "",
    "style": "",
    "id_split": "",
    "split": "",
}
REST = {"width": 0, "height": 0, "content_hash": "", "source_file": "", "source_row": 0}


def items(*named: tuple[str, str]) -> pa.Table:
    """Whole items of an id and a title each."""
    rows = [{**TEXT, **REST, "item_id": i, "title": title, "image": title.encode() * 20} for i, title in named]
    return pa.Table.from_pylist(rows, schema=schema.ITEMS)


def replayed(found: list[changes.Change]) -> dict[str, str]:
    """What a catalogue that was empty holds after the changes."""
    state: dict[str, str] = {}
    for change in found:
        for row in change.rows.to_pylist():
            state.pop(row["item_id"], None)
            if change.operation == "put":
                state[row["item_id"]] = row["title"]
    return state


def numbers(found: list[changes.Change]) -> list[int]:
    return [n for change in found for n in range(change.first, change.last + 1)]


NAMES = st.sampled_from("abcde")
STEPS = st.lists(
    st.one_of(st.lists(st.tuples(NAMES, st.text(max_size=5)), max_size=4), st.lists(NAMES, max_size=3).map(tuple)), max_size=12
)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, segment=st.integers(1, 20_000), after=st.integers(0, 20))
def test_the_log_says_what_a_dictionary_would(steps, segment, after, tmp_path_factory):
    folder, state, seen = tmp_path_factory.mktemp("log"), {}, []
    growing = Tail(folder)
    for step in steps:
        with Writer(folder, segment=segment) as writer:  # each time another one
            before = writer.last
            if isinstance(step, tuple):
                assert writer.delete(step) == before + len(step)
                for name in step:
                    state.pop(name, None)
            else:
                assert writer.put(items(*step)) == before + len(step)
                for name, title in step:
                    state.pop(name, None)
                    state[name] = title
        seen += growing.news()
    whole = Tail(folder).news()
    assert replayed(whole) == state == replayed(seen)
    assert numbers(whole) == numbers(seen) == list(range(1, len(numbers(whole)) + 1))
    assert numbers(Tail(folder, after).news()) == [n for n in numbers(whole) if n > after]
    assert growing.news() == []


def test_items_come_back_as_they_were(tmp_path):
    table = items(("a", "red mug"), ("b", "")).append_column("attributes", pa.array([{"price": 3.5}, None]))
    with Writer(tmp_path) as writer:
        writer.put(table)
    (change,) = Tail(tmp_path).news()
    assert change.rows.equals(table)


def test_an_end_that_was_never_acknowledged_is_put_aside_wherever_it_stops(tmp_path):
    with Writer(tmp_path) as writer:
        writer.put(items(("a", "x")))
        whole = Path(writer.file.name).stat().st_size
        writer.delete(["a"])
        path = Path(writer.file.name)
    data = path.read_bytes()
    for stop in [*range(whole, whole + HEADER + 8), *range(whole + HEADER + 8, len(data), 37)]:
        path.write_bytes(data[:stop])
        assert numbers(Tail(tmp_path).news()) == [1]
        with Writer(tmp_path) as writer:
            assert writer.last == 1
            assert writer.put(items(("b", "y"))) == 2
        assert replayed(Tail(tmp_path).news()) == {"a": "x", "b": "y"}
        torn = [file.read_bytes() for file in tmp_path.glob("*.torn")]
        assert torn == ([data[whole:stop]] if stop > whole else [])
        for file in tmp_path.glob("*.torn"):
            file.unlink()


@pytest.mark.parametrize("segment", [1, 1 << 20])
def test_a_flipped_byte_is_named_and_never_skipped(segment, tmp_path):
    with Writer(tmp_path, segment=segment) as writer:
        for n in range(3):
            writer.put(items((f"i{n}", "x" * 50)))
    path = changes.segments(tmp_path)[0][1]
    data = path.read_bytes()
    for place in range(0, len(data) // 3, 61):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"changes-0+1\.log is damaged at byte 0"):
            Tail(tmp_path).news()
    if segment > 1:
        with pytest.raises(ValueError, match="is damaged at byte 0"):
            Writer(tmp_path)
    path.write_bytes(data)
    Writer(tmp_path).close()


def test_a_log_has_one_writer(tmp_path):
    with Writer(tmp_path), pytest.raises(ValueError, match="another process writes the change log"):
        Writer(tmp_path)
    Writer(tmp_path).close()


def test_what_is_not_whole_is_refused_and_nothing_is_nothing(tmp_path):
    with Writer(tmp_path) as writer:
        with pytest.raises(ValueError, match="these lack product_id, family_id"):
            writer.put(pa.table({"item_id": ["a"]}))
        assert writer.put(items()) == writer.delete([]) == 0
    assert Tail(tmp_path).news() == []


def test_a_full_disk_loses_nothing_and_the_log_goes_on(tmp_path, monkeypatch):
    with Writer(tmp_path) as writer:
        writer.put(items(("a", "x")))
        with monkeypatch.context() as patch:
            real, calls = os.fsync, []

            def full(descriptor: int) -> None:
                calls.append(descriptor)
                if len(calls) == 1:
                    raise OSError(errno.ENOSPC, "No space left on device")
                real(descriptor)

            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                writer.put(items(("b", "y")))
        assert numbers(Tail(tmp_path).news()) == [1]
        assert writer.put(items(("c", "z"))) == 2
    assert replayed(Tail(tmp_path).news()) == {"a": "x", "c": "z"}


def test_files_that_every_release_holds_are_forgotten_and_asking_for_them_is_refused(tmp_path):
    with Writer(tmp_path, segment=1) as writer:
        for n in range(4):
            writer.put(items((f"i{n}", "x"), (f"j{n}", "y")))
        assert forget(writer.folder, 3) == [f"changes-{1:020d}.log"]  # 3 and 4 are in one file
        assert forget(writer.folder, 100) == [f"changes-{3:020d}.log", f"changes-{5:020d}.log"]  # never the one that is written
    assert numbers(Tail(tmp_path, 6).news()) == [7, 8]
    with pytest.raises(ValueError, match="begins at 7; changes from 6 on were asked for"):
        Tail(tmp_path, 5).news()


def test_a_file_that_is_missing_between_others_is_told(tmp_path):
    with Writer(tmp_path, segment=1) as writer:
        for n in range(3):
            writer.put(items((f"i{n}", "x")))
    changes.segments(tmp_path)[1][1].unlink()
    with pytest.raises(ValueError, match="the change log lacks 2 to 2"):
        Tail(tmp_path).news()


WRITES = """
import sys
from tests.index.test_changes import Writer, items
writer = Writer(sys.argv[1], segment=50_000)
while True:
    n = writer.last + 1
    acknowledged = writer.put(items((f"i{n}", "x" * (n % 700)))) if n % 5 else writer.delete([f"i{n - 1}"])
    print(acknowledged, flush=True)
"""


@pytest.mark.parametrize("after", [1, 40, 150])
def test_what_was_acknowledged_outlives_a_kill(after, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    said = [int(process.stdout.readline()) for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    said += [int(line) for line in process.stdout.read().splitlines() if line]
    process.wait()
    found = Tail(tmp_path).news()
    assert numbers(found)[: len(said)] == said == list(range(1, len(said) + 1))
    assert len(numbers(found)) <= len(said) + 1  # the one that was on the disk and not yet said
    with Writer(tmp_path) as writer:
        assert writer.delete(["i1"]) == len(numbers(found)) + 1
