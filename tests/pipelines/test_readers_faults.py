"""Readers where the way is broken (that ends the job), and where the data is (that costs records): never one for the other."""

import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from idem import storage, streams
from pipelines.reading import readers, typed
from pipelines.reading.sources import plan_source
from pipelines.records import Columns
from tests.pipelines.conftest import S3Server
from tests.pipelines.formats import (
    N,
    expected,
    make_rows,
    read_and_fetch,
    read_plan,
    read_source,
    seen,
    upload,
    write_rows,
)

COLUMNS = Columns()


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "tar", "arrow", "lance"])
def test_a_network_that_fails(tmp_path: Path, s3_server: S3Server, flaky: Callable, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    rows = make_rows(200)
    path = Path(write_rows(tmp_path, kind, rows))
    upload(tmp_path, s3_server.uri)
    monkeypatch.setenv(storage.TIMEOUT, "1")
    _, dice = flaky(s3_server.endpoint, 0.05, stall=1, seed=3)
    # Pictures by the row make many requests, the other formats few: read until there was something to survive.
    for _ in range(12):
        assert seen(read_and_fetch(storage.join(s3_server.uri, path.name), unit_rows=40)) == expected(rows)
        if dice.happened["stall"] and sum(dice.happened[h] for h in ("error", "reset", "cut")) >= 2:
            return
    pytest.fail(f"nothing failed: {dice.happened}")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tar", "arrow", "lance"])
def test_a_server_that_is_gone(tmp_path: Path, s3_server: S3Server, flaky: Callable, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = Path(write_rows(tmp_path, kind, make_rows(10)))
    upload(tmp_path, s3_server.uri)
    uri = storage.join(s3_server.uri, path.name)
    plan = plan_source(uri, COLUMNS)
    monkeypatch.setenv(storage.ATTEMPTS, "2")
    monkeypatch.setenv(storage.TIMEOUT, "1")
    flaky(s3_server.endpoint, 1.0, stall=0)
    with pytest.raises(storage.Unreachable, match=f"{uri}.* cannot be reached"):
        plan_source(uri, COLUMNS)
    with pytest.raises(storage.Unreachable, match=f"{uri}.* cannot be reached"):
        read_plan(plan)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "csv", "tar", "tar.gz", "arrow", "arrow_file"])
def test_a_server_that_goes_away_is_no_damage(
    tmp_path: Path, s3_server: S3Server, flaky: Callable, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rows = [row | {"filler": random.Random(row["image_id"]).randbytes(1500).hex()} for row in make_rows(400)]
    path = Path(write_rows(tmp_path, kind, rows))
    uri = storage.join(s3_server.uri, path.name)
    storage.write_bytes(uri, path.read_bytes())
    monkeypatch.setattr(streams, "REMOTE_BYTES", 8192)
    monkeypatch.setattr(typed, "BUFFER", 8192)
    monkeypatch.setenv(storage.ATTEMPTS, "2")
    _, dice = flaky(s3_server.endpoint, 0.0, stall=0)
    plan = plan_source(uri, COLUMNS)
    tables = readers.read_unit(plan.units[0], plan.reading)
    assert next(tables)["fault"].unique().to_pylist() == [""]
    dice.fail_fraction = 1.0
    with pytest.raises(storage.Unreachable, match=f"{uri} cannot be reached"):
        list(tables)


def test_damaged_pages_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = {"image_id": range(900), "product_id": ["p"] * 900, "image": [os.urandom(500) for _ in range(900)]}
    pq.write_table(
        pa.table(rows), path, use_dictionary=False, row_group_size=300, data_page_size=20_000, write_batch_size=16, write_page_checksum=True
    )
    place = pq.ParquetFile(path).metadata.row_group(1).column(2)
    data = bytearray(path.read_bytes())
    middle = place.data_page_offset + place.total_compressed_size // 2
    data[middle : middle + 5000] = b"\xff" * 5000
    path.write_bytes(data)
    found = read_source(path)
    assert [r["source_row"] for r in found] == list(range(900))
    bad = [k for k, r in enumerate(found) if r["fault"]]
    assert bad == list(range(bad[0], 600))
    assert 300 < bad[0] < 500
    assert {r["fault"] for r in found} == {"", "source_damaged"}
    assert [r["image"] for r in found if not r["fault"]] == [rows["image"][k] for k in range(900) if k not in bad]


@pytest.mark.parametrize("kind", ["jsonl.gz", "tsv.gz", "tar", "tar.gz", "arrow"])
@pytest.mark.parametrize("harm", ["cut", "overwritten"])
def test_damaged_streams(tmp_path: Path, kind: str, harm: str) -> None:
    rows = make_rows()
    path = Path(write_rows(tmp_path, kind, rows))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 if kind != "tar" or harm == "cut" else len(data) // 2 // 512 * 512
    if harm == "cut":
        del data[middle:]
    else:
        size = 10_000 if kind == "tar" else len(data) - 100 - middle
        data[middle : middle + size] = b"\xff" * size
    path.write_bytes(data)
    found = read_source(path)
    assert found[-1]["fault"] == "source_damaged"
    whole = [r for r in found[:-1] if not r["fault"]]
    assert len(whole) >= 50
    assert [r["source_row"] for r in found] == list(range(len(found)))
    assert [r["item_id"] for r in whole] == [rows[r["source_row"]]["image_id"] for r in whole]
    assert path.name in found[-1]["fault_message"]


@pytest.mark.parametrize("kind", ["tar", "arrow"])
def test_streams_that_are_cut_where_it_does_not_show(tmp_path: Path, kind: str) -> None:
    rows = make_rows(10)
    path = Path(write_rows(tmp_path, kind, rows))
    data = path.read_bytes()
    if kind == "tar":  # of the last sample before the cut nobody knows whether it is whole
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            path.write_bytes(data[: archive.getmembers()[-2].offset])
    else:
        path.write_bytes(data[:-8])
    assert [r["fault"] for r in read_source(path)] == [""] * (8 if kind == "tar" else 10) + ["source_damaged"]


def test_a_damaged_arrow_file_names_each_row(tmp_path: Path) -> None:
    path = Path(write_rows(tmp_path, "arrow_file", make_rows()))
    plan = plan_source(str(path), COLUMNS)
    assert plan.rows == N
    data = bytearray(path.read_bytes())
    with pa.ipc.open_file(path) as reader:
        start = data.index(reader.get_batch(1).column(1).buffers()[1].to_pybytes()[:200])
    data[start : start + 600] = b"\xff" * 600
    path.write_bytes(data)
    found = read_plan(plan).to_pylist()
    assert [r["source_row"] for r in found] == list(range(N))
    assert [r["fault"] for r in found] == [""] * 150 + ["source_damaged"] * (N - 150)


def test_a_damaged_fragment_of_lance(tmp_path: Path) -> None:
    n = 900
    table = pa.table({"image_id": range(n), "product_id": ["p"] * n, "image": [os.urandom(800) for _ in range(n)]})
    lance.write_dataset(table, str(tmp_path / "a"), max_rows_per_file=300)
    plan = plan_source(str(tmp_path / "a"), COLUMNS)
    fragment = lance.dataset(str(tmp_path / "a")).get_fragments()[1]
    file = tmp_path / "a" / "data" / fragment.data_files()[0].path
    file.write_bytes(file.read_bytes()[:2000])
    found = read_plan(plan).to_pylist()
    assert [r["source_row"] for r in found] == list(range(n))
    assert [r["fault"] for r in found] == [""] * 300 + ["source_damaged"] * 300 + [""] * 300


def test_lance_keeps_to_the_version_that_was_planned(tmp_path: Path) -> None:
    uri = write_rows(tmp_path, "lance", make_rows(20))
    dataset = lance.dataset(uri)
    dataset.delete("image_id in ('i0', 'i7')")
    plan = plan_source(uri, COLUMNS, unit_rows=5)
    lance.dataset(uri).delete("image_id != 'i3'")
    assert [r["item_id"] for r in read_plan(plan).to_pylist()] == [f"i{k}" for k in range(20) if k not in (0, 7)]
    assert [r["source_row"] for r in read_plan(plan).to_pylist()] == list(range(18))


def test_lines_that_have_gone_since_planning(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps({"image_id": 1, "product_id": 1, "title": "t"}) + "\n"
    path.write_text(line * 10)
    plan = plan_source(str(path), COLUMNS, unit_rows=5)
    path.write_text(line * 7)
    with pytest.raises(ValueError, match=r"a.jsonl has changed since it was planned: row 7 is gone"):
        read_plan(plan)


def test_a_gz_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"not packed")
    with pytest.raises(ValueError, match=r"a.jsonl.gz cannot be read as jsonl: Not a gzipped file"):
        plan_source(str(tmp_path / "a.jsonl.gz"), COLUMNS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"no json\n"))
    with pytest.raises(ValueError, match=r"a.jsonl.gz cannot be read as jsonl: none of its first 1 lines holds an object"):
        plan_source(str(tmp_path / "a.jsonl.gz"), COLUMNS)
