"""The records that the ingest is measured on are what they should be, and the figures are made right of what was measured."""

import dataclasses
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import ingest as bench
from benchmarks.tools import ingest_records as drawn
from benchmarks.tools import measuring


def run(contender, rows, seconds, **changes):
    known = {"mb": rows / 100, "cpu_s": seconds * 2, "cpu_by": "test", "peak_mb": 800.0}
    return measuring.Run(contender=contender, rows=rows, seconds=seconds, **{**known, **changes})


def runs(**changes):
    """Ours at 900 rows/s, the bare loop at 1,000, Ray alone at 3,000; starting takes ours and Ray 10 s."""
    speeds = {measuring.OURS: (10, 900), bench.BARE: (2, 1000), bench.UNCHECKED: (10, 3000)}
    sizes = {"tiny": 100, "small": 20_000, "large": 200_000}
    made = {(n, size): run(n, rows, start + rows / a_second) for n, (start, a_second) in speeds.items() for size, rows in sizes.items()}
    for key, values in changes.items():
        name, size = key.split("_")
        made[name, size] = dataclasses.replace(made[name, size], **values)
    return made


def named(figures, name, peer):
    (found,) = [f for f in figures if f.name == name and f.peer.startswith(peer)]
    return found


def hashed(data):
    """64 bits: which of the low frequencies of a picture's grey values are above their median."""
    grey = np.asarray(Image.open(io.BytesIO(data)).convert("L").resize((32, 32)), float)
    n = np.arange(32)
    cosines = np.cos(np.pi * (2 * n[None] + 1) * np.arange(8)[:, None] / 64)
    low = (cosines @ grey @ cosines.T).ravel()
    return low > np.median(low)


def test_records_depend_on_seed_and_number_alone():
    some = drawn.records(3, 100, 8)
    assert some.equals(drawn.records(3, 100, 8))
    assert some.slice(5).equals(drawn.records(3, 105, 3))
    assert not some.column("image").equals(drawn.records(4, 100, 8).column("image"))
    assert some.column("product_id").to_pylist() == ["product-0000025"] * 4 + ["product-0000026"] * 4
    assert len(set(some.column("image_id").to_pylist())) == 8
    assert all(30 < len(title) < 140 for title in some.column("title").to_pylist())


def test_pictures_have_about_10_kb():
    sizes = [len(drawn.picture(0, n)) for n in range(100)]
    assert np.mean(sizes) == pytest.approx(10_000, rel=0.05)
    assert min(sizes) > 9_000
    assert max(sizes) < 11_000


def test_no_picture_looks_like_another():
    hashes = [hashed(drawn.picture(0, n)) for n in range(300)]
    nearest = min(int((a != b).sum()) for a, b in itertools.combinations(hashes, 2))
    assert nearest > 8, nearest


@pytest.mark.parametrize(("rows", "a_file", "files", "group"), [(200_000, 20_000, 10, 1000), (2_000, 500, 4, 50), (1_250, 500, 3, 50)])
def test_the_larger_source_is_made_of_files_like_the_smaller(rows, a_file, files, group, tmp_path):
    made = drawn.parts(tmp_path, rows, a_file)
    assert [part.first for part in made] == list(range(0, rows, a_file))
    assert sum(part.rows for part in made) == rows
    assert len(made) == files
    assert {part.group for part in made} == {group}


def test_a_file_says_how_many_bytes_its_pictures_have(tmp_path):
    for part in drawn.parts(tmp_path, 25, 20):
        drawn.write_part(part)
    read = [pq.read_table(path) for path in sorted(tmp_path.glob("*.parquet"))]
    image_bytes = sum(len(data) for table in read for data in table.column("image").to_pylist())
    assert drawn.source(tmp_path) == drawn.Source(path=str(tmp_path), rows=25, mb=image_bytes / 1e6)
    assert pq.read_metadata(tmp_path / "part-00000.parquet").num_row_groups == 10
    assert read[0].equals(drawn.records(drawn.SEED, 0, 20))
    assert list(tmp_path.iterdir()) == list(tmp_path.glob("*.parquet"))


def test_rates_are_slopes_so_starting_up_costs_nothing():
    figures = bench.compare(runs())
    assert named(figures, "rows_per_s", bench.BARE).value == pytest.approx(900)
    assert named(figures, "rows_per_s", bench.BARE).peer_value == pytest.approx(1000)
    assert named(figures, "mb_per_s", bench.UNCHECKED).ratio == pytest.approx(0.3)
    with pytest.raises(ValueError, match="too close for a slope"):
        measuring.slope(run("ours", 500, 9.0), run("ours", 2000, 8.9), lambda r: r.rows)


@pytest.mark.parametrize(
    ("name", "peer", "changes", "holds"),
    [
        ("rows_per_s", bench.BARE, {}, True),
        ("rows_per_s", bench.BARE, {"ours_large": {"seconds": 300.0}}, False),
        ("mb_per_s", bench.BARE, {"ours_large": {"seconds": 300.0}}, False),
        ("rows_per_s", bench.UNCHECKED, {"ours_large": {"seconds": 300.0}}, None),
        ("peak_mb", "ours at", {"ours_large": {"peak_mb": 915.0}}, True),
        ("peak_mb", "ours at", {"ours_large": {"peak_mb": 925.0}}, False),
        ("peak_mb", "ours at", {"ours_large": {"peak_mb": 600.0}}, False),
        ("cpu_ms_a_record", "ours at", {"ours_small": {"cpu_s": 40.0}, "ours_large": {"cpu_s": 490.0}}, None),
        ("cpu_ms_a_record_less_start", "ours at", {}, True),
        ("cpu_ms_a_record_less_start", "ours at", {"ours_tiny": {"cpu_s": 20.0}, "ours_large": {"cpu_s": 550.0}}, True),
        ("cpu_ms_a_record_less_start", "ours at", {"ours_tiny": {"cpu_s": 20.0}, "ours_large": {"cpu_s": 560.0}}, False),
        ("cpu_ms_a_record_less_start", "ours at", {"ours_tiny": {"cpu_s": 20.0}, "ours_large": {"cpu_s": 385.0}}, False),
    ],
)
def test_bars(name, peer, changes, holds):
    figures = bench.compare(runs(**changes))
    assert named(figures, name, peer).holds is holds
    assert measuring.verdict(figures) == all(f.holds for f in figures if f.bar)


def test_what_starting_up_costs_is_told_apart():
    started, large = run("ours", 100, 10.0, cpu_s=20.0), run("ours", 20_100, 40.0, cpu_s=80.0)
    assert measuring.cpu_ms(large) == pytest.approx(80_000 / 20_100)
    assert measuring.cpu_ms(large, started) == pytest.approx(3.0)
    whole = named(bench.compare(runs()), "cpu_ms_a_record", "ours at")
    assert whole.ratio < 1 / bench.CPU_BAR  # it falls with size alone, and is no failure
    assert (whole.bar, whole.holds) == ("", None)
    made = runs(
        ours_small={"cpu_s": 70.0},
        ours_large={"cpu_s": 430.0},
        multiprocessing_small={"cpu_s": 40.0},
        multiprocessing_large={"cpu_s": 400.0},
    )
    assert named(bench.compare(made), "cpu_ms_a_further_record", bench.BARE).ratio == pytest.approx(1.0)


def test_what_is_saved_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    path = tmp_path / measuring.save("ingest", {"command": f"x --keep {tmp_path}/out", "holds": True})
    assert json.loads(path.read_text()) == {"command": "x --keep out", "holds": True}
    assert re.fullmatch(r"ingest_\d+cpu_\d{4}-\d\d-\d\d.json", path.name)


def test_a_peer_that_did_nothing_gives_no_ratio():
    assert math.isnan(measuring.Figure(name="x", value=1.0, peer="y", peer_value=0.0).ratio)


def test_the_table_names_every_run_and_figure():
    made = runs(ours_large={"seconds": 300.0})
    told = measuring.table(made.values(), bench.compare(made))
    assert told.count("200,000") == 3
    assert told.count("FAILS") == 2  # both rates
    lines = told.split("\n\n")[0].splitlines()
    assert len(lines) == 1 + 9
    assert len({len(line) for line in lines}) == 1


def test_the_run_file_is_one_that_an_ingest_reads(tmp_path):
    import tomllib

    odd = drawn.Source(path='a "folder" \\ of files', rows=1, mb=0.0)
    read = tomllib.loads(bench.run_file(tmp_path, odd, "tiny").read_text())
    assert read == {"root": str(tmp_path / "made" / "ours"), "ingest": {"source": odd.path}}


WATCHING = """
import json, pathlib, sys
from benchmarks.tools import measuring
measuring.CPU_EVERY_S = measuring.MEMORY_EVERY_S = 0.1
measuring.adopt_orphans()
logs = pathlib.Path(sys.argv[1])
seconds, seen, code = measuring.watch(["starter"], logs)
print(json.dumps([seconds, seen.cpu_s, seen.peak_mb, measuring.used_by_children(), code, measuring.said(logs)]))
"""
STARTER = """
import subprocess, sys
burn = "import time; held = b'x' * 50_000_000\\nwhile time.process_time() < 0.6: pass"
orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {burn!r}])"
subprocess.run([sys.executable, "-c", orphan], check=True)
print('{"ok": true}')
print("no JSON")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="process trees as Linux shows them")
def test_a_contender_is_watched_from_outside_with_the_orphans_that_it_leaves(tmp_path):
    """In a process of its own: whoever watches buries all children, and the tests may have some."""
    (tmp_path / "starter.py").write_text(STARTER)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(measuring.ROOT)])}
    told = subprocess.run([sys.executable, "-c", WATCHING, str(tmp_path / "log")], env=env, capture_output=True, text=True, check=True)
    seconds, sampled, peak_mb, waited, code, said = json.loads(told.stdout)
    assert (code, said) == (0, {"ok": True})
    assert seconds < 5
    assert 0.6 <= waited < 3, "the orphan's time is counted, once"
    assert sampled <= waited + 0.05
    assert peak_mb < 300
